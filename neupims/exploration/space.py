"""A space of designs: knobs, what each may be, and constraints; points of it by grid, by chance or
by a Sobol sequence.

A knob is a field of the hardware record by its dotted name, or one of `SETTINGS`. A point is a row
of the unit cube, one coordinate a knob, and its `values` are a row of numbers. Every sampler gives
any range of its points by itself, so that a run can stop and go on anywhere.

A space is read from TOML or JSON:

    constraints = ["npu.num_arrays * npu.array_width * npu.array_height <= 262144"]
    [knobs]
    hbm.num_channels = [8, 16, 32, 64]                      # one of these
    npu.num_arrays = {low = 2, high = 16}                   # every whole number from 2 to 16
    npu.clock_hz = {low = 0.7e9, high = 1.5e9, log = true}  # any number, even chances of each factor
"""

import json
import math
import numbers
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neupims.exploration.constraint import Constraint, parse_constraint
from neupims.machine.hardware import Hardware
from neupims.machine.record import COUNT_MOST, REAL_MOST, describe, instead, real

METHODS = ("grid", "random", "sobol")
LARGEST_RANGE = 10**9  # whole numbers of one knob
STEPS = 5  # of a continuous knob in a grid, ends included


# Knobs that are no field of the hardware: how many halves of the batch are interleaved, and how
# many devices share layers and the list of layers. All are whole numbers of at least 1.
SETTINGS = ("sub_batches", "parallel.tp", "parallel.pp")

Bounds = tuple[
    float, float, bool
]  # the least and the most that a knob may be, and whether it is whole


@dataclass(frozen=True)
class Knob:
    """One number to choose: from the list `values` where there is one, else from `low` to
    `high`.
    """

    name: str
    values: tuple[float, ...] = ()
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    whole: bool = False

    @property
    def count(self) -> int:
        """How many values there are; 0 where they are not counted."""
        if self.values:
            return len(self.values)
        return int(self.high - self.low) + 1 if self.whole else 0

    @property
    def most(self) -> float:
        return max(self.values, default=self.high)

    def at(self, unit: np.ndarray) -> np.ndarray:
        """The values at coordinates from 0 to 1, float64. Values of a list and whole numbers have
        cells of equal width, or factor with `log`.
        """
        unit = np.clip(np.asarray(unit, np.float64), 0, 1)
        if self.values:
            return np.asarray(self.values, np.float64)[
                np.minimum((unit * self.count).astype(np.int64), self.count - 1)
            ]
        low, high = self.low, self.high + self.whole
        value = low * (high / low) ** unit if self.log else low + unit * (high - low)
        return np.clip(np.floor(value) if self.whole else value, self.low, self.high)

    def levels(self) -> np.ndarray:
        """The values of a grid: all, or `STEPS` of a continuous range."""
        if self.values:
            return np.asarray(self.values, np.float64)
        return (
            np.arange(self.low, self.high + 1) if self.whole else self.at(np.linspace(0, 1, STEPS))
        )


