"""Evaluation of designs in batches of fixed size on all devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

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
    everything before it found possible.
    """

    names: tuple[str, ...]  # of the metrics
    compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]  # knobs are float64
    workloads: int = 1  # columns of each metric
    settings: Any = None  # what the metrics depend on besides the knobs, as JSON can hold it


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
        self.space, self.rows = space, -(-rows // len(devices)) * len(devices)
        spread = PartitionSpec("designs")
        mesh = Mesh(np.array(devices), ("designs",))
        self.placed = NamedSharding(mesh, spread)
        self.run = jax.jit(
            jax.shard_map(evaluate, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False),
            compiler_options=WIDE if devices[0].platform == "cpu" else None,
        )

    def metrics(self) -> tuple[str, ...]:
        """Returns the names of the metrics."""
        found = jax.eval_shape(self.run, self._columns(np.ones((1, len(self.space.knobs)))))
        further = (name for measure in self.measures for name in measure.names)
        return (*(name for name in found if name != "flagged"), *further)

    def __call__(
        self, values: Float[np.ndarray, "n k"], first: int = 0, *, measured: bool = True
    ) -> Points:
        """Returns designs with their metrics.

        A design is flagged if `evaluate` flags it or one of its metrics is not finite.

        Args:
            values: Knob values of the designs, `(n, k)`.
            first: Number of the first design in the run.
            measured: Whether the designs have the metrics of the measures; if not, constraints on
                those count as violated.
        """
        parts = []
        for start in range(0, len(values), self.rows):
            part = values[start : start + self.rows]
            found = jax.device_get(self.run(self._columns(part)))
            parts.append({name: np.asarray(each)[: len(part)] for name, each in found.items()})
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        code = _code(arrays, len(values))
        for measure in self.measures if measured else ():
            further = _measure(measure, self.space.columns(values), code == 0)
            code = np.where(code == 0, _code(further, len(values)), code)
            arrays |= further
        known = self.space.columns(values) | {name: overall(each) for name, each in arrays.items()}
        unknown = (name for measure in self.measures for name in measure.names)
        known = dict.fromkeys(unknown, np.full(len(values), np.nan)) | known
        violation = np.where(code != 0, np.inf, self.space.violation(known))
        return Points(np.arange(first, first + len(values)), values, arrays, violation, code)

    def _columns(self, values: np.ndarray) -> dict[str, Array]:
        padding = np.broadcast_to(values[-1:], (self.rows - len(values), values.shape[1]))
        columns = {}
        for knob, column in zip(self.space.knobs, np.concatenate([values, padding]).T, strict=True):
            whole = knob.whole and np.abs(column).max() < 2**31
            columns[knob.name] = jax.device_put(
                column.astype(np.int32 if whole else np.float32), self.placed
            )
        return columns


def _code(arrays: dict[str, np.ndarray], n: int) -> np.ndarray:
    """The code of each design, `(n,)`, that of the first workload; takes it out of the arrays."""
    codes = arrays.pop("flagged", np.zeros((n, 1), int)).astype(int)
    code = codes[np.arange(n), (codes != 0).argmax(axis=1)]
    finite = np.all([np.isfinite(each).all(axis=1) for each in arrays.values()], axis=0)
    return np.where((code == 0) & ~finite, NOT_FINITE, code)


def _measure(
    measure: Measure, columns: dict[str, np.ndarray], possible: np.ndarray
) -> dict[str, np.ndarray]:
    """The metrics of a measure; NaN where a design is not possible."""
    rows = np.flatnonzero(possible)
    spread = {name: np.full((len(possible), measure.workloads), np.nan) for name in measure.names}
    spread["flagged"] = np.zeros((len(possible), measure.workloads))
    if rows.size:
        found = measure.compute({name: column[rows] for name, column in columns.items()})
        for name in spread.keys() & found.keys():
            spread[name][rows] = found[name]
    return spread
