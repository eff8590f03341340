"""Losses of image-text learning, CLIP's and SigLIP's, on one device or on a mesh of devices.

Descriptors are `(b, d)` of length 1. Row i of the images and row i of the texts are a pair; all
other combinations are negatives. The losses compute in float32, or in float64 where the
descriptors do.

References: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(CLIP), 2021, arXiv:2103.00020; Zhai et al., "Sigmoid Loss for Language Image Pre-Training"
(SigLIP), 2023, arXiv:2303.15343, whose section 3.3 passes the texts from device to device as here.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Descriptors = Float[Array, "b d"]
Loss = Float[Array, ""]


def clip_loss(images: Descriptors, texts: Descriptors, scale: ArrayLike) -> Loss:
    """Returns CLIP's loss: the mean cross-entropy of finding the text of each image, and back.

    With logits l_ij = scale images_i . texts_j it is mean_i (log sum_j exp l_ij + log sum_j exp
    l_ji - 2 l_ii) / 2.

    Args:
        images: Descriptors of the images, `(b, d)`, of length 1.
        texts: Descriptors of their texts, `(b, d)`, of length 1.
        scale: Factor of the similarities, the inverse of a temperature; exp(t) in the paper.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: The descriptors are not both `(b, d)` with b at least 1.

    Reference: Radford et al. (CLIP), 2021, arXiv:2103.00020, figure 3.

    Example:
        >>> images, texts = jnp.eye(4), jnp.eye(4)
        >>> print(f"{clip_loss(images, texts, 10.0):.6f}")
        0.000136
    """
    _check(images, texts)
    logits = _similarities(images, texts) * scale
    pairs = jnp.diagonal(logits)
    of_images, of_texts = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
    return jnp.mean(of_images + of_texts - 2 * pairs) / 2


def siglip_loss(images: Descriptors, texts: Descriptors, scale: ArrayLike, bias: ArrayLike) -> Loss:
    """Returns SigLIP's loss: the log-loss of telling pairs from others, summed over all, over b.

    With logits l_ij = scale images_i . texts_j + bias it is sum_ij log(1 + exp(-z_ij l_ij)) / b,
    where z_ij is 1 for a pair and -1 otherwise.

    Args:
        images: Descriptors of the images, `(b, d)`, of length 1.
        texts: Descriptors of their texts, `(b, d)`, of length 1.
        scale: Factor of the similarities; the paper starts at 10.
        bias: Added to all logits; the paper starts at -10, as most combinations are negatives.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: The descriptors are not both `(b, d)` with b at least 1.

    Reference: Zhai et al. (SigLIP), 2023, arXiv:2303.15343, algorithm 1.

    Example:
        >>> images, texts = jnp.eye(4), jnp.eye(4)
        >>> print(f"{siglip_loss(images, texts, 10.0, -5.0):.6f}")
        0.026861
    """
    _check(images, texts)
    return _sigmoid_block(images, texts, scale, bias, own=True) / len(images)


def sharded_clip_loss(
    images: Descriptors,
    texts: Descriptors,
    scale: ArrayLike,
    *,
    mesh: Mesh,
    axes: str | tuple[str, ...],
) -> Loss:
    """Returns `clip_loss` of descriptors that are split over the axes of a mesh.

    No device ever holds more than a block of (b / devices)^2 logits. Each device keeps its images,
    and the texts travel once around all devices: the sums over texts gather where the images are,
    the sums over images travel with the texts. The backward pass computes each block again. Value
    and gradient are those of `clip_loss`.

    Args:
        images: Descriptors of the images, `(b, d)`, rows split over `axes`.
        texts: Descriptors of their texts, likewise.
        scale: Factor of the similarities.
        mesh: The devices.
        axes: The axes of the mesh that the rows are split over.

    Returns:
        The loss, a scalar, the same on every device.

    Raises:
        ValueError: The mesh does not have the axes, or its devices do not divide b.
    """
    devices = _check_mesh(images, texts, mesh, axes)
    send = _sender(axes, devices)

    def local(images, texts, scale):
        # wide before they travel, so that their gradients are summed wide, too
        images, texts = _wide(images), _wide(texts)
        pairs = jnp.sum(images * texts, axis=1) * scale
        of_images, of_texts = _log_sums(images, texts, scale)

        def meet(carried, _):
            texts, of_texts, of_images = carried
            texts, of_texts = send(texts), send(of_texts)
            more_images, more_texts = _log_sums(images, texts, scale)
            of_texts = jnp.logaddexp(of_texts, more_texts)
            return (texts, of_texts, jnp.logaddexp(of_images, more_images)), None

        first = (texts, of_texts, of_images)
        (_, of_texts, of_images), _ = jax.lax.scan(meet, first, length=devices - 1)
        # the mean does not depend on where the texts end up
        return jax.lax.pmean(jnp.mean(of_images + of_texts - 2 * pairs) / 2, axes)

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(axes), P(axes), P()), out_specs=P())
    return spread(images, texts, jnp.asarray(scale))


def sharded_siglip_loss(
    images: Descriptors,
    texts: Descriptors,
    scale: ArrayLike,
    bias: ArrayLike,
    *,
    mesh: Mesh,
    axes: str | tuple[str, ...],
) -> Loss:
    """Returns `siglip_loss` of descriptors that are split over the axes of a mesh.

    The texts travel around the devices as in `sharded_clip_loss`. Value and gradient are those of
    `siglip_loss`.

    Args:
        images: Descriptors of the images, `(b, d)`, rows split over `axes`.
        texts: Descriptors of their texts, likewise.
        scale: Factor of the similarities.
        bias: Added to all logits.
        mesh: The devices.
        axes: The axes of the mesh that the rows are split over.

    Returns:
        The loss, a scalar, the same on every device.

    Raises:
        ValueError: The mesh does not have the axes, or its devices do not divide b.

    Reference: Zhai et al. (SigLIP), 2023, arXiv:2303.15343, section 3.3.
    """
    devices = _check_mesh(images, texts, mesh, axes)
    send = _sender(axes, devices)
    block = jax.checkpoint(_sigmoid_block, static_argnums=(4,))

    def local(images, texts, scale, bias):
        images, texts = _wide(images), _wide(texts)

        def meet(carried, _):
            texts, total = carried
            texts = send(texts)
            return (texts, total + block(images, texts, scale, bias, False)), None

        first = (texts, block(images, texts, scale, bias, True))
        (_, total), _ = jax.lax.scan(meet, first, length=devices - 1)
        return jax.lax.psum(total, axes) / (devices * len(images))

    specs = (P(axes), P(axes), P(), P())
    spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    return spread(images, texts, jnp.asarray(scale), jnp.asarray(bias))


def _wide(descriptors):
    return descriptors.astype(jnp.promote_types(descriptors.dtype, jnp.float32))


def _similarities(images, texts):
    # with a scale of 100, the error of a bfloat16 or TF32 product would be tenths of a logit
    return jnp.matmul(_wide(images), _wide(texts).T, precision="highest")


@jax.checkpoint
def _log_sums(images, texts, scale):
    """Log-sum-exp of a block of logits, over its texts and over its images."""
    logits = _similarities(images, texts) * scale
    return jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(logits, axis=0)


def _sigmoid_block(images, texts, scale, bias, own: bool):
    """Sums the losses of a block; in a device's own block the diagonal holds the true pairs."""
    logits = _similarities(images, texts) * scale + bias
    if own:
        logits = jnp.where(jnp.eye(len(images), dtype=bool), -logits, logits)
    return jnp.sum(jax.nn.softplus(logits))


def _sender(axes, devices: int) -> Callable[[Array], Array]:
    """Returns a function that passes an array to the next device of the ring."""
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    return lambda array: jax.lax.ppermute(array, axes, ring)


def _check(images, texts) -> None:
    if jnp.ndim(images) != 2 or jnp.shape(images) != jnp.shape(texts) or not len(images):
        raise ValueError(
            "images and texts must both be (b, d) with b at least 1, not of shapes"
            f" {jnp.shape(images)} and {jnp.shape(texts)}"
        )


def _check_mesh(images, texts, mesh: Mesh, axes) -> int:
    """Checks the arguments of a sharded loss; returns the number of devices along the axes."""
    _check(images, texts)
    names = (axes,) if isinstance(axes, str) else axes
    if not names or not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"axes must be some of the mesh's, {', '.join(map(str, mesh.axis_names))}, not {axes!r}"
        )
    devices = math.prod(mesh.shape[name] for name in names)
    if len(images) % devices:
        raise ValueError(
            f"the {devices} devices along {', '.join(names)} must divide the number of pairs,"
            f" {len(images)}"
        )
    return devices
