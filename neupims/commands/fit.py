"""`fit`: the largest batch and the longest context that fit the memory."""

import argparse
from typing import Any

from neupims.commands.common import (
    add_json_argument,
    add_machine_arguments,
    add_spread_model_arguments,
    console,
    parse_change,
    print_json,
)
from neupims.machine.systems import FIDELITIES

BINDING = {
    "weights": "the weights, which leave no room",
    "channel": "a channel",
    "memory": "the whole memory",
    "limit": "the largest number that is tried",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fit`.

    Args:
        parser: The parser of the command; changed in place.
    """
    add_spread_model_arguments(parser)
    add_machine_arguments(parser)
    parser.add_argument(
        "--fidelity",
        choices=FIDELITIES,
        default="simulator",
        help="layout of keys and values in PIM's tiles: the public simulator's, or with full rows",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of each request: gives the largest batch (default: find the longest context)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="requests: gives the longest context (default: the largest batch, or 1 without"
        " --context); with --context: what is left",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints what fits, and returns the exit code 0.

    Args:
        arguments: Parsed flags of `add_arguments`.

    Raises:
        ValueError: A flag is impossible.
        OSError: A file cannot be read.
    """
    from neupims.timing.fit import fit

    found = fit(
        arguments.model,
        system=arguments.system,
        hardware=arguments.hardware,
        changes=dict(map(parse_change, arguments.set)),
        tp=arguments.tp,
        pp=arguments.pp,
        kv_split=arguments.kv_split,
        context=arguments.context,
        batch=arguments.batch,
        fidelity=arguments.fidelity,
    ).to_dict()
    if arguments.json:
        print_json(found)
    else:
        _print_table(found)
    return 0


def _print_table(found: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from neupims.timing.memory_check import format_bytes

    lines = console()
    table = Table(
        title=(
            f"{found['model']} on {found['system']}, {_say_device(found)},"
            f" {_count(found['batch'], 'request')} of {_count(found['context'], 'token')}"
        ),
        box=box.SIMPLE,
        title_justify="left",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    for name, key in (
        ("memory", "memory_bytes"),
        ("weights", "weight_bytes"),
        ("activations", "activation_bytes"),
        ("keys and values", "kv_bytes"),
        ("keys and values of a token", "kv_bytes_per_token"),
    ):
        table.add_row(name, format_bytes(found[key]))
    for name, key in (
        (f"largest batch at {_count(found['context'], 'token')}", "largest_batch"),
        (f"longest context of {_count(found['batch'], 'request')}", "largest_context"),
    ):
        if bound := found[key]:
            by_channel = "" if bound["channel"] is None else f"{bound['channel']:,} by channel, "
            numbers = f"{by_channel}{bound['memory']:,} by the whole memory"
            table.add_row(name, f"{bound['value']:,} ({numbers})")
            table.add_row("bound by", BINDING[bound["binding"]])
    if not (found["largest_batch"] or found["largest_context"]):
        table.add_row("fits", "yes" if found["fits"] else "no")
    if found["channel_tokens_left"] is not None:
        table.add_row("tokens left on the fullest channel", f"{found['channel_tokens_left']:,}")
    table.add_row("tokens left in the whole memory", f"{found['memory_tokens_left']:,}")
    lines.print(table)
    if found["devices"]:
        lines.print(f"{_say_refused(found)}: {found['devices']}")
    if found["pp"] > 1:
        lines.print(
            f"the batch is that of all {found['pp']} groups of layers: each has"
            f" 1/{found['pp']} of it at a time"
        )


def _say_device(found: dict[str, Any]) -> str:
    tp, pp = found["tp"], found["pp"]
    return f"one of {tp * pp} devices (tp {tp}, pp {pp})" if tp * pp > 1 else "one device"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _say_refused(found: dict[str, Any]) -> str:
    batch, context = found["batch"], found["context"]
    if not batch or (batch == 1 and not context):
        return "not even one request fits"
    requests = "one request does" if batch == 1 else f"{batch:,} requests do"
    return f"{requests} not fit" if not context else f"{requests} not fit at {context:,} tokens"
