"""The kinds of layers of a model: with a dense MLP or with experts, with or without a window.

A model may mix kinds. Its step is the mean of the steps of models that have one kind alone, each
weighted with its share of the layers. This is exact for layers, because a stage of an interleaved
step has one MLP and one attention; the first and the last stages of a step are the mean too. Where
both the MLPs and the windows differ, windows are taken to be spread evenly over the MLPs, and every
group of devices (`Parallel.pp`) to have the mix of the whole model.
"""

from dataclasses import fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neupims.machine.model import EXPERT_FIELDS, Decoder
from neupims.machine.record import COUNT_MOST, Number


class Mix(NamedTuple):
    """What a model has beside one kind of layer. These are static: they choose what is computed."""

    shared: bool = False  # shared experts
    dense: bool = False  # layers with a dense MLP beside layers with experts
    windows: bool = False  # layers with a window
    narrow: bool = False  # weights, or inputs of products, of fewer than 16 bits
    lm_head: bool = False  # whether the LM head is computed
    latent: bool = False  # latent attention
    skewed: int = 0  # the most experts of a layer, where they are routed to with a skew, else 0

    @property
    def of_layer(self) -> "Mix":
        """What layers of one kind have: neither dense layers beside them, nor windows."""
        return self._replace(dense=False, windows=False)


ALIKE = Mix()
EVERYTHING = Mix(True, True, True, True, True, True, COUNT_MOST)


class LayerKind(NamedTuple):
    """One kind of layer."""

    share: Number  # of the layers of the model
    model: Decoder  # a model with layers of this kind alone
    mix: Mix  # shared experts, and whether all layers have the window


def find_mix(model: Decoder) -> Mix:
    """Returns what a model, or any of a batch of models, has; nothing where numbers are traced.

    Args:
        model: The model.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model)):
        return Mix()
    found = (
        model.shared_experts,
        (np.asarray(model.experts) > 0) * np.asarray(model.dense_layers),
        model.window,
        has_narrow_products(model),
        model.lm_head,
        model.kv_rank,
    )
    skewed = (model.expert_skew > 0) * np.asarray(model.experts)
    flags = Mix(*(bool(np.any(np.asarray(each) > 0)) for each in found))
    return flags._replace(skewed=int(np.max(skewed)))


def narrowest_product(model: Decoder) -> int:
    """Returns the bits of the narrowest product with weights: of its two numbers, the wider one.

    Args:
        model: The model.
    """
    weights = [model.weight_bits, *([model.expert_bits] if model.experts > 0 else [])]
    return max(int(model.activation_bits), int(min(weights)))


def has_narrow_products(model: Decoder) -> Number:
    """Returns whether weights, or inputs of products with them, have fewer than 16 bits.

    Args:
        model: The model.
    """
    experts = (model.experts > 0) & (model.expert_bits < 16)
    return experts | (model.weight_bits < 16) | (model.activation_bits < 16)


def layer_kinds(model: Decoder, mix: Mix) -> tuple[LayerKind, ...]:
    """Returns the kinds of layers of a model; their shares add up to 1.

    Args:
        model: The model; numbers may be traced.
        mix: What it has; kinds that do not follow from it are left out.
    """
    kinds = [LayerKind(1.0, model, mix.of_layer)]
    if mix.dense:
        dense = jnp.where(
            jnp.asarray(model.experts) > 0, 1.0 * model.dense_layers / model.layers, 0.0
        )
        without = _changed(model, experts=0, **dict.fromkeys(EXPERT_FIELDS, 0))
        kinds = [
            LayerKind(dense, without, mix.of_layer._replace(shared=False, skewed=0)),
            LayerKind(1 - dense, _changed(model, dense_layers=0), mix.of_layer),
        ]
    if mix.windows:
        windowed = jnp.where(
            jnp.asarray(model.window) > 0, 1.0 * model.window_layers / model.layers, 0.0
        )
        kinds = [
            each
            for one in kinds
            for each in (
                LayerKind(one.share * windowed, one.model, one.mix._replace(windows=True)),
                LayerKind(
                    one.share * (1 - windowed),
                    _changed(one.model, window=0, window_layers=0),
                    one.mix,
                ),
            )
        ]
    return tuple(each for each in kinds if not _is_zero(each.share))


def attended(model: Decoder, lengths: Number) -> Number:
    """Returns the tokens that a layer with the window attends to, at most the window.

    Args:
        model: The model; without a window all tokens.
        lengths: The tokens of requests.
    """
    window = jnp.asarray(model.window)
    return jnp.where(window > 0, jnp.minimum(lengths, window), lengths)


def shared_mlp(model: Decoder) -> Decoder:
    """Returns the model whose dense MLP is all shared experts of a layer together.

    Args:
        model: The model; numbers may be traced.
    """
    width = jnp.maximum(model.shared_experts * jnp.asarray(model.expert_width), 1)
    return _changed(model, experts=0, mlp_width=width)


def other_mlps(model: Decoder) -> tuple[Decoder, Decoder]:
    """Returns models with the MLPs beside routed experts: dense layers', and shared experts.

    Args:
        model: The model; where it does not have them, their MLP has one channel.
    """
    width = jnp.where(jnp.asarray(model.dense_layers) > 0, model.mlp_width, 1)
    return _changed(model, experts=0, mlp_width=width), shared_mlp(model)


def _changed(model: Decoder, **changes: Number) -> Decoder:
    """Returns the model with other numbers, which may be traced and are not checked."""
    values = vars(model) | changes
    return jax.tree.unflatten(
        jax.tree.structure(model), [values[each.name] for each in fields(model)]
    )


def _is_zero(share: Number) -> bool:
    return not isinstance(share, jax.core.Tracer) and not np.any(np.asarray(share))
