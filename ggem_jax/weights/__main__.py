"""Inspects a file of weights, writes the weights under other names, or fetches them by name.

    python -m ggem_jax.weights inspect FILE [--tower image|text] [--which NAME] [--json]
    python -m ggem_jax.weights convert FILE OUT [--to flax|timm|hf] [--which NAME] [--no-head]
        [--overwrite]
    python -m ggem_jax.weights convert FILE OUT.safetensors --tower text [--to flax|published]
    python -m ggem_jax.weights get [NAME] [--revision R] [--json]

FILE is a published Vision Transformer, or with `--tower text` a text tower of CLIP or SigLIP; many
files hold both. `--which` takes one of several networks in a training checkpoint, such as `ema`,
`student` or `base_encoder`. `convert` also takes our own files and the folders of training runs.
`flax` names are those of the variables of `ViT` and `TextTransformer`, joined by slashes; `timm`
and `hf` are those of timm and of Hugging Face, which load the folder OUT; `published` names are
those of the file, for text towers. `get` downloads into the cache of huggingface_hub and prints the
path; without NAME it lists the names. A failure is one sentence on standard error and exit code 1;
no file is left half written.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from ggem_jax.files.arrays import Checkpoint, read_checkpoint
from ggem_jax.files.safetensors_files import write_safetensors
from ggem_jax.weights.architecture import Given, Settings
from ggem_jax.weights.export import FOLDERS_FILE, export_vit, weights_path
from ggem_jax.weights.hub import NAMES, SITE, fetch
from ggem_jax.weights.load import LoadedViT, load_vit
from ggem_jax.weights.own import holds_own_vit, read_own_vit
from ggem_jax.weights.text import (
    TEXT_FAMILIES,
    PublishedText,
    from_published_names,
    holds_text,
    to_published_names,
)
from ggem_jax.weights.vit import FAMILIES, PublishedViT, from_arrays

NAMINGS = {"image": ("flax", "timm", "hf"), "text": ("flax", "published")}  # of a tower


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ggem_jax.weights", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (
        ("inspect", "tell what a file holds, and which names in it are not used"),
        ("convert", "write the weights under other names, as a file or a folder"),
    ):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("file", type=Path, metavar="FILE")
        command.add_argument(
            "--tower",
            choices=("image", "text"),
            default="image",
            help="of a file with two (default: image)",
        )
        command.add_argument("--heads", type=int, help="attention heads (default: by the evidence)")
        command.add_argument(
            "--gelu",
            choices=("exact", "tanh", "quick"),
            help="GELU of the MLPs (default: by the evidence)",
        )
        command.add_argument(
            "--norm",
            choices=("pre", "post"),
            help="norms before or after the branches of a block, of an image tower (default: by the"
            " evidence)",
        )
        command.add_argument(
            "--architecture",
            type=Path,
            metavar="CONFIG",
            help="the publisher's config.json, its folder, or the name of the model in timm"
            " (default: the config.json beside FILE)",
        )
        command.add_argument(
            "--which",
            metavar="NAME",
            help="the network of a file with several, such as ema, model, teacher or student"
            " (default: model, or teacher)",
        )
        if name == "convert":
            command.add_argument(
                "out", type=Path, metavar="OUT", help="a folder, or a file ending in .safetensors"
            )
            command.add_argument(
                "--to",
                choices=("flax", "timm", "hf", "published"),
                default="flax",
                help="names of the parameters (default: flax)",
            )
            command.add_argument(
                "--no-head", action="store_true", help="leave the classification head out"
            )
            command.add_argument(
                "--overwrite",
                action="store_true",
                help="replace a config.json that says something else",
            )
        else:
            command.add_argument(
                "--json",
                action="store_true",
                help="one JSON object and nothing else on standard output",
            )
    get = commands.add_parser("get", help="download published weights by name")
    get.add_argument("name", nargs="?", metavar="NAME", help="(default: list the names)")
    get.add_argument("--revision", metavar="R", help="commit, branch or tag (default: the newest)")
    get.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "get":
            _get(arguments.name, arguments.revision, arguments.json)
            return 0
        if (arguments.file / FOLDERS_FILE).is_file():
            arguments.file /= FOLDERS_FILE
        if arguments.command == "convert":
            _check_names(arguments)
            target = weights_path(arguments.out)
            if target.exists() and target.samefile(arguments.file):
                raise ValueError(f"{target} is the file that is converted: give another name")
        if arguments.tower == "text" and arguments.norm is not None:
            raise ValueError("--norm is of image towers: the norms of text towers come before")
        of_image = arguments.command == "convert" and arguments.tower == "image"
        if of_image and arguments.file.is_dir():
            _export(_load_own(arguments), arguments)
            return 0
        checkpoint = read_checkpoint(arguments.file, arguments.which)
        if of_image and holds_own_vit(checkpoint.arrays):
            _export(_load_own(arguments), arguments)
            return 0
        published = _read(checkpoint, arguments)
        if arguments.command == "convert":
            if isinstance(published, PublishedText):
                _convert_text(published, arguments.out, arguments.to)
            else:
                _export(published, arguments)
        elif arguments.json:
            print(json.dumps(describe(published) | describe_file(checkpoint), indent=2))
        else:
            print("\n".join([*_lines(published), *_lines_of_file(checkpoint)]))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if arguments.command == "inspect" and (own := _describe_own(arguments.file)):
            print(json.dumps(own, indent=2) if arguments.json else own["about"])
            return 0
        sys.stderr.write(f"ggem_jax.weights: {' '.join(str(error).split())}\n")
        return 1
    return 0


def describe(published: PublishedViT | PublishedText) -> dict[str, Any]:
    """Returns what `inspect --json` prints.

    Args:
        published: The tower, as it was read.
    """
    found = {
        "family": published.family,
        "layout": published.layout,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(published.variables)),
        "config": dataclasses.asdict(published.config),
        "evidence": published.evidence,
        "unused": list(published.unused),
    }
    if isinstance(published, PublishedText):
        return found | {
            "about": TEXT_FAMILIES[published.family].about,
            "tower": "text",
            "outputs": published.outputs,
            "logit_scale": published.logit_scale,
            "logit_bias": published.logit_bias,
        }
    mean, std = published.normalised or (None, None)
    return found | {
        "about": FAMILIES[published.family].about,
        "tower": "image",
        "pooling": published.pooling,
        "classes": published.num_classes,
        "mean": mean,
        "std": std,
        "text_tower": holds_text(published.unused),
    }


def _describe_own(file: Path) -> dict[str, Any] | None:
    """What `inspect` prints of a file in the names of our own, None for any other file."""
    try:
        model, variables = read_own_vit(file)
    except (ValueError, OSError, ModuleNotFoundError):
        return None
    count, config = sum(leaf.size for leaf in jax.tree.leaves(variables)), model.config
    about = (
        f"a ViT in our own Flax names, which load_vit and --init read; {count:,} parameters without"
        f" pooling and head, width {config.width}, {config.depth} blocks, {config.heads} heads,"
        f" patches of {config.patch} in images of {config.image}"
    )
    config_values = dataclasses.asdict(config)
    return {"family": "own", "about": about, "parameters": count, "config": config_values}


def _read(checkpoint: Checkpoint, arguments: argparse.Namespace) -> PublishedViT | PublishedText:
    given = Given(arguments.heads, arguments.gelu, norm=arguments.norm)
    file, architecture = arguments.file, arguments.architecture
    if arguments.tower == "image":
        return from_arrays(checkpoint.arrays, file, given=given, architecture=architecture)
    settings = Settings(file, architecture)
    return from_published_names(checkpoint.arrays, given=given, settings=settings, source=str(file))


def describe_file(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what `inspect --json` prints of the file, beside its network.

    Args:
        checkpoint: The file as it was read.
    """
    return {
        "file": list(checkpoint.about),
        "which": checkpoint.chosen,
        "others": list(checkpoint.others),
    }


