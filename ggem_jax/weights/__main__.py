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
from ggem_jax.weights.export import export_vit, weights_path
from ggem_jax.weights.folders import find_checkpoint
from ggem_jax.weights.hub import NAMES, SITE, fetch
from ggem_jax.weights.load import LoadedViT, load_vit
from ggem_jax.weights.own import holds_own_vit
from ggem_jax.weights.own_settings import describe_settings
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
    arguments = _parser().parse_args(argv)
    commands = {"inspect": _inspect, "convert": _convert, "get": _get}
    try:
        commands[arguments.command](arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"ggem_jax.weights: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
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
    return parser


def _inspect(arguments: argparse.Namespace) -> None:
    found = _open(arguments)
    if isinstance(found, LoadedViT):
        record = describe_own(found)
        print(json.dumps(record, indent=2) if arguments.json else "\n".join(_lines_of_own(record)))
        return
    checkpoint, published = found
    if arguments.json:
        print(json.dumps(describe(published) | describe_file(checkpoint), indent=2))
    else:
        print("\n".join([*_lines(published), *_lines_of_file(checkpoint)]))


def _convert(arguments: argparse.Namespace) -> None:
    _check_names(arguments)
    target = weights_path(arguments.out)
    if target.exists() and target.samefile(find_checkpoint(arguments.file)):
        raise ValueError(f"{target} is the file that is converted: give another name")
    found = _open(arguments)
    vit = found if isinstance(found, LoadedViT) else found[1]
    if isinstance(vit, PublishedText):
        _convert_text(vit, arguments.out, arguments.to)
    else:
        _export(vit, arguments)


def _open(
    arguments: argparse.Namespace,
) -> LoadedViT | tuple[Checkpoint, PublishedViT | PublishedText]:
    """The network of FILE: one of our own, or a published one with the file it was read from."""
    if arguments.tower == "text" and arguments.norm is not None:
        raise ValueError("--norm is of image towers: the norms of text towers come before")
    file = find_checkpoint(arguments.file)
    if file.is_dir():
        return _load_own(arguments)
    checkpoint = read_checkpoint(file, arguments.which)
    if holds_own_vit(checkpoint.arrays):
        return _load_own(arguments)
    return checkpoint, _read(checkpoint, file, arguments)


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


def describe_own(loaded: LoadedViT) -> dict[str, Any]:
    """Returns what `inspect --json` prints of a file of our own, or of a run.

    Args:
        loaded: The network, as it was read.
    """
    return {
        "family": "own",
        "about": f"a ViT of our own, which load_vit and --init read ({loaded.source})",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(loaded.variables)),
        "config": dataclasses.asdict(loaded.model.config),
        "pooling": describe_settings(loaded.model, None)["pool"],
        "classes": loaded.model.num_classes,
        "mean": loaded.mean,
        "std": loaded.std,
    }


def _lines_of_own(record: dict[str, Any]) -> list[str]:
    c = record["config"]
    images = f"less {record['mean']}, over {record['std']}" if record["mean"] else "not known"
    return [
        f"{record['about']}; {record['parameters']:,} parameters",
        f"width {c['width']}, {c['depth']} blocks, {c['heads']} heads, MLP {c['mlp_width']};"
        f" patches of {c['patch']} in images of {c['image']}; GELU {c['gelu']}, norms with"
        f" {c['norm_eps']:g}",
        f"pooled by {record['pooling']['kind']}, {record['classes'] or 'no'} outputs of the head",
        f"images in [0, 1]: {images}",
    ]


def _read(
    checkpoint: Checkpoint, file: Path, arguments: argparse.Namespace
) -> PublishedViT | PublishedText:
    given = Given(arguments.heads, arguments.gelu, norm=arguments.norm)
    architecture = arguments.architecture
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
        "ignored": "",
    }
    if isinstance(published, PublishedViT):
        values["rope"] = f"base {config.rope_base:g} in {config.rope_dtype}"
    return [
        (f"{choice} {values.get(choice, '')}".rstrip(), where)
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
    if arguments.tower == "text":
        raise ValueError(f"{arguments.file} is a ViT of our own: it has no text tower")
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


def _get(arguments: argparse.Namespace) -> None:
    name, revision, as_json = arguments.name, arguments.revision, arguments.json
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
