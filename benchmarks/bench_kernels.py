"""Checks and times the kernels on an NVIDIA GPU in one call.

    python -m benchmarks.bench_kernels

The contestants of a group take turns on the same inputs: our function as users call it; XLA from
the formula as papers print it, under autodiff; XLA from our closed-form gradient; PyTorch, eager
and compiled, where it is installed; and a copy of as many bytes, which is the ceiling. Contestants
that cannot run, or that disagree with ours, are left out and named; the exit code is then 1.

A contestant works through buffers that together are at least four times the L2 cache, so that each
call finds its tokens in memory. They form one program. A timing covers at least 100 calls in a row,
from the first to the last. `host_share` is the share of that time after which the host had
submitted everything: where it is small, the device was timed; near 1, perhaps the host. PyTorch's
queue makes the host wait for the device when it is full, so a large share says nothing there.
`modelled_us` is what `benchmarks.model_kernels` had said of the same kernels before.

The last line sums up: checks that failed, and measured times over modelled ones. Several GPUs are
not tried.

Sections run in order of importance. A section that would start after --budget seconds is left out
and named; --sections runs it in another call. Rows go to benchmarks/results/ as soon as they are
measured; `benchmarks.plot_kernels` draws them.

Without a GPU, --dry goes through all of it on the CPU with small shapes, and --check runs the
numerics in Triton's interpreter (TRITON_INTERPRET=1).
"""

import argparse
import contextlib
import gc
import importlib.metadata
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room, too
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.kernel_contestants import (
    B16,
    B16_384,
    B16_FLOAT32,
    DRY,
    L14_518,
    L16,
    S16,
    Call,
    Case,
    Inputs,
    contestants,
    count_buffers,
    find_difference,
    first_result,
    make_copies,
    moved_bytes,
    over_buffers,
    time_call,
)
from benchmarks.kernel_numerics import basic_checks, default_checks, further_checks
from benchmarks.model_kernels import modelled_us
from benchmarks.record import RESULTS, append, machine
from ggem_jax.kernels import launch
from ggem_jax.models.vit import GGeM, ViT, vit_config
from ggem_jax.pooling import superglobal_pool
from train.throughput import peak_flops, training_flops

