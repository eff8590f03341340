"""What only the files of DINOv3 have: gates apart, masked biases of keys, and periods of rotations.

The names are those that `vit_layouts` gives every publisher's file. On the way back they are those
of timm's Eva, which is timm's class of these networks.

References: github.com/facebookresearch/dinov3, layers/attention.py (the mask of the biases) and
layers/rope_position_encoding.py (the periods); timm, models/eva.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.files.networks import Arrays
from ggem_jax.files.normalisation import IMAGENET, SAT493M, Normalisation
from ggem_jax.models.config import ViTConfig
from ggem_jax.models.position import rope_periods
from ggem_jax.weights.declared import Declared

PERIODS = "rope_embed.periods"
_GATE = re.compile(r"(blocks\.\d+\.mlp)\.(gate|value)\.(weight|bias)")


def join_parts(arrays: Arrays, *, source: str) -> Arrays:
    """Returns the arrays with the two layers of a gated MLP as one, and biases with their mask.

    Args:
        arrays: By timm's names; `mlp.gate` and `mlp.value` are the two layers, the gate first.
        source: The file, for messages.

    Returns:
        The arrays: gate and value are `mlp.fc1`, and a value without a gate is `mlp.fc1`; biases
        that are masked, as those of the keys, are 0.

    Raises:
        MismatchedWeights: Two parts do not fit together.
    """
    found: Arrays = {}
    for name, array in arrays.items():
        if match := _GATE.fullmatch(name):
            parts = [f"{match[1]}.{part}.{match[3]}" for part in ("gate", "value")]
            found[f"{match[1]}.fc1.{match[3]}"] = _together(
                {part: arrays[part] for part in parts if part in arrays}, source
            )
        elif name == "reg_token" and array.shape[1] == 0:
            continue  # of a network without registers
        elif name.endswith(".bias_mask"):
            continue
        elif f"{name}_mask" in arrays:
            mask = np.asarray(arrays[f"{name}_mask"], np.float32)
            if mask.shape != array.shape or not np.isin(mask, (0, 1)).all():
                raise MismatchedWeights(
                    f"{source}: {name}_mask must hold a 0 or a 1 for each of the {array.size}"
                    f" biases, not {mask.shape} with others"
                )
            found[name] = np.where(mask == 1, array, np.zeros_like(array))
        else:
            found[name] = array
    return found


def is_rotary(arrays: Mapping[str, Any], layout: str) -> bool:
    """Returns whether parameters by timm's names are those of a DINOv3.

    Files in timm's own names are recognised by what they lack: they have neither positions nor a
    bias of the keys, but a class token, registers and LayerScale. No other network of timm does.

    Args:
        arrays: By timm's names, with queries, keys and values apart.
        layout: Whose names the file has (`vit_layouts.LAYOUTS`).

    Returns:
        Whether they are; never with learned positions.
    """
    if "pos_embed" in arrays:
        return False
    has = {"cls_token", "reg_token", "blocks.0.ls1.gamma", "norm.weight"}
    lacks = {"blocks.0.attn.k.bias", "fc_norm.weight", "norm_pre.weight", "attn_pool.latent"}
    return layout in ("dinov3", "hf-dinov3") or (has <= set(arrays) and lacks.isdisjoint(arrays))


def split_periods(arrays: Arrays, *, source: str) -> tuple[Arrays, np.ndarray | None]:
    """Returns the arrays as a rotary ViT of ours has them, and the periods that the file holds.

    Keys have no bias there. One of zeros is left out.

    Args:
        arrays: By timm's names, with queries, keys and values apart.
        source: The file, for messages.

    Returns:
        The arrays without biases of keys and without the periods, and the periods, if any.

    Raises:
        MismatchedWeights: A bias of keys is not 0.
    """
    biases = [name for name in arrays if re.fullmatch(r"blocks\.\d+\.attn\.k\.bias", name)]
    if used := [name for name in biases if np.any(arrays[name] != 0)]:
        raise MismatchedWeights(
            f"{source} has biases of keys that are not 0, which DINOv3 masks and a rotary ViT of"
            f" ours does not have: {', '.join(used[:3])}"
        )
    left = {name: array for name, array in arrays.items() if name not in (*biases, PERIODS)}
    return left, arrays.get(PERIODS)


def rope_of(
    periods: np.ndarray | None, declared: Declared, *, source: str
) -> tuple[dict[str, Any], str]:
    """Returns the fields of a config for its rotary positions, and where their base came from.

    The original files hold the periods as they were trained, in bfloat16. Hugging Face and timm
    leave them out and compute them in float32, which changes the features a little.

    Args:
        periods: The periods, `(channels of a head / 4,)`; None: the file has none.
        declared: What files of settings say. Without periods or a declared base, the base is 100,
            that of all published networks.
        source: The file, for messages.

    Returns:
        The fields `position`, `rope_base` and `rope_dtype`, and the evidence.

    Raises:
        MismatchedWeights: The periods are not the powers of one base.
    """
    if periods is not None:
        base, dtype = _base_of(np.asarray(periods, np.float32), source)
        where = f"{PERIODS} in the file"
    elif declared.rope_base is not None:
        base, dtype, where = declared.rope_base, "float32", declared.sources["rope_base"]
    else:
        base, dtype, where = 100.0, "float32", "the base of every published DINOv3"
    return {"position": "rope", "rope_base": base, "rope_dtype": dtype}, where


def _base_of(periods: np.ndarray, source: str) -> tuple[float, str]:
    """The base whose powers these periods are, and the dtype that they are rounded to."""
    if periods.ndim == 1 and len(periods) and np.isfinite(periods).all() and periods[-1] > 0:
        fitted = float(periods[-1]) ** (len(periods) / max(len(periods) - 1, 1))
        for base in (100.0, float(np.round(fitted)), fitted):
            for dtype in ("float32", "bfloat16"):
                expected = rope_periods(4 * len(periods), base, dtype) if base > 0 else None
                if expected is not None and np.allclose(periods, expected, rtol=1e-6, atol=0):
                    return base, dtype
    raise MismatchedWeights(
        f"{source}: {PERIODS} must hold the powers of one base, base^(i / n) for i = 0 ... n - 1,"
        f" not {periods.tolist() if periods.size < 40 else periods.shape}"
    )


def heads_of_periods(width: int, periods: np.ndarray, *, source: str) -> int:
    """Returns the number of attention heads: there is a period for every 4 channels of a head.

    Args:
        width: Channels of a token.
        periods: The periods of the file, `(channels of a head / 4,)`.
        source: The file, for messages.

    Returns:
        The number of heads.

    Raises:
        MismatchedWeights: The width is no multiple of these heads' channels.
    """
    channels = 4 * len(periods)
    if width % channels:
        raise MismatchedWeights(
            f"{source}: {len(periods)} periods are of heads with {channels} channels, of which the"
            f" width {width} is no multiple"
        )
    return width // channels


def normalisation_of(
    config: ViTConfig, layout: str, unused: tuple[str, ...]
) -> Normalisation | None:
    """Returns the mean and deviation of the images that a network was trained on.

    L and 7B were trained on LVD-1689M and on the satellite images of SAT-493M, the others on the
    first only. In the original files the L of SAT-493M has `local_cls_norm`, and the other has not.

    Args:
        config: The network's config.
        layout: Whose names the file has.
        unused: The names in the file that no part of the network uses.

    Returns:
        Mean and deviation in [0, 1]; None where the file does not tell which of the two it is.
    """
    is_large = config.width == 1024 and config.mlp == "gelu"
    if not is_large and config.width != 4096:
        return IMAGENET
    if is_large and layout == "dinov3":
        return SAT493M if any("local_cls_norm" in name for name in unused) else IMAGENET
    return None


def to_names_of_eva(arrays: Arrays) -> Arrays:
    """Returns the arrays under the names of timm's class Eva, not those of its other ViTs.

    Queries, keys and values are joined; the biases of queries and values stand apart, and so do the
    layers of a gated MLP.

    Args:
        arrays: By timm's names, with queries, keys and values apart.

    Returns:
        The arrays, as timm's `vit_small_patch16_dinov3` and its relatives have them.
    """
    found: Arrays = {}
    for name, array in arrays.items():
        name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        name = re.sub(r"\.attn\.([qv])\.bias$", r".attn.\1_bias", name)
        first, last = re.sub(r"\.fc1\.", ".fc2.", name), re.fullmatch(r".*\.fc1\.(\w+)", name)
        weight = arrays.get(re.sub(r"bias$", "weight", first))
        if last and weight is not None and len(array) == 2 * weight.shape[1]:
            for part, half in zip(("fc1_g", "fc1_x"), np.split(array, 2), strict=True):
                found[name.replace(".fc1.", f".{part}.")] = half
        elif match := re.fullmatch(r"(.*\.attn)\.q\.weight", name):
            found[f"{match[1]}.qkv.weight"] = np.concatenate(
                [arrays[f"{match[1]}.{part}.weight"] for part in "qkv"]
            )
        elif not re.fullmatch(r".*\.attn\.[kv]\.weight", name):
            found[name] = array
    return found


def _together(parts: Arrays, source: str) -> np.ndarray:
    """The layers of a gated MLP as one, the gate first; a layer of its own as it is."""
    shapes = {name: array.shape for name, array in parts.items()}
    if len(set(shapes.values())) > 1 or any(not shape for shape in shapes.values()):
        raise MismatchedWeights(f"{source}: gate and value must be of one shape, not {shapes}")
    return np.concatenate(list(parts.values()))
