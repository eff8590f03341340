"""The command line: what is given -> keyword arguments, and the errors for wrong ones.

Loads neither JAX nor NumPy, unless `--backbone` names a network.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.retrieval.methods import OPTIONS, choose_method
from ggem_jax.retrieval.tool.arguments import COMMANDS


class Usage(Exception):
    """A mistake in the command line, in one sentence."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message} ({self.prog} --help lists what it takes)")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=120)


def parse(argv: list[str], prog: str) -> argparse.Namespace:
    """Returns the command and its keyword arguments for `ggem_jax.retrieval.tool.commands`.

    `--help` and `--version` print and exit.

    Args:
        argv: Arguments after the name of the program.
        prog: Name of the program in messages.

    Returns:
        The attribute `command`, and a further attribute for each keyword argument.

    Raises:
        Usage: The arguments are wrong.
    """
    # an empty name of an index would mean the current folder, an empty pattern all images
    if empty := [each for each in argv if re.fullmatch(r"(--[a-z-]+=)?", each)]:
        raise Usage(
            f"an argument is empty{f', {empty[0]}' if empty[0] else ''}: a variable of the shell"
            " may not be set"
        )
    arguments = _parser(prog).parse_args(_join_boxes(argv))
    values = vars(arguments)
    try:
        if "rerank" in values:
            given = {name: values.pop(name) for name in ("candidates", *OPTIONS)}
            arguments.method = choose_method(values.pop("rerank"), **given)
        if arguments.command == "index":
            names = [each.name for each in dataclasses.fields(DescriptorSettings)]
            given = {name: values.pop(name) for name in names if name in values}
            arguments.settings = DescriptorSettings(**given)
    except ValueError as error:
        raise Usage(str(error)) from None
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    """Raises `Usage` for arguments that do not fit, before hours of work are done."""
    if arguments.command == "search":
        if bool(arguments.queries) == bool(arguments.words):
            raise Usage("name images, QUERY, or words, --text: one of them is needed, not both")
        if arguments.words and (arguments.html or arguments.whitening):
            raise Usage("--html and --whitening are for images: leave them out for --text")
        if len(arguments.box) not in (0, len(arguments.queries)):
            raise Usage(
                f"--box belongs to one query: give it {len(arguments.queries)} times, in the order"
                " of the queries, or not at all"
            )
        if arguments.collection and not arguments.store:
            raise Usage("--collection names a part of a vector database: give --store too")
        if arguments.html:
            _check_output(arguments.html, (".html", ".htm"), arguments.queries)
    elif arguments.command == "rerank":
        files = [_file_of(arguments.queries), _file_of(arguments.database), arguments.ranking]
        _check_output(arguments.output, (".npz", ".json"), files)
        if arguments.ranking and arguments.k:
            raise Usage("-k is for the search, and --ranking takes its place: give one of them")
    elif arguments.command == "whiten":
        _check_output(arguments.output, (".npz",), [])
    elif arguments.command == "duplicates" and arguments.html:
        _check_output(arguments.html, (".html", ".htm"), [])


def _check_output(file: str, endings: tuple[str, ...], inputs: Iterable[str | None]) -> None:
    path = Path(file)
    if path.suffix.lower() not in endings:
        raise Usage(f"{file} must end with {' or '.join(endings)}")
    if path.is_dir():
        raise Usage(f"{file} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise Usage(f"{file} cannot be written: {path.parent} is no folder")
    for name in inputs:
        both = name is not None and path.exists() and os.path.exists(name)
        if both and os.path.samefile(path, str(name)):
            raise Usage(f"{file} is read by this very command: write to another file")


def _file_of(name: str) -> str:
    """`FILE.npz` of `FILE.npz:NAME`, as `ggem_jax.files.vectors.file_of`, without NumPy."""
    before, ending, key = name.rpartition(".npz:")
    return f"{before}.npz" if ending and key else name


def _join_boxes(argv: list[str]) -> list[str]:
    """`--box -1,0,9,9` as `--box=-1,0,9,9`: argparse takes a leading minus for a flag."""
    joined: list[str] = []
    for each in argv:
        if joined and joined[-1] == "--box" and re.match(r"-[0-9.]", each):
            joined[-1] = f"--box={each}"
        else:
            joined.append(each)
    return joined


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description="An index of your own images: search by image, and reranking."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, said) in COMMANDS.items():
        add(commands.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}."))
    return parser


def _version() -> str:
    import ggem_jax

    return f"ggem-jax {ggem_jax.__version__}"
