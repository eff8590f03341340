"""A ViT by timm's names, and the `config.json` with which timm makes and loads its model.

The model is one of timm's own by name, with all its sizes given as `model_args`. What those cannot
say, such as the epsilon of the norms, is chosen with the name.

References: huggingface/pytorch-image-models 1.0.31, `models/vision_transformer.py`,
`models/deit.py`, `models/eva.py` (DINOv3) and `models/_hub.py`.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.models.config import ViTConfig
from ggem_jax.weights.vit import PublishedViT, to_timm
from ggem_jax.weights.vit_layouts import Arrays, join_qkv, split_qkv
from ggem_jax.weights.vit_table import Style

ACTIVATIONS = {"exact": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}
POOLINGS = {"cls": "token", "avg": "avg", "map": "map"}


def to_timm_model(vit: PublishedViT) -> tuple[Arrays, dict[str, Any]]:
    """Returns the parameters by timm's names, and the `config.json` of the model.

    Args:
        vit: The network.

    Returns:
        The arrays by their names, and the settings that `timm.create_model("local-dir:...")` reads.

    Raises:
        MismatchedWeights: No model of timm computes the same; the message says why.
    """
    c = vit.config
    rotary = c.position == "rope"
    if why := _obstacle_of_eva(vit) if rotary else _obstacle(vit):
        raise MismatchedWeights(f"timm's models cannot express this network: {why}")
    if rotary:
        arrays = add_zero_biases(to_timm(vit), r"patch_embed\.proj")
        return arrays, _settings(vit, *_model_of_eva(vit))
    distilled = _is_distilled(vit)
    if distilled:
        positions = 2
    elif c.registers:
        positions = 0  # as in all models of timm with registers
    else:
        positions = min(vit.style.positions, int(c.class_token))
    style = Style(positions, distilled, fc_norm=c.pool_order == "pool-norm")
    rest = vit.rest if distilled else {}
    arrays = split_qkv(to_timm(dataclasses.replace(vit, style=style, rest=rest)))
    if not c.pre_norm:
        arrays = add_zero_biases(arrays, r"patch_embed\.proj")
    if vit.pooling == "map":  # whose projections have biases, whatever those of the blocks have
        arrays = add_zero_biases(arrays, r"(.*\.attn|attn_pool)\.[qkv]")
    if c.mlp == "swiglu" and c.layer_scale is None:  # which that model has
        arrays = add_unit_scales(arrays, c)
    return join_qkv(arrays), _settings(vit, *_model(vit, style), distilled=distilled)


def add_zero_biases(arrays: Arrays, modules: str) -> Arrays:
    """Returns the arrays with a bias of zeros for every module that has a weight alone.

    Args:
        arrays: The parameters by their names, queries, keys and values apart.
        modules: Pattern of the names of the modules.

    Returns:
        The parameters with the biases.
    """
    found = dict(arrays)
    for name, array in arrays.items():
        if match := re.fullmatch(rf"(?P<module>{modules})\.weight", name):
            found.setdefault(f"{match['module']}.bias", np.zeros(len(array), array.dtype))
    return found


def add_unit_scales(arrays: Arrays, config: ViTConfig) -> Arrays:
    """Returns the arrays with a LayerScale of ones in every branch, which changes nothing.

    Args:
        arrays: The parameters by timm's names.
        config: The network, which has no LayerScale.

    Returns:
        The parameters with the scales.
    """
    names = [f"blocks.{i}.ls{n}.gamma" for i in range(config.depth) for n in (1, 2)]
    return arrays | {name: np.ones(config.width, np.float32) for name in names}


def _is_distilled(vit: PublishedViT) -> bool:
    """Whether the model is timm's with a distillation token; else the token is a register."""
    c = vit.config
    return (
        vit.style.distilled
        and vit.pooling == "cls"
        and (c.registers, c.mlp, c.pool_order) == (1, "gelu", "norm-pool")
        and not (c.pre_norm or c.post_norm)
        and bool(vit.rest) == bool(vit.num_classes)
    )


def _obstacle(vit: PublishedViT) -> str:
    """What keeps timm's models from being this network, or nothing."""
    c = vit.config
    if c.pre_norm and c.patch_bias:
        return "it has a bias in the patch embedding where a norm follows before the first block"
    if c.mlp == "swiglu" and (c.pre_norm or vit.pooling == "map"):
        return "its gated MLP comes with attention pooling, or a norm before the first block"
    if c.post_norm and (c.mlp == "swiglu" or c.pre_norm or c.layer_scale is not None):
        return (
            "its norms after the branches come with a gated MLP, LayerScale, or a norm before the"
            " first block"
        )
    eps = 1e-5 if c.pre_norm else 1e-6
    if c.norm_eps > eps or (c.pre_norm and c.norm_eps < eps):
        return f"its norms have an epsilon of {c.norm_eps:g}, where timm's have {eps:g}"
    return ""


