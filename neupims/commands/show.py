"""`show`: all that a user can choose or change, with units and sources."""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from neupims import catalogue
from neupims.commands.common import add_json_argument, parse_change, print_json
from neupims.machine.units import compact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `show`.

    Args:
        parser: The parser of the command; changed in place.
    """
    parser.add_argument(
        "what",
        choices=tuple(SUBJECTS),
        help=(
            "hardware fields, models, energies of memories, systems, constants of the model, or"
            " fields of the public simulator"
        ),
    )
    parser.add_argument(
        "--hardware",
        metavar="NAME|FILE",
        help="show the hardware or the constants of this machine (default: neupims)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        help="show this model only: a name, a file of ours or Hugging Face's config.json",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="one field of that machine, such as hbm.trp_cycles='14 ns'; may repeat",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="hardware: each field with its unit, range and source, and the named machines",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the requested table, and returns the exit code 0.

    Args:
        arguments: Parsed flags of `add_arguments`.

    Raises:
        ValueError: The hardware or the model is unknown, its file is malformed, or the table has
            none.
        OSError: The file of the hardware or the model cannot be read.
    """
    list_, draw = SUBJECTS[arguments.what]
    if arguments.model is not None and arguments.what != "models":
        raise ValueError(f"--model is for models: leave it out for {arguments.what}")
    if arguments.all and arguments.what != "hardware":
        raise ValueError(f"--all is for hardware: leave it out for {arguments.what}")
    changes = dict(map(parse_change, arguments.set))
    if changes and arguments.what not in OF_A_MACHINE:
        raise ValueError(
            f"--set is for {' and '.join(OF_A_MACHINE)}: leave it out for {arguments.what}"
        )
    if arguments.what in OF_A_MACHINE:
        machine = "neupims" if arguments.hardware is None else arguments.hardware
        record = list_(machine, changes)
    elif arguments.hardware is None:
        record = list_() if arguments.model is None else list_(arguments.model)
    else:
        raise ValueError(
            f"--hardware is for {' and '.join(OF_A_MACHINE)}: {arguments.what} are the same on all"
            " machines, leave it out"
        )
    found = record.to_dict()
    if arguments.json:
        print_json(found)
    elif arguments.all:
        _draw_fields(found)
    else:
        draw(found)
    return 0


def _draw_hardware(found: dict[str, Any]) -> None:
    """Totals, what the file and --set give, all values by group, and the names of machines."""
    totals = [(each["name"], _scaled(each["value"], each["unit"])) for each in found["totals"]]
    _table(f"{found['hardware']}: what follows from its fields", ("total", "value"), totals)
    given = [each for each in found["fields"] if each["given_by"] is not None]
    if given:
        _table(
            f"{found['hardware']}: fields that its file or --set gives",
            ("field", "value", "unit. by whom: what (default)"),
            [(each["name"], _format(each["value"]), _explain_given(each)) for each in given],
        )
    groups: dict[str, list[str]] = {}
    for each in found["fields"]:
        group, _, name = each["name"].partition(".")
        groups.setdefault(group, []).append(f"{name}={compact(each['value'])}")
    rows = [(group, ", ".join(groups[group])) for group in groups if group not in COSTS]
    _table(f"{found['hardware']}: all values", ("group", "fields"), rows)
    counts = " and ".join(f"{group} ({len(groups[group])} costs)" for group in COSTS)
    names = ", ".join(each["name"] for each in found["configurations"])
    _say(f"Further groups, in `show constants`: {counts}.")
    _say(f"Named machines: {names}.")
    _say("--all: unit, range and source of each field, and what these machines are.")


def _draw_fields(found: dict[str, Any]) -> None:
    """Totals, each field with all that is known of it, and the named machines."""
    totals = [
        (each["name"], _scaled(each["value"], each["unit"]), each["formula"])
        for each in found["totals"]
    ]
    title = f"{found['hardware']}: what follows from its fields"
    _table(title, ("total", "value", "formula"), totals)
    rows = [(each["name"], _format(each["value"]), _explain(each)) for each in found["fields"]]
    _table(
        f"{found['hardware']}: fields that --set and files may change",
        ("field", "value", "unit; range. where the value is from"),
        rows,
    )
    changes = [
        ", ".join(f"{name}={_format(value)}" for name, value in each["changes"].items())
        for each in found["configurations"]
    ]
    named = [
        (each["name"], f"{each['about']}{f': {changed}' if changed else ''}")
        for each, changed in zip(found["configurations"], changes, strict=True)
    ]
    _table("named machines (--hardware NAME)", ("name", "what: fields that differ"), named)


def _explain(field: dict[str, Any]) -> str:
    """Returns the unit of a field, its range, and where its value is from."""
    ends = (
        f"{'0 or ' if field['zero'] else ''}{compact(field['least'])} to {compact(field['most'])}"
    )
    effect = {"none": " No effect.", "energy": " Energy alone."}.get(field["effect"], "")
    by = f" Default: {field['source']}" if field["given_by"] is None else f" {_say_giver(field)}"
    return f"{_unit(field)}; {ends}.{effect}{by}"


def _explain_given(field: dict[str, Any]) -> str:
    """Returns the unit of a field, and who gives its value."""
    return f"{_unit(field | {'note': ''})}. {_say_giver(field)}"


