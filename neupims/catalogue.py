"""All that a user can choose or change, with units and sources, as `show` prints it.

Each function returns a frozen record whose fields are the keys of the printed JSON.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neupims.costs.area import area
from neupims.costs.energy import command_energies, idle_watts
from neupims.costs.power import peak_power
from neupims.machine import config
from neupims.machine.calibration import Calibration
from neupims.machine.model import Decoder
from neupims.machine.model_size import flops_per_token, kv_cache_bytes, parameters, weight_bytes
from neupims.machine.quantity import Field, describe
from neupims.machine.record import to_values
from neupims.machine.simulator_files import CORE_FIELDS, MEMORY_FIELDS, WITHOUT_EFFECT
from neupims.machine.systems import SPELLINGS, System
from neupims.machine.totals import derive_totals
from neupims.machine.units import CYCLES
from neupims.timing.stages import stages

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


Row = dict[str, Any]


class _Table:
    """A record of values that JSON can hold."""

    def to_dict(self) -> Row:
        """Returns the values of JSON, as `show --json` prints them."""
        return to_values(self)


@dataclass(frozen=True)
class HardwareTable(_Table):
    """The fields of a machine, and the named machines."""

    hardware: str  # name or file of the machine
    # Of each field what `quantity.Field` says, the text or number that a file or the caller gives
    # (or null), by whom, and cycles in nanoseconds.
    fields: list[Row]
    totals: list[Row]  # name, value, unit and formula of what follows from the fields
    configurations: list[Row]  # name, about and changed fields of each named machine


@dataclass(frozen=True)
class ModelTable(_Table):
    """Models with their dimensions and what follows from them, and the fields of a model's file."""

    # name, about, source, notes, dimensions, tp, pp, parameters, active_parameters, weight_bytes,
    # kv_bytes_per_token and flops_per_token of each model
    models: list[Row]
    fields: list[Row]  # name, meaning, default (None: must be given), least and most of each field


@dataclass(frozen=True)
class SystemTable(_Table):
    """The systems, and how the validation files spell them."""

    systems: list[Row]  # name, about and stages_by_sub_batches of each system
    validation_spellings: list[Row]  # name, system, sub_batches and row_buffers of each spelling


@dataclass(frozen=True)
class ConstantTable(_Table):
    """Fitted constants and costs, and what follows from them for a machine."""

    hardware: str  # name or file of the machine
    constants: list[Row]  # name, value, unit, confidence and source of each constant
    command_picojoules: dict[str, float]  # pJ of a command of the memory, by command
    area_mm2: dict[str, float]  # mm2 of one device, by part
    idle_watts: dict[str, float]  # W of one device that waits, by part
    peak_watts: dict[str, float]  # W of one device, by part


@dataclass(frozen=True)
class MemoryTable(_Table):
    """The kinds of memory with their energies."""

    memories: list[Row]  # name, about, and energies: name, value, unit, confidence and source


@dataclass(frozen=True)
class KnobTable(_Table):
    """Fields of the public simulator's configuration files, and our fields that they set."""

    knobs: list[Row]  # simulator, file, name, factor, unit and modelled of each field
    without_effect: list[str]  # fields that do not change the simulator's cycles


def list_hardware(
    hardware: str | Path = "neupims", changes: Mapping[str, float | str] | None = None
) -> HardwareTable:
    """Returns every field of a machine by dotted name, what follows from them, and named machines.

    Args:
        hardware: A named machine, or a file.
        changes: Further fields by dotted name: numbers, or text with a unit.

    Raises:
        ValueError: The machine is unknown, or its file is malformed.
        OSError: The file cannot be read.
    """
    machine, given = config.read_machine(hardware, changes)
    shown = []
    for each in describe(machine):
        row = each._asdict()
        row["given"], row["given_by"] = given.get(each.name, (None, None))
        row["nanoseconds"] = (
            each.value / machine.hbm.clock_hz * 1e9 if each.unit == CYCLES else None
        )
        shown.append(row)
    named = [
        {"name": name, "about": config.about("hardware", name), "changes": config.changes(name)}
        for name in config.names("hardware")
    ]
    totals = [each._asdict() for each in derive_totals(machine)]
    return HardwareTable(str(hardware), shown, totals, named)


