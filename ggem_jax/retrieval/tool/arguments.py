"""The commands, and the arguments of each."""

import argparse
from functools import partial

from ggem_jax.descriptors.settings import DEFAULT_BACKBONE, DescriptorSettings
from ggem_jax.retrieval.methods import CANDIDATES, METHODS
from ggem_jax.retrieval.tool.values import LARGEST, above_0, box, counts, number, shard, whole

DEFAULTS = DescriptorSettings()

MOST_TOGETHER = 4096  # largest --batch: a batch with fewer images is padded to its full size

_count = partial(whole, least=1)


def _index(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", metavar="PHOTOS", help="folder of images, with folders below it")
    add(
        "-o",
        "--output",
        required=True,
        metavar="INDEX",
        help="folder of the index; an existing index is brought up to date",
    )
    add(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of the vectors on disk (%(default)s)",
    )
    add(
        "--shard",
        type=shard,
        metavar="I/N",
        help="index the I-th of N parts of the folder only; merge joins all parts",
    )
    _add_folder(parser)
    _add_work(parser)
    _add_json(parser)
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "how an image becomes a vector; an index keeps these settings, and a search follows them"
    )
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add(
        "--weights",
        metavar="FILE",
        help="the network's parameters: a ViT under any published naming, a ResNet of CVNet,"
        " EfficientNet-Lite0, a ViT of ours, or the folder of a training run (those installed with"
        f" {DEFAULT_BACKBONE})",
    )
    add(
        "--backbone",
        metavar="NAME",
        help="insist on a network, where its file does not tell it: a row of the table of"
        " ggem_jax.descriptors.backbones such as deit, or sizes such as vit-S/16 (found from"
        " --weights)",
    )
    add(
        "--pooling",
        choices=("gem+", "gem", "average", "max", "clip", "own"),
        help=f"of the feature map ({DEFAULTS.pooling}; own for a training run); clip: pooling and"
        " projection of CLIP or SigLIP, at one scale and without Regional GeM, for a search by"
        " words; own: likewise those that a training run has learned",
    )
    add(
        "--regional",
        action=switch,
        default=DEFAULTS.regional,
        help="use Regional GeM before the pooling",
    )
    add("--relup", action=switch, default=DEFAULTS.relup, help="use ReLU-P inside a ResNet")
    add(
        "--scales",
        type=whole,
        choices=(1, 3, 5),
        default=DEFAULTS.scales,
        help="number of scales of each image (%(default)s)",
    )
    add(
        "--scale-gem",
        action=switch,
        default=DEFAULTS.scale_gem,
        help="take the maximum over the scales; off: their mean",
    )
    add(
        "--antialias",
        action=switch,
        default=DEFAULTS.antialias,
        help="filter where a scale shrinks the image",
    )
    add(
        "--sizes",
        choices=("buckets", "exact"),
        default=DEFAULTS.sizes,
        help="resize to a few shared sizes (fast), or keep each image's own size (%(default)s)",
    )
    add(
        "--longest-side",
        type=whole,
        default=DEFAULTS.longest_side,
        metavar="PIXELS",
        help="longer side after resizing (%(default)s); 0 with exact sizes: never shrink",
    )
    add(
        "--decoding",
        choices=("draft", "full"),
        help="of large JPEGs: draft is several times faster, and changes the vectors a little"
        " (draft; for an existing index, as it was)",
    )
    for flag, choices in (("--gelu", ("exact", "tanh", "quick")), ("--norm", ("pre", "post"))):
        add(flag, choices=choices, help="of a published ViT whose file does not say it")
    add(
        "--heads",
        type=_count,
        metavar="N",
        help="attention heads of a published ViT whose file does not say them",
    )
    add(
        "--architecture",
        metavar="NAME",
        help="name in timm of a published ViT, such as deit3_small_patch16_224, where its file does"
        " not tell what it is",
    )
    add(
        "--which",
        metavar="NAME",
        help="the network of a file of weights with several, such as ema, teacher or student",
    )
    add("--whitening", metavar="FILE", help="whitening of the command whiten, applied at the end")


