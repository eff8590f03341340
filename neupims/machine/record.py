"""Frozen records that JAX maps over."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform

import jax

from neupims.machine.units import compact, describe_range, read_quantity, text_slip

T = TypeVar("T")
SHOWN = 40  # characters of a wrong value
INT32_MOST = 2**31 - 1
COUNT_MOST = 2**24  # float32 holds this and all smaller whole numbers exactly
REAL_MOST = 1e30  # its products with other quantities are finite
# A number, or an array with one for each design, request or channel: the result of arithmetic on
# records.
Number = Any


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[T]) -> type[T]:
    """Returns the class as a frozen dataclass that is a pytree of its fields.

    Its `__post_init__` checks records that are made by a call. Those that JAX makes (of arrays,
    tracers, or the axes of a `vmap`) are not checked.
    """
    made = dataclass(frozen=True)(cls)
    names = tuple(field.name for field in fields(made))  # type: ignore[arg-type]

    def unflatten(_, leaves):
        new = object.__new__(made)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(new, name, leaf)
        return new

    def flatten(value):
        return [
            (jax.tree_util.GetAttrKey(name), _leaf(getattr(value, name))) for name in names
        ], None

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return made


def _leaf(number: Number) -> Number:
    """Returns the number as JAX can take it: whole numbers in 32 bits, larger ones as floats."""
    return real(number) if isinstance(number, int) and abs(number) > INT32_MOST else number


def real(number: Any) -> float:
    """Returns a number as a float, infinite where it is too large for one.

    Args:
        number: A real number, such as an `int` of any size.
    """
    try:
        return float(number)
    except OverflowError:
        return math.inf


def is_allowed(number: Any, least: float, most: float, *, whole: bool, zero: bool) -> bool:
    """Returns whether a real number is in a range, and whole if it has to be.

    Args:
        number: The number.
        least: The smallest value.
        most: The largest value.
        whole: Whether it must be a whole number.
        zero: Whether 0 is allowed beside the range.
    """
    size = real(number)
    if zero and size == 0:
        return True
    return least <= size <= most and not (whole and size % 1 != 0)


def cut(value: Any) -> str:
    """Returns a value as text that is short enough for an error.

    Args:
        value: The value.
    """
    text = repr(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        short = compact(float(value))
        text = short if float(short) == value else repr(float(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def instead(number: Any, least: float, most: float, whole: bool) -> str:
    """Returns the end of an error sentence: what a quantity must be, and what it is.

    An example is "a whole number of at least 1, not 0". The largest value is named where it is
    unusual or exceeded.

    Args:
        number: The wrong value; its text is cut to SHOWN characters.
        least: The smallest value that is allowed.
        most: The largest value that is allowed.
        whole: Whether it must be a whole number.
    """
    kind = "a whole number" if whole else "a number"
    said = most < math.inf and (
        most not in (COUNT_MOST, REAL_MOST)
        or (isinstance(number, numbers.Real) and real(number) > most)
    )
    most_text = f" and at most {most:.9g}" if said else ""
    return f"{kind} of at least {least:g}{most_text}, not {cut(number)}"


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """Raises unless an argument is a whole number in a range.

    Args:
        name: Its name.
        value: The value to check.
        least: The smallest value.
        most: The largest value.

    Raises:
        ValueError: It is something else.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) <= most:
        raise ValueError(f"{name} must be {instead(value, least, most, True)}")


def check_seed(seed: Any) -> None:
    """Raises unless a seed of random numbers is a whole number that JAX can take.

    Args:
        seed: The value to check.

    Raises:
        ValueError: It is not a whole number, negative, or at least 2^63.
    """
    if not isinstance(seed, numbers.Integral) or int(seed) >= 2**63:
        raise ValueError(f"the seed must be a whole number below 2^63, not {seed!r}")
    if int(seed) < 0:
        raise ValueError(f"the seed must be at least 0, not {seed}")


def replace(value: T, name: str, new: Any) -> T:
    """Returns the record with one field changed, checked again.

    Args:
        value: The record, such as `Hardware()`.
        name: The dotted name of the field, such as "hbm.num_channels".
        new: Its value: a number, or text with a unit, such as "14 ns".

    Raises:
        ValueError: The field does not exist (the sentence lists those that do), or the value is
            impossible.
    """
    return replace_all(value, {name: new})


