"""The kernels as bodies of the operations in `ggem_jax.pooling`: the same arguments and results.

Every body takes `implementation`, "triton" or "interpret", first. Kernels are imported when they
are called: they need triton.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ggem_jax.kernels.tiles import MOST_COLUMNS, MOST_NORM_CHANNELS, MOST_TOKENS
from ggem_jax.pooling.dispatch import over_rows
from ggem_jax.pooling.sign_rules import RULES, Negatives

EIGHTH = 0.125  # of the root is what the gradient keeps: see `ggem_jax.pooling`
_DTYPES = ("float32", "bfloat16", "float16")


def refusal(tokens: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the power-mean kernel cannot take these tokens, or None."""
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
    # The kernel scales by the largest entry of the map, of which the mixed map has half or more:
    # (1/2)^90 / 2^31 is still a normal number.
    if p > 90:
        return f"the fused regional GeM takes p up to 90, not {p}"
    # By the largest entry of the map: (1e-9)^4 is still above what is rounded to zero.
    if regional_p > 4:
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
    tokens: Float[Array, "*b n d"],
    p: Float[Array, " d"],
    mask: Bool[Array, "*b n"] | None,
    *,
    eps: float,
    negatives: str,
) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
    """Pooled value, and an eighth of the root for the gradient."""
    from ggem_jax.kernels import ggem

    scale, low = _scale(negatives), _lowest(tokens, mask, negatives)
    body = partial(ggem.pool, eps=scale * eps, negatives=negatives, implementation=implementation)
    (root,) = _on_rows(
        implementation, lambda *arrays: (body(*arrays),), (tokens, 2), p[None], (mask, 1), (low, 1)
    )
    if low is None:
        return root, EIGHTH * root
    return _where_any(mask, (root + low - EIGHTH * eps) / EIGHTH), root


def power_mean_gradient(
    implementation: str, tokens: Float[Array, "*b n d"], p: Float[Array, " d"], mask: Bool[Array,
    "*b n"] | None, root: Float[Array, "*b d"],
    cotangent: Float[Array, "*b d"], *, eps: float, negatives: str,
) -> tuple[Float[Array, "*b n d"], Float[Array, "*b d"]]:  # fmt: skip
    """Cotangents of the tokens and, row by row, of p; `root` is an eighth of it, `cotangent` that
    of the pooled value.
    """
    from ggem_jax.kernels import ggem

    scale = _scale(negatives)
    low, by_low = jax.vjp(lambda tokens: _lowest(tokens, mask, negatives), tokens)
    body = partial(
        ggem.gradient, eps=scale * eps, negatives=negatives, implementation=implementation
    )
    cotangent = _where_any(mask, cotangent)
    by_tokens, by_rest = _on_rows(
        implementation,
        body,
        (tokens, 2),
        p[None],
        (mask, 1),
        (low, 1),
        (root / EIGHTH * scale, 1),
        (cotangent / scale, 1),
    )
    if low is not None:
        by_tokens += by_low(by_rest[..., 1, :] + cotangent / scale)[0]
    return by_tokens, by_rest[..., 0, :]


def norm_power_mean(
    implementation: str, tokens: Float[Array, "*b n d"], scale: Float[Array, " d"],
    bias: Float[Array, " d"], p: Float[Array, " d"],
    mask: Bool[Array, "*b n"] | None, *, norm_eps: float, eps: float, negatives: str,
) -> tuple[Float[Array, "*b d"], Float[Array, "*b 2 n"]]:  # fmt: skip
    """Pooled value, and mean and 1 / deviation of every token."""
    from ggem_jax.kernels import norm_ggem

    body = partial(
        norm_ggem.pool,
        norm_eps=norm_eps,
        eps=eps,
        negatives=negatives,
        implementation=implementation,
    )
    return _on_rows(implementation, body, (tokens, 2), scale[None], bias[None], p[None], (mask, 1))


def norm_power_mean_gradient(
    implementation: str, tokens: Float[Array, "*b n d"], scale: Float[Array, " d"],
    bias: Float[Array, " d"], p: Float[Array, " d"],
    mask: Bool[Array, "*b n"] | None, root: Float[Array, "*b d"], statistics: Float[Array,
    "*b 2 n"], cotangent: Float[Array, "*b d"],
    *, eps: float, negatives: str,
) -> tuple[Float[Array, "*b n d"], Float[Array, "*b 3 d"]]:  # fmt: skip
    """Cotangents of the tokens and, row by row, of p, scale and bias."""
    from ggem_jax.kernels import norm_ggem

    body = partial(norm_ggem.gradient, eps=eps, negatives=negatives, implementation=implementation)
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
    """Regional GeM, then GeM+."""
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
    """Calls a kernel on flat rows. An argument is `(array, its own axes)`, or parameters as one
    set; arrays may be None.
    """
    leading = arguments[0][0].shape[: -arguments[0][1]]
    flat = [_flat(*argument) if isinstance(argument, tuple) else argument for argument in arguments]
    sets = [i for i, argument in enumerate(arguments) if not isinstance(argument, tuple)]
    outputs = over_rows(body, flat, sets, spread=implementation == "triton")
    return tuple(output.reshape(*leading, *output.shape[1:]) for output in outputs)


def _flat(array, own_axes):
    return None if array is None else array.reshape(-1, *array.shape[array.ndim - own_axes :])


def _scale(negatives):
    """The kernel of the sign rule "shift" works on eighths."""
    return EIGHTH if negatives == "shift" else 1.0


def _lowest(tokens, mask, negatives):
    """What the sign rule "shift" subtracts from an eighth of the tokens, `(..., d)`; None for the
    other rules.
    """
    if negatives != "shift":
        return None
    x = EIGHTH * tokens.astype(jnp.float32)
    return _where_any(
        mask, jnp.min(x if mask is None else jnp.where(mask[..., None], x, jnp.inf), axis=-2)
    )


def _where_any(mask, values):
    return values if mask is None else jnp.where(jnp.any(mask, axis=-1)[..., None], values, 0)
