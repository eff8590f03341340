"""What decides heads, GELU and the order of the norms of each kind of published ViT: a table.

    python -m benchmarks.weights_evidence           # Markdown, for docs/weights.md

Each row is a network of published width with one block of zeros, under the names of a publisher,
with or without the file of settings that the publisher puts beside the weights. It is read by the
reader itself, or the reader asks, or refuses.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bench_weights import Shapes, augreg_shapes, clip_shapes, siglip_shapes, timm_shapes
from ggem_jax.files.errors import AmbiguousWeights, MismatchedWeights
from ggem_jax.models.vit import ViTConfig
from ggem_jax.weights.architecture import TIMM, Given
from ggem_jax.weights.hugging_face import to_hugging_face
from ggem_jax.weights.vit import from_arrays
from ggem_jax.weights.vit_table import Style, Trained

# what a user might answer
ANSWERS: dict[str, Any] = {
    "heads": 16,
    "gelu": "exact",
    "norm": "pre",
    "architecture": "deit3_small_patch16_224",
}
OF_CLASS_TOKEN = Style(1)  # positions of the class token and the patches


class Row(NamedTuple):
    """A kind of file."""

    network: str
    naming: str
    arrays: Mapping[str, np.ndarray]
    settings: dict[str, Any] | None = None  # the contents of config.json; None: no such file
    file: str = "config.json"


def rows() -> list[Row]:
    """Returns the kinds of files, each publisher's naming with and without its settings."""
    clip_b = zeros(clip_shapes(config(768, 32)))
    openai = clip_b | {name: np.array(7) for name in ("input_resolution", "context_length")}
    openai["vocab_size"] = np.array(49408)
    laion = {"vision_cfg": {"width": 1280, "layers": 1, "head_width": 80, "patch_size": 14}}
    deit3 = timm(384, style=Style(0), layer_scale=1.0)
    found = [
        *with_settings("ViT-B/16, DeiT-B/16", timm(768), "vit_base_patch16_224"),
        *with_settings("DeiT-Ti/16", timm(192), "vit_tiny_patch16_224"),
        Row("AugReg B/16", "Google", zeros(augreg_shapes(config(768)))),
        *with_settings(
            "DeiT III", timm(384, style=Style(0), layer_scale=1.0), "deit3_small_patch16_224"
        ),
        Row("DeiT III", "DeiT's code", gammas(deit3)),
        *with_settings("MAE H/14", timm(1280, 14, decoder=True), "vit_huge_patch14_224"),
        *with_settings("DINOv2 S/14", timm(384, 14, layer_scale=1.0), "vit_small_patch14_dinov2"),
        Row("DINOv2 g/14", "timm", timm(1536, 14, layer_scale=1.0, mlp="swiglu")),
        Row("MoCo v3 S/16", "MoCo v3", folder("base_encoder.", timm(384))),
        Row("CLIP B/32", "OpenAI's TorchScript", openai),
        Row("CLIP B/32", "open_clip", clip_b),
        Row(
            "CLIP H/14",
            "open_clip",
            zeros(clip_shapes(config(1280, 14))),
            {"model_cfg": laion},
            "open_clip_config.json",
        ),
        *with_settings("CLIP g/14", clip(1408, 14), "vit_giant_patch14_clip_224"),
        *with_settings("CLIP bigG/14", clip(1664, 14), "vit_gigantic_patch14_clip_224"),
        Row("SigLIP B/16", "Google", zeros(siglip_shapes(config(768)))),
        Row("SigLIP B/16", "timm", siglip(768, 16)),
        Row("SigLIP So400m/16", "timm", siglip(1152, 16)),
        Row("SigLIP 2 giant-opt/16", "timm", siglip(1536, 16)),
        *with_settings("I-JEPA g/16", average(1408), "vit_giant_patch16_gap_224"),
        *with_settings("post-norm B/16", average(768, qkv_bias=False), "vit_base_patch16_rpn_224"),
        *with_settings("gap or SigLIP B/16", without_token(768), "vit_base_patch16_gap_224"),
        Row("a width of no publisher", "timm", timm(64)),
    ]
    return found + hugging_face()


def hugging_face() -> list[Row]:
    """Returns the kinds of Hugging Face: the same arrays under its names."""
    kinds = {
        "ViT-B/16": timm(768),
        "DeiT-S/16 distilled": timm(384, style=Style(2, distilled=True), registers=1),
        "MAE B/16": timm(768, decoder=True),
        "DINOv2 S/14": timm(384, 14, layer_scale=1.0),
        "CLIP B/16": clip(768, 16),
        "CLIP bigG/14": clip(1664, 14),
        "SigLIP B/16": siglip(768, 16),
        "SigLIP 2 giant-opt/16": siglip(1536, 16),
    }
    given = Given(gelu="exact")
    found = []
    for network, arrays in kinds.items():
        gelu = given if network.startswith(("CLIP", "SigLIP")) else Given()
        renamed, settings = to_hugging_face(from_arrays(arrays, "none", given=gelu))
        found += [Row(network, "Hugging Face", renamed, each) for each in (settings, None)]
    return found