def _lines_of_file(checkpoint: Checkpoint) -> list[str]:
    lines = [f"the file: {', '.join(checkpoint.about)}"] if checkpoint.about else []
    if checkpoint.chosen:
        lines.append(f"read from: {checkpoint.chosen}")
    if checkpoint.others:
        lines.append(f"also in the file: {', '.join(checkpoint.others)} (--which)")
    return lines


def _lines(published: PublishedViT | PublishedText) -> list[str]:
    found = describe(published)
    config = found["config"]
    size = (
        f"width {config['width']}, {config['depth']} blocks, {config['heads']} heads, MLP"
        f" {config['mlp_width']}"
    )
    inside = "SwiGLU" if config["mlp"] == "swiglu" else f"GELU {config['gelu']}"
    lines = [
        f"{found['about']}; names of layout {found['layout']}; {found['parameters']:,} parameters"
    ]
    if found["tower"] == "text":
        lines.append(f"{size}; {inside}, norms with {config['norm_eps']:g}")
        seen = "what is before it" if config["causal"] else "all"
        taken = "that ends the text" if config["pooled"] == "end" else "at the last place"
        lines.append(
            f"{config['vocabulary']:,} ids, texts of up to {config['context']}; a token sees"
            f" {seen}, and the one {taken} is the descriptor"
        )
        logits = f"of the logits: log scale {found['logit_scale']}, bias {found['logit_bias']}"
        lines.append(f"{found['outputs'] or 'no'} outputs of the projection; {logits}")
    else:
        lines.append(
            f"{size}; patches of {config['patch']} in images of {config['image']}; {inside}, norms"
            f" with {config['norm_eps']:g}"
        )
        prefix = (
            "a class token" if config["class_token"] else "no class token"
        ) + f", {config['registers']} registers"
        if config["position"] == "rope":
            prefix += ", rotary positions"
        lines.append(
            f"{prefix}; pooled by {found['pooling']}, {found['classes'] or 'no'} outputs of the"
            " head"
        )
        unknown = "not known: files of this kind do not agree (a config.json beside it would say)"
        lines.append(
            "images in [0, 1]: "
            + (f"less {found['mean']}, over {found['std']}" if found["mean"] else unknown)
        )
        if found["text_tower"]:
            lines.append("a text tower is in the file too: --tower text")
    unused = dict.fromkeys(
        re.sub(r"(?<=\.)\d+(?=\.)|(?<=encoderblock_)\d+", "*", name) for name in found["unused"]
    )  # of all blocks at once
    lines += [f"{choice}: {where}" for choice, where in _choices(published)]
    return [*lines, f"not used: {', '.join(unused) or 'nothing'}"]


