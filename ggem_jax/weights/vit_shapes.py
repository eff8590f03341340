"""What names and shapes of a published ViT say: family, sizes, and how positions are kept."""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.weights.vit_layouts import Arrays
from ggem_jax.weights.vit_table import Style

# parameters that only the decoder of a MAE has, in its own names and in Hugging Face's
_DECODER_OF_MAE = r"decoder_embed|decoder_pos_embed|decoder_pred|decoder_layers\.|decoder_blocks\."


def family_of(layout: str, arrays: Arrays, unused: tuple[str, ...]) -> str:
    """Returns the family of a ViT with learned positions, a key of `ggem_jax.weights.vit.FAMILIES`.

    Args:
        layout: The layout of its file (`vit_layouts.LAYOUTS`).
        arrays: Its parameters by timm's names.
        unused: Names in the file that no ViT uses.
    """
    dropped = " ".join(unused)
    if layout == "augreg":
        return "augreg"
    if "norm_pre.weight" in arrays:
        return "clip"
    if "attn_pool.latent" in arrays or layout == "hf-clip":
        return "siglip"
    if layout == "big_vision":
        return "big_vision"
    if "blocks.0.ls1.gamma" in arrays:
        return _family_with_layer_scale(layout, arrays, dropped)
    if "dist_token" in arrays:
        return "deit"
    decoder = any(re.search(_DECODER_OF_MAE, name) for name in unused)
    return "mae" if decoder or _is_fine_tuned_mae(arrays) else "vit"


def _family_with_layer_scale(layout: str, arrays: Arrays, dropped: str) -> str:
    """DINOv2, or DeiT III, or one of the others that timm has under the same names."""
    if layout == "hf-dinov2" or "mask_token" in dropped or _is_gated(arrays):
        return "dinov2"
    if "cls_token" not in arrays or "pos_embed" not in arrays:
        return "vit"
    if "reg_token" in arrays:  # DINOv2 has 4; TIPS v2 has 1
        return "dinov2" if arrays["reg_token"].shape[1] > 1 else "vit"
    side = math.isqrt(max(arrays["pos_embed"].shape[1] - 1, 0))
    if not side or side * side != arrays["pos_embed"].shape[1] - 1:
        return "deit3"  # whose class token has no position
    kernel = arrays.get("patch_embed.proj.weight")
    return "dinov2" if kernel is not None and kernel.shape[-1:] == (14,) else "vit"


def _is_fine_tuned_mae(arrays: Arrays) -> bool:
    """Whether it has a class token and pools by average, as fine-tuned MAEs do.

    timm's other averages have no class token, but for EVA's ViT-L/14.
    """
    kernel = arrays.get("patch_embed.proj.weight")
    of_eva = kernel is not None and (*kernel.shape[:1], *kernel.shape[-1:]) == (1024, 14)
    return "fc_norm.weight" in arrays and "cls_token" in arrays and not of_eva


class Shapes(NamedTuple):
    """What the shapes of a file say."""

    style: Style
    sizes: dict[str, Any]  # fields of `ViTConfig`


# keys of Hugging Face's config.json -> fields of `ViTConfig`
HUGGING_FACE_SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "patch_size": "patch",
}


def shapes_of(arrays: Arrays, source: str, rotary: bool) -> Shapes:
    """Returns the style of a file, and the sizes of its ViT.

    Args:
        arrays: Its parameters by timm's names, queries, keys and values apart.
        source: The file, for messages.
        rotary: Whether the positions are rotary, so that there is no table of them.

    Returns:
        The style, and fields of `ViTConfig`.

    Raises:
        MismatchedWeights: A parameter is missing, or of a shape that no ViT has.
    """
    needed = (
        "patch_embed.proj.weight",
        *(() if rotary else ("pos_embed",)),
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    )
    if missing := [name for name in needed if name not in arrays]:
        learned = (
            "; of networks without learned positions only DINOv3 is read, which has a class token,"
            " registers, LayerScale and no biases of keys"
            if "pos_embed" in missing
            else ""
        )
        raise MismatchedWeights(f"{source} has no {', '.join(missing)}{learned}")
    kernel = arrays["patch_embed.proj.weight"]
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise MismatchedWeights(
            f"{source}: patch_embed.proj.weight must be (width, 3, patch, patch), not"
            f" {kernel.shape}"
        )
    blocks = {int(name.split(".")[1]) for name in arrays if name.startswith("blocks.")}
    if far := sorted(block for block in blocks if block >= len(arrays)):
        raise MismatchedWeights(
            f"{source} has parameters of block {far[0]}, and of blocks before it not all"
        )
    width, patch, first = kernel.shape[0], kernel.shape[2], arrays["blocks.0.mlp.fc1.weight"]
    if first.ndim != 2:
        raise MismatchedWeights(
            f"{source}: blocks.0.mlp.fc1.weight must be (hidden, width), not {first.shape}"
        )
    class_token, distilled = "cls_token" in arrays, "dist_token" in arrays
    registers = (arrays["reg_token"].shape[1] if "reg_token" in arrays else 0) + distilled
    if rotary:
        side, positions = max(224 // max(patch, 1), 1), 0  # images of any size: the usual one
    else:
        count = arrays["pos_embed"].shape[1]
        side, positions = _grid(count, int(class_token), int(distilled), source)
    sizes = {
        "patch": patch,
        "width": width,
        "depth": 1 + max(blocks),
        "mlp_width": len(first) // (2 if _is_gated(arrays) else 1),
        "image": side * patch,
        "class_token": class_token,
        "registers": registers,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in arrays else None,
        "mlp": "swiglu" if _is_gated(arrays) else "gelu",
        "patch_bias": "patch_embed.proj.bias" in arrays,
        "pre_norm": "norm_pre.weight" in arrays,
        "qkv_bias": "blocks.0.attn.q.bias" in arrays,
        "pool_order": "pool-norm" if "fc_norm.weight" in arrays else "norm-pool",
    }
    return Shapes(Style(positions, distilled, "fc_norm.weight" in arrays), sizes)


def _is_gated(arrays: Arrays) -> bool:
    """Whether the MLPs are gated: the first layer makes two channels for each of the second's."""
    first, second = (
        np.shape(arrays.get(f"blocks.0.mlp.{layer}.weight", 0)) for layer in ("fc1", "fc2")
    )
    return len(first) == len(second) == 2 and first[0] == 2 * second[1]


def _grid(count: int, class_token: int, distilled: int, source: str) -> tuple[int, int]:
    """Side of the grid of patches, and the positions before it: of the prefix tokens, or none."""
    for positions in dict.fromkeys((class_token + distilled, 0)):
        side = math.isqrt(max(count - positions, 0))
        if side and side * side == count - positions:
            return side, positions
    raise MismatchedWeights(
        f"{source}: {count} positions are no square of patches, with {class_token + distilled}"
        " prefix tokens or without"
    )