def config(width: int, patch: int = 16, **changes: Any) -> ViTConfig:
    """Returns a config of one block ; heads do not show in the names."""
    sizes = {"depth": 1, "heads": width // 64 or 1, "mlp_width": 4 * width, "image": patch}
    return ViTConfig(**{"patch": patch, "width": width} | sizes | changes)


def timm(
    width: int,
    patch: int = 16,
    *,
    pooling: Trained = "cls",
    style: Style = OF_CLASS_TOKEN,
    decoder: bool = False,
    **changes: Any,
) -> dict[str, np.ndarray]:
    """Returns arrays of zeros in timm's names; `decoder` adds what a MAE holds beside."""
    arrays = zeros(timm_shapes(config(width, patch, **changes), pooling, 0, style))
    return arrays | ({"decoder_embed.weight": np.zeros((8, 8), np.float32)} if decoder else {})


def clip(width: int, patch: int) -> dict[str, np.ndarray]:
    """Returns an image tower of CLIP in timm's names."""
    return timm(width, patch, pre_norm=True, patch_bias=False)


def siglip(width: int, patch: int) -> dict[str, np.ndarray]:
    """Returns an image tower of SigLIP in timm's names."""
    return timm(width, patch, pooling="map", class_token=False, style=Style(0))


def average(width: int, **changes: Any) -> dict[str, np.ndarray]:
    """Returns a network without a class token, whose norm comes after the pooling."""
    return without_token(width, style=Style(0, fc_norm=True), **changes)


def without_token(width: int, **changes: Any) -> dict[str, np.ndarray]:
    """Returns a network without a class token, in timm's names."""
    return timm(width, **{"pooling": "avg", "class_token": False, "style": Style(0)} | changes)


def zeros(shapes: Shapes) -> dict[str, np.ndarray]:
    """Returns arrays of zeros of these shapes, without memory of their own."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def gammas(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays with LayerScales named as in DeiT's code."""
    return {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): each for name, each in arrays.items()}


def folder(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays behind a prefix."""
    return {prefix + name: array for name, array in arrays.items()}


def with_settings(network: str, arrays: Mapping[str, np.ndarray], architecture: str) -> list[Row]:
    """Returns a file of timm's with its `config.json`, which names the model, and without."""
    return [
        Row(network, "timm", arrays, {"architecture": architecture}),
        Row(network, "timm", arrays),
    ]


def outcome(row: Row) -> tuple[str, ...]:
    """Returns what reading gives: the value and the source of each choice, or why it stops.

    Args:
        row: The kind of file.

    Returns:
        Heads, GELU and order of the norms; a flag that is asked for in its place.
    """
    with tempfile.TemporaryDirectory() as place:
        if row.settings is not None:
            (Path(place) / row.file).write_text(json.dumps(row.settings))
        given, asked = Given(), list[str]()
        while True:
            try:
                found = from_arrays(dict(row.arrays), Path(place) / "w.safetensors", given=given)
            except AmbiguousWeights as error:
                flag = re.findall(r"--(heads|gelu|norm|architecture)", str(error))[0]
                if flag in asked:
                    raise
                asked.append(flag)
                given = given._replace(**{flag: ANSWERS[flag]})
                continue
            except MismatchedWeights as error:
                return (f"refused: {str(error).partition(': ')[2]}", "", "")
            break
    c, where = found.config, found.evidence
    norms = "post" if c.post_norm else "pre"
    cells = {
        "heads": f"{c.heads}: {where['heads']}",
        "gelu": f"{c.gelu}: {where['gelu']}",
        "norm": f"{norms}: {where['norm']}" if c.post_norm else norms,
        "architecture": where.get("architecture", ""),
    }
    asks = {name: f"**asks** `--{name}`" for name in asked}
    heads, gelu, norms, name = (asks.get(each, cell) for each, cell in cells.items())
    return heads.replace(TIMM, "timm"), gelu.replace(TIMM, "timm"), name or norms


def main() -> None:
    print("| network | names | beside it | heads | GELU | norms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows():
        beside = "nothing" if row.settings is None else f"`{row.file}`"
        print(f"| {' | '.join((row.network, row.naming, beside, *outcome(row)))} |")


if __name__ == "__main__":
    main()
