"""A space of designs: knobs with their choices, and constraints.

A knob is a field of the hardware record by its dotted name, or one of `SETTINGS`. A point is a row
of the unit cube with one coordinate for each knob; its values are a row of numbers.

A space can be read from TOML or JSON:

    constraints = ["npu.num_arrays * npu.array_width * npu.array_height <= 262144"]
    [knobs]
    hbm.num_channels = [8, 16, 32, 64]                      # one of these
    npu.num_arrays = {low = 2, high = 16}                   # every whole number from 2 to 16
    npu.clock_hz = {low = 0.7e9, high = 1.5e9, log = true}  # any number, uniform in its logarithm
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neupims.exploration.constraint import Constraint, parse_constraint
from neupims.files import read_table
from neupims.machine.hardware import Hardware
from neupims.machine.quantity import Field, describe
from neupims.machine.record import COUNT_MOST, REAL_MOST, read_text, real

LARGEST_RANGE = 10**9  # whole numbers of one knob
STEPS = 5  # values of a continuous knob in a grid, ends included

# Knobs that are not fields of the hardware: the number of interleaved halves of the batch, the
# degrees of tensor and pipeline parallelism, and the channels that share a request. All are whole
# numbers of at least 1.
SETTINGS = ("sub_batches", "parallel.tp", "parallel.pp", "parallel.kv_split")


@dataclass(frozen=True)
class Knob:
    """One number to choose: from `values` if there are any, else between `low` and `high`."""

    name: str  # dotted name of a field of the hardware, or one of `SETTINGS`
    values: tuple[float, ...] = ()  # a list to choose from; empty for a range
    low: float = math.nan  # the least value of a range
    high: float = math.nan  # the greatest value of a range
    log: bool = False  # whether a range is uniform in the logarithm
    whole: bool = False  # whether values are whole numbers

    @property
    def count(self) -> int:
        """Number of values; 0 for a continuous range."""
        if self.values:
            return len(self.values)
        return int(self.high - self.low) + 1 if self.whole else 0

    @property
    def most(self) -> float:
        """Greatest value."""
        return max(self.values, default=self.high)

    def at(self, unit: np.ndarray) -> np.ndarray:
        """Returns the values at coordinates from 0 to 1, float64 and of the same shape.

        Values of a list and whole numbers have cells of equal width; with `log`, of equal ratio.

        Args:
            unit: Coordinates of any shape; values outside of 0 to 1 are clipped.
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
        """Returns the values in a grid: all of them, or `STEPS` values of a continuous range."""
        if self.values:
            return np.asarray(self.values, np.float64)
        return (
            np.arange(self.low, self.high + 1) if self.whole else self.at(np.linspace(0, 1, STEPS))
        )


@dataclass(frozen=True)
class Space:
    """Knobs, constraints and the base design."""

    knobs: tuple[Knob, ...]  # in the order of coordinates and values
    constraints: tuple[Constraint, ...]  # that designs must meet
    base: dict[str, float]  # value of every name that constraints may use, before knobs are set

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the knobs."""
        return tuple(knob.name for knob in self.knobs)

    def values(self, units: np.ndarray) -> np.ndarray:
        """Returns the values of points, `(n, knobs)` in float64.

        Args:
            units: `(n, knobs)` coordinates from 0 to 1.
        """
        return np.stack(
            [knob.at(units[:, column]) for column, knob in enumerate(self.knobs)], axis=1
        )

    def columns(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the `(n,)` values of each knob by its name.

        Args:
            values: `(n, knobs)` values.
        """
        return {name: values[:, column] for column, name in enumerate(self.names)}

    def violation(
        self, columns: Mapping[str, np.ndarray], without: Collection[str] = ()
    ) -> np.ndarray:
        """Returns how far designs are from meeting the constraints.

        Args:
            columns: `(n,)` values of the knobs by name, and of the metrics that constraints use.
            without: Names; constraints that use one of them do not count.

        Returns:
            `(n,)` violations: 0 where all constraints hold, infinite where one cannot be computed.
        """
        size = len(next(iter(columns.values())))
        known = self.base | dict(columns)
        counted = [each for each in self.constraints if not each.names & set(without)]
        return sum((each.violation(known) for each in counted), start=np.zeros(size))

    def describe(self) -> dict[str, Any]:
        """Returns the content of a file for `read_space`."""
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
    """Returns a validated space.

    Args:
        knobs: For each name a list of values, or a range: `(low, high)`, `(low, high, "log")`
            (uniform in the logarithm), or a mapping with `low`, `high` and `log`. A value is a
            number, or text with a unit, such as "14 ns".
        constraints: Comparisons that designs must meet, see `neupims.exploration.constraint`.
        hardware: Gives the base values; `Hardware()` if not given.
        settings: Base values of `SETTINGS`, where constraints or the base design need them.
        metrics: Further names that constraints may use.

    Raises:
        ValueError: A knob or a constraint is impossible; the message names it.
    """
    listed = list(describe(Hardware() if hardware is None else hardware))
    settable = {name: Field(name, 1, "", least=1, most=COUNT_MOST, whole=True) for name in SETTINGS}
    known = {each.name: each for each in listed} | settable
    if not knobs:
        raise ValueError("a space needs at least one knob")
    # Where the clock itself varies, a time is not a number of cycles.
    clock = None if "hbm.clock_hz" in knobs else float(known["hbm.clock_hz"].value)
    made = tuple(_knob(name, choice, known, clock) for name, choice in knobs.items())
    base = {each.name: float(each.value) for each in listed} | dict(settings or {})
    usable = {*base, *(knob.name for knob in made), *metrics}
    return Space(made, tuple(parse_constraint(text, usable) for text in constraints), base)


