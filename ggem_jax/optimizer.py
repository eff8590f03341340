"""AdamW, and other optimizers, for models with learned exponents.

Exponents are the parameters called `p`. They get no weight decay, which would pull them towards 0,
and a learning rate of their own: Adam moves a number by at most about one learning rate a step, so
that the rate of the weights hardly moves exponents in a short run. The public GeM code does the
same, with a factor of 10 for one shared exponent and 100 for one per channel
(filipradenovic/cnnimageretrieval-pytorch).

Parameters are trees of arrays: those of Flax linen, of Flax NNX or of Equinox.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.tree_util import GetAttrKey, KeyPath

Parameters = Any


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.05,
    beta1: float = 0.9,
    beta2: float = 0.999,
    exponent_lr: float = 10.0,
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Returns AdamW with a learning rate of its own for exponents, and decay for matrices only.

    Args:
        learning_rate: The learning rate of the weights, a number or a schedule of optax.
        weight_decay: Decay of matrices, see `weight_decay_mask`.
        beta1: Decay of the mean of the gradients.
        beta2: Decay of the mean of their squares.
        exponent_lr: Learning rate of the exponents over that of the weights.
        layer_decay: Learning rate of each block over that of the next, see `learning_rate_scales`.

    Returns:
        A transformation of optax; its `update` needs the parameters.

    Reference: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019,
        arXiv:1711.05101.

    Example:
        >>> params = {"head": {"kernel": jnp.ones((2, 2))}, "pool": {"p": jnp.full(4, 3.0)}}
        >>> updates, state = adamw(1e-3).update(params, adamw(1e-3).init(params), params)
        >>> print(f"{updates['pool']['p'][0]:.3f} {updates['head']['kernel'][0, 0]:.5f}")
        -0.010 -0.00105
    """
    return optimizer(
        optax.scale_by_adam(b1=beta1, b2=beta2),
        learning_rate,
        weight_decay=weight_decay,
        exponent_lr=exponent_lr,
        layer_decay=layer_decay,
    )


def optimizer(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.05,
    exponent_lr: float = 10.0,
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Returns an optimizer with decoupled decay for matrices, and a learning rate for exponents.

    Args:
        direction: A transformation of gradients to directions, such as `optax.scale_by_lion()`.
        learning_rate: The learning rate of the weights, a number or a schedule of optax.
        weight_decay: Decay of matrices, see `weight_decay_mask`.
        exponent_lr: Learning rate of the exponents over that of the weights.
        layer_decay: Learning rate of each block over that of the next, see `learning_rate_scales`.

    Returns:
        A transformation of optax; its `update` needs the parameters.
    """
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),
        scale_by_parameter(
            lambda params: learning_rate_scales(
                params, exponent_lr=exponent_lr, layer_decay=layer_decay
            )
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_muon_and_adam(
    beta1: float = 0.9, beta2: float = 0.999, momentum: float = 0.95
) -> optax.GradientTransformation:
    """Returns Muon for the matrices of blocks, and Adam for all other parameters.

    Muon's direction of a matrix is its momentum made orthogonal, times 0.2 sqrt(max(inputs,
    outputs)), which is as long as a typical direction of Adam, so that one learning rate and one
    decay do for both. The heads of a projection count as one matrix.

    Args:
        beta1: Of Adam, the decay of the mean of the gradients.
        beta2: Of Adam, the decay of the mean of their squares.
        momentum: Of Muon, the decay of the mean of the gradients.

    Returns:
        A transformation of optax.

    Reference: Jordan et al., "Muon", 2024, kellerjordan.github.io/posts/muon; Liu et al., "Muon is
        Scalable for LLM Training", 2025, arXiv:2502.16982, section 2.2 (the length).
    """

    def label(path: KeyPath, leaf: Any) -> str:
        _, block = _place(path)
        inner = block is not None and block >= 0
        return "muon" if inner and _is_matrix(path, leaf) else "adam"

    def sides(updates: Parameters) -> Parameters:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _sides(_names(path), jnp.ndim(leaf)), updates
        )

    def length(path: KeyPath, leaf: Any) -> Any:
        into, out = _sides(_names(path), leaf.ndim)
        inputs, outputs = (math.prod(leaf.shape[axis] for axis in axes) for axes in (into, out))
        return leaf * (0.2 * max(inputs, outputs) ** 0.5)

    scaled = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(length, updates))
    muon = optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=sides)
    return optax.partition(
        {
            "muon": optax.chain(muon, scaled),
            "adam": optax.scale_by_adam(b1=beta1, b2=beta2),
        },
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def _sides(names: tuple[str, ...], axes: int) -> optax.contrib.MuonDimensionNumbers:
    """The axes of the inputs of a matrix, and of its outputs; attention's `out` joins heads."""
    into = axes - 1 if names[-2:-1] == ("out",) else 1
    return optax.contrib.MuonDimensionNumbers(tuple(range(into)), tuple(range(into, axes)))


