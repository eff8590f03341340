"""Arithmetic over the kept tokens of values `(..., n, d)`; a mask is `(..., n)`, true = keep.

A row that keeps nothing has a count of 1, so that nothing is divided by zero.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Mask = Bool[Array, "*b n"] | None


def widen(tokens: Float[Array, "*b n d"]) -> Float[Array, "*b n d"]:
    """Returns values in the dtype that the mathematics is done in: float32, or float64 for float64.

    Args:
        tokens: Floating-point values of any shape, such as tokens `(..., n, d)`.
    """
    return tokens.astype(jnp.float64 if tokens.dtype == jnp.float64 else jnp.float32)


def lift(per_channel: Float[Array, " d"], values: Float[Array, "*b d"]) -> Float[Array, "... d"]:
    """Returns one number per channel with leading axes of length 1, to broadcast against `values`.

    Args:
        per_channel: One number for each channel, `(d,)`.
        values: An array `(..., d)` with as many axes as the result gets.

    Returns:
        The numbers, `(1, ..., 1, d)`.
    """
    return jnp.expand_dims(per_channel, range(values.ndim - 1))


def keep(values: Array, mask: Mask, fill: float) -> Array:
    """Returns the values with `fill` in place of the tokens that the mask drops.

    Args:
        values: One row for each token, `(..., n, d)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        fill: The number for every channel of the other tokens.

    Returns:
        The values, `(..., n, d)`.
    """
    return values if mask is None else jnp.where(mask[..., None], values, fill)


def where_any(mask: Mask, values: Array, otherwise: float = 0) -> Array:
    """Returns the values in the rows that keep a token, and `otherwise` in the rest.

    Args:
        mask: Which tokens are kept, `(..., n)`; None keeps all.
        values: One vector for each row, `(..., d)`.
        otherwise: The number for every channel of a row that keeps nothing.

    Returns:
        The values, `(..., d)`.
    """
    if mask is None:
        return values
    return jnp.where(jnp.any(mask, axis=-1)[..., None], values, otherwise)


def count(values: Array, mask: Mask) -> int | Array:
    """Returns how many tokens each row keeps, at least 1.

    Args:
        values: An array `(..., n, d)`, whose n is the count without a mask.
        mask: Which tokens to keep, `(..., n)`; None keeps all.

    Returns:
        The number n without a mask, else the counts, `(..., 1)`, in the dtype of `values`.
    """
    if mask is None:
        return values.shape[-2]
    return jnp.maximum(jnp.sum(mask, axis=-1), 1)[..., None].astype(values.dtype)


def mean_of_kept(values: Array, mask: Mask) -> Array:
    """Returns the mean over the kept tokens; a row that keeps nothing gives zeros.

    Args:
        values: One row for each token, `(..., n, d)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.

    Returns:
        The means, `(..., d)`.
    """
    return jnp.sum(keep(values, mask, 0), axis=-2) / count(values, mask)