def replace_all(value: T, changes: Mapping[str, Any]) -> T:
    """Returns the record with several fields changed together, checked again.

    Times that are given for cycles are converted with the new clock.

    Args:
        value: The record, such as `Hardware()`.
        changes: Numbers, or texts with a unit, by the dotted name of the field.

    Raises:
        ValueError: A field does not exist (the sentence lists those that do), or a value is
            impossible.

    Example:
        >>> from neupims import Hardware
        >>> hbm = {"hbm.clock_hz": "1.3 GHz", "hbm.trp_cycles": "14 ns"}
        >>> replace_all(Hardware(), hbm).hbm.trp_cycles
        19.0
    """
    return _replace_all(value, changes, "")


def _replace_all(value: T, changes: Mapping[str, Any], prefix: str) -> T:
    known = [each.name for each in fields(value)]  # type: ignore[arg-type]
    inner: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, new in changes.items():
        head, _, rest = name.partition(".")
        if head not in known:
            raise ValueError(f"there is no field {prefix}{head}; there are {', '.join(known)}")
        part = getattr(value, head)
        if rest and not is_dataclass(part):
            raise ValueError(f"{prefix}{head} is a number and has no field {rest!r}")
        if not rest and is_dataclass(part):
            raise ValueError(
                f"{prefix}{head} is a group; name one of its fields,"
                f" {', '.join(f'{prefix}{head}.{each.name}' for each in fields(part))}"
            )
        (inner.setdefault(head, {}) if rest else own)[rest or head] = new
    parts = {
        head: _replace_all(getattr(value, head), some, f"{prefix}{head}.")
        for head, some in inner.items()
    }
    return dataclasses.replace(value, **_read_texts(value, own, prefix), **parts)  # type: ignore


def _read_texts(value: Any, changes: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns changes of a record with numbers for texts; the clock is read before the cycles."""
    found = dict(changes)
    for name in sorted(changes, key=lambda name: name != "clock_hz"):
        if not isinstance(changes[name], str):
            continue
        about = next(each.metadata for each in fields(value) if each.name == name)
        clock = found.get("clock_hz", getattr(value, "clock_hz", None))
        clock_hz = float(clock) if isinstance(clock, numbers.Real) else None
        try:
            found[name] = read_text(changes[name], about, clock_hz)
        except ValueError as fault:
            raise ValueError(f"{prefix}{name} {fault}") from None
    return found


def read_text(text: str, about: Mapping[str, Any], clock_hz: float | None) -> float:
    """Returns the number of a field, in its unit, that a text with a unit stands for.

    Args:
        text: A number and a unit, such as "14 ns".
        about: What is known of the field: unit, longest, least, most, whole, zero and default.
        clock_hz: The clock, in Hz, by which a time becomes cycles; None where it is not known.

    Raises:
        ValueError: The text is not a number with a unit of the field's kind, or the number is
            impossible; the message is the end of a sentence that begins with the name of the field.
    """
    unit, choices = about["unit"], {name: about[name] for name in ("whole", "zero")}
    number = read_quantity(text, unit, clock_hz=clock_hz, longest=about["longest"])
    value = int(number) if about["whole"] and number.denominator == 1 else real(number)
    least, most = about["least"], about["most"]

    def fits(size: float) -> bool:
        return is_allowed(size, least, most, **choices)

    if fits(value):
        return value
    slip = text_slip(text, unit, fits, about["default"], clock_hz)
    raise ValueError(
        f"must be {describe_range(least, most, unit, **choices)}, not {text[:SHOWN]!r}"
        f"{f'; did you mean {slip}' if slip else ''}"
    )


def to_values(value: Any) -> Any:
    """Returns a record as values that JSON can hold: records become dictionaries of their fields.

    Args:
        value: A dataclass, a named tuple, a dictionary, list or tuple of them, or any other value,
            which stays as it is.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: to_values(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_values(value._asdict())
    if isinstance(value, dict):
        return {key: to_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_values(part) for part in value]
    return value