def _is_matrix(path: KeyPath, leaf: Any) -> bool:
    return _names(path)[-1:] in (("kernel",), ("weight",)) and jnp.ndim(leaf) >= 2


def weight_decay_mask(params: Parameters) -> Parameters:
    """Returns which parameters decay: matrices called `kernel` (Flax) or `weight` (Equinox).

    Biases, norms, positions, prefix tokens, embeddings of ids and exponents do not decay.

    Args:
        params: The parameters.

    Returns:
        A tree of bools, a mask for `optax.add_decayed_weights`.
    """
    return jax.tree_util.tree_map_with_path(_is_matrix, params)


def learning_rate_scales(
    params: Parameters, *, exponent_lr: float = 10.0, layer_decay: float = 1.0
) -> Parameters:
    """Returns the factor of the learning rate of each parameter.

    Block i of n has `layer_decay^(n - i)`, the embeddings `layer_decay^(n + 1)`, the layers after
    the blocks 1, and exponents `exponent_lr`.

    Args:
        params: Parameters with a `ViT` or a `TextTransformer` anywhere in the tree, or a part of
            one that has its last block.
        exponent_lr: Factor of the exponents.
        layer_decay: Factor of each block over that of the next.

    Returns:
        A tree of numbers.

    Reference: Bao et al., "BEiT", 2022, arXiv:2106.08254, section 3.1 (layer-wise decay as in its
        code).
    """
    depths: dict[tuple[str, ...], int] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        model, block = _place(path)
        if isinstance(block, int):
            depths[model] = max(depths.get(model, 0), block + 1)

    def scale(path: KeyPath, _: Any) -> float:
        if is_exponent(path):
            return exponent_lr
        model, block = _place(path)
        if block is None:
            return 1.0
        return layer_decay ** (depths.get(model, 0) - block)

    return jax.tree_util.tree_map_with_path(scale, params)


def scale_by_parameter(scales: Callable[[Parameters], Parameters]) -> optax.GradientTransformation:
    """Returns a transformation that multiplies the update of each parameter by a constant.

    Args:
        scales: A function from the parameters to the tree of their constants.

    Returns:
        A transformation of optax.

    Raises:
        ValueError: In `update`, which needs the parameters.
    """

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "scale_by_parameter needs the parameters: update(updates, state, params)"
            )
        return jax.tree.map(lambda u, s: u * s, updates, scales(params)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def is_exponent(path: KeyPath) -> bool:
    """Returns whether the parameter at a path of the tree holds the exponents of a power mean.

    Args:
        path: Keys on the way from the root to the parameter, as `jax.tree_util` gives them; the
            last is `p` for exponents.
    """
    return _names(path)[-1:] == ("p",)


def exponents(params: Parameters) -> dict[str, jax.Array]:
    """Returns the exponents of a model by their paths, such as `{"pool/p": (groups,)}`.

    Args:
        params: The parameters, with or without the collection `params` around them.

    Returns:
        The learned exponents; a `GGeM` pools with `used_exponents` of them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        "/".join(_names(path)).removeprefix("params/"): leaf
        for path, leaf in leaves
        if is_exponent(path)
    }


def _names(path: KeyPath) -> tuple[str, ...]:
    """The keys and attributes on the way to a leaf, without the `.value` of variables of NNX."""
    names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    return names[:-1] if names[-1:] == ("value",) and isinstance(path[-1], GetAttrKey) else names


def _place(path: KeyPath) -> tuple[tuple[str, ...], int | None]:
    """The path of the tower that a parameter is in, and its block: -1 for the embeddings, None
    after the blocks.
    """
    names = _names(path)
    for i, name in enumerate(names):
        if name in ("patch_embedding", "class_token", "registers", "token_embedding", "position"):
            return names[:i], -1
        if match := re.fullmatch("blocks_([0-9]+)", name):
            return names[:i], int(match[1])
    return (), None
