"""`show`: what there is to choose from, with units and sources."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from neupims.commands.common import print_json
from neupims.machine import config
from neupims.machine.record import describe
from neupims.machine.systems import SPELLINGS, System

ABOUT: dict[System, str] = {
    "neupims": (
        "PIM computes attention while the NPU computes the rest of the other sub-batch (two), or"
        " after it (one); two row buffers"
    ),
    "npu-pim": (
        "NPU and PIM take turns; one row buffer, so PIM and the NPU's memory traffic exclude each"
        " other"
    ),
    "npu-only": "the NPU computes attention too, keys and values come over the buses",
    "gpu": "a roofline: the longer of arithmetic and memory traffic of each operation",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=tuple(SUBJECTS),
        help=(
            "hardware fields, models, systems, constants of the model, or fields of the public"
            " simulator"
        ),
    )
    parser.add_argument(
        "--hardware",
        default="neupims",
        metavar="NAME|FILE",
        help="show this machine's values (default: neupims)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object and nothing else on standard output"
    )


def run(arguments: argparse.Namespace) -> int:
    gather, draw = SUBJECTS[arguments.what]
    found = gather(arguments)
    if arguments.json:
        print_json(found)
    else:
        draw(found)
    return 0


def hardware(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every field of the machine by dotted name, and the named machines."""
    machine = config.load_hardware(arguments.hardware)
    defaults = {each.name: each.value for each in describe(config.load_hardware("neupims"))}
    shown = [
        {
            "name": each.name,
            "value": each.value,
            "default": defaults[each.name],
            "unit": each.unit,
            "source": each.source,
            "least": each.least,
            "whole": each.whole,
        }
        for each in describe(machine)
    ]
    named = [
        {"name": name, "about": config.about("hardware", name), "changes": config.changes(name)}
        for name in config.names("hardware")
    ]
    return {"hardware": arguments.hardware, "fields": shown, "configurations": named}


def models(_: argparse.Namespace) -> dict[str, Any]:
    """The named models by their numbers."""
    from neupims.machine.workload import weight_bytes

    found = []
    for name in config.names("models"):
        model, parallel = config.load_model(name), config.load_parallel(name)
        spread = {"tp": parallel.tp, "pp": parallel.pp, "weight_bytes": float(weight_bytes(model))}
        found.append(
            {
                "name": name,
                "about": config.about("models", name),
                **dataclasses.asdict(model),
                **spread,
            }
        )
    return {"models": found}


def systems(_: argparse.Namespace) -> dict[str, Any]:
    """The systems, and how the validation files spell them."""
    from neupims.timing.schedule import stages

    found = []
    for name, about in ABOUT.items():
        counts = (2, 1) if name == "neupims" else (1,)
        planned = {
            str(count): "".join(stage.name for stage in stages(name, count)) for count in counts
        }
        found.append({"name": name, "about": about, "stages_by_sub_batches": planned})
    golden = [{"name": name} | setting._asdict() for name, setting in SPELLINGS.items()]
    return {"systems": found, "validation_spellings": golden}


