"""Losses of descriptor learning, of descriptors, their labels and one proxy for each class.

Descriptors are `(b, d)` of any length, labels `(b,)`, and proxies, which are learned with the
network, `(classes, d)`. Descriptors and proxies are L2-normalised first, in float32, so that every
similarity is a cosine. The functions are pure and work under `jit`, `grad` and on sharded arrays.
Labels are not compared with the number of classes: under `jit` their values are not known.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ggem_jax.pooling import l2_normalize

LossName = Literal["normalised-softmax", "arcface", "proxy-anchor"]

_LEAST_SQUARE = 1e-12  # of 1 - cos^2: the square root has no slope at 0


def normalised_softmax_loss(
    descriptors: Float[Array, "b d"],
    labels: Int[Array, " b"],
    proxies: Float[Array, "classes d"],
    *,
    temperature: float = 0.05,
) -> Float[Array, ""]:
    """Returns the cross-entropy of cosines over a temperature.

    Args:
        descriptors: Descriptors of any length, `(b, d)`.
        labels: Their classes, `(b,)`, from 0.
        proxies: One vector for each class, `(classes, d)`.
        temperature: Divides the cosines; the default is the paper's.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: The shapes do not fit, or the temperature is not positive.

    Reference: Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning", 2019,
        arXiv:1811.12649, eq. 4.

    Example:
        >>> descriptors, proxies = jnp.eye(3), jnp.eye(3)
        >>> print(f"{normalised_softmax_loss(descriptors, jnp.array([0, 1, 1]), proxies):.4f}")
        6.6667
    """
    _check("temperature", temperature, temperature > 0)
    return _cross_entropy(_cosines(descriptors, labels, proxies) / temperature, labels)


def arcface_loss(
    descriptors: Float[Array, "b d"],
    labels: Int[Array, " b"],
    proxies: Float[Array, "classes d"],
    *,
    scale: float = 64.0,
    margin: float = 0.5,
) -> Float[Array, ""]:
    """Returns ArcFace's loss: the cross-entropy of scaled cosines with an angular margin.

    The logit of the own class is scale cos(angle + margin), of every other class scale cos(angle).
    Where angle + margin exceeds pi, cos(angle) - margin sin(margin) keeps the logit falling with
    the angle, as in the authors' code.

    Args:
        descriptors: Descriptors of any length, `(b, d)`.
        labels: Their classes, `(b,)`, from 0.
        proxies: One vector for each class, `(classes, d)`.
        scale: Factor of the cosines.
        margin: Added to the angle of the own class, radians, from 0 to pi / 2.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: The shapes do not fit, or scale or margin is out of range.

    Reference: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019,
        arXiv:1801.07698, eq. 3.

    Example:
        >>> descriptors, proxies = jnp.eye(3), jnp.eye(3)
        >>> print(f"{arcface_loss(descriptors, jnp.array([0, 1, 1]), proxies, scale=8.0):.4f}")
        3.9464
    """
    _check("scale", scale, scale > 0)
    _check("margin", margin, 0 <= margin <= np.pi / 2)
    cosines = _cosines(descriptors, labels, proxies)
    own = jnp.take_along_axis(cosines, labels[:, None], axis=1)
    sines = jnp.sqrt(jnp.maximum(1 - own**2, _LEAST_SQUARE))
    shifted = own * np.cos(margin) - sines * np.sin(margin)  # cos(angle + margin)
    shifted = jnp.where(own > np.cos(np.pi - margin), shifted, own - margin * np.sin(margin))
    is_own = jnp.arange(len(proxies)) == labels[:, None]
    return _cross_entropy(scale * jnp.where(is_own, shifted, cosines), labels)


def proxy_anchor_loss(
    descriptors: Float[Array, "b d"],
    labels: Int[Array, " b"],
    proxies: Float[Array, "classes d"],
    *,
    scale: float = 32.0,
    margin: float = 0.1,
) -> Float[Array, ""]:
    """Returns Proxy-Anchor's loss, which pulls the own descriptors to each proxy, others away.

    With P the proxies that have a descriptor of their class in the batch it is mean over P of
    log(1 + sum_own exp(-scale (cos - margin))) plus mean over all proxies of log(1 + sum_other
    exp(scale (cos + margin))), in which the hardest descriptors weigh most. It depends on the batch
    as a whole: the mean over parts of a batch is another loss.

    Args:
        descriptors: Descriptors of any length, `(b, d)`.
        labels: Their classes, `(b,)`, from 0.
        proxies: One vector for each class, `(classes, d)`.
        scale: Factor of the cosines.
        margin: How far own cosines should exceed, and others stay below, 0.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: The shapes do not fit, or the scale is not positive.

    Reference: Kim et al., "Proxy Anchor Loss for Deep Metric Learning", 2020, arXiv:2003.13911,
        eq. 4.

    Example:
        >>> descriptors, proxies = jnp.eye(3), jnp.eye(3)
        >>> print(f"{proxy_anchor_loss(descriptors, jnp.array([0, 1, 1]), proxies):.4f}")
        15.7377
    """
    _check("scale", scale, scale > 0)
    cosines = _cosines(descriptors, labels, proxies)
    is_own = jnp.arange(len(proxies)) == labels[:, None]
    pull = _log_one_plus_sum(-scale * (cosines - margin), is_own)
    push = _log_one_plus_sum(scale * (cosines + margin), ~is_own)
    # a proxy without a descriptor of its class adds log 1 to the pull
    return pull.sum() / jnp.maximum(is_own.any(axis=0).sum(), 1) + push.mean()


LOSSES: dict[LossName, Callable[..., Array]] = {
    "normalised-softmax": normalised_softmax_loss,
    "arcface": arcface_loss,
    "proxy-anchor": proxy_anchor_loss,
}


def _log_one_plus_sum(
    exponents: Float[Array, "b classes"], kept: Array
) -> Float[Array, " classes"]:
    """log(1 + sum_b exp(exponents_b)), over the kept entries."""
    return jax.nn.softplus(jax.nn.logsumexp(jnp.where(kept, exponents, -1e30), axis=0))


def _cross_entropy(logits: Float[Array, "b classes"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def _cosines(descriptors, labels, proxies) -> Float[Array, "b classes"]:
    """Checks the shapes; returns the cosine of each descriptor and each proxy."""
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
