"""Frozen records that JAX maps over."""

import dataclasses
import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax

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


def quantity(
    default: float,
    unit: str,
    source: str,
    *,
    least: float = 0,
    most: float | None = None,
    whole: bool = False,
    simulator: str | None = None,
) -> Any:
    """Returns a dataclass field that is one number.

    Args:
        default: Its default.
        unit: Its unit, in words.
        source: Where the default comes from: a file, paper or data sheet.
        least: The smallest value that is allowed.
        most: The largest value that is allowed (default: COUNT_MOST for whole numbers, else
            REAL_MOST).
        whole: Whether it must be a whole number.
        simulator: Its name in the memory files of the public simulator, if it has one there with
            the same unit.
    """
    most = most if most is not None else COUNT_MOST if whole else REAL_MOST
    metadata = {"unit": unit, "source": source, "least": least, "most": most, "whole": whole}
    return field(default=default, metadata=metadata | {"simulator": simulator})


class Field(NamedTuple):
    """One number of a record, as `describe` lists it."""

    name: str  # dotted
    value: Any  # a number, or an array in a batch
    unit: str  # in words
    source: str  # of the default
    least: float  # the smallest value that is allowed
    most: float  # the largest value that is allowed
    whole: bool  # whether it must be a whole number


def describe(value: Any, prefix: str = "") -> Iterator[Field]:
    """Yields every number of a record and of the records in it.

    Args:
        value: A record whose fields are made by `quantity` or are such records.
        prefix: Text before each dotted name.
    """
    for each in fields(value):
        number, data = getattr(value, each.name), each.metadata
        if is_dataclass(number):
            yield from describe(number, f"{prefix}{each.name}.")
        else:
            yield Field(
                f"{prefix}{each.name}",
                number,
                data["unit"],
                data["source"],
                data["least"],
                data["most"],
                data["whole"],
            )


def check_quantities(value: Any, group: str) -> None:
    """Raises unless every plain number of the record is a number within its limits.

    Arrays pass: in a batch of designs the result flags a wrong row, and the others stay valid.

    Args:
        value: A record whose fields are made by `quantity`.
        group: Name before that of the field in an error, such as "hbm".

    Raises:
        ValueError: A field is not a number, or is too small, too large or not whole; the sentence
            names it.
    """
    for each in fields(value):
        number = getattr(value, each.name)
        if isinstance(number, bool) or not isinstance(number, (numbers.Real, str)):
            if not hasattr(number, "dtype"):
                raise ValueError(f"{group}.{each.name} must be a number, not {number!r}")
            continue
        least, most, whole = (each.metadata[name] for name in ("least", "most", "whole"))
        if (
            isinstance(number, str)
            or not least <= real(number) <= most
            or (whole and real(number) % 1 != 0)
        ):
            raise ValueError(f"{group}.{each.name} must be {instead(number, least, most, whole)}")


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
    text, kind = repr(number), "a whole number" if whole else "a number"
    said = most < math.inf and (
        most not in (COUNT_MOST, REAL_MOST)
        or (isinstance(number, numbers.Real) and real(number) > most)
    )
    short = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return f"{kind} of at least {least:g}{f' and at most {most:.9g}' if said else ''}, not {short}"


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
        new: Its value.

    Raises:
        ValueError: The field does not exist (the sentence lists those that do), or the value is
            impossible.
    """
    head, _, rest = name.partition(".")
    names = [each.name for each in fields(value)]  # type: ignore[arg-type]
    if head not in names:
        raise ValueError(f"there is no field {head!r}; there are {', '.join(names)}")
    inner = getattr(value, head)
    if rest:
        if not is_dataclass(inner):
            raise ValueError(f"{head!r} is a number and has no field {rest!r}")
        new = replace(inner, rest, new)
    elif is_dataclass(inner):
        raise ValueError(
            f"{head!r} is a group; name one of its fields,"
            f" {', '.join(f'{head}.{each.name}' for each in fields(inner))}"
        )
    return dataclasses.replace(value, **{head: new})  # type: ignore[type-var]


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