_CALLS = 100  # at least so many in one timing
_BUDGET = 420  # the last group may take a minute: 8 minutes in all
_STAGES = ("forward", "backward", "both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", help=f"some of {','.join(SECTIONS)}; all of them by default")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds; what would start later is left out and named ({_BUDGET} on a GPU)",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="timings of each contestant, at least 2 (%(default)s)"
    )
    parser.add_argument(
        "--dry", action="store_true", help="on the CPU, with small shapes; no row is kept"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="the numerics alone, in Triton's interpreter; no row is kept",
    )
    options = parser.parse_args()
    sections = (
        list(SECTIONS)
        if options.sections is None
        else [name.strip() for name in options.sections.split(",")]
    )
    if unknown := set(sections) - set(SECTIONS):
        sys.exit(
            f"--sections must be of {', '.join(SECTIONS)}, not"
            f" {', '.join(sorted(unknown)) or 'empty'}"
        )
    budget = (
        options.budget
        if options.budget is not None
        else math.inf
        if options.dry or options.check
        else _BUDGET
    )
    if not budget >= 0:
        sys.exit(f"--budget must be a number of seconds, 0 or more, not {budget}")
    if options.rounds < 2:
        sys.exit(f"--rounds must be at least 2, not {options.rounds}")
    if options.check and (options.dry or options.sections is not None):
        sys.exit("--check runs the numerics alone: not together with --dry or --sections")
    if options.check:
        try:
            launch.check("interpret")
        except NotImplementedError as error:
            sys.exit(f"--check: {error}")
        sections = ["basics", "numerics"]
    if options.dry or options.check:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(
                Path(folder),
                budget,
                2,
                dry=True,
                implementation="interpret" if options.check else "xla",
            )
            sys.exit(bench.run(sections))
    if not launch.runs_here():
        found = (
            f"jax-triton {'works' if launch.available() else 'is missing or finds no CUDA'} and JAX"
            f" runs on {jax.default_backend()}"
        )
        print(
            f"timing kernels needs an NVIDIA GPU, a JAX with CUDA and jax-triton; here {found}:"
            " --dry and --check need none",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(Bench(RESULTS, budget, options.rounds).run(sections))


class Bench:
    """One run of the benchmark, which knows where its rows go and how much time is left.

    Args:
        folder: Folder of the CSV files.
        budget: Seconds after which nothing new starts.
        rounds: Timings of each contestant that are kept.
        dry: Whether everything runs on the CPU with small shapes.
        implementation: Implementation that the numerics check, "triton", "interpret" or "xla".
    """

    def __init__(
        self,
        folder: Path,
        budget: float,
        rounds: int,
        *,
        dry: bool = False,
        implementation: str = "triton",
    ):
        self.folder, self.rounds, self.dry, self.implementation = (
            folder,
            rounds,
            dry,
            implementation,
        )
        self.ends, self.failed = time.monotonic() + budget, False
        self.checks: list[bool] = []  # whether each check has passed
        self.over_model: list[float] = []  # measured times over modelled ones
        self.about = (
            machine()
            | {"driver": _driver()}
            | {name: _version(name) for name in ("triton", "jax_triton", "torch")}
        )

    def run(self, sections: list[str]) -> int:
        """Runs sections in order.

        Args:
            sections: Names of `SECTIONS`.

        Returns:
            1 if a check failed, contestants disagreed or ours did not run, otherwise 0.
        """
        for name in sections:
            self.section = name
            began = time.monotonic()
            SECTIONS[name](self)
            print(f"section {name}: {time.monotonic() - began:.0f} s", flush=True)
        print(self.summary(), flush=True)
        return int(self.failed)

    def summary(self) -> str:
        """Returns how many checks failed, and how good the model of times was."""
        checks = f"{len(self.checks)} checks of numerics, {self.checks.count(False)} failed"
        if not self.over_model:
            return f"{checks}; no time to compare with the model"
        middle, ratios = statistics.median(self.over_model), sorted(self.over_model)
        return (
            f"{checks}; measured over modelled time: median {middle:.2f}, from {ratios[0]:.2f} to"
            f" {ratios[-1]:.2f} in {len(ratios)} comparisons"
        )

    def time_left(self, what: str) -> bool:
        """Returns whether there is time for more; otherwise prints what is left out."""
        if time.monotonic() < self.ends:
            return True
        print(f"no time left for {what}", flush=True)
        return False

    def attempted(self, what: str, function: Callable[[], Any], *, fails: bool = True) -> Any:
        """Returns what `function` returns, or prints the error that it raises and returns None.

        Args:
            what: Description of the attempt, for the message.
            function: The attempt.
            fails: Whether an error makes the whole run fail.
        """
        try:
            return function()
        except Exception as error:
            print(
                f"left out: {what}: {' '.join(f'{type(error).__name__}: {error}'.split())[:400]}",
                flush=True,
            )
            self.failed |= fails
            return None

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Appends a row to a CSV file, with the columns that all rows share."""
        append(table, self.about | row, self.folder)

    # Sections

    def numerics(self, checks: Callable[..., dict[str, Callable]]) -> None:
        """Runs checks of `benchmarks.kernel_numerics` and appends their rows."""
        for name, check in checks(self.implementation, small=self.dry).items():
            if self.time_left(name):
                self.check(name, check)

    def defaults(self) -> None:
        """Checks that calls that ask for no implementation are kernels, on a GPU."""
        if self.time_left("defaults"):
            self.check("defaults", partial(default_checks, kernels=not self.dry))

    def check(self, name: str, check: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Runs a check by name and appends its rows."""
        for row in self.attempted(name, lambda: list(check())) or []:
            self.checks.append(row["passed"])
            self.failed |= not row["passed"]
            self.add("kernel_numerics", row)

    def poolings(self, operation: str, cases: list[Case], compiled_torch: bool) -> None:
        """Times the contestants of an operation on each case: forward, backward and both."""
        for case in [DRY] if self.dry else cases:
            inputs = None
            for stage in _STAGES:
                about = {
                    "operation": operation,
                    "name": case.name,
                    "shape": (case.batch, case.tokens, case.channels),
                    "dtype": case.dtype,
                    "stage": stage,
                }
                if self.time_left(_named(about)):
                    inputs = inputs or Inputs.drawn(
                        operation, case, count_buffers(case.token_bytes, self.dry)
                    )
                    makers = {
                        name: partial(make, inputs, stage)
                        for name, make in contestants(operation, compiled_torch, self.dry).items()
                    }
                    self.measure(
                        about, makers, moved_bytes(operation, stage, about["shape"], case.dtype)
                    )

    def maps(self) -> None:
        """Times maps of several images: 16 buffers of a single image would stay in the cache."""
        for shape in [(2, 6, 7, 8)] if self.dry else [(8, 32, 22, 2048), (64, 14, 14, 768)]:
            about = {
                "operation": "superglobal",
                "name": "map",
                "shape": shape,
                "dtype": "bfloat16",
                "stage": "forward",
            }
            if self.time_left(_named(about)):
                size = 2 * int(np.prod(shape))
                maps = [
                    jax.nn.relu(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16))
                    for i in range(count_buffers(size, self.dry))
                ]
                makers = {
                    name: partial(
                        over_buffers,
                        maps,
                        partial(superglobal_pool, implementation=implementation),
                    )
                    for name, implementation in (("ours", None), ("xla closed form", "xla"))
                }
                self.measure(about, makers, size + 4 * shape[0] * shape[-1])

    def training(self) -> None:
        """Times a step of ViT-B/16 and S/16 with a learned GGeM, AdamW and a thousand classes."""
        for variant in ("B/16", "S/16") if self.time_left("training") else ():
            self.training_of(variant)
            _freed()

    def training_of(self, variant: str) -> None:
        """Times training steps of a ViT with and without the kernels, in turns."""
        small = (
            {"image": 32, "width": 24, "depth": 1, "heads": 3, "mlp_width": 32}
            if self.dry
            else {"dtype": "bfloat16"}
        )
        config = vit_config(variant, **small)
        batch, steps = (4, 1) if self.dry else (256, 5)
        params = self.attempted(f"training of {variant}, parameters", partial(_parameters, config))
        calls = {}
        for name, (fused_norm, kernels) in {
            "fused norm and pooling": (True, True),
            "no kernel": (False, False),
            "pooling alone": (False, True),
        }.items():
            what = f"training of {variant}, {name}"
            make = partial(
                _training, config, params, batch, steps, fused_norm=fused_norm, kernels=kernels
            )
            call = params and self.time_left(what) and self.attempted(what, make)
            if call:
                calls[name] = call
        if not calls:
            return
        times = self.timed(f"training of {variant}", calls, rounds=min(self.rounds, 3))
        of = {name: statistics.median(s for s, _ in seconds) for name, seconds in times.items()}
        flops, peak = training_flops(config, 1000), peak_flops()[0]
        for name, middle in of.items():
            speed = steps * batch / middle
            self.add(
                "kernel_training",
                {
                    "model": f"ViT-{variant} at {config.image} px",
                    "dtype": config.dtype,
                    "batch": batch,
                    "contestant": name,
                    "ms": f"{1e3 * middle / steps:.2f}",
                }
                | {"images_per_s": f"{speed:.0f}", "mfu": f"{speed * flops / peak:.3f}"}
                | {
                    "over_no_kernel": f"{of['no kernel'] / middle:.4f}" if "no kernel" in of else ""
                },
            )

    # One group

    def measure(
        self, about: dict[str, Any], makers: dict[str, Callable[[], "Call"]], moved: int
    ) -> None:
        """Times ours, the other contestants, and a copy of as many bytes.

        Args:
            about: Operation, name, shape, dtype and stage, which are columns of the rows.
            makers: Functions that make the call of each contestant, by name; ours is the first.
            moved: Bytes that the algorithm must read and write for one buffer.
        """
        what = _named(about)
        calls = self.ready(what, makers, 1e-3 if about["dtype"] == "float32" else 0.05)
        copies = calls and self.attempted(
            f"{what}, copies", partial(make_copies, moved, count_buffers(moved // 2, self.dry))
        )
        if copies:
            times = self.timed(what, calls | copies, 2 if self.dry else _CALLS)
            if {"ours", *copies} <= times.keys():
                self.add_times(about, times, moved, calls["ours"].count)
        del calls, copies
        _freed()

    def ready(
        self, what: str, makers: dict[str, Callable[[], "Call"]], tolerance: float
    ) -> dict[str, "Call"]:
        """Returns the contestants that have run once and agree with the first, which is ours.

        Args:
            what: Description of the group, for messages.
            makers: As in `measure`.
            tolerance: Largest difference, relative to the largest entry of an array.
        """
        calls: dict[str, Call] = {}
        expected: list[np.ndarray] = []
        for name, make in makers.items():
            made = self.attempted(f"{what}, {name}", partial(first_result, make), fails=not calls)
            if made is None and not calls:
                print(f"left out: {what}: there is nothing to compare with", flush=True)
                return {}
            if made is None:
                _freed()
                continue
            call, result = made
            expected = expected or result
            if difference := find_difference(result, expected, tolerance):
                print(
                    f"left out: {what}, {name}: it does not agree with ours: {difference}",
                    flush=True,
                )
                self.failed = True
            else:
                calls[name] = call
        return calls

    def timed(
        self, what: str, calls: dict[str, "Call"], least_calls: int = 1, rounds: int | None = None
    ) -> dict[str, list[tuple[float, float]]]:
        """Returns seconds per buffer and the host's share of them, for each round but the first.

        The contestants take turns.

        Args:
            what: Description of the group, for messages.
            calls: Calls by contestant.
            least_calls: Buffers in one timing, at least.
            rounds: Rounds that are kept; None takes those of the run.
        """
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range((rounds or self.rounds) + 1):
            for name in list(times):
                time_and_share = self.attempted(
                    f"{what}, {name}",
                    partial(time_call, calls[name], least_calls),
                    fails=not name.startswith(("xla", "torch")),
                )
                if time_and_share is None:
                    del times[name]
                else:
                    times[name].append(time_and_share)
        return {name: seconds[1:] for name, seconds in times.items()}

    def add_times(
        self,
        about: dict[str, Any],
        times: dict[str, list[tuple[float, float]]],
        moved: int,
        count: int,
    ) -> None:
        """Appends a row for each contestant of a group.

        Args:
            about: As in `measure`.
            times: Seconds per buffer and host's shares by contestant, as `timed` returns them.
            moved: As in `measure`.
            count: Buffers that a contestant works through.
        """
        of = {
            contestant: statistics.median(s for s, _ in seconds)
            for contestant, seconds in times.items()
        }
        ceiling = moved / min(of["copy"], of["negated copy"])
        name, images, dtype = about["name"], about["shape"][0], about["dtype"]
        model = modelled_us(
            self.about["device"], name, images, dtype, about["operation"], about["stage"]
        )
        if model is not None:
            measured = 1e6 * of["ours"]
            self.over_model.append(measured / model)
            print(
                f"{_named(about)}: measured {measured:.1f} us, modelled {model:.1f} us,"
                f" {measured / model:.2f} times the model",
                flush=True,
            )
        for contestant, seconds in times.items():
            low, middle, high = statistics.quantiles([s for s, _ in seconds], n=4)
            self.add(
                "kernels",
                {"section": self.section} | about | {"shape": " x ".join(map(str, about["shape"]))}
                | {"contestant": contestant, "buffers": count, "us": f"{1e6 * middle:.2f}",
                "spread": f"{(high - low) / middle:.3f}"}
                | {"host_share": f"{max(h for _, h in seconds):.2f}", "bytes": moved,
                "gb_per_s": f"{moved / middle / 1e9:.0f}"}
                | {"fraction_of_copy": f"{moved / middle / ceiling:.3f}",
                "over_ours": f"{middle / of['ours']:.3f}",
                "modelled_us": "" if model is None or contestant != "ours" else f"{model:.1f}"},
            )  # fmt: skip


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "defaults": Bench.defaults,
    "basics": partial(Bench.numerics, checks=basic_checks),
    "ggem": partial(Bench.poolings, operation="ggem", cases=[B16, L16], compiled_torch=True),
    "norm": partial(Bench.poolings, operation="norm_ggem", cases=[B16, L16], compiled_torch=True),
    "training": Bench.training,
    "shapes": lambda bench: [
        bench.poolings(operation, [case], compiled_torch=False)
        for case in (S16, L14_518, B16_384)
        for operation in ("ggem", "norm_ggem")
    ],
    "float32": lambda bench: [
        bench.poolings(operation, [B16_FLOAT32], compiled_torch=False)
        for operation in ("ggem", "norm_ggem")
    ],
    "maps": Bench.maps,
    "numerics": partial(Bench.numerics, checks=further_checks),
}


def _named(about: dict[str, Any]) -> str:
    return ", ".join(map(str, about.values()))


def _freed() -> None:
    """Frees the memory of a group, so that JAX and PyTorch can share a device."""
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


def _parameters(config):
    return jax.jit(ViT(config, GGeM(), 1000).init)(
        jax.random.key(0), jnp.ones((1, config.image, config.image, 3))
    )["params"]


def _training(
    config, params, batch: int, steps: int, *, fused_norm: bool, kernels: bool
) -> Callable:
    """Returns a call that takes a number of steps, after a first step, which compiles."""
    model, transform = ViT(config, GGeM(), 1000, fused_norm=fused_norm), optax.adamw(1e-3)
    images = jax.random.normal(
        jax.random.key(1), (batch, config.image, config.image, 3), config.dtype
    )
    labels = jnp.arange(batch) % 1000

    def loss_of(params, images, labels):
        logits = model.apply({"params": params}, images, train=True).logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels):
        loss, slopes = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = transform.update(slopes, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.copy, params)  # each step takes the memory of the last
    carry = [params, transform.init(params)]

    def call():
        with (
            contextlib.nullcontext()
            if kernels
            else mock.patch.object(launch, "available", return_value=False)
        ):  # matters when it is traced
            for _ in range(steps):
                *carry[:], loss = step(*carry, images, labels)
        return loss

    jax.block_until_ready(call())
    return Call(call, 1)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            query, capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