def read_space(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the knobs and the constraints of a TOML or JSON file, for `make_space`.

    Args:
        path: The file; its name ends in .toml or .json.

    Raises:
        ValueError: The file is neither TOML nor JSON, or does not hold a space; the message names
            the file.
        OSError: The file cannot be read.
    """
    content = read_table(path)
    if not isinstance(content.get("knobs"), dict):
        raise ValueError(f"{path} must have a table knobs")
    if unknown := set(content) - {"knobs", "constraints", "about"}:
        raise ValueError(
            f"{path} has {', '.join(sorted(unknown))}; only about, constraints and knobs are known"
        )
    constraints = content.get("constraints", [])
    if not isinstance(constraints, list) or not all(isinstance(each, str) for each in constraints):
        raise ValueError(f"{path}: constraints must be a list of strings, not {constraints!r}")
    return dict(_flatten(content["knobs"], "")), constraints


def parse_knob(text: str) -> tuple[str, Any]:
    """Returns the name and the choice of a knob, for `make_space`.

    Args:
        text: NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=a,b,c, as on the command line. A value may
            have a unit, such as 14 ns.

    Raises:
        ValueError: The text has another form.
    """
    name, equals, right = (part.strip() for part in text.partition("="))
    try:
        if not name or not equals:
            raise ValueError
        if ":" not in right:
            return name, [_read(part) for part in right.split(",")]
        low, high, *log = right.split(":")
        if log not in ([], ["log"]):
            raise ValueError
        return name, {"low": _read(low), "high": _read(high), "log": bool(log)}
    except ValueError:
        raise ValueError(
            f"a knob is NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=a,b,c, not {text!r}"
        ) from None


def _read(text: str) -> float | str:
    """Returns a number, or the text if it may be a number with a unit."""
    try:
        return float(text)
    except ValueError:
        if not text.strip().startswith(tuple("+-.0123456789")):
            raise
        return text.strip()


def _flatten(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Full names of dotted keys, which TOML reads as nested tables."""
    for key, value in table.items():
        if isinstance(value, dict) and not {"low", "high"} & set(value):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _knob(name: str, choice: Any, known: Mapping[str, Field], clock_hz: float | None) -> Knob:
    if name not in known:
        raise ValueError(f"there is no knob {name!r}; there are {', '.join(known)}")
    field = known[name]
    whole = field.whole
    if field.effect == "none":
        raise ValueError(f"{name} has no effect in this model: leave it out of the knobs")
    if isinstance(choice, tuple):
        choice = _range(name, choice)
    if isinstance(choice, Mapping):
        if unknown := set(choice) - {"low", "high", "log"}:
            raise ValueError(
                f"{name} has {', '.join(sorted(map(str, unknown)))}; a range has low, high and log"
            )
        if not {"low", "high"} <= set(choice):
            raise ValueError(f"{name} needs both low and high")
        low, high = (_number(field, choice[end], clock_hz) for end in ("low", "high"))
        log = choice.get("log", False)
        if not isinstance(log, bool):
            raise ValueError(f"log of {name} must be true or false, not {log!r}")
        if low >= high:
            raise ValueError(f"low of {name} must be below high, but {low:g} is not below {high:g}")
        if log and low <= 0:
            raise ValueError(f"low of {name} must be above 0 for log, but is {low:g}")
        if name == "sub_batches":
            _check_sub_batches(high)
        if whole and high - low >= LARGEST_RANGE:
            raise ValueError(f"{name} has more than {LARGEST_RANGE} values")
        return Knob(name, low=low, high=high, log=log, whole=whole)
    if not isinstance(choice, list) or not choice:
        raise ValueError(
            f"{name} must be a list of values or a range with low and high, not {choice!r}"
        )
    values = tuple(_number(field, value, clock_hz) for value in choice)
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has a value twice: {', '.join(f'{value:g}' for value in values)}")
    if name == "sub_batches":
        _check_sub_batches(max(values))
    return Knob(name, values=values, whole=whole)


def _check_sub_batches(most: float) -> None:
    if most > 2:
        raise ValueError(f"sub_batches must be 1 or 2, not {most:g}")


def _range(name: str, ends: tuple[Any, ...]) -> dict[str, Any]:
    """The range that `(low, high)` or `(low, high, "log")` stands for."""
    if len(ends) not in (2, 3) or (len(ends) == 3 and ends[2] != "log"):
        raise ValueError(
            f'{name} must be a range (low, high) or (low, high, "log"), not {ends!r}; values to'
            " choose from are a list"
        )
    return {"low": ends[0], "high": ends[1], "log": len(ends) == 3}


def _number(field: Field, value: Any, clock_hz: float | None) -> float:
    if isinstance(value, str):
        try:
            value = float(read_text(value, field._asdict(), clock_hz))
        except ValueError as error:
            raise ValueError(f"{field.name} {error}") from None
    if fault := field.fault(value, clock_hz):
        raise ValueError(f"{field.name} {fault}")
    if real(value) > REAL_MOST:
        raise ValueError(f"{field.name} must be at most {REAL_MOST:g}, not {value!r}")
    return real(value)
