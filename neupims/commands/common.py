"""Flags that several commands share, the records that they describe, and printing."""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from neupims.files import check_place, finite
from neupims.machine.case import Case, make_case, select_system
from neupims.machine.hardware import Hardware
from neupims.machine.systems import FIDELITIES, SYSTEMS, System
from neupims.machine.traces import UNIFORM, Requests, read_requests
from neupims.scheduling.packing import PACKINGS

AUTO = "auto"
TRACE = (
    "requests: a CSV or JSON file of lengths (seq_len, with ch_idx or without) or of input and"
    " output tokens, as Azure and Mooncake have them; or sharegpt:256, alpaca:256, const:2048x128,"
    " uniform:512-4096x128"
)
WIDTH = 200  # characters of a line where the output is no terminal


def add_system_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the machine.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    add_machine_arguments(parser)
    parser.add_argument(
        "--sub-batches",
        choices=("1", "2", AUTO),
        help=(
            "halves of the batch that NPU and PIM interleave (neupims; default: 2); simulate takes"
            " auto: the faster"
        ),
    )
    add_row_buffers_argument(parser)
    parser.add_argument(
        "--fidelity",
        choices=FIDELITIES,
        default="simulator",
        help=(
            "simulator: what the authors' code would print; intended: what the machine of the paper"
            " would do (default: simulator)"
        ),
    )


