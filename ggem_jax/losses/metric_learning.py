"""Losses of descriptor learning: descriptors `(b, d)` of any length, labels `(b,)`, and one learned
proxy `(d,)` for each class, to a scalar.

Descriptors and proxies are L2-normalised first, in float32, so that every similarity is a cosine.
Pure functions, for use under `jit`, `grad` and on sharded arrays. What is passed in is not checked
for labels out of range: they would be clipped.

Errors: `ValueError` for shapes that do not fit and settings out of range.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ggem_jax.pooling import l2_normalize

_BEYOND = 1e-12  # of 1 - cos^2, whose root has no slope at 0


def normalised_softmax(
    descriptors: Float[Array, "b d"],
    labels: Int[Array, " b"],
    proxies: Float[Array, "classes d"],
    *,
    temperature: float = 0.05,
) -> Float[Array, ""]:
    """Cross-entropy of cosines over a temperature.

    Reference: Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning", 2019,
        arXiv:1811.12649, eq. 4.
    """
    _check("temperature", temperature, temperature > 0)
    return _cross_entropy(_cosines(descriptors, labels, proxies) / temperature, labels)


def arcface(
    descriptors: Float[Array, "b d"],
    labels: Int[Array, " b"],
    proxies: Float[Array, "classes d"],
    *,
    scale: float = 64.0,
    margin: float = 0.5,
) -> Float[Array, ""]:
    """Cross-entropy of scaled cosines, the angle to the own class widened by a margin in radians.

    Where angle and margin together pass pi, cos(angle) - margin sin(margin) keeps the logit falling
    with the angle, as in the authors' code. Margins go up to pi / 2.
    Reference: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019,
        arXiv:1801.07698, eq. 3.
    """
    _check("scale", scale, scale > 0)
    _check("margin", margin, 0 <= margin <= np.pi / 2)
    cosines = _cosines(descriptors, labels, proxies)
    own = jnp.take_along_axis(cosines, labels[:, None], axis=1)
    widened = own * np.cos(margin) - jnp.sqrt(jnp.maximum(1 - own**2, _BEYOND)) * np.sin(margin)
    widened = jnp.where(own > np.cos(np.pi - margin), widened, own - margin * np.sin(margin))
    is_own = jnp.arange(len(proxies)) == labels[:, None]
    return _cross_entropy(scale * jnp.where(is_own, widened, cosines), labels)


def proxy_anchor(
    descriptors: Float[Array, "b d"],
    labels: Int[Array, " b"],
    proxies: Float[Array, "classes d"],
    *,
    scale: float = 32.0,
    margin: float = 0.1,
) -> Float[Array, ""]:
    """Pulls the batch's own descriptors towards each proxy and pushes all others away, the hardest
    most.

    Depends on the batch as a whole: the mean over parts of it is another loss.
    Reference: Kim et al., "Proxy Anchor Loss for Deep Metric Learning", 2020, arXiv:2003.13911, eq.
        4.
    """
    _check("scale", scale, scale > 0)
    cosines = _cosines(descriptors, labels, proxies)
    is_own = jnp.arange(len(proxies)) == labels[:, None]
    pull = _log_one_plus_sum(-scale * (cosines - margin), is_own)
    push = _log_one_plus_sum(scale * (cosines + margin), ~is_own)
    return (
        pull.sum() / jnp.maximum(is_own.any(axis=0).sum(), 1) + push.mean()
    )  # proxies without a descriptor of theirs add log 1 to the pull


LOSSES: dict[str, Callable[..., Array]] = {
    "normalised-softmax": normalised_softmax,
    "arcface": arcface,
    "proxy-anchor": proxy_anchor,
}


def _log_one_plus_sum(
    exponents: Float[Array, "b classes"], kept: Array
) -> Float[Array, " classes"]:
    """log(1 + the sum over the batch of exp of what is kept)."""
    return jax.nn.softplus(jax.nn.logsumexp(jnp.where(kept, exponents, -1e30), axis=0))


def _cross_entropy(logits: Float[Array, "b classes"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def _cosines(descriptors, labels, proxies) -> Float[Array, "b classes"]:
    if (
        descriptors.ndim != 2
        or proxies.ndim != 2
        or descriptors.shape[1] != proxies.shape[1]
        or labels.shape != descriptors.shape[:1]
    ):
        shapes = f"{descriptors.shape}, {labels.shape} and {proxies.shape}"
        raise ValueError(
            "descriptors (b, d), labels (b,) and proxies (classes, d) are needed, not shapes"
            f" {shapes}"
        )
    one, other = (l2_normalize(x.astype(jnp.float32)) for x in (descriptors, proxies))
    return jnp.einsum("bd,cd->bc", one, other, precision="highest")


def _check(name: str, value: float, fulfilled: bool) -> None:
    if not fulfilled:
        raise ValueError(f"{name} is out of range: {value}")
