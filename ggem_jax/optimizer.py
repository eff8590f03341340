"""AdamW for models with learned exponents.

Exponents are the parameters called `p`. Weight decay would pull them towards 0, and since Adam moves a number by at most about one learning rate a
step, the rate of the weights hardly moves them in a short run: they get no decay and a rate of their own. The public GeM code does the same, with a
rate of 10 for one shared exponent and 100 for one per channel (filipradenovic/cnnimageretrieval-pytorch).
"""

from typing import Any

import jax
import optax
from jax.tree_util import KeyPath

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
    """AdamW with decay of the kernels only, `exponent_lr` times the rate for exponents, and `layer_decay` (see `learning_rate_scales`).

    Reference: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, arXiv:1711.05101.
    """
    return optax.chain(
        optax.scale_by_adam(b1=beta1, b2=beta2),
        optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),
        scale_by_parameter(lambda params: learning_rate_scales(params, exponent_lr=exponent_lr, layer_decay=layer_decay)),
        optax.scale_by_learning_rate(learning_rate),
    )


def weight_decay_mask(params: Parameters) -> Parameters:
    """True for the kernels; false for biases, norms, positions, prefix tokens and exponents. A mask for `optax.add_decayed_weights`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path[-1]) == "kernel", params)


def learning_rate_scales(params: Parameters, *, exponent_lr: float = 10.0, layer_decay: float = 1.0) -> Parameters:
    """What multiplies the learning rate of each parameter of a `ViT`.

    Block i of n has `layer_decay^(n - i)`, the embeddings `layer_decay^(n + 1)`, what follows the blocks 1; exponents `exponent_lr`.
    Reference: Bao et al., "BEiT", 2022, arXiv:2106.08254, section 3.1 (layer-wise decay as in its code).
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    depth = len({_block(path) for path in paths} - {None})

    def scale(path: KeyPath, _: Any) -> float:
        if is_exponent(path):
            return exponent_lr
        if any(_name(key) in ("patch_embedding", "class_token", "registers", "position") for key in path):
            return layer_decay ** (depth + 1)
        block = _block(path)
        return 1.0 if block is None else layer_decay ** (depth - block)

    return jax.tree_util.tree_map_with_path(scale, params)


def scale_by_parameter(scales) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by a constant; `scales(params)` gives the tree of constants."""

    def update(updates, state, params):
        return jax.tree.map(lambda u, s: u * s, updates, scales(params)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def is_exponent(path: KeyPath) -> bool:
    """Whether the parameter at this path of the tree is the exponents of a power mean."""
    return _name(path[-1]) == "p"


def exponents(params: Parameters) -> dict[str, jax.Array]:
    """The exponents of a model by path, such as `{"pool/p": (groups,)}`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(_name(key) for key in path if _name(key) != "params"): leaf for path, leaf in leaves if is_exponent(path)}


def _name(key) -> str:
    return str(getattr(key, "key", getattr(key, "name", key)))


def _block(path: KeyPath) -> int | None:
    return next((int(_name(key).removeprefix("blocks_")) for key in path if _name(key).startswith("blocks_")), None)