def list_models(model: str | Path | None = None) -> ModelTable:
    """Returns models with their dimensions, and what follows: parameters, bytes and operations.

    Args:
        model: A named model, or a TOML or JSON file (default: all named models).

    Raises:
        ValueError: The model is unknown, or its file is malformed.
        OSError: The file cannot be read.
    """
    names = config.names("models") if model is None else (str(model),)
    described = [
        {
            "name": each.name,
            "meaning": each.metadata["meaning"],
            "default": None if each.default is dataclasses.MISSING else each.default,
            "least": each.metadata["least"],
            "most": each.metadata["most"],
        }
        for each in dataclasses.fields(Decoder)
    ]
    return ModelTable([_describe_model(name) for name in names], described)


def _describe_model(name: str) -> Row:
    file = config.read_model(name)
    size = parameters(file.model)
    texts = {"name": name, "about": file.about, "source": file.source, "notes": list(file.notes)}
    spread = {"tp": file.parallel.tp, "pp": file.parallel.pp}
    return (
        texts
        | dataclasses.asdict(file.model)
        | spread
        | {
            "parameters": float(size.total),
            "active_parameters": float(size.active),
            "weight_bytes": float(weight_bytes(file.model)),
            "kv_bytes_per_token": float(kv_cache_bytes(file.model, 1)),
            "flops_per_token": float(flops_per_token(file.model)),
        }
    )


def list_systems() -> SystemTable:
    """Returns the systems with their stages, and how the validation files spell them."""
    found = []
    for name, about in ABOUT.items():
        counts = (2, 1) if name == "neupims" else (1,)
        planned = {
            str(count): "".join(stage.name for stage in stages(name, count)) for count in counts
        }
        found.append({"name": name, "about": about, "stages_by_sub_batches": planned})
    spelt = [{"name": name} | setting._asdict() for name, setting in SPELLINGS.items()]
    return SystemTable(found, spelt)


def list_constants(
    hardware: str | Path = "neupims", changes: Mapping[str, Any] | None = None
) -> ConstantTable:
    """Returns fitted constants and costs with their confidence, and what they give for a machine.

    Args:
        hardware: A named machine, or a TOML or JSON file.
        changes: Fields of the machine by dotted name, as for `set_fields`.

    Raises:
        ValueError: The machine is unknown, its file is malformed, or a change is impossible.
        OSError: The file cannot be read.
    """
    machine = config.load_hardware(hardware, changes)
    origins = config.cost_sources(hardware, changes)
    fitted = [
        _constant(f"calibration.{each.name}", each, f"fitted: {each.source}")
        for each in describe(Calibration())
    ]
    costs = [
        _constant(name, each, origins.get(name, each.source))
        for group in ("energy", "area")
        for each in describe(getattr(machine, group))
        for name in [f"{group}.{each.name}"]
    ]
    energies = command_energies(machine)._asdict()
    return ConstantTable(
        str(hardware),
        fitted + costs,
        {name: float(value) for name, value in energies.items()},
        _numbers(area(machine), "npu", "pim", "total"),
        {name: float(value) for name, value in idle_watts(machine)._asdict().items()},
        _numbers(peak_power(machine), "npu", "total"),
    )


def list_memories() -> MemoryTable:
    """Returns the kinds of memory that `energy.memory` may name, with the source of each energy."""
    fields = {each.name: each for each in describe(config.load_hardware("neupims").energy)}
    found = []
    for name in config.names("memory"):
        memory = config.load_memory(name)
        energies = [
            _constant(field, fields[field]._replace(value=value), memory.sources[field])
            for field, value in memory.values.items()
        ]
        found.append({"name": name, "about": memory.about, "energies": energies})
    return MemoryTable(found)


def _constant(name: str, each: Field, origin: str) -> Row:
    confidence, _, source = origin.partition(": ")
    return {
        "name": name,
        "value": each.value,
        "unit": f"{each.unit}, {each.note}" if each.note else each.unit,
        "confidence": confidence,
        "source": source,
    }


def list_knobs() -> KnobTable:
    """Returns the fields of the public simulator's files and the fields of ours that they set."""
    known = {each.name: each for each in describe(config.load_hardware("neupims"))}
    found = [
        {
            "simulator": name,
            "file": file,
            "name": ours,
            "factor": factor,
            "unit": known[ours].unit,
            "modelled": known[ours].effect != "none",
        }
        for file, table in (("memory", MEMORY_FIELDS), ("core", CORE_FIELDS))
        for name, (ours, factor) in table.items()
    ]
    return KnobTable(found, sorted(WITHOUT_EFFECT))


def _numbers(record: Any, *sums: str) -> dict[str, float]:
    """Returns the numbers of a record, and its sums."""
    names = (*(each.name for each in dataclasses.fields(record)), *sums)
    return {name: float(getattr(record, name)) for name in names}
