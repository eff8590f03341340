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
COUNT_MOST = 2**24  # that float32 holds exactly, as it does all below
REAL_MOST = 1e30  # whose products with other quantities are finite
# a number, or an array with one for each design, request or channel: what arithmetic makes of
# records
Number = Any


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree of its fields.

    Its `__post_init__` checks what a person makes; what JAX makes of one (arrays, tracers, the axes
    of a `vmap`) is not checked.
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
    """The same number as JAX can take it: whole ones in 32 bits."""
    return real(number) if isinstance(number, int) and abs(number) > INT32_MOST else number


def real(number: Any) -> float:
    """A number as a floating-point one; infinite where it is too large."""
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
) -> Any:
    """A field of a record that is one number: its default, its unit, where the default comes from,
    and the least and the most that it may be (COUNT_MOST or REAL_MOST, if not given).
    """
    most = most if most is not None else COUNT_MOST if whole else REAL_MOST
    return field(
        default=default,
        metadata={"unit": unit, "source": source, "least": least, "most": most, "whole": whole},
    )


class Field(NamedTuple):
    """One number of a record: its dotted name, its value, and what `quantity` says of it."""

    name: str
    value: Any
    unit: str
    source: str
    least: float
    most: float
    whole: bool


def describe(value: Any, prefix: str = "") -> Iterator[Field]:
    """Every number of a record and of the records in it."""
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
    """Raises ValueError, naming the field, unless every plain number of the record is one, and
    between its least and its most.

    Arrays pass: in a batch of designs a wrong row is flagged by its result, not refused with all
    others.
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
    """What a quantity must be instead of what it is, in words; the most where it is not the usual
    one, or is exceeded.
    """
    text, kind = repr(number), "a whole number" if whole else "a number"
    said = most < math.inf and (
        most not in (COUNT_MOST, REAL_MOST)
        or (isinstance(number, numbers.Real) and real(number) > most)
    )
    short = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return f"{kind} of at least {least:g}{f' and at most {most:.9g}' if said else ''}, not {short}"


def replace(value: T, name: str, new: Any) -> T:
    """The record with the field of this dotted name changed, checked again.

    Raises:
        ValueError: there is no such field (the sentence lists those there are), or the value is
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
