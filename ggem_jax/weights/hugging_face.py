"""A ViT by the names of Hugging Face's transformers, and the `config.json` of its model.

`to_hugging_face` chooses the model whose mathematics is that of the network, not the one that the
network once came from:

| network | model |
| --- | --- |
| a norm before the first block | CLIP's image tower, with its projection where there is a head |
| no class token | SigLIP's image tower, with its attention pooling where the network has one |
| a distillation token (DeiT) | DeiT |
| rotary positions | DINOv3 |
| registers, LayerScale or a gated MLP | DINOv2, with or without registers |
| pre-trained by MAE | the encoder of ViT-MAE |
| any other | ViT |

References: huggingface/transformers 5.24, `configuration_*.py` and `modeling_*.py` of these models.
"""

import dataclasses
from typing import Any

import numpy as np

from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.models.config import ViTConfig
from ggem_jax.weights.convert import to_published
from ggem_jax.weights.hugging_face_names import rename
from ggem_jax.weights.timm_model import add_unit_scales, add_zero_biases
from ggem_jax.weights.vit import PublishedViT, to_timm
from ggem_jax.weights.vit_layouts import Arrays, split_qkv
from ggem_jax.weights.vit_table import Style, vit_table

ACTIVATIONS = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}


# model_type -> the name of the model for people
_MODELS = {
    "clip_vision_model": "the image tower of CLIP",
    "siglip_vision_model": "the image tower of SigLIP",
    "deit": "DeiT",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "dinov3_vit": "DINOv3",
    "vit_mae": "ViT-MAE",
    "vit": "ViT",
}


def to_hugging_face(vit: PublishedViT) -> tuple[Arrays, dict[str, Any]]:
    """Returns the parameters by Hugging Face's names, and the `config.json` of the model.

    Args:
        vit: The network.

    Returns:
        The arrays by their names, and the settings that `transformers.AutoModel` loads them with.

    Raises:
        MismatchedWeights: No model there computes the same; the message says why.
    """
    c, kind = vit.config, _kind(vit)
    if why := _obstacle(vit, kind):
        raise MismatchedWeights(
            f"Hugging Face's models cannot express this network: {_MODELS[kind]}, the nearest one,"
            f" {why}"
        )
    if kind == "dinov3_vit":
        table = vit_table(c, vit.style, vit.pooling, vit.num_classes)
        arrays = add_zero_biases(to_published(vit.variables, table), "patch_embed.proj")
        if c.layer_scale is None:
            arrays = add_unit_scales(arrays, c)
        return rename(arrays, kind, gated=c.mlp == "swiglu"), _settings(vit, kind)
    style = Style(int(c.class_token) + (kind == "deit"), distilled=kind == "deit")
    arrays = split_qkv(to_timm(dataclasses.replace(vit, style=style)))
    with_bias = r"(.*\.attn|attn_pool)\.[qkv]" + ("|patch_embed.proj" if not c.pre_norm else "")
    arrays = add_zero_biases(arrays, with_bias)
    if kind.startswith("dinov2") and c.layer_scale is None:
        arrays = add_unit_scales(arrays, c)
    return rename(arrays, kind, gated=c.mlp == "swiglu"), _settings(vit, kind)


def _kind(vit: PublishedViT) -> str:
    c = vit.config
    if c.position == "rope":
        return "dinov3_vit"
    if c.pre_norm:
        return "clip_vision_model"
    if not c.class_token:
        return "siglip_vision_model"
    if vit.style.distilled and c.registers == 1 and c.layer_scale is None and c.mlp == "gelu":
        return "deit"
    if c.registers or c.layer_scale is not None or c.mlp == "swiglu":
        return "dinov2_with_registers" if c.registers else "dinov2"
    return "vit_mae" if vit.family == "mae" and not vit.num_classes else "vit"


