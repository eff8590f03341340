"""Time as whole nanoseconds in two 32-bit words: exact for 68 years.

float32 resolves 0.24 ms after an hour, and JAX computes in 32 bits unless told otherwise. An
instant is `high * 2^30 + low` nanoseconds, with `low` from 0 to 2^30 - 1.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from neupims.machine.record import Number

LOW_BITS = 30
LOW = 2**LOW_BITS
PART_OF_LOW = 1.0 / LOW  # a power of two, so that products with it are exact


class Instant(NamedTuple):
    """An instant, or a duration that is not negative; any shape."""

    high: Number
    low: Number


def add(one: Instant, other: Instant) -> Instant:
    """Returns the sum of two instants.

    Args:
        one: An instant.
        other: A duration.
    """
    low = one.low + other.low
    return Instant(one.high + other.high + (low >> LOW_BITS), low & (LOW - 1))


def is_after(one: Instant, other: Instant) -> Bool[Array, "..."]:
    """Returns whether an instant is later than another one.

    Args:
        one: An instant.
        other: Another instant; shapes broadcast.
    """
    return (one.high > other.high) | ((one.high == other.high) & (one.low > other.low))


def where(condition: Bool[Array, "..."], one: Instant, other: Instant) -> Instant:
    """Returns one instant where a condition holds, else the other.

    Args:
        condition: The condition.
        one: The instant where it holds.
        other: The instant where it does not hold.
    """
    return Instant(*(jnp.where(condition, a, b) for a, b in zip(one, other, strict=True)))


def from_seconds(seconds: Number) -> Instant:
    """Returns a duration, rounded to a nanosecond as far as float32 resolves the seconds.

    Args:
        seconds: Seconds, not negative, as float32.
    """
    nanoseconds = jnp.asarray(seconds, jnp.float32) * 1e9
    high = jnp.floor(nanoseconds * PART_OF_LOW)
    low = jnp.round(nanoseconds - high * LOW).astype(jnp.int32)
    return add(Instant(high.astype(jnp.int32), low), Instant(jnp.int32(0), jnp.int32(0)))


def split(nanoseconds: Int[np.ndarray, "..."]) -> Instant:
    """Returns instants from whole nanoseconds in 64 bits.

    Args:
        nanoseconds: Whole nanoseconds, as NumPy has them.
    """
    high, low = np.divmod(np.asarray(nanoseconds, np.int64), LOW)
    return Instant(np.asarray(high, np.int32), np.asarray(low, np.int32))


def join(instant: Instant) -> Int[np.ndarray, "..."]:
    """Returns the whole nanoseconds of instants, in 64 bits.

    Args:
        instant: Instants.
    """
    high, low = (np.asarray(part, np.int64) for part in instant)
    return high * LOW + low
