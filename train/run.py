"""A run's folder, its other processes, and its end by a signal."""

import contextlib
import json
import os
import signal
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from ggem_jax.files.atomic import write_text
from ggem_jax.weights.folders import checkpoint_steps
from train.cli import Refused, from_dict, to_dict
from train.config import C, Config

# Settings that may change when a run resumes: the weights do not depend on them (on `fsdp` in the
# last bits only, as on the number of devices).
FREE = (
    "out", "stop_after", "keep", "patience", "log_every", "checkpoint_every", "eval_every", "fsdp",
    "data.data_dir", "data.download", "data.workers", "data.processes", "data.eval_split",
    "data.corrupt", "data_found.eval",
)  # fmt: skip
# Where data lie and how they are read: it may change when a run resumes, as digests tell what is
# read.
MOVABLE = {
    "data.source", "data.separator", "data.quoting", "data.image_key", "data.caption_key",
    "data.label_key", "data.label_separator",
    "text.tokenizer", "text.names",
}  # fmt: skip
DIGEST = "data_found.digest."


def join_processes() -> None:
    """Joins the other processes of the run where `JAX_COORDINATOR_ADDRESS` is set.

    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say which process this is, where no cluster that JAX
    knows (Slurm, Open MPI, Kubernetes, Cloud TPU) does.

    Raises:
        Refused: The others cannot be joined.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not jax.distributed.is_initialized():
        try:
            count, own = (
                int(os.environ[name]) if name in os.environ else None
                for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
            )
            jax.distributed.initialize(address, num_processes=count, process_id=own)
        except (ValueError, RuntimeError) as error:
            raise Refused(
                f"this process could not join the others at {address}: {str(error).splitlines()[0]}"
            ) from None


@contextlib.contextmanager
def run_folder(config: Config, facts: dict[str, Any]) -> Iterator[None]:
    """Holds the run's folder for this run while the block runs.

    Other runs are kept out of the folder; other settings and other data, known by their `facts`,
    are kept away from its checkpoints. All processes of a run enter together.

    Args:
        config: The settings of the run, which `config.json` stores.
        facts: A description of the data, as JSON can hold it.

    Yields:
        Nothing.

    Raises:
        Refused: Another process trains there, the folder holds a run with other settings, or the
            processes of the run differ in settings or data.
        OSError: The folder cannot be made or written to.
    """
    with contextlib.ExitStack() as stack:
        refused: Exception | None = None
        if jax.process_index() == 0:
            try:
                config.out.mkdir(parents=True, exist_ok=True)
                stack.callback(_lock(config.out).release)
                _keep_settings(config, facts)
            except (Refused, OSError) as error:
                refused = error
        if jax.process_count() > 1:
            if (
                multihost_utils.broadcast_one_to_all(np.array(refused is not None))
                and refused is None
            ):
                refused = Refused("the first process refused the run")
            own = np.array(zlib.crc32(json.dumps([to_dict(config), facts]).encode()))
            if np.ptp(multihost_utils.process_allgather(own)) and refused is None:
                refused = Refused(
                    "the processes of a run must have the same settings and data, and they differ"
                )
        if refused is not None:
            raise refused
        yield


def _lock(run: Path) -> FileLock:
    """A lock on the folder that the operating system releases however the process ends.

    A soft lock, which a killed process would leave behind, is never used in its place.
    """
    lock = FileLock(run / ".lock", blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise Refused(
            f"another process is training in {run}: wait for it, or choose another --out"
        ) from None
    except NotImplementedError as error:
        raise Refused(f"{run} cannot be locked: {error}") from None
    return lock


def _keep_settings(config: Config, facts: dict[str, Any]) -> None:
    now = {**to_dict(config), "data_found": facts}
    if has_checkpoint(config.out):
        before, facts_before = read_run(config.out, type(config))
        _refuse_changes(config.out, now, {**to_dict(before), "data_found": facts_before})
    write_text(
        config.out / "config.json", json.dumps({"tool": config.tool, **now}, indent=2) + "\n"
    )


def _refuse_changes(run: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Raises `Refused` if the settings or the data of a run are others than they were.

    Files may lie elsewhere than they did as long as they are the same by their digests, which runs
    of earlier versions do not have.
    """
    here, there = _flat(now), _flat(then)
    free = {*FREE, "data_found.weights"}
    if any(name.startswith(DIGEST) for name in there):
        free |= MOVABLE
    else:
        free |= {name for name in here if name.startswith(DIGEST)}
    if here.get("data_found.weights") == there.get("data_found.weights") is not None:
        free.add("init")
    changed = [
        name for name in here | there if name not in free and here.get(name) != there.get(name)
    ]
    settings = [name for name in changed if not name.startswith(DIGEST)]
    if settings:
        listed = "; ".join(
            f"{name} {there.get(name)} there, {here.get(name)} now" for name in settings
        )
        raise Refused(f"{run} holds a run with other settings ({listed}): choose another --out")
    if changed:
        parts = " and ".join(name.removeprefix(DIGEST) for name in changed)
        raise Refused(
            f"{run} holds a run on other training images, by their {parts}: give the run its own"
            " images again, or choose another --out"
        )