def _obstacle(vit: PublishedViT, kind: str) -> str:
    """What keeps a model of Hugging Face from being this network, or nothing."""
    c, tower = vit.config, kind.endswith("vision_model")
    if c.pool_order == "pool-norm":
        return "has its last norm before the pooling, not after it"
    if c.post_norm:
        return "has its norms before the branches of a block, not after them"
    if tower and (c.layer_scale is not None or c.mlp == "swiglu"):
        return "has neither LayerScale nor a gated MLP"
    if tower and c.registers:
        return "has no registers"
    if kind in ("clip_vision_model", "dinov3_vit") and not c.class_token:
        return "has a class token"
    if kind == "dinov3_vit" and c.pre_norm:
        return "has no norm before the first block"
    if kind == "clip_vision_model" and c.patch_bias:
        return "has no bias in its patch embedding"
    if vit.pooling == "map" and kind != "siglip_vision_model":
        return "has no attention pooling"
    if kind in ("dinov2", "dinov2_with_registers") and _mlp_ratio(c) is None:
        return f"has no MLP of {c.mlp_width} channels for tokens of {c.width}"
    if vit.rest and kind != "deit":
        return "has no head on a distillation token: leave it out (--no-head, head=False)"
    if not vit.num_classes:
        return ""
    if kind.startswith("dino") or kind == "siglip_vision_model":
        return "has no head on this descriptor: leave it out (--no-head, head=False)"
    if vit.pooling != "cls":
        return "has its head on the class token: leave it out (--no-head, head=False)"
    if kind == "clip_vision_model" and np.any(vit.variables["params"]["head"]["bias"]):
        return "has a projection without a bias"
    return ""


def _mlp_ratio(c: ViTConfig) -> int | None:
    """The whole number that gives DINOv2 an MLP of this width, or None."""
    if c.mlp == "gelu":
        return c.mlp_width // c.width if c.mlp_width % c.width == 0 else None
    for ratio in range(1, 65):
        if (int(c.width * ratio * 2 / 3) + 7) // 8 * 8 == c.mlp_width:
            return ratio
    return None


def _has_classifier(vit: PublishedViT, kind: str) -> bool:
    return bool(vit.num_classes) and kind in ("vit", "deit")


def _settings(vit: PublishedViT, kind: str) -> dict[str, Any]:
    c = vit.config
    found: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_architecture(vit, kind)],
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "hidden_act": ACTIVATIONS[c.gelu],
        "layer_norm_eps": c.norm_eps,
        "image_size": c.image,
        "patch_size": c.patch,
        "num_channels": 3,
    }
    if kind.startswith("dinov2"):
        found |= {"mlp_ratio": _mlp_ratio(c), "use_swiglu_ffn": c.mlp == "swiglu"}
        found |= {"num_register_tokens": c.registers} if c.registers else {"use_mask_token": False}
    else:
        found["intermediate_size"] = c.mlp_width
    if kind == "clip_vision_model":
        found |= {"projection_dim": vit.num_classes} if vit.num_classes else {}
    elif kind == "siglip_vision_model":
        found["vision_use_head"] = vit.pooling == "map"
    elif kind == "dinov3_vit":
        found |= {"num_register_tokens": c.registers, "rope_theta": c.rope_base}
        found |= {"query_bias": c.qkv_bias, "value_bias": c.qkv_bias, "key_bias": False}
        if c.mlp == "swiglu":
            found |= {"use_gated_mlp": True, "hidden_act": "silu"}
    if kind == "vit_mae":
        found["mask_ratio"] = 0.0  # all patches are seen
    if _has_classifier(vit, kind):
        labels = {str(i): f"LABEL_{i}" for i in range(vit.num_classes)}
        found |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    return found


def _architecture(vit: PublishedViT, kind: str) -> str:
    if kind == "clip_vision_model":
        return "CLIPVisionModelWithProjection" if vit.num_classes else "CLIPVisionModel"
    if kind == "deit" and vit.num_classes:
        return f"DeiTForImageClassification{'WithTeacher' if vit.rest else ''}"
    if kind == "vit" and vit.num_classes:
        return "ViTForImageClassification"
    return {
        "siglip_vision_model": "SiglipVisionModel",
        "deit": "DeiTModel",
        "dinov2": "Dinov2Model",
        "dinov2_with_registers": "Dinov2WithRegistersModel",
        "dinov3_vit": "DINOv3ViTModel",
        "vit_mae": "ViTMAEModel",
        "vit": "ViTModel",
    }[kind]


def preprocessor(vit: PublishedViT) -> dict[str, Any] | None:
    """Returns the `preprocessor_config.json` of the network, or None where it is not known.

    Args:
        vit: The network.

    Returns:
        Settings that resize images to the size of the network and normalise them as it needs.
    """
    if vit.normalised is None:
        return None
    mean, std = vit.normalised
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": vit.config.image, "width": vit.config.image},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
