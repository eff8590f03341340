"""Where the model's error was measured, and how large it was there.

`expected_error.json` lists the runs of the public simulator with which the model was compared, by
system, and the errors of those that no constant was fitted to. A case is inside the envelope of a
system if each of its features lies between the smallest and the largest value of that system's
runs. Outside, no error is stated; the reasons are named, and the nearest run with its error.
"""

import functools
import json
import math
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from typing import Any

import numpy as np

from neupims.machine.case import Case
from neupims.machine.hardware import Hardware
from neupims.machine.model import Decoder
from neupims.machine.quantity import describe
from neupims.machine.systems import SPELLINGS, TimingPath

# Fields of the hardware that change no cycle of a layer: they are no feature.
NO_CYCLES = ("hbm.rows", "pim.row_buffers")
# Fields of the model on which the cycles of a layer do not depend, or only with another field.
LEFT_OUT = ("vocabulary", "tied_embeddings", "lm_head", "value_dim")
CLOSE = 1e-6  # relative difference of values that are the same
# The kind of each feature, by the beginning of its name: the first that matches.
KINDS = (
    ("hbm.clock_hz", "clocks"),
    ("npu.clock_hz", "clocks"),
    ("npu.interconnect_hz", "clocks"),
    ("hbm.t", "DRAM timings"),
    ("hbm.read_latency", "DRAM timings"),
    ("hbm.write_latency", "DRAM timings"),
    ("hbm.num_channels", "channels"),
    ("hbm.", "organisation of the memory"),
    ("pim.", "PIM units"),
    ("npu.scratchpad", "scratchpad"),
    ("npu.", "NPU"),
    ("model.queries_of_a_key", "grouped queries"),
    ("model.mlp_matrices", "gated MLP"),
    ("model.experts", "mixture of experts"),
    ("model.active_experts", "mixture of experts"),
    ("model.shared_experts", "mixture of experts"),
    ("model.expert_", "mixture of experts"),
    ("model.dense_layers", "mixture of experts"),
    ("model.window", "sliding window"),
    ("model.kv_rank", "latent attention"),
    ("model.query_rank", "latent attention"),
    ("model.rope_dim", "latent attention"),
    ("model.weight_bits", "numbers of fewer bits"),
    ("model.kv_bits", "numbers of fewer bits"),
    ("model.activation_bits", "numbers of fewer bits"),
    ("model.", "size of the model"),
    ("batch.", "batch"),
)


