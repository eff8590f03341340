"""AdamW for models with learned exponents.

Exponents are the parameters called `p`. Weight decay would pull them towards 0, and since Adam
moves a number by at most about one learning rate a step, the rate of the weights hardly moves them
in a short run: they get no decay and a rate of their own. The public GeM code does the same, with a
rate of 10 for one shared exponent and 100 for one per channel
(filipradenovic/cnnimageretrieval-pytorch).
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
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
    """AdamW with decay of the kernels only, `exponent_lr` times the rate for exponents, and
    `layer_decay` (see `learning_rate_scales`).

    Reference: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019,
        arXiv:1711.05101.
    """
    return optax.chain(
        optax.scale_by_adam(b1=beta1, b2=beta2),
        optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),
        scale_by_parameter(
            lambda params: learning_rate_scales(
                params, exponent_lr=exponent_lr, layer_decay=layer_decay
            )
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def weight_decay_mask(params: Parameters) -> Parameters:
    """True for matrices called `kernel` (Flax) or `weight` (Equinox); false for biases, norms,
    positions, prefix tokens and exponents.

    Neither do the embeddings of ids decay. A mask for `optax.add_decayed_weights`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _names(path)[-1:] in (("kernel",), ("weight",)) and jnp.ndim(leaf) >= 2,
        params,
    )


def learning_rate_scales(
    params: Parameters, *, exponent_lr: float = 10.0, layer_decay: float = 1.0
) -> Parameters:
    """What multiplies the learning rate of each parameter of a `ViT` or a `TextTransformer`,
    wherever it stands in a larger tree.

    Block i of n has `layer_decay^(n - i)`, the embeddings `layer_decay^(n + 1)`, what follows the
    blocks 1; exponents `exponent_lr`. The tree may be a part of the model that has its last block.
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


def scale_by_parameter(scales) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by a constant; `scales(params)` gives the tree of
    constants.
    """

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "scale_by_parameter needs the parameters: update(updates, state, params)"
            )
        return jax.tree.map(lambda u, s: u * s, updates, scales(params)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def is_exponent(path: KeyPath) -> bool:
    """Whether the parameter at this path of the tree is the exponents of a power mean."""
    return _names(path)[-1:] == ("p",)


def exponents(params: Parameters) -> dict[str, jax.Array]:
    """The exponents of a model by path, such as `{"pool/p": (groups,)}`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        "/".join(_names(path)).removeprefix("params/"): leaf
        for path, leaf in leaves
        if is_exponent(path)
    }


def _names(path: KeyPath) -> tuple[str, ...]:
    """The keys and attributes on the way to a leaf, without the `.value` at which variables of Flax
    NNX end.
    """
    names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    return names[:-1] if names[-1:] == ("value",) and isinstance(path[-1], GetAttrKey) else names


def _place(path: KeyPath) -> tuple[tuple[str, ...], int | None]:
    """The path of the tower that a parameter is in, and its block: -1 for the embeddings, None for
    what follows the blocks.
    """
    names = _names(path)
    for i, name in enumerate(names):
        if name in ("patch_embedding", "class_token", "registers", "token_embedding", "position"):
            return names[:i], -1
        if match := re.fullmatch("blocks_([0-9]+)", name):
            return names[:i], int(match[1])
    return (), None
