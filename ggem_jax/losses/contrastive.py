"""Image-text learning: the losses of CLIP and SigLIP, on one device or on a mesh, and how well
pictures and texts find each other.

Descriptors are `(b, d)` of length 1; row i of the images and row i of the texts are a pair, all
others are negatives. Losses compute in float32, or in float64 where the descriptors do. The
measures at the end are NumPy.

References: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(CLIP), 2021, arXiv:2103.00020; Zhai et al., "Sigmoid Loss for Language Image Pre-Training"
(SigLIP), 2023, arXiv:2303.15343, whose section 3.3 passes the texts from device to device as here.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

Descriptors = Float[Array, "b d"]
Loss = Float[Array, ""]


def softmax_loss(images: Descriptors, texts: Descriptors, scale: ArrayLike) -> Loss:
    """Mean cross-entropy of finding the text of each image and the image of each text: CLIP, figure
    3.

    `scale` is what multiplies the similarities, exp(t) in the figure. Descriptors of other shapes
    than `(b, d)` are a `ValueError`.
    """
    _check(images, texts)
    logits = _similarities(images, texts) * scale
    pairs = jnp.diagonal(logits)
    of_images, of_texts = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
    return jnp.mean(of_images + of_texts - 2 * pairs) / 2


def sigmoid_loss(
    images: Descriptors, texts: Descriptors, scale: ArrayLike, bias: ArrayLike
) -> Loss:
    """Sum over all pairs of the log-loss of telling true pairs from others, over b: SigLIP,
    algorithm 1.

    The logit of a pair is scale * similarity + bias. Descriptors of other shapes than `(b, d)` are
    a `ValueError`.
    """
    _check(images, texts)
    return _sigmoid_block(images, texts, scale, bias, own=True) / len(images)


def sharded_softmax_loss(
    images: Descriptors,
    texts: Descriptors,
    scale: ArrayLike,
    *,
    mesh: Mesh,
    axes: str | tuple[str, ...],
) -> Loss:
    """`softmax_loss` of descriptors that are split over the axes of a mesh; no device ever holds
    more than a block of (b / devices)^2 logits.

    Each device keeps its images, and the texts travel once around all of them: the sums over texts
    gather where the images are, those over images travel with the texts. A block is computed again
    in the backward pass. Value and gradient are those of `softmax_loss`. Raises `ValueError` for
    axes that the mesh does not have, and for a b that its devices do not divide.
    """
    devices = _check_mesh(images, texts, mesh, axes)
    send = _sender(axes, devices)

    def local(images, texts, scale):
        images, texts = (
            _wide(images),
            _wide(texts),
        )  # before they travel: so are their gradients summed
        pairs = jnp.sum(images * texts, axis=1) * scale
        of_images, of_texts = _log_sums(images, texts, scale)

        def meet(carried, _):
            texts, of_texts, of_images = carried
            texts, of_texts = send(texts), send(of_texts)
            more_images, more_texts = _log_sums(images, texts, scale)
            return (
                texts,
                jnp.logaddexp(of_texts, more_texts),
                jnp.logaddexp(of_images, more_images),
            ), None

        (_, of_texts, of_images), _ = jax.lax.scan(
            meet, (texts, of_texts, of_images), length=devices - 1
        )
        return jax.lax.pmean(
            jnp.mean(of_images + of_texts - 2 * pairs) / 2, axes
        )  # to the mean it is all one where the texts have come to

    return jax.shard_map(local, mesh=mesh, in_specs=(P(axes), P(axes), P()), out_specs=P())(
        images, texts, jnp.asarray(scale)
    )


def sharded_sigmoid_loss(
    images: Descriptors,
    texts: Descriptors,
    scale: ArrayLike,
    bias: ArrayLike,
    *,
    mesh: Mesh,
    axes: str | tuple[str, ...],
) -> Loss:
    """`sigmoid_loss` of descriptors that are split over the axes of a mesh, as in
    `sharded_softmax_loss`: SigLIP, section 3.3.
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

        (_, total), _ = jax.lax.scan(
            meet, (texts, block(images, texts, scale, bias, True)), length=devices - 1
        )
        return jax.lax.psum(total, axes) / (devices * len(images))

    inputs = (images, texts, jnp.asarray(scale), jnp.asarray(bias))
    return jax.shard_map(local, mesh=mesh, in_specs=(P(axes), P(axes), P(), P()), out_specs=P())(
        *inputs
    )


def _wide(descriptors):
    return descriptors.astype(jnp.promote_types(descriptors.dtype, jnp.float32))


def _similarities(images, texts):
    # A scale of 100 makes tenths of the error of a bfloat16 or TF32 product.
    return jnp.matmul(_wide(images), _wide(texts).T, precision="highest")