def _choices(published: PublishedViT | PublishedText) -> list[tuple[str, str]]:
    """Each choice that shapes do not say with its value, and where it came from."""
    config: Any = published.config
    values = {
        "heads": config.heads,
        "gelu": config.gelu,
        "norm_eps": f"{config.norm_eps:g}",
        "norm": "post" if getattr(config, "post_norm", False) else "pre",
        "pooling": getattr(published, "pooling", ""),
        "normalisation": "",
    }
    if isinstance(published, PublishedViT):
        values["rope"] = f"base {config.rope_base:g} in {config.rope_dtype}"
    return [
        (f"{choice} {values[choice]}".rstrip(), where)
        for choice, where in published.evidence.items()
    ]


def _check_names(arguments: argparse.Namespace) -> None:
    """Refuses what can be refused before the file is read."""
    tower, names, out = arguments.tower, arguments.to, arguments.out
    if names not in NAMINGS[tower]:
        raise ValueError(
            f"the names of {'an image' if tower == 'image' else 'a text'} tower may be"
            f" {' or '.join(NAMINGS[tower])}, not {names}"
        )
    if tower == "text" and out.suffix != ".safetensors":
        raise ValueError(
            f"the output is a safetensors file: give a name that ends in .safetensors, not {out}"
        )
    if tower == "text" and (arguments.no_head or arguments.overwrite):
        raise ValueError("--no-head and --overwrite are of image towers: leave them out")


def _load_own(arguments: argparse.Namespace) -> LoadedViT:
    """The network of a training run, or of a file by the names of our variables."""
    names = ("heads", "gelu", "norm", "architecture", "which")
    if given := [name for name in names if getattr(arguments, name) is not None]:
        raise ValueError(
            f"{arguments.file} is of our own, and says its settings itself: leave out"
            f" {' and '.join(f'--{name}' for name in given)}"
        )
    return load_vit(arguments.file)


def _export(vit: PublishedViT | LoadedViT, arguments: argparse.Namespace) -> None:
    done = export_vit(
        vit,
        arguments.out,
        to=arguments.to,
        head=not arguments.no_head,
        overwrite=arguments.overwrite,
    )
    beside = " and ".join(path.name for path in done.files[1:])
    print(f"{done.arrays} arrays written to {done.files[0]}, with {beside} beside it")
    for note in done.notes:
        print(f"note: {note}")


def _convert_text(published: PublishedText, out: Path, names: str) -> None:
    if names == "flax":
        arrays = traverse_util.flatten_dict(published.variables, sep="/")
    else:
        arrays = to_published_names(published)
    write_safetensors(out, arrays)
    print(f"{len(arrays)} arrays written to {out}")


def _get(name: str | None, revision: str | None, as_json: bool) -> None:
    if name is None:
        rows = {
            each: {**entry._asdict(), "page": f"{SITE}/{entry.repo}"}
            for each, entry in NAMES.items()
        }
        if as_json:
            print(json.dumps(rows, indent=2))
        for each, row in ({} if as_json else rows).items():
            gated = " (accept the licence there first)" if row["gated"] else ""
            print(f"{each:15} {row['about']}: {row['page']}{gated}")
        return
    found = fetch(name, revision)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), default=str, indent=2))
        return
    print(found.path)
    print(f"revision {found.revision}")
    print(f"sha256 {found.sha256}")
    if found.offline:
        print(f"note: from the cache, a newer revision may exist ({found.offline})")


if __name__ == "__main__":
    sys.exit(main())
