"""Arithmetic over the kept tokens of values `(..., n, d)`; a mask is `(..., n)`, true = keep.

A row that keeps nothing has a count of 1, so that nothing is divided by zero.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Mask = Bool[Array, "*b n"] | None


def widen(tokens: Float[Array, "*b n d"]) -> Float[Array, "*b n d"]:
    """Returns the tokens in the dtype that the mathematics is done in: float32, or float64."""
    return tokens.astype(jnp.float64 if tokens.dtype == jnp.float64 else jnp.float32)


def lift(per_channel: Float[Array, " d"], values: Float[Array, "*b d"]) -> Float[Array, "... d"]:
    """Returns `(d,)` with leading axes of length 1, to go with `values` `(..., d)`."""
    return jnp.expand_dims(per_channel, range(values.ndim - 1))


def keep(values: Array, mask: Mask, fill: float) -> Array:
    """Returns the values with those of other tokens replaced by `fill`."""
    return values if mask is None else jnp.where(mask[..., None], values, fill)


def where_any(mask: Mask, values: Array, otherwise: float = 0) -> Array:
    """Returns `values` `(..., d)` in the rows that keep a token, `otherwise` in the rest."""
    if mask is None:
        return values
    return jnp.where(jnp.any(mask, axis=-1)[..., None], values, otherwise)


def count(values: Array, mask: Mask) -> int | Array:
    """Returns how many tokens are kept, at least 1: a number, or `(..., 1)` under a mask."""
    if mask is None:
        return values.shape[-2]
    return jnp.maximum(jnp.sum(mask, axis=-1), 1)[..., None].astype(values.dtype)


def mean_of_kept(values: Array, mask: Mask) -> Array:
    """Returns the mean over the kept tokens, `(..., d)`."""
    return jnp.sum(keep(values, mask, 0), axis=-2) / count(values, mask)
