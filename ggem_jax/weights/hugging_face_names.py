"""Parameters of a ViT by timm's names -> by those in the files of Hugging Face's transformers.

References: huggingface/transformers 5.24, `modeling_*.py` of vit, deit, dinov2,
dinov2_with_registers, dinov3_vit, clip, siglip and vit_mae, and files that it saved.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ggem_jax.weights.vit_layouts import Arrays


class Names(NamedTuple):
    """Modules of timm -> those of one model: outside the blocks, and inside of them."""

    block: str  # the folder of block i
    outside: Mapping[str, str]
    inside: Mapping[str, str]


_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_ATTENTION = {
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
}
_VIT = Names(
    "encoder.layer.{}.",
    _EMBEDDINGS,
    _ATTENTION
    | {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
)
_SAME = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
_DINOV2 = Names(
    "encoder.layer.{}.",
    _EMBEDDINGS,
    _ATTENTION
    | {name: name for name in _SAME}
    | {f"ls{n}.gamma": f"layer_scale{n}.lambda1" for n in (1, 2)},
)
_DINOV3 = Names(
    "layer.{}.",
    {
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj": "embeddings.patch_embeddings",
        "norm": "norm",
    },
    {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.q": "attention.q_proj",
        "attn.k": "attention.k_proj",
        "attn.v": "attention.v_proj",
        "attn.proj": "attention.o_proj",
        "mlp.fc1_g": "mlp.gate_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    },
)
_GATED = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_TOWER = Names(
    "vision_model.encoder.layers.{}.",
    {
        "cls_token": "vision_model.embeddings.class_embedding",
        "pos_embed": "vision_model.embeddings.position_embedding.weight",
        "patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "norm_pre": "vision_model.pre_layrnorm",  # as it is spelled there
        "norm": "vision_model.post_layernorm",
        "head": "visual_projection",
        "attn_pool.latent": "vision_model.head.probe",
        "attn_pool.in_proj_weight": "vision_model.head.attention.in_proj_weight",
        "attn_pool.in_proj_bias": "vision_model.head.attention.in_proj_bias",
        "attn_pool.proj": "vision_model.head.attention.out_proj",
        "attn_pool.norm": "vision_model.head.layernorm",
        "attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
        "attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
    },
    {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
)


def rename(arrays: Arrays, kind: str, *, gated: bool) -> Arrays:
    """Returns the parameters by the names of a model.

    Args:
        arrays: The parameters by timm's names, queries, keys and values apart.
        kind: The `model_type` of the model's config.json.
        gated: Whether the MLPs are gated.

    Returns:
        The parameters by their names in a file of that model.
    """
    names = _TOWER if kind.endswith("vision_model") else _VIT
    if kind.startswith("dinov2"):
        names = _DINOV2._replace(inside={**_DINOV2.inside, **(_GATED if gated else {})})
    if kind == "dinov3_vit":
        names, arrays = _DINOV3, _split_gates(arrays) if gated else arrays
    if kind == "siglip_vision_model":
        arrays = _join_pool(arrays)
    classifier = kind in ("vit", "deit") and "head.weight" in arrays
    folder = f"{kind}." if classifier else ""
    heads = {"head": "classifier"}
    if "head_dist.weight" in arrays:
        heads = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
    found = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition(".")
        if name.startswith("blocks."):
            _, i, inside = name.split(".", 2)
            module, _, leaf = inside.rpartition(".")
            own = names.inside.get(inside) or f"{names.inside[module]}.{leaf}"
            found[f"{folder}{names.block.format(i)}{own}"] = array
        elif classifier and module in heads:
            found[f"{heads[module]}.{leaf}"] = array
        elif name in names.outside:
            found[folder + names.outside[name]] = array
        else:
            found[f"{folder}{names.outside[module]}.{leaf}"] = array
    found.pop("visual_projection.bias", None)  # of CLIP, zeros
    if names is _TOWER:  # whose tables have no axis for the batch
        for name, axes in (("class_embedding", (0, 1)), ("position_embedding.weight", (0,))):
            if (full := f"vision_model.embeddings.{name}") in found:
                found[full] = found[full].squeeze(axes)
    return found


def _split_gates(arrays: Arrays) -> Arrays:
    """The arrays with gate and value of a gated MLP apart, as `mlp.fc1_g` and `mlp.fc1`."""
    found: Arrays = {}
    for name, array in arrays.items():
        if ".mlp.fc1." in name:
            found[name.replace(".fc1.", ".fc1_g.")], found[name] = np.split(array, 2)
        else:
            found[name] = array
    return found


def _join_pool(arrays: Arrays) -> Arrays:
    """The arrays with the projections of the attention pooling in one, as PyTorch keeps them."""
    if "attn_pool.q.weight" not in arrays:
        return arrays
    found = dict(arrays)
    for leaf in ("weight", "bias"):
        parts = [found.pop(f"attn_pool.{part}.{leaf}") for part in "qkv"]
        found[f"attn_pool.in_proj_{leaf}"] = np.concatenate(parts)
    return found
