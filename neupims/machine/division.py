"""Exact quotients of whole numbers in compiled code.

XLA may compute `a / b` as `a * (1 / b)`, with the reciprocal rounded, where one `b` divides many
`a`: compiled, 735 / 105 can be 7.0000005, and its ceiling 8. The functions here correct the
quotient with a product, which is exact. Use them wherever a quotient is rounded to a whole number,
or must be one:

    ceil_divide(length, lanes)      not jnp.ceil(length / lanes)
    floor_divide(room, period)      not jnp.floor(room / period)
    divide(model.width, heads)      where heads normally divide the width

Plain `/` stays right for rates, times and shares, where an error of 1e-7 does not matter. All
functions broadcast, and can be jitted, mapped and differentiated as `/` can.
"""

import jax.numpy as jnp

from neupims.machine.record import Number


def divide(dividend: Number, divisor: Number) -> Number:
    """Returns the quotient, exactly where it is whole.

    Args:
        dividend: Whole numbers below 2^24 in magnitude, or any number.
        divisor: The same; the quotient by 0 is that of `/`.

    Example:
        >>> float(divide(735, 105))
        7.0
    """
    dividend, divisor = 1.0 * dividend, 1.0 * divisor
    quotient = jnp.asarray(dividend / jnp.asarray(divisor))
    whole = jnp.round(quotient)
    return jnp.where(whole * divisor == dividend, whole, quotient)


def ceil_divide(dividend: Number, divisor: Number) -> Number:
    """Returns the least whole number that is not less than the quotient.

    Args:
        dividend: Whole numbers below 2^24 in magnitude; other numbers are subject to rounding.
        divisor: Whole numbers of at least 1; the quotient by 0 is that of `/`.

    Example:
        >>> float(ceil_divide(735, 105)), float(ceil_divide(736, 105))
        (7.0, 8.0)
    """
    dividend, divisor = 1.0 * dividend, 1.0 * divisor
    nearest = jnp.round(dividend / jnp.asarray(divisor))
    return jnp.where(nearest * divisor < dividend, nearest + 1, nearest)


def floor_divide(dividend: Number, divisor: Number) -> Number:
    """Returns the largest whole number that is not more than the quotient.

    Args:
        dividend: Whole numbers below 2^24 in magnitude; other numbers are subject to rounding.
        divisor: Whole numbers of at least 1; the quotient by 0 is that of `/`.

    Example:
        >>> float(floor_divide(735, 105)), float(floor_divide(734, 105))
        (7.0, 6.0)
    """
    dividend, divisor = 1.0 * dividend, 1.0 * divisor
    nearest = jnp.round(dividend / jnp.asarray(divisor))
    return jnp.where(nearest * divisor > dividend, nearest - 1, nearest)
