"""The kernels as bodies of the operations in `ggem_jax.pooling`, with the arguments of plain JAX.

Every body takes `implementation`, "triton" or "interpret", first. All results are float32, except
the cotangents of tokens, which have their dtype. Kernels are imported when they are called, because
they need triton.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ggem_jax.kernels.tiles import MOST_COLUMNS, MOST_NORM_CHANNELS, MOST_TOKENS
from ggem_jax.pooling.dispatch import over_rows
from ggem_jax.pooling.sign_rules import RULES, Negatives

EIGHTH = 0.125  # all numbers are computed as eighths: see `ggem_jax.pooling.power_mean`
_DTYPES = ("float32", "bfloat16", "float16")


def refusal(tokens: Array | jax.ShapeDtypeStruct) -> str | None:
    """Returns why the power-mean kernel cannot take the tokens, or None if it can.

    Args:
        tokens: The tokens, `(..., n, d)`, or a record of their shape and dtype.

    Returns:
        One sentence that an error can say, or None.
    """
    if tokens.dtype.name not in _DTYPES:
        return f"the kernels take {', '.join(_DTYPES)}, not {tokens.dtype}: cast the tokens"
    if tokens.shape[-2] > MOST_TOKENS:
        return f"the kernels take at most {MOST_TOKENS} tokens, not {tokens.shape[-2]}"
    if tokens.shape[-2] * tokens.shape[-1] >= 2**31:
        return (
            f"the kernels take rows of fewer than 2^31 elements, not {tokens.shape[-2]} x"
            f" {tokens.shape[-1]}"
        )
    return "the kernels take at least one row" if tokens.size == 0 else None


def norm_refusal(tokens: Array, negatives: Negatives) -> str | None:
    """Returns why the kernel of norm and power mean cannot take the tokens, or None if it can.

    Args:
        tokens: The tokens before the norm, `(..., n, d)`.
        negatives: The sign rule by name; the kernel has every rule that adds no offset.

    Returns:
        One sentence that an error can say, or None.
    """
    if RULES[negatives].adds_offset:
        fit = ", ".join(name for name, rule in RULES.items() if not rule.adds_offset)
        return (
            f"the fused norm has the sign rules {fit}, not {negatives}: normalise first and use"
            " ggem_pool"
        )
    if tokens.shape[-1] > MOST_NORM_CHANNELS:
        return (
            f"the fused norm takes at most {MOST_NORM_CHANNELS} channels, not {tokens.shape[-1]}:"
            " normalise first and use ggem_pool"
        )
    return refusal(tokens)


def superglobal_refusal(feature_map: Array, regional_p: float, window: int, p: float) -> str | None:
    """Returns why the fused regional GeM cannot take a feature map, or None if it can.

    Args:
        feature_map: The map, `(..., h, w, d)`.
        regional_p: Exponent over the window.
        window: Odd side of the window, in places of the map.
        p: Exponent of GeM+ over all places.

    Returns:
        One sentence that an error can say, or None.
    """
    # The kernel scales by the largest entry of the map. The largest of the mixed map is half of it
    # or more: (1/2)^90 / 2^31 is still a normal number.
    if p > 90:
        return f"the fused regional GeM takes p up to 90, not {p}"
    if regional_p > 4:  # (1e-9)^4 is still above the numbers that are rounded to zero
        return f"the fused regional GeM takes regional_p up to 4, not {regional_p}"
    if window > 7:
        return f"the fused regional GeM takes windows up to 7, not {window}"
    if feature_map.shape[-2] > MOST_COLUMNS:
        return (
            f"the fused regional GeM takes maps up to {MOST_COLUMNS} columns wide, not"
            f" {feature_map.shape[-2]}"
        )
    h, w, d = feature_map.shape[-3:]
    return refusal(jax.ShapeDtypeStruct((*feature_map.shape[:-3], 1, h * w * d), feature_map.dtype))


def power_mean(
    implementation: str,
    tokens: Float[Array, "*b all d"],
    p: Float[Array, " d"],
    mask: Bool[Array, "*b n"] | None,
    *,
    skip: int,
    eps: float,
    negatives: str,
) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
    """Returns the power mean over n, and an eighth of the root for the gradient.

    Args:
        implementation: "triton" or "interpret".
        tokens: The tokens, `(..., skip + n, d)`.
        p: Exponents, `(d,)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        skip: Number of tokens at the start that are not pooled.
        eps: Smallest number that is raised to p.
        negatives: The sign rule.

    Returns:
        Both `(..., d)`.
    """
    from ggem_jax.kernels import ggem

    scale, low = _scale(negatives), _lowest(tokens, mask, skip, negatives)
    body = partial(
        ggem.pool, skip=skip, eps=scale * eps, negatives=negatives, implementation=implementation
    )
    (root,) = _on_rows(
        implementation, lambda *arrays: (body(*arrays),), (tokens, 2), p[None], (mask, 1), (low, 1)
    )
    if low is None:
        return root, EIGHTH * root
    return _where_any(mask, (root + low - EIGHTH * eps) / EIGHTH), root


def power_mean_gradient(
    implementation: str,
    tokens: Float[Array, "*b all d"],
    p: Float[Array, " d"],
    mask: Bool[Array, "*b n"] | None,
    root: Float[Array, "*b d"],
    cotangent: Float[Array, "*b d"],
    *,
    skip: int,
    eps: float,
    negatives: str,
) -> tuple[Float[Array, "*b all d"], Float[Array, "*b d"]]:
    """Returns the cotangents of the tokens and, for each row, of p.

    Args:
        implementation: "triton" or "interpret".
        tokens: The tokens, `(..., skip + n, d)`.
        p: Exponents, `(d,)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        root: An eighth of the root, from `power_mean`, `(..., d)`.
        cotangent: Cotangent of the pooled value, `(..., d)`.
        skip: Number of tokens at the start that are not pooled.
        eps: Smallest number that is raised to p.
        negatives: The sign rule.

    Returns:
        The cotangents of the tokens, `(..., skip + n, d)`, and of p, `(..., d)`.
    """
    from ggem_jax.kernels import ggem

    scale = _scale(negatives)
    low, by_low = jax.vjp(lambda tokens: _lowest(tokens, mask, skip, negatives), tokens)
    body = partial(
        ggem.gradient,
        skip=skip,
        eps=scale * eps,
        negatives=negatives,
        implementation=implementation,
    )
    cotangent = _where_any(mask, cotangent)
    per_row = (mask, 1), (low, 1), (root / EIGHTH * scale, 1), (cotangent / scale, 1)
    by_tokens, by_rest = _on_rows(implementation, body, (tokens, 2), p[None], *per_row)
    if low is not None:
        by_tokens += by_low(by_rest[..., 1, :] + cotangent / scale)[0]
    return by_tokens, by_rest[..., 0, :]


def norm_power_mean(
    implementation: str,
    tokens: Float[Array, "*b all d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    p: Float[Array, " d"],
    mask: Bool[Array, "*b n"] | None,
    *,
    skip: int,
    norm_eps: float,
    eps: float,
    negatives: str,
) -> tuple[Float[Array, "*b d"], Float[Array, "*b 2 n"]]:
    """Returns the power mean of layer-normalised tokens, and the statistics of the norm.

    Args:
        implementation: "triton" or "interpret".
        tokens: The tokens, `(..., skip + n, d)`.
        scale: Factor of the normalised tokens, `(d,)`.
        bias: Added to them, `(d,)`.
        p: Exponents, `(d,)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        skip: Number of tokens at the start that are not pooled.
        norm_eps: Added to the variance.
        eps: Smallest number that is raised to p.
        negatives: The sign rule.

    Returns:
        The pooled value, `(..., d)`, and mean and 1 / deviation of each token, `(..., 2, n)`.
    """
    from ggem_jax.kernels import norm_ggem

    body = partial(
        norm_ggem.pool,
        skip=skip,
        norm_eps=norm_eps,
        eps=eps,
        negatives=negatives,
        implementation=implementation,
    )
    return _on_rows(implementation, body, (tokens, 2), scale[None], bias[None], p[None], (mask, 1))


def norm_power_mean_gradient(
    implementation: str,
    tokens: Float[Array, "*b all d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    p: Float[Array, " d"],
    mask: Bool[Array, "*b n"] | None,
    root: Float[Array, "*b d"],
    statistics: Float[Array, "*b 2 n"],
    cotangent: Float[Array, "*b d"],
    *,
    skip: int,
    eps: float,
    negatives: str,
) -> tuple[Float[Array, "*b all d"], Float[Array, "*b 3 d"]]:
    """Returns the cotangents of the tokens and, for each row, of p, scale and bias.

    Args:
        implementation: "triton" or "interpret".
        tokens: The tokens, `(..., skip + n, d)`.
        scale: Factor of the normalised tokens, `(d,)`.
        bias: Added to them, `(d,)`.
        p: Exponents, `(d,)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        root: The pooled value, from `norm_power_mean`, `(..., d)`.
        statistics: Mean and 1 / deviation, from `norm_power_mean`, `(..., 2, n)`.
        cotangent: Cotangent of the pooled value, `(..., d)`.
        skip: Number of tokens at the start that are not pooled.
        eps: Smallest number that is raised to p.
        negatives: The sign rule.

    Returns:
        The cotangents of the tokens, `(..., skip + n, d)`, and of p, scale and bias, `(..., 3, d)`.
    """
    from ggem_jax.kernels import norm_ggem

    body = partial(
        norm_ggem.gradient,
        skip=skip,
        eps=eps,
        negatives=negatives,
        implementation=implementation,
    )
    per_row = (mask, 1), (root, 1), (statistics, 2), (_where_any(mask, cotangent), 1)
    return _on_rows(implementation, body, (tokens, 2), scale[None], bias[None], p[None], *per_row)


def superglobal(
    implementation: str,
    feature_map: Float[Array, "*b h w d"],
    *,
    regional_p: float,
    window: int,
    p: float,
    eps: float,
) -> tuple[Float[Array, "*b d"]]:
    """Returns the descriptor of a feature map: regional GeM, then GeM+, as a tuple of one.

    Args:
        implementation: "triton" or "interpret".
        feature_map: The map, `(..., h, w, d)`.
        regional_p: Exponent over the window.
        window: Odd side of the window.
        p: Exponent over all positions.
        eps: Smallest number that is raised to p.

    Returns:
        The descriptor, `(..., d)`.
    """
    from ggem_jax.kernels import regional_gem

    body = partial(
        regional_gem.pool,
        regional_p=regional_p,
        window=window,
        p=p,
        eps=eps,
        implementation=implementation,
    )
    return _on_rows(implementation, lambda maps: (body(maps),), (feature_map, 3))


def _on_rows(implementation, body, *arguments):
    """Calls a kernel on flat rows and gives its outputs the leading axes of the first argument.

    An argument is `(array or None, how many axes it has beside the leading ones)`, or an array of
    parameters as one set.
    """
    leading = arguments[0][0].shape[: -arguments[0][1]]
    flat = [_flat(*argument) if isinstance(argument, tuple) else argument for argument in arguments]
    sets = [i for i, argument in enumerate(arguments) if not isinstance(argument, tuple)]
    outputs = over_rows(body, flat, sets, spread=implementation == "triton")
    return tuple(output.reshape(*leading, *output.shape[1:]) for output in outputs)


def _flat(array, own_axes):
    """The array with its leading axes joined to one."""
    return None if array is None else array.reshape(-1, *array.shape[array.ndim - own_axes :])


def _scale(negatives):
    """The factor of the numbers in the kernel, which takes eighths for the sign rule "shift"."""
    return EIGHTH if negatives == "shift" else 1.0


def _lowest(tokens, mask, skip, negatives):
    """The lowest kept eighth of the tokens that are not skipped, `(..., d)`.

    The sign rule "shift" subtracts it; it is None for the other rules.
    """
    if negatives != "shift":
        return None
    x = EIGHTH * tokens[..., skip:, :].astype(jnp.float32)
    kept = x if mask is None else jnp.where(mask[..., None], x, jnp.inf)
    return _where_any(mask, jnp.min(kept, axis=-2))


def _where_any(mask, values):
    """`values` `(..., d)`, but zeros where no token is kept."""
    return values if mask is None else jnp.where(jnp.any(mask, axis=-1)[..., None], values, 0)
