"""What the commands share: the flags that say what runs on what, and the records they stand for."""

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from neupims.files import check_place, finite
from neupims.machine.config import SUFFIXES, load_hardware, load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.systems import FIDELITIES, PIM_SYSTEMS, SPELLINGS, SYSTEMS, Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel, check_parallel, read_trace

AUTO = "auto"
WIDTH = 200  # characters of a line where the output is no terminal


class Case(NamedTuple):
    """One thing to simulate."""

    hardware: Hardware
    model_name: str
    model: Decoder
    parallel: Parallel
    batch: Batch
    system: System
    sub_batches: int
    fidelity: Fidelity
    prefill: bool = False


def add_system_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the machine."""
    parser.add_argument(
        "--system",
        default="neupims",
        metavar="NAME",
        help=f"{', '.join(SYSTEMS)}, or as the validation files spell it (default: neupims)",
    )
    parser.add_argument(
        "--sub-batches",
        choices=("1", "2", AUTO),
        help=(
            "halves of the batch that NPU and PIM interleave (neupims; default: 2); simulate takes"
            " auto: the faster"
        ),
    )
    parser.add_argument(
        "--row-buffers", choices=("single", "dual"), help="of a bank (default: what the system has)"
    )
    parser.add_argument(
        "--hardware",
        default="neupims",
        metavar="NAME|FILE",
        help="a named machine or a TOML or JSON file (`show hardware` lists names)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="one field of the hardware, such as hbm.num_channels=16; may repeat",
    )
    parser.add_argument(
        "--fidelity",
        choices=FIDELITIES,
        default="simulator",
        help="as the public simulator is coded, or as the paper means it",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of what is run."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|FILE",
        help="gpt3-7b, llama3-8b, ... (`show models`), or a TOML or JSON file",
    )
    parser.add_argument(
        "--trace",
        required=True,
        type=Path,
        metavar="FILE",
        help="CSV of seq_len,ch_idx, one request a row",
    )
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


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the machine and of what it runs, and `--json`."""
    add_model_arguments(parser)
    add_system_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object and nothing else on standard output"
    )


def system(arguments: argparse.Namespace) -> tuple[System, int, Hardware]:
    """The system's name, its sub-batches, and the hardware with what the flags change.

    Raises:
        ValueError: an unknown system, or flags that contradict each other or name an impossible
            hardware.
    """
    name = arguments.system.lower()
    if arguments.sub_batches == AUTO:
        raise ValueError("--sub-batches auto is for simulate: say 1 or 2")
    wanted = int(arguments.sub_batches) if arguments.sub_batches else None
    if name in SYSTEMS:
        chosen, sub_batches, row_buffers = (
            name,
            wanted or (2 if name == "neupims" else 1),
            1 if name == "npu-pim" else 2,
        )
        if name != "neupims" and sub_batches == 2:
            raise ValueError(f"--sub-batches 2 needs --system neupims, not {name}")
    elif name in SPELLINGS:
        chosen, sub_batches, row_buffers = SPELLINGS[name]
        if wanted not in (None, sub_batches):
            raise ValueError(
                f"--system {arguments.system} means --sub-batches {sub_batches}, not {wanted}"
            )
    else:
        raise ValueError(
            f"--system must be one of {', '.join(dict.fromkeys((*SYSTEMS, *SPELLINGS)))}, not"
            f" {arguments.system!r}"
        )
    hardware = load_hardware(arguments.hardware)
    if row_buffers == 1:
        hardware = replace(hardware, "pim.row_buffers", 1)
    if arguments.row_buffers:
        hardware = replace(
            hardware, "pim.row_buffers", {"single": 1, "dual": 2}[arguments.row_buffers]
        )
    for change in arguments.set:
        hardware = replace(hardware, *_change(change))
    return chosen, sub_batches, hardware


def model(arguments: argparse.Namespace) -> tuple[str, Decoder, Parallel]:
    """The model's name and numbers, and how it is spread over devices.

    Raises:
        ValueError: there is no such model, or it cannot be spread so.
    """
    is_file = os.path.exists(arguments.model) or arguments.model.lower().endswith(SUFFIXES)
    name = arguments.model if is_file else arguments.model.lower()
    decoder = load_model(name)
    published = load_parallel(name)
    spread = Parallel(
        arguments.tp if arguments.tp is not None else published.tp,
        arguments.pp if arguments.pp is not None else published.pp,
    )
    check_parallel(decoder, spread)
    return name, decoder, spread


def workload(arguments: argparse.Namespace) -> Case:
    """The records that the flags of `add_workload_arguments` stand for.

    Raises:
        ValueError: as `system`, `model` and `read_trace`.
    """
    name, sub_batches, hardware = system(arguments)
    model_name, decoder, parallel = model(arguments)
    batch = read_trace(arguments.trace, num_channels=int(hardware.hbm.num_channels))
    return Case(
        hardware, model_name, decoder, parallel, batch, name, sub_batches, arguments.fidelity
    )


def check_run(*places: Path | None, seed: int = 0) -> None:
    """Before a run, not after it: raises OSError where a file has no folder to stand in, ValueError
    for a seed below 0.
    """
    for place in filter(None, places):
        check_place(place)
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, not {seed}")


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output; what is not finite becomes null, which JSON has and
    infinity it has not.
    """
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def _change(text: str) -> tuple[str, int | float]:
    field, _, value = (part.strip() for part in text.partition("="))
    for kind in (int, float):
        with suppress(ValueError):
            if field:
                return field, kind(value)
    raise ValueError(f"--set needs FIELD=NUMBER, such as hbm.num_channels=16, not {text!r}")


def error_sentence(error: dict[str, Any]) -> str:
    """The mean and the greatest error of a layer, of an `expected_error`."""
    return (
        f"{error['layer_mean_percent']:.1f} % in the mean, {error['layer_max_percent']:.1f} % at"
        " most"
    )


def simulated(case: Case, path: str):
    """The iteration of one case.

    Raises:
        ValueError: the hardware cannot run it.
    """
    from neupims.timing.prefill import prefill
    from neupims.timing.schedule import simulate

    records = (case.hardware, case.model, case.batch, case.parallel)
    options: dict[str, Any] = {"system": case.system}
    if case.prefill:
        iteration = prefill(*records, **options)
    else:
        options |= {"path": path, "sub_batches": case.sub_batches, "fidelity": case.fidelity}
        iteration = simulate(*records, **options)
    if iteration.flagged:
        hbm = case.hardware.hbm
        pim = (
            "; PIM tiles, for one, must fit between the refreshes of ranks, "
            f"hbm.trefi_cycles / hbm.ranks = {hbm.trefi_cycles / hbm.ranks:g} memory cycles apart"
        )
        raise ValueError(
            "this hardware cannot run the batch: a time or an energy is not"
            f" finite{pim if case.system in PIM_SYSTEMS else ''}"
        )
    return iteration


def console():
    """A terminal for tables; where the output is none, lines are long enough for them."""
    from rich.console import Console

    return Console(
        highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH
    )
