"""Evaluation of designs in batches of fixed size on all devices."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from neupims.exploration.impossible import REASONS
from neupims.exploration.points import Points, overall
from neupims.exploration.space import Space

Evaluate = Callable[[dict[str, Array]], dict[str, Array]]
# Vectors of 512 bits, where the CPU has them: JAX's compiler takes 256 otherwise.
WIDE: Any = {"xla_cpu_prefer_vector_width": 512}
NOT_FINITE = -1  # code of a design with a metric that is not finite


@dataclass(frozen=True)
class Measure:
    """Further metrics of designs, which are computed outside of the compiled evaluation.

    Explorations treat them as all other metrics: as objectives, in constraints and in results.

    `compute` is a function from `{knob: (n,)}` to `{metric: (n, workloads)}`, both NumPy, with the
    same number n of designs. It may also return `flagged`, `(n, workloads)`: the code of the reason
    (`impossible.REASONS`) where a design is impossible, else 0. It sees only designs that
    everything before it found possible. Of those that the method draws it sees only those that meet
    the constraints which need no measure, unless results depend on the others (`explore_space`).
    """

    names: tuple[str, ...]  # of the metrics
    compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]  # knobs are float64
    workloads: int = 1  # columns of each metric
    settings: Any = None  # what the metrics depend on besides the knobs, as JSON can hold it
    zero: str = ""  # what it means if a metric is 0, for the error that refuses such a base design

    def __post_init__(self):
        sound = isinstance(self.names, tuple) and all(
            isinstance(name, str) and name and name != "flagged" for name in self.names
        )
        if not sound or not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(
                "a measure needs the names of its metrics, a tuple of different texts other than"
                f" flagged, not {self.names!r}"
            )


# The designs of which measures are computed: all possible ones; those of them that meet the
# constraints which need no measure; or none.
Measured = Literal["possible", "kept", "none"]


class Evaluator:
    """Evaluates designs `rows` at a time, distributed over all devices.

    The last designs of a call are padded to `rows`, so that `evaluate` is compiled once.

    Args:
        space: The space whose knobs `evaluate` takes.
        evaluate: Function from `{knob: (n,)}` to `{metric: (n, workloads)}`, with `flagged`,
            `(n, workloads)`, the code of the reason where the design is impossible, else 0.
        rows: Designs of one call; rounded up to a multiple of the devices.
        devices: The devices to use; `jax.devices()` if not given.
        measures: Further metrics, which are computed in the given order.

    Raises:
        ValueError: A metric of a measure has the name of another metric, a knob or a field.
    """

    def __init__(
        self,
        space: Space,
        evaluate: Evaluate,
        rows: int,
        devices: Sequence[jax.Device] | None = None,
        measures: Sequence[Measure] = (),
    ):
        devices = jax.devices() if devices is None else devices
        self.measures = tuple(measures)
        self.measured: Measured = "possible"
        self.space, self.rows = space, -(-rows // len(devices)) * len(devices)
        spread = PartitionSpec("designs")
        mesh = Mesh(np.array(devices), ("designs",))
        self.placed = NamedSharding(mesh, spread)
        self.run = jax.jit(
            jax.shard_map(evaluate, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False),
            compiler_options=WIDE if devices[0].platform == "cpu" else None,
        )
        if measures:
            self._check_names()

    @property
    def further(self) -> tuple[str, ...]:
        """Names of the metrics of all measures."""
        return tuple(name for measure in self.measures for name in measure.names)

    def measuring(self, measured: Measured) -> "Evaluator":
        """Returns this evaluator with another choice of the designs that are measured.

        Metrics of the other designs are NaN, and what they violate is that of the constraints that
        need no measure.

        Args:
            measured: "possible" (all possible designs), "kept" (those of them that meet the
                constraints which need no measure) or "none".
        """
        other = copy.copy(self)
        other.measured = measured
        return other

    def metrics(self) -> tuple[str, ...]:
        """Returns the names of the metrics."""
        found = jax.eval_shape(self.run, self._columns(np.ones((1, len(self.space.knobs)))))
        return (*(name for name in found if name != "flagged"), *self.further)

    def __call__(self, values: Float[np.ndarray, "n k"], first: int = 0) -> Points:
        """Returns designs with their metrics.

        A design is flagged if `evaluate` or a measure flags it, or one of its metrics is not
        finite.

        Args:
            values: Knob values of the designs, `(n, k)`.
            first: Number of the first design in the run.
        """
        parts = []
        for start in range(0, len(values), self.rows):
            part = values[start : start + self.rows]
            found = jax.device_get(self.run(self._columns(part)))
            parts.append({name: np.asarray(each)[: len(part)] for name, each in found.items()})
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        code = _code(arrays, np.ones(len(values), bool))
        known = self.space.columns(values) | {name: overall(each) for name, each in arrays.items()}
        violation = self.space.violation(known, without=self.further)
        chosen = (code == 0) & (self.measured != "none")
        if self.measured == "kept":
            chosen &= violation <= 0
        for measure in self.measures:
            asked = chosen & (code == 0)
            metrics = _measure(measure, self.space.columns(values), asked)
            code = np.where(asked, _code(metrics, asked), code)
            arrays |= metrics
            known |= {name: overall(each) for name, each in metrics.items()}
        if self.measures:
            violation = np.where(chosen, self.space.violation(known), violation)
        violation = np.where(code != 0, np.inf, violation)
        return Points(np.arange(first, first + len(values)), values, arrays, violation, code)

    def _check_names(self) -> None:
        """Raises where a metric of a measure has the name of something else."""
        taken = {*self.space.names, *self.space.base}
        for name in self.metrics():
            if name in taken:
                raise ValueError(
                    f"a measure cannot be called {name}: a metric, a knob or a field of the"
                    " hardware has that name"
                )
            taken.add(name)

    def _columns(self, values: np.ndarray) -> dict[str, Array]:
        padding = np.broadcast_to(values[-1:], (self.rows - len(values), values.shape[1]))
        columns = {}
        for knob, column in zip(self.space.knobs, np.concatenate([values, padding]).T, strict=True):
            whole = knob.whole and np.abs(column).max() < 2**31
            columns[knob.name] = jax.device_put(
                column.astype(np.int32 if whole else np.float32), self.placed
            )
        return columns


def _code(arrays: dict[str, np.ndarray], asked: np.ndarray) -> np.ndarray:
    """The code of each design, `(n,)`, that of the first workload; takes it out of the arrays.

    Designs that were not asked about have the code 0.
    """
    codes = arrays.pop("flagged", np.zeros((len(asked), 1), int)).astype(int)
    code = codes[np.arange(len(asked)), (codes != 0).argmax(axis=1)]
    finite = np.all([np.isfinite(each).all(axis=1) for each in arrays.values()], axis=0)
    return np.where(asked & (code == 0) & ~finite, NOT_FINITE, code)


def _measure(
    measure: Measure, columns: dict[str, np.ndarray], asked: np.ndarray
) -> dict[str, np.ndarray]:
    """The metrics of a measure; NaN where a design was not asked about."""
    rows = np.flatnonzero(asked)
    spread = {name: np.full((len(asked), measure.workloads), np.nan) for name in measure.names}
    spread["flagged"] = np.zeros((len(asked), measure.workloads))
    if rows.size:
        found = measure.compute({name: column[rows] for name, column in columns.items()})
        for name, each in _check(measure, found, rows.size).items():
            spread[name][rows] = each
    return spread


def _check(measure: Measure, found: Mapping[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """The arrays that a measure returned for n designs, which must be those it promised."""
    about = f"the measure of {', '.join(measure.names)}"
    if not isinstance(found, Mapping):
        raise ValueError(f"{about} must return arrays by name, not {type(found).__name__}")
    if set(found) - {"flagged"} != set(measure.names):
        raise ValueError(
            f"{about} must return these metrics, and may return flagged, but it returned"
            f" {', '.join(map(str, found)) or 'nothing'}"
        )
    arrays = {name: np.asarray(each) for name, each in found.items()}
    for name, each in arrays.items():
        if each.shape != (n, measure.workloads) or each.dtype.kind not in "biuf":
            raise ValueError(
                f"{about} must return {name} as numbers of the shape {(n, measure.workloads)},"
                f" designs by workloads, not {each.dtype} of the shape {each.shape}"
            )
    codes = arrays.get("flagged", np.zeros(0))
    if not np.isin(codes, range(NOT_FINITE, len(REASONS) - 1)).all():
        raise ValueError(
            f"{about} may flag with codes from 0 to {len(REASONS) - 2}, or {NOT_FINITE}, the places"
            f" in impossible.REASONS, not {codes.min():g} to {codes.max():g}"
        )
    return arrays
