"""Times reading and writing published weights of full size.

    python -m benchmarks.bench_weights

Random weights of the published sizes are written under the published names. A process of its own
reads the file (`read_vit`, `read_text`: names, axes, variables), converts the variables back
(`to_timm`; text towers: `to_published_names`) and writes them. Seconds are medians over the rounds;
the files are in the page cache of the system. `load` is the number of processes that wanted a core
in the minute before; where it is above the number of cores, the times are too long. `peak_mb` is
the growth of the process in the first round.

`differs` lists what does not return to the bit. It compares with the file where the names are the
same, otherwise the variables of the written file with those of the first. It should be empty except
for the distilled DeiT, whose file has a distillation token and a position for it: our model has
their sum, which returns as the token, with a position of zero.

Rows go to benchmarks/results/weights.csv.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.record import RESULTS, append, machine
from ggem_jax.files.arrays import read_arrays
from ggem_jax.files.safetensors_files import write_safetensors
from ggem_jax.models.text import TextConfig
from ggem_jax.models.vit import ViTConfig, vit_config
from ggem_jax.weights.text import TextStyle, read_text, text_table, to_published_names
from ggem_jax.weights.vit import read_vit, to_timm
from ggem_jax.weights.vit_layouts import Arrays, join_qkv
from ggem_jax.weights.vit_table import Style, Trained, vit_table

Shapes = dict[str, tuple[int, ...]]
SMALLER = {"width": 24, "depth": 2, "heads": 3, "mlp_width": 40}  # of --small


class Case(NamedTuple):
    """A published file: its names and shapes, and its towers."""

    shapes: Shapes  # of the arrays by their published names
    ending: str = ".safetensors"  # or ".npz"
    towers: tuple[str, ...] = ("image",)  # towers that are read and timed


def cases(small: bool = False) -> dict[str, Case]:
    """Returns the files by family; `small` gives tiny networks of the same architectures."""

    def sized(variant: str, **changes: Any) -> ViTConfig:
        return vit_config(
            variant, **changes | (SMALLER | {"image": 2 * int(variant[2:])} if small else {})
        )

    def texts(**sizes: Any) -> TextConfig:
        return TextConfig(**sizes | (SMALLER | {"vocabulary": 50} if small else {}))

    b16 = sized("B/16")
    distilled, dinov2 = (
        sized("S/16", registers=1),
        sized("B/14", image=518, registers=4, layer_scale=1e-5),
    )
    of_clip = text_shapes(
        "clip", TextStyle("", "text_projection"), texts(vocabulary=49408), 512, False
    )
    of_siglip = texts(vocabulary=32000, width=768, heads=12, mlp_width=3072, context=64)
    decoder = {
        "mask_token": (1, 1, 512),
        "decoder_embed.weight": (512, b16.width),
        "decoder_embed.bias": (512,),
    }
    head = {"head_dist.weight": (1000, distilled.width), "head_dist.bias": (1000,)}
    return {
        "MAE-B/16": Case(timm_shapes(b16, "avg", 0, Style(1)) | decoder),
        "DeiT-S/16 distilled": Case(
            timm_shapes(distilled, "cls", 1000, Style(2, distilled=True)) | head
        ),
        "DeiT-III-B/16": Case(timm_shapes(sized("B/16", layer_scale=1e-5), "cls", 1000, Style(0))),
        "DINOv2-B/14 registers": Case(timm_shapes(dinov2, "cls", 0, Style(0))),
        "AugReg-B/16": Case(augreg_shapes(b16), ".npz"),
        "CLIP-B/16": Case(
            clip_shapes(b16) | of_clip | {"logit_scale": ()}, towers=("image", "text")
        ),
        "SigLIP-B/16": Case(
            siglip_shapes(b16)
            | text_shapes(
                "big_vision",
                TextStyle("params/txt/", "params/txt/head/kernel"),
                of_siglip,
                of_siglip.width,
                True,
            )
            | {"params/t": (1,), "params/b": (1,)},
            ".npz",
            ("image", "text"),
        ),
    }


def timm_shapes(config: ViTConfig, pooling: Trained, classes: int, style: Style) -> Shapes:
    """Returns timm's names; positions as in the file, before our table folds them."""
    shapes = {
        name: parameter.shape
        for name, parameter in vit_table(config, style, pooling, classes).items()
    }
    # np.empty: memory that nothing touches
    joined = join_qkv({name: np.empty(shape, np.float32) for name, shape in shapes.items()})
    shapes = {name: array.shape for name, array in joined.items()}
    shapes["pos_embed"] = (1, style.positions + (config.image // config.patch) ** 2, config.width)
    if style.distilled:
        shapes["dist_token"] = shapes.pop("reg_token")
    return shapes


def text_shapes(
    layout: str, style: TextStyle, config: TextConfig, outputs: int, project_bias: bool
) -> Shapes:
    """Returns the shapes of a text tower under the names of a published layout."""
    return {
        name: parameter.shape
        for name, parameter in text_table(layout, style, config, outputs, project_bias).items()
    }


def clip_shapes(c: ViTConfig) -> Shapes:
    """Returns the shapes of the image tower of openai/CLIP, model.py."""
    block = {
        "ln_1.weight": (c.width,),
        "ln_1.bias": (c.width,),
        "ln_2.weight": (c.width,),
        "ln_2.bias": (c.width,),
    }
    block |= {"attn.in_proj_weight": (3 * c.width, c.width), "attn.in_proj_bias": (3 * c.width,)}
    block |= {"attn.out_proj.weight": (c.width, c.width), "attn.out_proj.bias": (c.width,)}
    block |= {"mlp.c_fc.weight": (c.mlp_width, c.width), "mlp.c_fc.bias": (c.mlp_width,)}
    block |= {"mlp.c_proj.weight": (c.width, c.mlp_width), "mlp.c_proj.bias": (c.width,)}
    shapes = {
        "class_embedding": (c.width,),
        "positional_embedding": (1 + (c.image // c.patch) ** 2, c.width),
        "proj": (c.width, 512),
    }
    shapes |= {"conv1.weight": (c.width, 3, c.patch, c.patch)}
    shapes |= {
        f"{norm}.{leaf}": (c.width,)
        for norm in ("ln_pre", "ln_post")
        for leaf in ("weight", "bias")
    }
    return inside("visual.", shapes | repeat("transformer.resblocks.{}.", block, c.depth))


def augreg_shapes(c: ViTConfig) -> Shapes:
    """Returns the shapes of a file of google-research/vision_transformer."""
    block = flax_block(
        c, ("LayerNorm_0/", "LayerNorm_2/"), "MultiHeadDotProductAttention_1/", "MlpBlock_3/"
    )
    shapes = {
        "cls": (1, 1, c.width),
        "Transformer/posembed_input/pos_embedding": (1, 1 + (c.image // c.patch) ** 2, c.width),
    }
    return shapes | flax_tower(c, block) | {"head/kernel": (c.width, 1000), "head/bias": (1000,)}


def siglip_shapes(c: ViTConfig) -> Shapes:
    """Returns the shapes of the image tower of big_vision, with attention pooling."""
    attention, mlp = "MultiHeadDotProductAttention_0/", "MlpBlock_0/"
    pooling = flax_block(c, ("LayerNorm_0/",), attention, mlp) | {"probe": (1, 1, c.width)}
    block = flax_block(c, ("LayerNorm_0/", "LayerNorm_1/"), attention, mlp)
    shapes = {"pos_embedding": (1, (c.image // c.patch) ** 2, c.width)} | inside(
        "MAPHead_0/", pooling
    )
    return inside("params/img/", shapes | flax_tower(c, block))


def flax_tower(c: ViTConfig, block: Shapes) -> Shapes:
    """Returns the shapes of the patch embedding, the blocks and the last norm of a Flax ViT."""
    shapes = {"embedding/kernel": (c.patch, c.patch, 3, c.width), "embedding/bias": (c.width,)}
    shapes |= {
        "Transformer/encoder_norm/scale": (c.width,),
        "Transformer/encoder_norm/bias": (c.width,),
    }
    return shapes | repeat("Transformer/encoderblock_{}/", block, c.depth)


def flax_block(c: ViTConfig, norms: Sequence[str], attention: str, mlp: str) -> Shapes:
    """Returns the shapes of one block of a Flax ViT, with its norms, attention and MLP as named."""
    heads = (c.heads, c.width // c.heads)
    shapes = {f"{norm}{leaf}": (c.width,) for norm in norms for leaf in ("scale", "bias")}
    for part in ("query", "key", "value"):
        shapes |= {f"{attention}{part}/kernel": (c.width, *heads), f"{attention}{part}/bias": heads}
    shapes |= {f"{attention}out/kernel": (*heads, c.width), f"{attention}out/bias": (c.width,)}
    shapes |= {f"{mlp}Dense_0/kernel": (c.width, c.mlp_width), f"{mlp}Dense_0/bias": (c.mlp_width,)}
    return shapes | {
        f"{mlp}Dense_1/kernel": (c.mlp_width, c.width),
        f"{mlp}Dense_1/bias": (c.width,),
    }


def inside(folder: str, shapes: Shapes) -> Shapes:
    """Returns the shapes with a prefix before each name."""
    return {folder + name: shape for name, shape in shapes.items()}


def repeat(folder: str, block: Shapes, depth: int) -> Shapes:
    """Returns the shapes of `depth` blocks; `folder` is their prefix with {} for the number."""
    return {
        name: shape for i in range(depth) for name, shape in inside(folder.format(i), block).items()
    }


def write_random(case: Case, path: Path) -> None:
    """Writes a file of a case with random weights."""
    rng = np.random.default_rng(0)
    arrays = {
        name: np.float32(0.02) * rng.standard_normal(shape, np.float32)
        for name, shape in case.shapes.items()
    }
    if case.ending == ".npz":
        np.savez(path, **arrays)
    else:
        write_safetensors(path, arrays)


def measure(path: Path, tower: str, heads: int | None, rounds: int) -> dict[str, Any]:
    """Returns seconds and memory of one tower of a file, and what does not return to the bit.

    Args:
        path: The file; a written copy is placed beside it.
        tower: "image" or "text".
        heads: Attention heads. None leaves them to `read_vit` or `read_text`.
        rounds: Rounds whose medians are given.
    """
    read: Callable = read_vit if tower == "image" else read_text
    back: Callable[[Any], Arrays] = to_timm if tower == "image" else to_published_names
    written = path.with_name("written.safetensors")
    before, seconds = _kilobytes("VmRSS"), []
    for each in range(rounds):
        times = [time.perf_counter()]
        published = read(path, heads=heads, gelu="quick")  # of CLIP it must be given
        times.append(time.perf_counter())
        arrays = back(published)
        times.append(time.perf_counter())
        write_safetensors(written, arrays)
        seconds.append(np.diff([*times, time.perf_counter()]))
        if each == 0:
            peak = (_kilobytes("VmHWM") - before) / 1e3
    names = ("read_s", "back_s", "write_s")
    row = {
        name: f"{statistics.median(column):.2f}"
        for name, column in zip(names, np.transpose(seconds), strict=True)
    }
    numbers = sum(leaf.size for leaf in jax.tree.leaves(published.variables))
    same_names = tower == "text" or published.layout == "timm"
    used = (
        {name: array for name, array in read_arrays(path).items() if name not in published.unused}
        if same_names
        else _named(published)
    )
    again = (
        read_arrays(written)
        if same_names
        else _named(read_vit(written, heads=published.config.heads, gelu="quick"))
    )
    differs = sorted(
        name
        for name in used.keys() | again.keys()
        if not np.array_equal(used.get(name), again.get(name))
    )
    return (
        {"family_found": published.family, "parameters": numbers}
        | row
        | {"peak_mb": f"{peak:.0f}", "differs": " ".join(differs)}
    )


def _named(published: Any) -> Arrays:
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(published.variables)
    }


def _kilobytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny networks of the same architectures, to test the benchmark",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="the folder of weights.csv (default: benchmarks/results)",
    )
    parser.add_argument("--one", nargs=2, metavar=("FILE", "TOWER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    heads = SMALLER["heads"] if arguments.small else None
    if arguments.one:
        print(
            json.dumps(measure(Path(arguments.one[0]), arguments.one[1], heads, arguments.rounds))
        )
        return
    versions = machine()
    print("  ".join(f"{key} {value}" for key, value in versions.items()))
    for family, case in cases(arguments.small).items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"weights{case.ending}"
            write_random(case, path)
            for tower in case.towers:
                flags = [
                    "--rounds",
                    str(arguments.rounds),
                    "--one",
                    str(path),
                    tower,
                    *(["--small"] if arguments.small else []),
                ]
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.bench_weights", *flags],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                row = {
                    "family": family,
                    "tower": tower,
                    "file": case.ending[1:],
                    "file_mb": f"{path.stat().st_size / 1e6:.1f}",
                }
                append(
                    "weights",
                    versions
                    | row
                    | json.loads(done.stdout)
                    | {"rounds": arguments.rounds, "load": f"{os.getloadavg()[0]:.1f}"},
                    arguments.results,
                )


if __name__ == "__main__":
    main()