@jax.checkpoint
def _log_sums(images, texts, scale):
    """Log-sum-exp of a block of logits over the texts and over the images."""
    logits = _similarities(images, texts) * scale
    return jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(logits, axis=0)


def _sigmoid_block(images, texts, scale, bias, own: bool):
    """Sum of the losses of a block; in a device's own block the diagonal holds the true pairs."""
    logits = _similarities(images, texts) * scale + bias
    if own:
        logits = jnp.where(jnp.eye(len(images), dtype=bool), -logits, logits)
    return jnp.sum(jax.nn.softplus(logits))


def _sender(axes, devices: int) -> Callable[[Array], Array]:
    """Passes an array to the next device of the ring."""
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    return lambda array: jax.lax.ppermute(array, axes, ring)


def _check(images, texts) -> None:
    if jnp.ndim(images) != 2 or jnp.shape(images) != jnp.shape(texts) or not len(images):
        raise ValueError(
            "images and texts must both be (b, d) with b at least 1, not of shapes"
            f" {jnp.shape(images)} and {jnp.shape(texts)}"
        )


def _check_mesh(images, texts, mesh: Mesh, axes) -> int:
    """The number of devices along the axes."""
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


def found_at(
    queries: Float[np.ndarray, "q d"],
    items: Float[np.ndarray, "n d"],
    pairs: Int[np.ndarray, "m 2"],
    *,
    kappas: Sequence[int] = (1, 5, 10),
    block: int = 1024,
) -> Bool[np.ndarray, "q kappas"]:
    """Whether one of the right items of a query is among the kappa most similar: recall@kappa is
    the mean over the queries.

    `pairs` holds (query, right item); a query may have several right items and an item several
    queries. Wrong items that are exactly as similar as the best right one stand before it, and
    descriptors that are no numbers find nothing. `block` queries are compared at a time.
    """
    _check_pairs(pairs, len(queries), len(items))
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    found = np.zeros((len(queries), len(kappas)), bool)
    columns = np.asarray(items, np.float64).T
    for start in range(0, len(queries), block):
        similarity = np.asarray(queries[start : start + block], np.float64) @ columns
        right = _right(similarity.shape, pairs, start)
        best = np.max(similarity, axis=1, where=right, initial=-np.inf)
        before = np.sum((similarity >= best[:, None]) & ~right, axis=1)
        possible = right.any(axis=1) & np.all(np.isfinite(similarity), axis=1)
        found[start : start + block] = (before[:, None] < np.asarray(kappas)) & possible[:, None]
    return found


def chance_at(
    pairs: Int[np.ndarray, "m 2"], queries: int, items: int, *, kappas: Sequence[int] = (1, 5, 10)
) -> Float[np.ndarray, " kappas"]:
    """What `found_at` gives on average where the items of every query stand in a random order.

    A query with r right items of n misses them all with probability (n - r choose kappa) / (n
    choose kappa).
    """
    _check_pairs(pairs, queries, items)
    right = np.bincount(np.unique(pairs, axis=0)[:, 0], minlength=queries)
    missed = [
        np.prod(
            [
                np.clip((items - right - j) / max(items - j, 1), 0, 1)
                for j in range(min(kappa, items))
            ],
            axis=0,
        )
        for kappa in kappas
    ]
    return np.array([np.mean(1 - np.broadcast_to(each, right.shape)) for each in missed])


def class_descriptors(
    prompts: Float[np.ndarray, "classes templates d"],
) -> Float[np.ndarray, "classes d"]:
    """One descriptor of length 1 for each class: the mean of those of its prompts, each of length
    1. CLIP, section 3.1.4.
    """
    prompts = np.asarray(prompts)
    if prompts.ndim != 3 or not prompts.shape[1]:
        raise ValueError(
            "prompts must be (classes, templates, d) with at least one template, not of shape"
            f" {prompts.shape}"
        )
    mean = (prompts / np.linalg.norm(prompts, axis=-1, keepdims=True)).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def _right(shape, pairs, start: int) -> Bool[np.ndarray, "block n"]:
    """Which items are right for the queries of a block; `pairs` stand in the order of their
    queries.
    """
    first, last = np.searchsorted(pairs[:, 0], (start, start + shape[0]))
    right = np.zeros(shape, bool)
    right[pairs[first:last, 0] - start, pairs[first:last, 1]] = True
    return right


def _check_pairs(pairs, queries: int, items: int) -> None:
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(
            f"pairs must be whole numbers (m, 2), not {pairs.dtype} of shape {pairs.shape}"
        )
    if len(pairs) and not ((pairs >= 0) & (pairs < (queries, items))).all():
        raise ValueError(f"pairs must name queries below {queries} and items below {items}")