def _unit(field: dict[str, Any]) -> str:
    unit = ", ".join(filter(None, (field["unit"], field["note"])))
    return unit if field["nanoseconds"] is None else f"{unit}, {field['nanoseconds']:.4g} ns"


def _say_giver(field: dict[str, Any]) -> str:
    given = field["given"] if isinstance(field["given"], str) else _format(field["given"])
    by = os.path.basename(field["given_by"])
    return f"{by}: {given} (default: {_format(field['default'])})"


def _scaled(value: float, unit: str) -> str:
    """Returns a total with a prefix, and bytes of a memory also in binary units."""
    if unit == "FLOP/byte":
        return f"{value:.4g} {unit}"
    symbol = unit.replace("bytes", "B")
    prefix, factor = next(each for each in PREFIXES if value >= each[1] or each[1] == 1)
    text = f"{value / factor:.4g} {prefix}{symbol}"
    return f"{text}, {value / 2**30:.4g} GiB" if unit == "bytes" else text


def _draw_models(found: dict[str, Any]) -> None:
    models = [each | {"name": Path(each["name"]).name} for each in found["models"]]
    rows = [
        (
            each["name"],
            str(each["layers"]),
            str(each["width"]),
            f"{each['heads']}/{each['kv_heads']}",
            str(each["head_dim"]),
            str(each["mlp_width"]),
            f"{each['active_experts']}/{each['experts']}" if each["experts"] else "",
            f"{each['tp']},{each['pp']}",
        )
        for each in models
    ]
    _table(
        "models (--model NAME): query/key heads, channels of a head, active/all experts",
        ("name", "layers", "width", "heads", "head", "mlp", "exps", "tp,pp"),
        rows,
        numbers=True,
    )
    sizes = [
        (
            each["name"],
            f"{each['parameters'] / 1e9:.1f}",
            f"{each['active_parameters'] / 1e9:.1f}",
            f"{each['weight_bytes'] / 1e9:.1f}",
            f"{each['kv_bytes_per_token']:,.0f}",
            f"{each['flops_per_token'] / 1e9:.1f}",
        )
        for each in models
    ]
    _table(
        "sizes: billions of parameters, all and those active for a token; GB of weights; bytes of"
        " cache a token, before windows are full; GFLOPs a token without those with the cache",
        ("name", "parameters", "active", "weights", "cache bytes", "GFLOPs"),
        sizes,
        numbers=True,
    )
    _table(
        "sources",
        ("name", "what. source"),
        [(each["name"], f"{each['about']}. {each['source']}") for each in models],
    )
    notes = [(each["name"], note) for each in models for note in each["notes"]]
    if notes:
        _table("notes", ("name", "what its file leaves open"), notes)
    fields = [
        (
            each["name"],
            "must be given" if each["default"] is None else _format(each["default"]),
            each["meaning"],
        )
        for each in found["fields"]
    ]
    _table("fields of a model's file", ("field", "default", "meaning"), fields)


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
            _format(each["value"]),
            f"{each['unit']}. {each['confidence']}: {each['source']}",
        )
        for each in found["constants"]
    ]
    _table("constants", ("name", "value", "unit. confidence: source"), rows)
    for title, key in (
        ("commands of the memory, pJ", "command_picojoules"),
        ("area, mm2", "area_mm2"),
        ("power while it waits, W", "idle_watts"),
        ("power at full speed, W", "peak_watts"),
    ):
        listed = [(name.replace("_", " "), f"{value:,.4g}") for name, value in found[key].items()]
        _table(f"{found['hardware']}: {title}", ("part", "value"), listed, numbers=True)


def _draw_memories(found: dict[str, Any]) -> None:
    for memory in found["memories"]:
        rows = [
            (
                each["name"],
                _format(each["value"]),
                f"{each['unit']}. {each['confidence']}: {each['source']}",
            )
            for each in memory["energies"]
        ]
        _table(
            f"energy.memory={memory['name']}: {memory['about']}",
            ("field", "value", "unit. confidence: source"),
            rows,
        )


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


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, markup=False, emoji=False).print(text)


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> None:
    """Draws a table: columns of numbers are aligned to the right, or else the last one wraps."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(
        title=escape(title),
        box=box.SIMPLE,
        title_justify="left",
        padding=(0, 1) if numbers else (0, 2, 0, 0),
    )
    for i, column in enumerate(columns):
        drawn.add_column(
            column,
            no_wrap=numbers or i < len(columns) - 1,
            justify="right" if numbers and i else "left",
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    Console(highlight=False).print(drawn)


def _format(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) and abs(value) < 1e7 else compact(value)


PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1))
SUBJECTS: dict[str, tuple[Callable[..., Any], Callable[[dict[str, Any]], None]]] = {
    "hardware": (catalogue.list_hardware, _draw_hardware),
    "models": (catalogue.list_models, _draw_models),
    "memories": (catalogue.list_memories, _draw_memories),
    "systems": (catalogue.list_systems, _draw_systems),
    "constants": (catalogue.list_constants, _draw_constants),
    "knobs": (catalogue.list_knobs, _draw_knobs),
}
COSTS = ("energy", "area")  # groups of fields that `constants` shows
OF_A_MACHINE = ("hardware", "constants")  # the subjects that --hardware changes