@dataclass(frozen=True)
class Space:
    """Knobs and constraints, and the numbers of everything that is not turned (by the names that
    constraints may use).
    """

    knobs: tuple[Knob, ...]
    constraints: tuple[Constraint, ...]
    base: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(knob.name for knob in self.knobs)

    def values(self, units: np.ndarray) -> np.ndarray:
        """(n, knobs) values at (n, knobs) coordinates."""
        return np.stack(
            [knob.at(units[:, column]) for column, knob in enumerate(self.knobs)], axis=1
        )

    def columns(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """The values of each knob by its name."""
        return {name: values[:, column] for column, name in enumerate(self.names)}

    def violation(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """By how much designs break the constraints, (n,): 0 where they keep all, infinite where
        one cannot be computed.

        `columns` are the knobs by name, and further names that constraints may use: the metrics.
        """
        size = len(next(iter(columns.values())))
        known = self.base | dict(columns)
        return sum(
            (constraint.violation(known) for constraint in self.constraints), start=np.zeros(size)
        )

    def described(self) -> dict[str, Any]:
        """The space as it would stand in a file."""
        knobs: dict[str, Any] = {}
        for knob in self.knobs:
            knobs[knob.name] = (
                list(knob.values)
                if knob.values
                else {"low": knob.low, "high": knob.high, "log": knob.log}
            )
        return {"knobs": knobs, "constraints": [constraint.text for constraint in self.constraints]}


def make_space(
    knobs: Mapping[str, Any],
    constraints: Sequence[str] = (),
    *,
    hardware: Hardware | None = None,
    settings: Mapping[str, float] | None = None,
    metrics: Sequence[str] = (),
) -> Space:
    """A checked space. A knob is a list of values, or a mapping of low, high and log.

    `hardware` and `settings` give the numbers of what is not turned; `metrics` are further names
    for constraints.

    Raises:
        ValueError: a knob or constraint is impossible; the sentence names it.
    """
    listed = list(describe(Hardware() if hardware is None else hardware))
    settable = dict.fromkeys(SETTINGS, (1.0, float(COUNT_MOST), True))
    known: dict[str, Bounds] = {
        each.name: (each.least, min(each.most, REAL_MOST), each.whole) for each in listed
    } | settable
    if not knobs:
        raise ValueError("a space needs at least one knob")
    made = tuple(_knob(name, choice, known) for name, choice in knobs.items())
    base = {each.name: float(each.value) for each in listed} | dict(settings or {})
    usable = {*base, *(knob.name for knob in made), *metrics}
    return Space(made, tuple(parse_constraint(text, usable) for text in constraints), base)


def read_space(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Knobs and constraints of a file, for `make_space`.

    Raises:
        ValueError: it is neither TOML nor JSON, or holds something else; the sentence names the
            file.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() not in (".toml", ".json"):
        raise ValueError(f"{path} must end in .toml or .json")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (
        UnicodeDecodeError,
        json.JSONDecodeError,
        tomllib.TOMLDecodeError,
        RecursionError,
    ) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("knobs"), dict):
        raise ValueError(f"{path} must have a table knobs")
    if unknown := set(content) - {"knobs", "constraints", "about"}:
        raise ValueError(
            f"{path} has {', '.join(sorted(unknown))}; there are about, constraints and knobs"
        )
    constraints = content.get("constraints", [])
    if not isinstance(constraints, list) or not all(isinstance(each, str) for each in constraints):
        raise ValueError(f"{path}: constraints must be a list of strings, not {constraints!r}")
    return dict(_flat(content["knobs"], "")), constraints


def parse_knob(text: str) -> tuple[str, Any]:
    """A knob of a command line, NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=a,b,c, for `make_space`.

    Raises:
        ValueError: it is none of these.
    """
    name, equals, right = (part.strip() for part in text.partition("="))
    try:
        if not name or not equals:
            raise ValueError
        if ":" not in right:
            return name, [float(part) for part in right.split(",")]
        low, high, *log = right.split(":")
        if log not in ([], ["log"]):
            raise ValueError
        return name, {"low": float(low), "high": float(high), "log": bool(log)}
    except ValueError:
        raise ValueError(
            f"a knob is NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=a,b,c, not {text!r}"
        ) from None


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys, which TOML reads as tables in tables, by their whole names."""
    for key, value in table.items():
        if isinstance(value, dict) and not {"low", "high"} & set(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _knob(name: str, choice: Any, known: Mapping[str, Bounds]) -> Knob:
    if name not in known:
        raise ValueError(f"there is no knob {name!r}; there are {', '.join(known)}")
    limits = known[name]
    whole = limits[2]
    if isinstance(choice, Mapping):
        if unknown := set(choice) - {"low", "high", "log"}:
            raise ValueError(
                f"{name} has {', '.join(sorted(map(str, unknown)))}; a range has low, high and log"
            )
        if not {"low", "high"} <= set(choice):
            raise ValueError(f"{name} needs both low and high")
        low, high = (_number(name, choice[end], limits) for end in ("low", "high"))
        log = choice.get("log", False)
        if not isinstance(log, bool):
            raise ValueError(f"log of {name} must be true or false, not {log!r}")
        if low >= high:
            raise ValueError(f"low of {name} must be below high, but {low:g} is not below {high:g}")
        if log and low <= 0:
            raise ValueError(f"low of {name} must be above 0 for log, but is {low:g}")
        if whole and high - low >= LARGEST_RANGE:
            raise ValueError(f"{name} has more than {LARGEST_RANGE} values")
        return Knob(name, low=low, high=high, log=log, whole=whole)
    if not isinstance(choice, list | tuple) or not choice:
        raise ValueError(
            f"{name} must be a list of values or a range with low and high, not {choice!r}"
        )
    values = tuple(_number(name, value, limits) for value in choice)
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has a value twice: {', '.join(f'{value:g}' for value in values)}")
    if name == "sub_batches" and max(values) > 2:
        raise ValueError(f"sub_batches must be 1 or 2, not {max(values):g}")
    return Knob(name, values=values, whole=whole)


def _number(name: str, value: Any, limits: Bounds) -> float:
    least, most, whole = limits
    right = (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and least <= real(value) <= most
    )
    if not right or (whole and value != int(value)):
        raise ValueError(f"{name} must be {instead(value, *limits)}")
    return float(value)


def grid_size(space: Space) -> int:
    """Points of the grid."""
    return math.prod(knob.count or STEPS for knob in space.knobs)


def sample(space: Space, method: str, start: int, stop: int, *, seed: int = 0) -> np.ndarray:
    """Values of the points `start` up to `stop` of a sampler, (stop - start, knobs) float64. The
    last knob of a grid turns fastest.

    Raises:
        ValueError: an unknown method, or a range beyond the grid.
        ImportError: "sobol" without SciPy.
    """
    if method == "grid":
        if stop > (size := grid_size(space)):
            raise ValueError(f"the grid has {size} points, so there is no point {stop - 1}")
        rest, columns = np.arange(start, stop), []
        for knob in reversed(space.knobs):
            levels = knob.levels()
            columns.append(levels[rest % len(levels)])
            rest = rest // len(levels)
        return np.stack(columns[::-1], axis=1)
    return space.values(unit_sample(len(space.knobs), method, start, stop, seed=seed))


def unit_sample(
    dimensions: int, method: str, start: int, stop: int, *, seed: int = 0
) -> np.ndarray:
    """Coordinates of the points `start` up to `stop` of "random" or "sobol", (stop - start,
    dimensions) from 0 up to 1.

    Sobol points are scrambled (Owen, "Randomly permuted (t,m,s)-nets and (t,s)-sequences", 1995);
    the first 2^k of them are balanced.
    """
    if method == "random":
        stream = np.random.PCG64(seed).advance(start * dimensions)  # one draw a number
        return np.random.Generator(stream).random((stop - start, dimensions))
    if method != "sobol":
        raise ValueError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    try:
        from scipy.stats import qmc
    except ImportError:
        raise ImportError(
            "the Sobol sequence needs SciPy: pip install 'ggem-jax[neupims]'"
        ) from None
    sequence = qmc.Sobol(dimensions, rng=seed)
    if start:
        return sequence.fast_forward(start).random(stop - start)
    first = sequence.random(
        1
        # alone, so that SciPy does not ask for a power of 2: points are counted by index, over all
        # chunks
    )
    return np.concatenate([first, sequence.random(stop - 1)]) if stop > 1 else first