def add_row_buffers_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of the row buffers.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    parser.add_argument(
        "--row-buffers", choices=("single", "dual"), help="of a bank (default: what the system has)"
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of results for programs.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    parser.add_argument(
        "--json", action="store_true", help="one JSON object and nothing else on standard output"
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the system and its hardware.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    parser.add_argument(
        "--system",
        default="neupims",
        metavar="NAME",
        help=(
            f"{', '.join(SYSTEMS)}, or as the validation files spell it (default: neupims);"
            " explore compares several, separated by commas"
        ),
    )
    parser.add_argument(
        "--hardware",
        default="neupims",
        metavar="NAME|FILE",
        help=(
            "a named machine (`show hardware` lists names), a TOML or JSON file, or a core JSON,"
            " memory JSON or DRAM ini of the public simulator; explore compares several, separated"
            " by commas"
        ),
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=(
            "one field of the hardware, such as hbm.num_channels=16 or hbm.trp_cycles='14 ns', or"
            " energy.memory=NAME (`show memories`); may repeat"
        ),
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the model and the trace.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    add_spread_model_arguments(parser)
    add_experts_and_head_arguments(parser)
    parser.add_argument("--trace", required=True, metavar="FILE|DISTRIBUTION", help=TRACE)
    add_trace_arguments(parser)
    parser.add_argument(
        "--packing",
        choices=tuple(PACKINGS),
        help=(
            "deal the requests to the machine's channels: greedy as published, longest-first by"
            " the model's estimate, or round-robin (default: the trace's channels; greedy where it"
            " has none)"
        ),
    )


def add_spread_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the model and the devices over which it is spread.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|FILE",
        help="gpt3-7b, llama3-8b, ... (`show models`), or a TOML or JSON file",
    )
    add_spread_arguments(parser)


def add_spread_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of the devices over which a model is spread.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    parser.add_argument(
        "--tp",
        type=int,
        metavar="N",
        help="devices that share a layer (default: as published for the model, else 1)",
    )
    parser.add_argument(
        "--pp",
        type=int,
        metavar="N",
        help="groups into which the layers are cut (default: as published, else 1)",
    )
    parser.add_argument(
        "--kv-split",
        type=int,
        metavar="N",
        help="channels that share the keys and values of a request (intended fidelity; default: 1)",
    )


def add_experts_and_head_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of the groups of experts and of the LM head.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    parser.add_argument(
        "--ep",
        type=int,
        metavar="N",
        help="deal experts to N equal groups of the tp devices (default: 1: all share each expert)",
    )
    add_head_argument(parser)


def add_head_argument(parser: argparse._ActionsContainer) -> None:
    """Adds the flag of the LM head.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    parser.add_argument(
        "--lm-head",
        action="store_true",
        help="also compute the LM head, once after the last layer (default: as the model's file)",
    )


def given_spread(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns how many devices share what, by the names of `Parallel`; only what flags give.

    Args:
        arguments: Parsed flags of `add_spread_arguments` and `add_experts_and_head_arguments`.
    """
    named = {name: getattr(arguments, name) for name in ("tp", "pp", "kv_split", "ep")}
    return {name: value for name, value in named.items() if value is not None}


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how traces are read; `--trace` itself is not among them.

    Args:
        parser: The parser, or a group of it; changed in place.
    """
    parser.add_argument(
        "--generated",
        metavar="SHARE",
        help=(
            "where a trace gives input and output: the share of its output that each request has"
            f" generated, from 0 to 1, or {UNIFORM}: another random share for each (default:"
            f" {UNIFORM}; 0 with --prefill)"
        ),
    )
    parser.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="draw N of the trace's requests at random (default: all of them)",
    )
    parser.add_argument(
        "--columns",
        metavar="ROLE=NAME,...",
        help=(
            "the trace's columns where their names are unknown: length=NAME,channel=NAME or"
            " input=NAME,output=NAME; a number counts columns from 1"
        ),
    )
    parser.add_argument(
        "--trace-seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of what is random in the trace (default: 0)",
    )


def read_trace_argument(text: str, arguments: argparse.Namespace) -> Requests:
    """Returns the requests of a --trace.

    Args:
        text: A file, or the text of a distribution.
        arguments: Parsed flags of `add_trace_arguments`.

    Raises:
        ValueError: A flag is impossible, or the file is no trace.
        OSError: The file cannot be read.
    """
    share: Any = arguments.generated
    if share is None:  # a prefill reads prompts, which have no output yet
        share = 0.0 if getattr(arguments, "prefill", False) else UNIFORM
    if share != UNIFORM:
        try:
            share = float(share)
        except ValueError:
            raise ValueError(
                f"--generated is a share from 0 to 1 or {UNIFORM}, not {share!r}"
            ) from None
    columns = None
    if arguments.columns is not None:
        pairs = [part.partition("=") for part in arguments.columns.split(",")]
        if not all(role.strip() and name.strip() for role, _, name in pairs):
            raise ValueError(f"--columns is ROLE=NAME,..., not {arguments.columns!r}")
        columns = {role.strip(): name.strip() for role, _, name in pairs}
    return read_requests(
        text,
        columns=columns,
        generated=share,
        draw=arguments.requests,
        seed=arguments.trace_seed,
    )


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the model, the trace and the machine, and `--json`.

    Args:
        parser: The parser; changed in place.
    """
    add_model_arguments(parser)
    add_system_arguments(parser)
    add_json_argument(parser)


def add_overflow_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--allow-overflow`.

    Args:
        parser: The parser; changed in place.
    """
    parser.add_argument(
        "--allow-overflow",
        action="store_true",
        help="time what the memory of a device does not hold, with a warning, instead of refusing",
    )


def system(arguments: argparse.Namespace) -> tuple[System, int, Hardware]:
    """Returns system, number of sub-batches and hardware from the flags of the machine.

    Args:
        arguments: Parsed flags of `add_system_arguments`.

    Raises:
        ValueError: A flag is impossible, or flags contradict each other.
        OSError: The file of the hardware cannot be read.
    """
    if arguments.sub_batches == AUTO:
        raise ValueError("--sub-batches auto is for simulate: say 1 or 2")
    return select_system(arguments.system, **system_options(arguments))


def system_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `select_system` that the flags of the machine give.

    Args:
        arguments: Parsed flags of `add_system_arguments`.

    Raises:
        ValueError: A --set is not FIELD=VALUE.
    """
    count = arguments.sub_batches
    return {
        "hardware": arguments.hardware,
        "sub_batches": int(count) if count not in (None, AUTO) else None,
        "row_buffers": {"single": 1, "dual": 2}.get(arguments.row_buffers),
        "changes": dict(map(parse_change, arguments.set)),
    }


def read_case(arguments: argparse.Namespace) -> Case:
    """Returns the case that the flags of the model, the trace and the machine describe.

    Notes on what the file of the model leaves open, and on what was assumed about the requests, go
    to standard error.

    Args:
        arguments: Parsed flags of `add_workload_arguments`.

    Raises:
        ValueError: A flag is impossible, or flags contradict each other.
        OSError: A file cannot be read.
    """
    requests = read_trace_argument(arguments.trace, arguments)
    name = arguments.packing or ("greedy" if requests.channels is None else None)
    case = make_case(
        arguments.model,
        requests,
        packing=PACKINGS[name] if name else None,
        system=arguments.system,
        **given_spread(arguments),
        lm_head=arguments.lm_head,
        fidelity=arguments.fidelity,
        **system_options(arguments),
    )
    print_notes(case.model_name, case.model_notes)
    print_notes(requests.name, case.trace_notes)
    return case


def print_notes(name: str, notes: Iterable[str]) -> None:
    """Prints notes on what a file leaves open, or on what was assumed, to standard error.

    Args:
        name: Name or file of the model or the trace.
        notes: The notes, one sentence each.
    """
    for note in notes:
        sys.stderr.write(f"neupims: note: {name}: {note}\n")


def print_warnings(warnings: Iterable[str]) -> None:
    """Prints warnings to standard error.

    Args:
        warnings: One sentence each.
    """
    for warning in warnings:
        sys.stderr.write(f"neupims: warning: {warning}\n")


def split_names(text: str) -> list[str]:
    """Returns names that are separated by commas; a file whose name has commas is one.

    Args:
        text: The text of a flag.
    """
    return [text] if Path(text).is_file() else [name.strip() for name in text.split(",")]


def parse_change(text: str) -> tuple[str, int | float | str]:
    """Returns the field and the value of a --set FIELD=VALUE.

    Args:
        text: Text after --set: a dotted name of the hardware, and its number, or a number with a
            unit, such as "14 ns".

    Raises:
        ValueError: The text is not FIELD=VALUE.
    """
    field, _, value = (part.strip() for part in text.partition("="))
    if not field or not value:
        raise ValueError(
            f"--set needs FIELD=VALUE, such as hbm.num_channels=16 or hbm.clock_hz='1.4 GHz', not"
            f" {text!r}"
        )
    for kind in (int, float):
        with suppress(ValueError):
            return field, kind(value)
    return field, value


def check_run(*places: Path | None, seed: int = 0, reads: Iterable[str | Path] = ()) -> None:
    """Raises before a long run if its flags would make it fail at the end.

    Args:
        *places: Files that will be written; None is skipped.
        seed: The seed of random numbers.
        reads: Files that are read or written by other flags; a text that names no file does not
            matter.

    Raises:
        OSError: The folder of a file does not exist.
        ValueError: The seed is negative, or at least 2^63; or two files are one, or one is read.
    """
    taken = [
        Path(each).resolve() for each in reads if isinstance(each, Path) or Path(each).exists()
    ]
    for place in filter(None, places):
        check_place(place)
        if place.exists() and not place.is_file():  # a pipe or a device
            continue
        if place.resolve() in taken:
            raise ValueError(f"{place} is another file of this run too: give each its own name")
        taken.append(place.resolve())
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, not {seed}")
    if seed >= 2**63:
        raise ValueError(f"--seed must be below 2^63, not {seed}")


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object; numbers that are not finite become null, as JSON has no infinity.

    Args:
        value: The object, with values that JSON can hold.
    """
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def print_error(lines, found: dict[str, Any], about: str = "") -> None:
    """Prints which question the fidelity answers, and the expected error or why there is none.

    Args:
        lines: A `console`.
        found: Result of a command, with `fidelity_answers` and `ExpectedError.to_dict`.
        about: What the error is of, before each title.
    """
    from neupims.envelope import describe_error

    lines.print(f"{found['fidelity']} fidelity: {found['fidelity_answers']}")
    for title, text in describe_error(found).items():
        if found["not_validated"] and "not validated" in title:
            text = "".join(f"\n  - {reason}" for reason in found["not_validated"])
        lines.print(f"{about}{title}: {text}")


def console():
    """Returns a console for tables, with lines of WIDTH characters if there is no terminal."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()  # None where it was closed
    return Console(highlight=False, markup=False, emoji=False, width=None if terminal else WIDTH)