def list_changes(
    config: Config, facts: dict[str, Any], before: Config, facts_before: dict[str, Any]
) -> list[str]:
    """Returns in words what differs between two runs of a script, besides their folders.

    Args:
        config: The settings of one run.
        facts: A description of its data.
        before: The settings of the other run.
        facts_before: A description of its data.
    """
    here = _flat({**to_dict(config), "data_found": facts})
    there = _flat({**to_dict(before), "data_found": facts_before})
    names = [name for name in here | there if here.get(name) != there.get(name)]
    parts = [name.removeprefix(DIGEST) for name in names if name.startswith(DIGEST)]
    own = {"out", "resume_from", "stop_after", "init", "data_found.weights"}
    return [
        f"{name} {there.get(name)} there, {here.get(name)} now"
        for name in names
        if name not in own and not name.startswith(DIGEST)
    ] + [f"other training images, by their {' and '.join(parts)}"] * bool(parts)


def has_checkpoint(run: Path) -> bool:
    """Returns whether a folder holds a checkpoint to resume from.

    Args:
        run: Folder of a run; it need not exist.
    """
    return bool(checkpoint_steps(run))


def read_run(run: Path, record: type[C] = Config) -> tuple[C, dict[str, Any]]:  # type: ignore[assignment]
    """Returns the settings of a run, and the facts of its data: classes and numbers of images.

    Args:
        run: Folder of the run.
        record: The dataclass of the settings of the script that made it.

    Raises:
        Refused: The folder is not a run of that script.
    """
    try:
        values = json.loads((run / "config.json").read_text())
        if not isinstance(values, dict):
            raise Refused("it must hold settings by name, not a list or a number")
        tool, facts = values.pop("tool", record.tool), values.pop("data_found")
        # runs of versions without this setting decoded training images whole
        values.setdefault("data", {}).setdefault("shrink", False)
        if tool != record.tool:
            raise Refused(f"it is one of {tool}")
        checked = {
            "classes": list(map(str, facts["classes"])),
            "train": int(facts["train"]),
            "eval": int(facts["eval"]),
        }
        return from_dict(record, values), facts | checked
    except FileNotFoundError:
        raise Refused(f"{run} is not a run of {record.tool}: it has no config.json") from None
    except KeyError as error:
        raise Refused(
            f"{run}/config.json is not that of a run of {record.tool}: it has no {error.args[0]},"
            " which the training writes when it starts: name the folder of a run, or train it again"
        ) from None
    except (ValueError, TypeError, AttributeError, Refused) as error:
        raise Refused(f"{run}/config.json is not that of a run of {record.tool}: {error}") from None


def _flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


class StopRequest:
    """Remembers SIGTERM and Ctrl-C, so that the current step is finished and saved.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before = {}

    def __enter__(self) -> "StopRequest":
        # With several processes the coordination service listens instead, and all stop after the
        # same step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._remember)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_asked(self, step: int) -> bool:
        """Returns whether the run was asked to stop, for all processes after the same step.

        Args:
            step: The step that has just ended.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _remember(self, number: int, _frame) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