def _obstacle_of_eva(vit: PublishedViT) -> str:
    """What keeps timm's DINOv3, which is of its class Eva, from being this network, or nothing."""
    c = vit.config
    if not c.class_token or c.layer_scale is None:
        return "it has rotary positions without a class token or LayerScale"
    if c.pre_norm or c.post_norm or c.pool_order == "pool-norm":
        return "it has rotary positions and other norms than DINOv3"
    if vit.pooling == "map":
        return "it has rotary positions and attention pooling"
    if c.mlp == "gelu" and c.gelu != "exact":
        return f"its GELU is {c.gelu}, where timm's DINOv3 has the exact one"
    if c.norm_eps != 1e-5:
        return f"its norms have an epsilon of {c.norm_eps:g}, where timm's DINOv3 has 1e-05"
    if not c.registers:  # by which its files are told from those of other networks
        return "it has rotary positions without registers, which every DINOv3 has"
    return ""


def _model_of_eva(vit: PublishedViT) -> tuple[str, dict[str, Any]]:
    """The name of a DINOv3 of timm, and all its sizes."""
    c = vit.config
    size = "small_plus" if c.mlp == "swiglu" else "small"
    return f"vit_{size}_patch16_dinov3{'_qkvb' if c.qkv_bias else ''}", {
        "img_size": c.image,
        "patch_size": c.patch,
        "embed_dim": c.width,
        "depth": c.depth,
        "num_heads": c.heads,
        "mlp_ratio": _mlp_ratio(c.width, c.mlp_width),
        "swiglu_align_to": 1,
        "qkv_bias": c.qkv_bias,
        "num_reg_tokens": c.registers,
        "init_values": c.layer_scale,
        "rope_temperature": c.rope_base,
        "global_pool": POOLINGS[vit.pooling],
    }


def _model(vit: PublishedViT, style: Style) -> tuple[str, dict[str, Any]]:
    """The name of a model of timm with the right norms and MLPs, and all its sizes."""
    c = vit.config
    name = "vit_base_patch16_224"
    if style.distilled:
        name = "deit_base_distilled_patch16_224"
    elif c.post_norm:
        name = "vit_base_patch16_rpn_224"
    elif c.mlp == "swiglu":
        name = "vit_giant_patch14_dinov2"
    elif c.pre_norm:
        name = "vit_base_patch16_clip_224"
        if c.gelu == "quick":
            name = "vit_base_patch16_clip_quickgelu_224"
    arguments: dict[str, Any] = {
        "img_size": c.image,
        "patch_size": c.patch,
        "embed_dim": c.width,
        "depth": c.depth,
        "num_heads": c.heads,
        "mlp_ratio": _mlp_ratio(c.width, c.mlp_width * (2 if c.mlp == "swiglu" else 1)),
        "qkv_bias": c.qkv_bias or vit.pooling == "map",
        "class_token": c.class_token,
        "reg_tokens": 0 if style.distilled else c.registers,
        "no_embed_class": style.positions == 0 and c.prefix_tokens > 0,
        "pre_norm": c.pre_norm,
        "global_pool": POOLINGS[vit.pooling],
        "fc_norm": style.fc_norm,
    }
    if c.layer_scale is not None:
        arguments["init_values"] = c.layer_scale
    if c.mlp == "gelu":
        arguments["act_layer"] = ACTIVATIONS[c.gelu]
    return name, arguments


def _settings(
    vit: PublishedViT, name: str, arguments: dict[str, Any], *, distilled: bool = False
) -> dict[str, Any]:
    c = vit.config
    pretrained = {
        "input_size": [3, c.image, c.image],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "pool_size": None,
        "num_classes": vit.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if distilled else "head",
    }
    if vit.normalised is not None:
        pretrained |= dict(zip(("mean", "std"), map(list, vit.normalised), strict=True))
    return {
        "architecture": name,
        "num_classes": vit.num_classes,
        "num_features": c.width,
        "global_pool": POOLINGS[vit.pooling],
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }


def _mlp_ratio(width: int, hidden: int) -> float:
    """The ratio that gives timm these hidden channels, int(width * ratio)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