def constants(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fitted constants of timing, costs of energy and area, each with how far it can be trusted,
    and what follows from them for the machine.
    """
    from neupims.costs.area import AreaCosts, area, peak_power
    from neupims.costs.energy import EnergyCosts, command_energies
    from neupims.machine.calibration import Calibration

    machine = config.load_hardware(arguments.hardware)
    found = []
    for group, record in (
        ("calibration", Calibration()),
        ("energy", EnergyCosts()),
        ("area", AreaCosts()),
    ):
        for each in describe(record):
            label, separator, source = each.source.partition(": ")
            label, source = (
                (label, source) if separator and group != "calibration" else ("fitted", each.source)
            )
            found.append(
                {
                    "name": f"{group}.{each.name}",
                    "value": each.value,
                    "unit": each.unit,
                    "confidence": label,
                    "source": source,
                }
            )
    millimetres, watts = area(machine), peak_power(machine)
    return {
        "hardware": arguments.hardware,
        "constants": found,
        "command_picojoules": {
            name: float(value)
            for name, value in command_energies(machine, EnergyCosts())._asdict().items()
        },
        "area_mm2": (
            _numbers(millimetres)
            | {
                "npu": float(millimetres.npu),
                "pim": float(millimetres.pim),
                "total": float(millimetres.total),
            }
        ),
        "peak_watts": _numbers(watts) | {"npu": float(watts.npu), "total": float(watts.total)},
    }


def knobs(_: argparse.Namespace) -> dict[str, Any]:
    """Fields of the public simulator's configuration files and the fields of ours that they set."""
    from neupims.validation import (
        CORE_FIELDS,
        MEMORY_FIELDS,
        WITHOUT_EFFECT,
        WITHOUT_MODELLED_EFFECT,
    )

    units = {each.name: each.unit for each in describe(config.load_hardware("neupims"))}
    fields = [
        {
            "simulator": name,
            "file": file,
            "name": ours,
            "factor": factor,
            "unit": units[ours],
            "modelled": name not in WITHOUT_MODELLED_EFFECT,
        }
        for file, table in (("memory", MEMORY_FIELDS), ("core", CORE_FIELDS))
        for name, (ours, factor) in table.items()
    ]
    return {"knobs": fields, "without_effect": sorted(WITHOUT_EFFECT)}


def _numbers(record: Any) -> dict[str, float]:
    return {each.name: float(getattr(record, each.name)) for each in dataclasses.fields(record)}


def _draw_hardware(found: dict[str, Any]) -> None:
    rows = [
        (each["name"], _shown(each["value"]), f"{each['unit']}. {each['source']}")
        for each in found["fields"]
    ]
    _table(
        f"{found['hardware']}: fields that --set and files may change",
        ("field", "value", "unit. source"),
        rows,
    )
    changes = [
        ", ".join(f"{name}={_shown(value)}" for name, value in each["changes"].items())
        for each in found["configurations"]
    ]
    named = [
        (each["name"], f"{each['about']}{f': {changed}' if changed else ''}")
        for each, changed in zip(found["configurations"], changes, strict=True)
    ]
    _table("named machines (--hardware NAME)", ("name", "what: fields that differ"), named)


def _draw_models(found: dict[str, Any]) -> None:
    columns = {
        "layers": "layers",
        "width": "width",
        "heads": "heads",
        "kv_heads": "kv",
        "mlp_width": "mlp",
        "mlp_matrices": "mats",
        "tp": "tp",
        "pp": "pp",
    }
    rows = [
        (each["name"], *(str(each[name]) for name in columns), f"{each['weight_bytes'] / 1e9:.1f}")
        for each in found["models"]
    ]
    _table("models (--model NAME)", ("name", *columns.values(), "GB"), rows, numbers=True)


def _draw_systems(found: dict[str, Any]) -> None:
    stages = [
        ", ".join(f"{names} with {count}" for count, names in each["stages_by_sub_batches"].items())
        for each in found["systems"]
    ]
    rows = [
        (each["name"], f"{each['about']}. Stages by sub-batches: {planned}")
        for each, planned in zip(found["systems"], stages, strict=True)
    ]
    _table("systems (--system NAME)", ("name", "what"), rows)
    spelt = [
        (each["name"], each["system"], str(each["sub_batches"]), str(each["row_buffers"]))
        for each in found["validation_spellings"]
    ]
    _table(
        "spellings of the validation files", ("name", "system", "sub-batches", "row buffers"), spelt
    )


def _draw_constants(found: dict[str, Any]) -> None:
    rows = [
        (
            each["name"],
            _shown(each["value"]),
            f"{each['unit']}. {each['confidence']}: {each['source']}",
        )
        for each in found["constants"]
    ]
    _table("constants", ("name", "value", "unit. confidence: source"), rows)
    for title, key in (
        ("commands of the memory, pJ", "command_picojoules"),
        ("area, mm2", "area_mm2"),
        ("peak power, W", "peak_watts"),
    ):
        listed = [(name.replace("_", " "), f"{value:,.4g}") for name, value in found[key].items()]
        _table(f"{found['hardware']}: {title}", ("part", "value"), listed, numbers=True)


def _draw_knobs(found: dict[str, Any]) -> None:
    rows = [
        (
            each["simulator"],
            each["file"],
            each["name"],
            f"{each['factor']:g}",
            "yes" if each["modelled"] else "no",
        )
        for each in found["knobs"]
    ]
    _table(
        "fields of the public simulator's files",
        ("simulator", "file", "ours", "times", "has an effect here"),
        rows,
    )
    _table(
        "accepted, without effect in the simulator",
        ("fields",),
        [(", ".join(found["without_effect"]),)],
    )


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> None:
    """Draws a table; of `numbers` all columns but the first stand to the right, else the last one
    wraps.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(
        title=title,
        box=box.SIMPLE,
        title_justify="left",
        padding=(0, 1) if numbers else (0, 2, 0, 0),
    )
    for i, column in enumerate(columns):
        drawn.add_column(
            column,
            no_wrap=numbers or i < len(columns) - 1,
            justify="right" if numbers and i else "left",
        )
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    Console(highlight=False).print(drawn)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and abs(value) < 1e7 else f"{value:g}"


SUBJECTS: dict[
    str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], None]]
] = {
    "hardware": (hardware, _draw_hardware),
    "models": (models, _draw_models),
    "systems": (systems, _draw_systems),
    "constants": (constants, _draw_constants),
    "knobs": (knobs, _draw_knobs),
}