def _search(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    add = parser.add_argument
    add("queries", nargs="*", metavar="QUERY", help="an image")
    add(
        "--text",
        action="append",
        dest="words",
        default=[],
        metavar="WORDS",
        help="words instead of an image, such as 'lighthouse + 0.5:red - people', for an index made"
        " with --pooling clip; any number of times",
    )
    add(
        "--box",
        type=box,
        action="append",
        default=[],
        metavar="X1,Y1,X2,Y2",
        help="crop the query to x1,y1,x2,y2 (pixels) before describing it; once for each query",
    )
    add("-k", type=_count, default=20, help="results of each query (%(default)s)")
    _add_method(parser, "--rerank", "none")
    _add_json(parser)
    add(
        "--html",
        metavar="FILE",
        help="write one page with the images, their scores and their ranks before and after",
    )
    add(
        "--store",
        metavar="STORE",
        help="vector database that finds the candidates, as push filled it",
    )
    add("--collection", metavar="NAME", help="collection of the database, as push names it")
    _add_files(parser)


def _add(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    add = parser.add_argument
    add(
        "photos",
        nargs="?",
        metavar="PHOTOS",
        help="a folder inside the root of the index (the root itself)",
    )
    add("--root", metavar="FOLDER", help="where the images of the index have been moved to")
    _add_folder(parser)
    add("--repair", action="store_true", help="describe again what verify finds damaged")
    _add_work(parser)
    _add_json(parser)
    _add_files(parser)


def _remove(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument(
        "patterns",
        nargs="+",
        metavar="PATTERN",
        help="a path, a folder or a glob; relative to the root, or absolute",
    )
    parser.add_argument(
        "--no-exclude",
        dest="exclude",
        action="store_false",
        help="let the next add find the images again, instead of leaving them out from now on",
    )
    _add_json(parser)


def _info(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    _add_json(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument(
        "--deep", action="store_true", help="read every image too, and compare its content"
    )
    _add_json(parser)


def _rerank(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "queries",
        metavar="QUERIES",
        help=".npy of vectors (q, d), or .npz (FILE.npz:NAME where it holds several arrays)",
    )
    add("database", metavar="DATABASE", help="likewise (n, d); a .npy file is not read into memory")
    add(
        "--ranking",
        metavar="FILE",
        help=".npy of ids (q, k), or .npz or .json of ids and scores (the database is searched)",
    )
    add(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help=".npz or .json of ids and scores (q, k)",
    )
    add("-k", type=_count, help="results of each query (as many as candidates)")
    add("--normalize", action="store_true", help="make all vectors of length 1 first")
    _add_method(parser, "--method", "superglobal")
    _add_json(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    add = parser.add_argument
    add(
        "truth",
        metavar="TRUTH.csv",
        help="columns query, relevant and, as needed, ignored, x1, y1, x2, y2; ; between paths",
    )
    add(
        "--root",
        metavar="FOLDER",
        help="folder that the paths in TRUTH.csv are relative to (its own)",
    )
    add(
        "-k",
        type=_count,
        default=10_000,
        help="results of each query that count (%(default)s, or all)",
    )
    add(
        "--at",
        type=counts,
        default=(1, 5, 10),
        metavar="K,K",
        help="ranks of precision and recall (1,5,10)",
    )
    _add_method(parser, "--rerank", "superglobal")
    _add_json(parser)
    _add_files(parser)


def _whiten(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE.npz",
        help="file that index --whitening takes",
    )
    parser.add_argument("--dim", type=_count, help="components to keep (all)")
    _add_json(parser)


def _push(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    add = parser.add_argument
    add(
        "store",
        metavar="STORE",
        help="milvus:FILE.db for a file of Milvus Lite, milvus:http://HOST:19530 for a server",
    )
    add(
        "--collection",
        metavar="NAME",
        help="letters, digits and _ (the name of the index's folder, with _ for all others)",
    )
    _add_json(parser)


def _merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("output", metavar="OUT", help="folder of the new index; nothing may exist there")
    add("parts", nargs="+", metavar="PART", help="folders of all parts, in any order")
    _add_json(parser)


def _duplicates(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    parser.add_argument(
        "--threshold",
        type=partial(above_0, most=1),
        default=0.95,
        metavar="COSINE",
        help="least cosine of a pair, above 0 and at most 1 (%(default)s)",
    )
    _add_json(parser)
    parser.add_argument("--html", metavar="FILE", help="write one page with the images")


def _serve(parser: argparse.ArgumentParser) -> None:
    _add_index(parser)
    add = parser.add_argument
    add(
        "--port",
        type=partial(whole, most=65535),
        default=8000,
        help="of the page (%(default)s); 0 takes a free one",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at (%(default)s: only this machine); with another one, such as"
        " 0.0.0.0, everybody who reaches it sees the images",
    )
    add(
        "--follow-links",
        action="store_true",
        help="show images behind links that leave the folder of the index, too",
    )
    add(
        "--max-megapixels",
        type=partial(above_0, most=LARGEST),
        default=80.0,
        metavar="N",
        help="refuse larger uploads (%(default)g)",
    )
    _add_files(parser)


COMMANDS = {
    "index": (_index, "build an index of a folder of images, or bring one up to date"),
    "search": (_search, "find the images of an index that are most like an image"),
    "add": (_add, "add images that are new or have changed"),
    "remove": (_remove, "remove entries and leave their images out from now on; the images stay"),
    "info": (_info, "tell what an index holds and how it was made"),
    "verify": (_verify, "look for damage"),
    "rerank": (_rerank, "rerank your own vectors, from files"),
    "evaluate": (_evaluate, "measure an index by ground truth, before and after reranking"),
    "whiten": (_whiten, "learn PCA whitening from the vectors of an index"),
    "push": (_push, "bring a collection of a vector database in line with an index"),
    "merge": (_merge, "join the parts of index --shard into one index"),
    "serve": (_serve, "look at an index in the browser"),
    "duplicates": (_duplicates, "find groups of images that are nearly the same, the best first"),
}


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", help="folder of the index")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--prune",
        action="store_true",
        help="drop the entries whose files are gone, instead of listing them as not reachable",
    )
    add(
        "--deep",
        action="store_true",
        help="compare the content of every file, also where its size and times are as before",
    )
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out files and folders of this name, or of this path if there is a / in it (a"
        " glob; any number of times; kept in the index, beside hidden files, @eaDir and the like)",
    )
    add(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="no longer leave out what matches, such as '@eaDir', or a pattern of remove",
    )
    add(
        "--max-megapixels",
        type=partial(above_0, most=LARGEST),
        default=300.0,
        metavar="N",
        help="skip larger images (%(default)g)",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch",
        type=partial(whole, least=1, most=MOST_TOGETHER),
        help="images that go through the network together (1 on a CPU, else 16)",
    )
    parser.add_argument("--workers", type=_count, help="threads that read images (at most 4)")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="where the index's file of weights is now, if it was moved",
    )
    parser.add_argument("--whitening", metavar="FILE", help="likewise its file of a whitening")


def _add_method(parser: argparse.ArgumentParser, flag: str, default: str) -> None:
    parser.add_argument(
        flag,
        dest="rerank",
        choices=list(METHODS),
        default=default,
        help="the reranker (%(default)s)",
    )
    add = parser.add_argument_group("options of the reranking").add_argument
    add(
        "--candidates",
        type=_count,
        help=f"results of the first search that are reranked ({CANDIDATES})",
    )
    add(
        "--neighbors",
        type=_count,
        help="superglobal: neighbours that refine a candidate (9); else results to average (10)",
    )
    add("--beta", type=number, help="superglobal: weight of neighbours (0.15)")
    add(
        "--variant",
        choices=("code", "paper"),
        help="superglobal: the published code, or the description in the paper (code)",
    )
    add(
        "--alpha",
        type=number,
        help="alpha-qe, dba: power of the similarity that weights a neighbour (3)",
    )
