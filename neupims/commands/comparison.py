"""`explore` with several systems or machines: one table, and the winner by each objective."""

import argparse
from collections.abc import Sequence

from neupims.commands.common import (
    AUTO,
    console,
    given_spread,
    print_json,
    print_warnings,
    split_names,
    system_options,
)
from neupims.machine.systems import FIDELITY_ANSWERS
from neupims.machine.traces import Requests

# Flags that only a space of designs has.
OF_A_SPACE = (
    "space", "constraint", "method", "points", "reference", "axes", "cells", "index_rows", "chunk",
    "out", "serve", "serve_batch", "serve_requests",
)  # fmt: skip


def compare_and_print(
    arguments: argparse.Namespace,
    models: Sequence[str],
    traces: Sequence[Requests],
    *,
    is_space: bool,
) -> int:
    """Compares the systems and machines of the flags, prints the result, and returns 0.

    Args:
        arguments: Parsed flags of `explore`.
        models: Names or files of the models.
        traces: The requests.
        is_space: Whether there are knobs, which exclude a comparison.

    Raises:
        ValueError: A flag is impossible, or flags contradict each other.
        OSError: A file cannot be read or written.
        ImportError: The extra `neupims` is not installed.
    """
    from neupims.exploration.compare import COMPARED, compare

    given = [name for name in OF_A_SPACE if getattr(arguments, name) not in (None, "", [])]
    if is_space or given:
        flag = "knob" if is_space else given[0].replace("_", "-")
        raise ValueError(
            f"--{flag} is for the designs of one system and one machine: leave it out to compare"
            " several"
        )
    if arguments.sub_batches == AUTO:
        raise ValueError("--sub-batches auto is for simulate: say 1 or 2")
    options = system_options(arguments)
    hardware = split_names(options.pop("hardware"))
    found = compare(
        hardware,
        models,
        traces,
        systems=split_names(arguments.system),
        objectives=COMPARED if arguments.objectives is None else arguments.objectives,
        fidelity=arguments.fidelity,
        schedule=arguments.schedule,
        parallel=given_spread(arguments),
        lm_head=arguments.lm_head,
        **options,
    )
    print_warnings(found.warnings)
    if arguments.html:
        from neupims.pages.exploration_comparison import write_comparison

        write_comparison(arguments.html, found)
    if arguments.json:
        print_json(found.to_dict())
    else:
        _print(found)
    return 0


def _print(found) -> None:
    """The contenders, how far to trust each, those that are left out, and the winners."""
    import re

    from rich.table import Table

    lines = console()
    table = Table(title=f"over {', '.join(found.workloads)} (geometric means)")
    for name in ("system", "hardware"):
        table.add_column(name)
    for name in found.contenders[0].metrics:
        table.add_column(re.sub("_", "\n", name), justify="right")
    for each in found.contenders:
        metrics = ("-" if each.flagged else f"{value:.4g}" for value in each.metrics.values())
        table.add_row(each.system, each.hardware, *metrics)
    lines.print(table)
    trust = Table(title=f"{found.fidelity} fidelity: {FIDELITY_ANSWERS[found.fidelity]}")
    for name in ("system", "hardware", "fidelity", "expected error of a layer, or left out"):
        trust.add_column(name)
    for each in found.contenders:
        trust.add_row(each.system, each.hardware, each.fidelity, each.trust)
    lines.print(trust)
    if found.flagged:
        lines.print(f"{found.flagged} of {len(found.contenders)} are left out:")
    for reason, count in found.flagged_by_reason.items():
        lines.print(f"  {count}: {reason}")
    winners = Table(title="winners")
    for name in ("objective", "best", "value", "better than the next"):
        winners.add_column(name, justify="right" if name in ("value",) else "left")
    for each in found.winners:
        names = " = ".join(found.contenders[place].name for place in each.best) or "none"
        lead = "" if each.lead is None else f"{each.lead:.1%}"
        value = f"{each.value:.4g}" if each.best else "-"
        winners.add_row(each.objective, names, value, lead)
    lines.print(winners)