@dataclass(frozen=True)
class ExpectedError:
    """The expected error of a case, or why none is stated."""

    percent: dict[str, Any] | None  # percentages by name; None where nothing was measured
    not_validated: tuple[str, ...]  # why, one phrase for each kind of reason; empty with `percent`
    nearest: dict[str, Any] | None  # the nearest validated run of the system; None without any

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of JSON, under the names that all commands use."""
        return {
            "expected_error": self.percent,
            "not_validated": list(self.not_validated),
            "nearest_validated": self.nearest,
        }


def expected_error(case: Case, *, path: TimingPath = "exact") -> ExpectedError:
    """Returns the error of layers, stages and operations where runs like the case were measured.

    Args:
        case: The case; numbers must not be traced.
        path: "exact" or "closed".
    """
    reasons = _find_reasons(case)
    spelling = spelling_of(case)
    if reasons or spelling not in load_table()["runs"]:
        if not reasons:
            reasons = [
                f"{case.system} with {case.sub_batches} sub-batches and"
                f" {int(case.hardware.pim.row_buffers)} row buffers was not run"
            ]
        return ExpectedError(None, tuple(reasons), None)
    table, known = load_table(), features(case)
    outside = tuple(_describe_outside(known, envelope(spelling)))
    percent = table[path][spelling] | {"path": path, "of": table["of"]}
    return ExpectedError(None if outside else percent, outside, _nearest(known, spelling, path))


def _find_reasons(case: Case) -> list[str]:
    """Returns why no run of the public simulator can tell about a case."""
    reasons = []
    if case.system == "gpu":
        reasons.append("a GPU, which the public simulator does not run")
    if case.prefill:
        reasons.append("a prefill, which the public simulator does not run")
    elif case.fidelity == "intended" and case.system != "gpu":
        reasons.append("intended fidelity: nobody has measured the machine of the paper")
    link, devices = case.hardware.link, int(case.parallel.tp) * int(case.parallel.pp)
    is_free = math.isinf(link.bandwidth_bytes_per_second) and link.latency_seconds == 0
    if devices > 1 and not is_free:
        reasons.append("communication between devices, which the public simulator leaves out")
    return reasons


def spelling_of(case: Case) -> str:
    """Returns how the validation files spell the system of a case; empty if they do not.

    Args:
        case: The case; row buffers matter only for "neupims", other systems have those they have.
    """
    buffers = int(case.hardware.pim.row_buffers)
    buffers = buffers if case.system == "neupims" else {"npu-pim": 1}.get(case.system, 2)
    wanted = (case.system, case.sub_batches, buffers)
    return next((name for name, setting in SPELLINGS.items() if setting == wanted), "")


def features(case: Case) -> dict[str, float]:
    """Returns the numbers of a case on which the cycles of a layer may depend, by name.

    Args:
        case: The case.
    """
    model, parallel = case.model, case.parallel
    found = {
        each.name: float(each.value)
        for each in describe(case.hardware)
        if each.name.startswith(("npu.", "hbm.", "pim.")) and each.name not in NO_CYCLES
    }
    sizes = {name: float(value) for name, value in vars(model).items()}
    for name in ("layers", "heads", "kv_heads", "mlp_width", *LEFT_OUT):
        sizes.pop(name, None)
    sizes |= {
        "heads_of_device": model.heads / parallel.tp,
        "queries_of_a_key": model.heads / model.kv_heads,
        "mlp_width_ratio": model.mlp_width / model.width,
    }
    found |= {f"model.{name}": value for name, value in sizes.items()}
    lengths, channels = np.asarray(case.batch.seq_lens), np.asarray(case.batch.channels)
    found |= {
        "batch.requests": float((lengths > 0).sum()),
        "batch.longest_tokens": float(lengths.max()),
    }
    if case.system in ("neupims", "npu-pim"):
        found["batch.tokens_of_fullest_channel"] = float(np.bincount(channels, lengths).max())
    return found


@functools.cache
def load_table() -> dict[str, Any]:
    """Returns the table of runs and errors that the package carries."""
    file = resources.files("neupims").joinpath("expected_error.json")
    return json.loads(file.read_text(encoding="utf-8"))


def runs_of(spelling: str) -> list[dict[str, Any]]:
    """Returns the validated runs of a system, each with all its features.

    Args:
        spelling: The system, as the validation files spell it.
    """
    table = load_table()
    usual = _defaults() | table["usual_features"][spelling]
    return [run | {"features": usual | run["features"]} for run in table["runs"][spelling]]


@functools.cache
def envelope(spelling: str) -> dict[str, tuple[float, float]]:
    """Returns the smallest and the largest value of each feature over the runs of a system.

    Args:
        spelling: The system, as the validation files spell it.
    """
    each = [run["features"] for run in runs_of(spelling)]
    return {name: (min(f[name] for f in each), max(f[name] for f in each)) for name in each[0]}


def _defaults() -> dict[str, float]:
    """Returns the defaults of features, which runs have that are older than a field."""
    hardware = {each.name: float(each.value) for each in describe(Hardware())}
    model = {
        f"model.{each.name}": float(each.default)
        for each in fields(Decoder)
        if each.default is not MISSING
    }
    return hardware | model


def _describe_outside(known: dict[str, float], limits: dict[str, tuple[float, float]]) -> list[str]:
    """Returns a phrase for each kind of feature that is outside the limits."""
    found: dict[str, list[str]] = {}
    for name, value in known.items():
        low, high = limits[name]
        if low * (1 - CLOSE) <= value <= high * (1 + CLOSE):
            continue
        kind = next(kind for start, kind in KINDS if name.startswith(start))
        run = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        short = name.partition(".")[2].replace("_", " ") if name[:3] in ("mod", "bat") else name
        found.setdefault(kind, []).append(f"{short} {value:.6g}, validated {run}")
    return [f"{kind} ({'; '.join(listed)})" for kind, listed in found.items()]


def _nearest(known: dict[str, float], spelling: str, path: TimingPath) -> dict[str, Any]:
    """Returns the run with the least sum of |log2| of ratios of the features, and its error."""

    def distance(run: dict[str, Any]) -> float:
        pairs = ((value, run["features"][name]) for name, value in known.items())
        return sum(abs(math.log2((1 + one) / (1 + two))) for one, two in pairs)

    best = min(runs_of(spelling), key=distance)
    differs = {
        name: {"run": best["features"][name], "case": value}
        for name, value in known.items()
        if not math.isclose(best["features"][name], value, rel_tol=CLOSE)
    }
    return {
        "run": best["run"],
        "set": best["set"],
        "layer_error_percent": best["layer_error_percent"][path],
        "differs": differs,
    }


def gain_error(before: Case, after: Case, *, path: TimingPath = "closed") -> dict[str, Any] | None:
    """Returns how far predicted gains were from measured ones, in points of per cent.

    Predicted less measured gains of pairs of runs of one batch: their mean (`bias_points`),
    standard deviation (`spread_points`), least and most, number and sets of runs.

    Args:
        before: The case before.
        after: The same case with another schedule.
        path: "exact" or "closed".

    Returns:
        The statistics, or None where no such gain was measured, or one of the cases is outside of
        the envelope.
    """
    kind = gain_kind(before.sub_batches, after.sub_batches)
    found = load_table()["gains"].get(kind)
    if not found or any(expected_error(case, path=path).not_validated for case in (before, after)):
        return None
    return found[path] | {"of": kind}


def gain_kind(before: int, after: int) -> str:
    """Returns the name of a gain in the table.

    Args:
        before: The number of sub-batches before.
        after: The number of sub-batches after.
    """
    if before == after:
        return f"another schedule, sub-batches {before}"
    return f"sub-batches {before} to {after}"


def describe_gain_error(error: dict[str, Any]) -> str:
    """Returns the error of a gain in words.

    Args:
        error: Result of `gain_error`.
    """
    ends = " to ".join(f"{error[end]:+.1f}" for end in ("least_points", "most_points"))
    return (
        f"of {error['n']} such gains measured in the simulator ({' and '.join(error['sets'])}), the"
        f" predicted less the measured one was {error['bias_points']:+.1f} points in the mean,"
        f" {ends}"
    )


def join_errors(found: list[ExpectedError]) -> ExpectedError:
    """Returns the expected error of several cases of one system: none if any has none.

    Args:
        found: At least one.
    """
    reasons = tuple(dict.fromkeys(why for each in found for why in each.not_validated))
    wrong = next((each for each in found if each.percent is None), found[0])
    return ExpectedError(None if reasons else found[0].percent, reasons, wrong.nearest)


def describe_error(found: dict[str, Any]) -> dict[str, str]:
    """Returns what commands and pages say about the expected error, by title.

    Args:
        found: Result of a command, with the values of `ExpectedError.to_dict`.
    """
    words = {}
    if found["expected_error"]:
        words["expected error of the layer"] = describe_percent(found["expected_error"])
    else:
        words["no expected error, not validated"] = "; ".join(found["not_validated"])
    if found["nearest_validated"]:
        words["nearest validated run"] = describe_nearest(found["nearest_validated"])
    return words


def describe_percent(percent: dict[str, Any]) -> str:
    """Returns the mean and the largest error of a layer in words.

    Args:
        percent: `ExpectedError.percent`.
    """
    return (
        f"{percent['layer_mean_percent']:.1f} % in the mean, {percent['layer_max_percent']:.1f} %"
        f" at most ({percent['layer_runs']} runs)"
    )


def describe_nearest(nearest: dict[str, Any]) -> str:
    """Returns the nearest validated run and its error in words.

    Args:
        nearest: `ExpectedError.nearest`.
    """
    error = nearest["layer_error_percent"]
    side = "above" if error > 0 else "below"
    return f"{nearest['run']}, predicted {abs(error):.1f} % {side} the measured layer"
