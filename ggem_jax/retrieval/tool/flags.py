"""The command line: commands, their flags, and what is wrong with them. Loads neither JAX nor
NumPy.
"""

import argparse
import dataclasses
import math
import re
from typing import Any, NoReturn

from ggem_jax.descriptors.settings import BACKBONES, DescriptorSettings
from ggem_jax.retrieval.tool.methods import CANDIDATES, METHODS, OPTIONS, Method, method_of

DEFAULTS = DescriptorSettings()

MOST_TOGETHER = 4096  # pictures in a batch: a batch is filled up to its size
LARGEST = 1e6  # of strengths and powers, as in `superglobal_rerank`


class Usage(Exception):
    """A command line that says nothing sensible, in one sentence."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message} ({self.prog} --help lists what it takes)")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=120)


def parse(argv: list[str], prog: str) -> argparse.Namespace:
    """The command and its arguments. Raises `Usage`; `--help` prints and exits."""
    # an index without a name would be the current folder, a pattern without one everything
    if empty := [each for each in argv if re.fullmatch(r"(--[a-z-]+=)?", each)]:
        raise Usage(
            f"an argument is empty{f', {empty[0]}' if empty[0] else ''}: a variable of the shell"
            " may not be set"
        )
    parser = _parser(prog)
    arguments = parser.parse_args(_with_boxes(argv))
    try:
        if hasattr(arguments, "rerank"):
            arguments.method = _method(arguments)
        if arguments.command == "index":
            names = [each.name for each in dataclasses.fields(DescriptorSettings)]
            arguments.settings = DescriptorSettings(
                **{name: getattr(arguments, name) for name in names}
            )
    except ValueError as error:
        raise Usage(str(error)) from None
    if arguments.command == "search" and len(arguments.box) not in (0, len(arguments.queries)):
        raise Usage(
            f"--box belongs to one query: give it {len(arguments.queries)} times, in the order of"
            " the queries, or not at all"
        )
    return arguments


def _with_boxes(argv: list[str]) -> list[str]:
    """`--box -1,0,9,9` as `--box=-1,0,9,9`: argparse takes what begins with a minus for a flag."""
    joined: list[str] = []
    for each in argv:
        if joined and joined[-1] == "--box" and re.match(r"-[0-9.]", each):
            joined[-1] = f"--box={each}"
        else:
            joined.append(each)
    return joined


def _method(arguments: argparse.Namespace) -> Method:
    return method_of(
        arguments.rerank,
        candidates=arguments.candidates,
        **{name: getattr(arguments, name) for name in OPTIONS},
    )


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description="An index of one's own pictures: search by picture, and reranking."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, said) in _COMMANDS.items():
        add(commands.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}."))
    return parser


def _version() -> str:
    import ggem_jax

    return f"ggem-jax {ggem_jax.__version__}"


def _index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "photos", metavar="PHOTOS", help="folder of pictures, with folders below it"
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="INDEX",
        help="folder of the index; one that is there is brought up to date",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of the vectors on disk (%(default)s)",
    )
    _add_work(parser)
    group = parser.add_argument_group(
        "what a descriptor is made of; an index keeps its settings, and a search follows them"
    )
    group.add_argument(
        "--backbone",
        default=DEFAULTS.backbone,
        help=f"{', '.join(BACKBONES)}, or a ViT such as vit-S/16 (%(default)s)",
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="the network's parameters (efficientnet-lite0 has those that are installed with it)",
    )
    group.add_argument(
        "--pooling",
        choices=("gem+", "gem", "average", "max"),
        default=DEFAULTS.pooling,
        help="(%(default)s)",
    )
    group.add_argument(
        "--regional",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS.regional,
        help="Regional GeM before the pooling",
    )
    group.add_argument(
        "--relup",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS.relup,
        help="ReLU-P inside a ResNet",
    )
    group.add_argument(
        "--scales",
        type=_whole,
        choices=(1, 3, 5),
        default=DEFAULTS.scales,
        help="of each picture (%(default)s)",
    )
    group.add_argument(
        "--scale-gem",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS.scale_gem,
        help="over the scales; off: their mean",
    )
    group.add_argument(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS.antialias,
        help="when a scale shrinks the picture",
    )
    group.add_argument(
        "--sizes",
        choices=("buckets", "exact"),
        default=DEFAULTS.sizes,
        help="few for all, or each picture its own (%(default)s)",
    )
    group.add_argument(
        "--longest-side",
        type=_whole,
        default=DEFAULTS.longest_side,
        metavar="PIXELS",
        help="(%(default)s); 0: as it is, if exact",
    )
    group.add_argument(
        "--whitening", metavar="FILE", help="of the command whiten, applied at the end"
    )


def _search(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="a picture")
    parser.add_argument(
        "--box",
        type=_box,
        action="append",
        default=[],
        metavar="X1,Y1,X2,Y2",
        help="the part of a query that is meant, in pixels",
    )
    parser.add_argument("-k", type=_count, default=20, help="results of each query (%(default)s)")
    _add_method(parser, "--rerank", "none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write one page with the pictures, their scores and their ranks before and after",
    )
    _add_files(parser)


def _add(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument(
        "photos",
        nargs="?",
        metavar="PHOTOS",
        help="a folder inside the root of the index (the root itself)",
    )
    parser.add_argument(
        "--root", metavar="FOLDER", help="where the pictures of the index have been moved to"
    )
    parser.add_argument(
        "--prune", action="store_true", help="drop the entries whose files are gone"
    )
    parser.add_argument(
        "--repair", action="store_true", help="extract again what verify finds damaged"
    )
    _add_work(parser)
    _add_files(parser)


def _remove(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument(
        "patterns",
        nargs="+",
        metavar="PATTERN",
        help="a path, a folder or a glob; relative to the root, or absolute",
    )


def _info(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _verify(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument(
        "--deep", action="store_true", help="read every picture too, and compare its content"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _rerank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "queries",
        metavar="QUERIES",
        help=".npy of vectors (q, d), or .npz (FILE.npz:NAME where it holds several arrays)",
    )
    parser.add_argument(
        "database", metavar="DATABASE", help="likewise (n, d); a .npy file is not read into memory"
    )
    parser.add_argument(
        "--ranking",
        metavar="FILE",
        help=(
            ".npy of ids (q, k), or .npz or .json of ids and scores; else the database is searched"
        ),
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help=".npz or .json of ids and scores (q, k)",
    )
    parser.add_argument("-k", type=_count, help="results of the search (as many as candidates)")
    parser.add_argument(
        "--normalize", action="store_true", help="make all vectors of length 1 first"
    )
    _add_method(parser, "--method", "superglobal")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument(
        "truth",
        metavar="TRUTH.csv",
        help="columns query, relevant and, as needed, ignored, x1, y1, x2, y2; ; between paths",
    )
    parser.add_argument(
        "--root",
        metavar="FOLDER",
        help="what the paths in TRUTH.csv are relative to (its own folder)",
    )
    parser.add_argument(
        "-k",
        type=_count,
        default=10_000,
        help="results of each query that are looked at (%(default)s, or all)",
    )
    parser.add_argument(
        "--at",
        type=_counts,
        default=(1, 5, 10),
        metavar="K,K",
        help="of precision and recall (1,5,10)",
    )
    _add_method(parser, "--rerank", "superglobal")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_files(parser)


def _whiten(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE.npz", help="what index --whitening takes"
    )
    parser.add_argument("--dim", type=_count, help="components to keep (all)")


_COMMANDS = {
    "index": (_index, "build an index of a folder of pictures, or bring one up to date"),
    "search": (_search, "find the pictures of an index that are most like a picture"),
    "add": (_add, "add what is new or has changed"),
    "remove": (_remove, "remove entries; the pictures stay"),
    "info": (_info, "tell what an index holds and how it was made"),
    "verify": (_verify, "look for damage"),
    "rerank": (_rerank, "rerank vectors of one's own, from files"),
    "evaluate": (
        _evaluate,
        "measure an index, before and after reranking, by ground truth of one's own",
    ),
    "whiten": (_whiten, "learn PCA whitening from the vectors of an index"),
}


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", help="folder of the index")


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch",
        type=_batch,
        help="pictures that go through the network together (1 on a CPU, else 16)",
    )
    parser.add_argument("--workers", type=_count, help="threads that read pictures (at most 4)")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="where the index's file of weights is now, if it was moved",
    )
    parser.add_argument("--whitening", metavar="FILE", help="likewise its file of a whitening")


def _add_method(parser: argparse.ArgumentParser, flag: str, default: str) -> None:
    parser.add_argument(
        flag, dest="rerank", choices=list(METHODS), default=default, help="(%(default)s)"
    )
    group = parser.add_argument_group("options of the reranking")
    group.add_argument(
        "--candidates",
        type=_count,
        help=f"results of the first search that are reranked ({CANDIDATES})",
    )
    group.add_argument(
        "--neighbors",
        type=_count,
        help=(
            "superglobal: neighbours that refine a candidate (9); else results that are averaged"
            " (10)"
        ),
    )
    group.add_argument("--beta", type=_number, help="superglobal: weight of neighbours (0.15)")
    group.add_argument(
        "--variant",
        choices=("code", "paper"),
        help="superglobal: as published in code, or as told in the paper (code)",
    )
    group.add_argument(
        "--alpha",
        type=_number,
        help="alpha-qe, dba: power of the similarity that weights a neighbour (3)",
    )


def _whole(text: str, least: int = 0, most: int = 2**31 - 1) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, not {text!r}"
        )
    if int(text) > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
    return int(text)


def _count(text: str) -> int:
    return _whole(text, 1)


def _batch(text: str) -> int:
    return _whole(text, 1, MOST_TOGETHER)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(each) for each in text.split(","))


def _number(text: str) -> float:
    try:
        value = _float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {LARGEST:g}, not {text!r}")
    return value


def _float(text: str) -> float:
    if not text.isascii() or "_" in text:
        raise ValueError(f"{text!r} is no number")
    return float(text)


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = map(_float, text.split(","))
        fits = math.isfinite(x1 + y1 + x2 + y2) and x1 < x2 and y1 < y2
    except ValueError:
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(
            f"must be x1,y1,x2,y2 in pixels with x1 < x2 and y1 < y2, not {text!r}"
        )
    return x1, y1, x2, y2
