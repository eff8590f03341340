"""What `python -m ggem_jax.weights inspect` says of ten kinds of files: docs/weights_inspect.md.

    python -m benchmarks.weights_inspect > docs/weights_inspect.md

The files are small: published widths, one block, zeros.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.bench_weights import augreg_shapes, clip_shapes, siglip_shapes, text_shapes
from benchmarks.weights_evidence import config, folder, timm, zeros
from ggem_jax.models.text import TextConfig
from ggem_jax.models.vit import GGeM, ViT
from ggem_jax.weights import write_safetensors, write_torch
from ggem_jax.weights.__main__ import main as inspect
from ggem_jax.weights.export import export_vit
from ggem_jax.weights.hugging_face import to_hugging_face
from ggem_jax.weights.load import LoadedViT
from ggem_jax.weights.text import TextStyle
from ggem_jax.weights.vit import from_arrays

HEAD = """# What inspect says

Ten kinds of files, as `python -m benchmarks.weights_inspect` writes and inspects them. The networks
are small: published widths, one block, zeros.
"""


def timm_and_settings() -> list[str]:
    """A file of timm's with its config.json."""
    settings = {
        "architecture": "deit_tiny_patch16_224",
        "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    return _write("model.safetensors", timm(192), settings)


def dinov2_of_hugging_face() -> list[str]:
    """DINOv2 in Hugging Face's names, with its config.json."""
    arrays, settings = to_hugging_face(from_arrays(timm(384, 14, layer_scale=1.0), "none"))
    return _write("model.safetensors", arrays, settings)


def mae_with_decoder() -> list[str]:
    """MAE in Hugging Face's names, with its decoder and without settings."""
    arrays, _ = to_hugging_face(from_arrays(timm(768), "none"))
    arrays = folder("vit.", arrays)
    return _write("pytorch_model.bin", arrays | folder("decoder.", {"decoder_embed.weight": ZERO}))


def teacher_of_dinov2() -> list[str]:
    """A training checkpoint of DINOv2, with student and teacher."""
    both = {f"{who}.backbone.": timm(384, 14, layer_scale=1.0) for who in ("student", "teacher")}
    arrays = {name: each for who, part in both.items() for name, each in folder(who, part).items()}
    heads = {f"{who}.dino_head.last_layer.weight": ZERO for who in ("student", "teacher")}
    return [*_write("model_final.rank_0.pth", arrays | heads), "--which", "teacher"]


def lightning() -> list[str]:
    """A checkpoint of Lightning around a compiled network."""
    return _write("last.ckpt", folder("model._orig_mod.", timm(192)))


def clip_of_open_clip() -> list[str]:
    """CLIP in open_clip's names, with its settings."""
    vision = {"width": 768, "layers": 1, "patch_size": 32}
    settings = {"model_cfg": {"quick_gelu": False, "vision_cfg": vision, "text_cfg": {}}}
    arrays = _clip_with_text()
    return _write("open_clip.safetensors", arrays, settings, "open_clip_config.json")


def text_tower() -> list[str]:
    """The text tower of the same file, with the GELU given."""
    return [*_write("clip.safetensors", _clip_with_text()), "--tower", "text", "--gelu", "exact"]


def siglip_of_google() -> list[str]:
    """SigLIP as Google published it."""
    return _write("siglip.npz", zeros(siglip_shapes(config(768))))


def augreg() -> list[str]:
    """AugReg as Google published it."""
    return _write("augreg.npz", zeros(augreg_shapes(config(768))))


def our_own() -> list[str]:
    """A file of our own."""
    model = ViT(config(192), GGeM(), num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    export_vit(LoadedViT(model, variables, None, None, ""), "own.safetensors")
    return ["own.safetensors"]


ZERO = np.zeros((8, 8), np.float32)
KINDS: tuple[Callable[[], list[str]], ...] = (
    timm_and_settings,
    dinov2_of_hugging_face,
    mae_with_decoder,
    teacher_of_dinov2,
    lightning,
    clip_of_open_clip,
    text_tower,
    siglip_of_google,
    augreg,
    our_own,
)


def _clip_with_text() -> dict[str, np.ndarray]:
    sizes = {"vocabulary": 512, "context": 77, "width": 512, "depth": 1, "heads": 8}
    texts = TextConfig(**sizes, mlp_width=64)
    style = TextStyle(projection="text_projection")
    shapes = clip_shapes(config(768, 32)) | text_shapes("clip", style, texts, 512, False)
    return zeros(shapes | {"logit_scale": ()})


def _write(
    name: str,
    arrays: Mapping[str, np.ndarray],
    settings: dict[str, Any] | None = None,
    file: str = "config.json",
) -> list[str]:
    """Writes a file of weights and its settings, and returns what `inspect` is called with."""
    if name.endswith(".npz"):
        np.savez(name, **arrays)
    elif name.endswith(".safetensors"):
        write_safetensors(name, arrays)
    else:
        write_torch(name, arrays)
    if settings is not None:
        Path(file).write_text(json.dumps(settings))
    return [name]


def main() -> None:
    print(HEAD)
    before = Path.cwd()
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            try:
                arguments = kind()
                print(f"## {(kind.__doc__ or '').removesuffix('.')}\n\n```")
                print(f"$ python -m ggem_jax.weights inspect {' '.join(arguments)}", flush=True)
                if inspect(["inspect", *arguments]):
                    raise SystemExit(f"{kind.__name__} is not read")
                print("```" + ("" if kind is KINDS[-1] else "\n"))
            finally:
                os.chdir(before)


if __name__ == "__main__":
    main()
