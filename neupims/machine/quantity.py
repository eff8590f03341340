"""Fields of records that are one number with a unit, a source and a plausible range."""

import math
import numbers
from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from typing import Any, Literal, NamedTuple

from neupims.machine.record import COUNT_MOST, REAL_MOST, cut, instead, is_allowed, real
from neupims.machine.units import describe_range, likely_slip

Effect = Literal[
    "time", "capacity", "energy", "area", "none"
]  # of a field on the results of the model


def quantity(
    default: float,
    unit: str,
    source: str,
    *,
    least: float = 0,
    most: float | None = None,
    whole: bool = False,
    zero: bool = False,
    longest: bool = False,
    effect: Effect = "time",
    simulator: str | None = None,
) -> Any:
    """Returns a dataclass field that is one number.

    Args:
        default: Its default.
        unit: Its unit; words after a comma explain it.
        source: Where the default comes from: a file, paper or data sheet.
        least: The smallest value that is allowed.
        most: The largest value that is allowed (default: COUNT_MOST for whole numbers, else
            REAL_MOST).
        whole: Whether it must be a whole number.
        zero: Whether 0 is allowed beside the range.
        longest: Whether it is a longest time, which becomes whole cycles by rounding down.
        effect: What it changes in the model: "time"; "capacity", "energy" or "area"
            alone; or "none".
        simulator: Its name in the memory files of the public simulator, if it has one there with
            the same unit.
    """
    most = most if most is not None else COUNT_MOST if whole else REAL_MOST
    unit, _, note = unit.partition(", ")
    return field(
        default=default,
        metadata={
            "unit": unit,
            "note": note,
            "source": source,
            "default": default,
            "least": least,
            "most": most,
            "whole": whole,
            "zero": zero,
            "longest": longest,
            "effect": effect,
            "simulator": simulator,
        },
    )


class Field(NamedTuple):
    """One number of a record, as `describe` lists it."""

    name: str  # dotted
    value: Any  # a number, or an array in a batch
    unit: str  # in which the value is
    note: str = ""  # words about the unit
    source: str = ""  # of the default
    default: float = 0  # its default
    least: float = 0  # the smallest value that is allowed
    most: float = REAL_MOST  # the largest value that is allowed
    whole: bool = False  # whether it must be a whole number
    zero: bool = False  # whether 0 is allowed beside the range
    longest: bool = False  # whether it is a longest time
    effect: Effect = "time"  # what it changes in the model
    simulator: str | None = None  # its name in the memory files of the public simulator

    def allows(self, number: Any) -> bool:
        """Returns whether a real number is in the range, and whole if it has to be.

        Args:
            number: The number.
        """
        return is_allowed(number, self.least, self.most, whole=self.whole, zero=self.zero)

    def fault(self, number: Any, clock_hz: float | None = None) -> str:
        """Returns what is wrong with a number, as the end of a sentence, or an empty string.

        Args:
            number: The number, or what stands in its place.
            clock_hz: The clock of a field that counts cycles, in Hz, or None.
        """
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            return f"must be a number, not {cut(number)}"
        if self.allows(number):
            return ""
        if self.most in (COUNT_MOST, REAL_MOST) or not self.unit:  # no plausible range is known
            return f"must be {instead(number, self.least, self.most, self.whole)}"
        slip = likely_slip(
            real(number),
            self.unit,
            self.allows,
            self.default,
            clock_hz,
            binary=self.whole,
        )
        return (
            f"must be {self.range()}, not {cut(number)}{f'; did you mean {slip}' if slip else ''}"
        )

    def range(self) -> str:
        """Returns the values that are allowed, such as "from 1e6 to 1e11 Hz"."""
        return describe_range(self.least, self.most, self.unit, whole=self.whole, zero=self.zero)


def field_of(value: Any, name: str, prefix: str = "") -> Field:
    """Returns a number of a record with what is known about it.

    Args:
        value: A record whose fields are made by `quantity`.
        name: The name of the field.
        prefix: Text before the name in the result.
    """
    found = next(each for each in fields(value) if each.name == name)
    return Field(f"{prefix}{name}", getattr(value, name), **found.metadata)


def describe(value: Any, prefix: str = "") -> Iterator[Field]:
    """Yields every number of a record and of the records in it.

    Args:
        value: A record whose fields are made by `quantity` or are such records.
        prefix: Text before each dotted name.
    """
    for each in fields(value):
        if is_dataclass(getattr(value, each.name)):
            yield from describe(getattr(value, each.name), f"{prefix}{each.name}.")
        else:
            yield field_of(value, each.name, prefix)


def check_quantities(value: Any, group: str) -> None:
    """Raises unless every plain number of the record is a number within its limits.

    Arrays pass: in a batch of designs the result flags a wrong row, and the others stay valid.

    Args:
        value: A record whose fields are made by `quantity`.
        group: Name before that of the field in an error, such as "hbm".

    Raises:
        ValueError: A field is not a number, or is too small, too large or not whole; the sentence
            names it, and the unit in which it was likely typed.
    """
    for each in describe(value, f"{group}."):
        if hasattr(each.value, "dtype") and not isinstance(each.value, numbers.Real):
            continue
        if fault := each.fault(each.value, _clock_of(value)):
            raise ValueError(f"{each.name} {fault}")


def _clock_of(value: Any) -> float | None:
    """Returns the clock of a record, if it has one that is a number."""
    clock = getattr(value, "clock_hz", None)
    plain = isinstance(clock, numbers.Real) and math.isfinite(real(clock))
    return float(clock) if plain and clock > 0 else None  # type: ignore[arg-type,operator]
