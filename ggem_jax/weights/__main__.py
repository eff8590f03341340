"""What a file of weights is, and the same weights under other names.

    python -m ggem_jax.weights inspect FILE [--json]
    python -m ggem_jax.weights convert FILE OUT.safetensors [--to flax|timm]

FILE is a published Vision Transformer (`read_vit`). `flax` names are those of `ViT`'s variables, joined by slashes; `timm` those of timm's models.
What goes wrong is one sentence on standard error and exit code 1; nothing half-written stays.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from ggem_jax.weights.safetensors_files import write_safetensors
from ggem_jax.weights.vit import FAMILIES, PublishedViT, read_vit, to_timm


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ggem_jax.weights", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (("inspect", "say what a file is, and what in it is not used"), ("convert", "write it under other names")):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("file", type=Path, metavar="FILE")
        command.add_argument("--heads", type=int, help="attention heads (default: those of the published sizes)")
        command.add_argument("--gelu", choices=("exact", "tanh", "quick"), help="(default: that of the family)")
        if name == "convert":
            command.add_argument("out", type=Path, metavar="OUT.safetensors")
            command.add_argument("--to", choices=("flax", "timm"), default="flax", help="names of the parameters (default: flax)")
        else:
            command.add_argument("--json", action="store_true", help="one JSON object and nothing else on standard output")
    arguments = parser.parse_args(argv)
    try:
        published = read_vit(arguments.file, heads=arguments.heads, gelu=arguments.gelu)
        if arguments.command == "inspect":
            _inspect(published, as_json=arguments.json)
        else:
            _convert(published, arguments.out, arguments.to)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"ggem_jax.weights: {' '.join(str(error).split())}\n")
        return 1
    return 0


def described(published: PublishedViT) -> dict[str, Any]:
    """What `inspect --json` prints."""
    numbers = sum(leaf.size for leaf in jax.tree.leaves(published.variables))
    mean, std = published.normalised or (None, None)
    return {
        "family": published.family,
        "about": FAMILIES[published.family].about,
        "layout": published.layout,
        "parameters": numbers,
        "pooling": published.pooling,
        "classes": published.num_classes,
        "mean": mean,
        "std": std,
        "config": dataclasses.asdict(published.config),
        "unused": list(published.unused),
    }


def _inspect(published: PublishedViT, *, as_json: bool) -> None:
    found = described(published)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    config = found["config"]
    print(f"{found['about']}; names of layout {found['layout']}; {found['parameters']:,} parameters")
    size = f"width {config['width']}, {config['depth']} blocks, {config['heads']} heads, MLP {config['mlp_width']}"
    print(f"{size}; patches of {config['patch']} in images of {config['image']}; GELU {config['gelu']}, norms with {config['norm_eps']:g}")
    prefix = ("a class token" if config["class_token"] else "no class token") + f", {config['registers']} registers"
    print(f"{prefix}; pooled by {found['pooling']}, {found['classes'] or 'no'} outputs of the head")
    pictures = (
        f"less {found['mean']}, over {found['std']}"
        if found["mean"]
        else "not known: files of this kind do not agree (a config.json beside it would say)"
    )
    print(f"pictures in [0, 1]: {pictures}")
    print(f"not used: {', '.join(found['unused']) or 'nothing'}")


def _convert(published: PublishedViT, out: Path, names: str) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"the output is a safetensors file: give a name that ends in .safetensors, not {out}")
    if names == "timm":
        arrays = to_timm(published)
    else:
        leaves = jax.tree_util.tree_leaves_with_path(published.variables)
        arrays = {"/".join(part.key for part in path): leaf for path, leaf in leaves}
    write_safetensors(out, arrays)
    print(f"{len(arrays)} arrays written to {out}")


if __name__ == "__main__":
    sys.exit(main())
