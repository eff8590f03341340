"""The configuration files of the public simulator, as machines of ours.

They are the JSON of the core, the JSON of the memory, and the DRAM file (ini) that it names.
"""

import configparser
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from neupims.files import read_table
from neupims.machine.hardware import HBM

# Fields of the simulator's memory and core files -> ours, with the factor from its unit to ours.
# The DRAM timings carry their names in `machine.hardware.HBM`.
MEMORY_FIELDS: dict[str, tuple[str, float]] = {
    each.metadata["simulator"]: (f"hbm.{each.name}", 1)
    for each in fields(HBM)
    if each.metadata["simulator"]
} | {
    "dram_page_size": ("pim.page_bytes", 1),
    "pim_comp_coverage": ("pim.macs_per_bank", 1),
    "dram_freq": ("hbm.clock_hz", 1e6),
    "channels": ("hbm.num_channels", 1),
    "dram_channels": ("hbm.num_channels", 1),
}
CORE_FIELDS: dict[str, tuple[str, float]] = {
    "core_width": ("npu.array_width", 1),
    "core_height": ("npu.array_height", 1),
    "core_freq": ("npu.clock_hz", 1e6),
    "num_cores": ("npu.num_cores", 1),
    "sram_size": ("npu.scratchpad_bytes", 1024),
    "vector_core_count": ("npu.vector_units", 1),
    "vector_core_width": ("npu.vector_lanes", 1),
    "icnt_freq": ("npu.interconnect_hz", 1e6),
}
# fmt: off
# Fields of the simulator's files without effect on its cycles: not read, overwritten, hard-coded
# elsewhere, only for energy, or of a policy that is off.
WITHOUT_EFFECT = {
    "tRTP_S", "tRTP_L", "tREFIb", "tRPRE", "tWPRE", "tXS", "tCKE", "tCKSRE", "tXP", "num_dies",
    "tCK", "epoch_period", "output_level",
    "unified_queue", "VDD", "IDD0", "IDD2P", "IDD2N", "IDD3P", "IDD3N", "IDD4W", "IDD4R", "IDD5AB",
    "IDD6x", "HBM_size", "HBM_act_buf_size",
    "hbm_dual_cmd", "systolic_array_count", "spad_size", "accum_spad_size", "__sram_size",
    "sram_width", "icnt_type", "process_bit", "layout",
    "scheduler", "core_type", "add_latency", "mul_latency", "gelu_latency", "scalar_sqrt_latency",
    "scalar_add_latency", "scalar_mul_latency",
    "operation_log_output_path",
}
# Fields that have an effect in the simulator and are constants here: other values are refused.
FIXED: dict[str, tuple[Any, ...]] = {
    "precision": (2,), "exp_latency": (1,), "add_tree_latency": (1,), "icnt_latency": (1,),
    "tWTR_S": (6,), "tWTR_L": (8,), "cmd_queue_size": (128,), "trans_queue_size": (32,),
    "protocol": ("HBM", "HBM2"), "address_mapping": ("rorabgbachco",),
    "queue_structure": ("PER_BANK",), "row_buf_policy": ("OPEN_PAGE",),
    "refresh_policy": ("RANK_LEVEL_STAGGERED",),
}
# fmt: on
# Fields of the DRAM file from which the layout of the memory follows.
LAYOUT = (
    "bankgroups",
    "banks_per_group",
    "rows",
    "columns",
    "device_width",
    "BL",
    "bus_width",
    "channel_size",
)  # fmt: skip
# The values of these fields say how many row buffers a bank has; None: the memory has no PIM.
ROW_BUFFERS = {
    "neupims": 2, "DUAL": 2, "newton": 1, "SINGLE": 1, "dram": None, "DRAM": None
}  # fmt: skip
OTHERS = {"dram_type", "pim_type", "pim_config_path", "dram_req_size", "dram_banks_per_ch"}
UNREAD = WITHOUT_EFFECT | {"icnt_config_path", "baseline_exp"}
MARKS = ("dram_type", "core_type", "core_width", "core_freq", "dram_freq", "pim_config_path")


class Found(NamedTuple):
    """A value of a file of the simulator."""

    value: Any  # a number or a text
    file: str  # the file that it stands in


def is_simulator_json(values: Mapping[str, Any]) -> bool:
    """Returns whether the values of a JSON file are those of the simulator's core or memory.

    Args:
        values: The values by name.
    """
    return any(mark in values for mark in MARKS)


def read_simulator_files(paths: Iterable[str | Path]) -> dict[str, Found]:
    """Returns the fields of `Hardware`, by dotted name, that files of the simulator set.

    Args:
        paths: Its core JSON, memory JSON and DRAM ini, or some of them. The ini that a memory JSON
            names is read too, unless another one is given.

    Raises:
        ValueError: A file is malformed, a field is unknown, or has a value that is not modelled;
            the sentence names file and field.
        OSError: A file cannot be read.
    """
    files = [os.fspath(path) for path in paths]
    has_ini = any(file.lower().endswith(".ini") for file in files)
    found: dict[str, Found] = {}
    for path in files:
        _merge(found, _read_file(path), path)
        named = found.get("pim_config_path")
        if named is not None and named.file == path and not has_ini:
            ini = _find_ini(path, str(named.value))
            _merge(found, _read_file(ini), ini)
    return _as_fields(found)


def _merge(found: dict[str, Found], values: Mapping[str, Any], file: str) -> None:
    for name, value in values.items():
        if name in found and found[name].value != value:
            raise ValueError(f"{found[name].file} and {file} contradict each other: {name}")
        found[name] = Found(value, file)


def _read_file(path: str) -> dict[str, Any]:
    """Returns the values of one file by name."""
    if not path.lower().endswith(".ini"):
        values = read_table(path)
        if not is_simulator_json(values):
            raise ValueError(f"{path} is no core or memory file of the public simulator")
        return values
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(";", "#"))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        parser.read_string(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
    except configparser.Error as error:
        raise ValueError(f"{path} is not a DRAM file: {' '.join(str(error).split())}") from None
    items = {name: text for section in parser.sections() for name, text in parser.items(section)}
    if missing := [name for name in (*LAYOUT, "tRCDRD", "tRP", "tREFI") if name not in items]:
        raise ValueError(f"{path} is no DRAM file of the public simulator: it lacks {missing[0]}")
    return {name: _as_number(text) for name, text in items.items()}


def _find_ini(path: str, named: str) -> str:
    """Returns the DRAM file that a memory file names: from the simulator's folder `build`."""
    for folder in Path(path).resolve().parents:
        if (folder / "build" / named).is_file() or (folder / Path(named.lstrip("./"))).is_file():
            return os.path.normpath(folder / named.lstrip("./"))
    raise ValueError(
        f"{path} names the DRAM file {named}, which is not there: in a machine's file, write"
        f' simulator = ["{os.path.basename(path)}", "PATH/{os.path.basename(named)}"]'
    )


def _as_number(text: str) -> Any:
    """Returns a text as a number, if it is one."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if math.isfinite(number) and number == int(number) else number


def _as_fields(found: Mapping[str, Found]) -> dict[str, Found]:
    """Returns fields of ours from those of the simulator."""
    fields_: dict[str, Found] = {}

    def put(name: str, value: Any, file: str) -> None:
        if name in fields_ and fields_[name].value != value:
            raise ValueError(f"{fields_[name].file} and {file} contradict each other: {name}")
        fields_[name] = Found(value, file)

    for name, each in found.items():
        if name in FIXED and each.value not in FIXED[name]:
            raise ValueError(
                f"{each.file}: {name} = {each.value} is not modelled, only"
                f" {' or '.join(map(str, FIXED[name]))}"
            )
        if name in MEMORY_FIELDS | CORE_FIELDS:
            ours, factor = (MEMORY_FIELDS | CORE_FIELDS)[name]
            put(ours, _scaled(name, each, factor), each.file)
        elif name in ("dram_type", "pim_type"):
            if each.value not in ROW_BUFFERS:
                raise ValueError(f"{each.file}: {name} = {each.value} is not modelled")
            if buffers := ROW_BUFFERS[each.value]:
                put("pim.row_buffers", buffers, each.file)
        elif name not in {*LAYOUT, *OTHERS, *FIXED, *UNREAD}:
            raise ValueError(f"{each.file}: {name} is no field of the simulator that we know")
    if "tCK" in found and "dram_freq" not in found:  # nanoseconds; beside dram_freq it is not read
        put("hbm.clock_hz", 1e9 / _scaled("tCK", found["tCK"], 1), found["tCK"].file)
    if "rows" in found:
        for name, value in _layout(found).items():
            put(name, value, found["rows"].file)
    _check_derived(found)
    return fields_


def _scaled(name: str, each: Found, factor: float) -> float:
    if isinstance(each.value, bool) or not isinstance(each.value, int | float):
        raise ValueError(f"{each.file}: {name} must be a number, not {each.value!r}")
    return each.value * int(factor)


def _layout(found: Mapping[str, Found]) -> dict[str, int]:
    """Returns the layout of the memory, as the simulator computes it (CalculateSize)."""
    size = {name: int(_scaled(name, found[name], 1)) for name in LAYOUT}
    row_bytes = size["columns"] * size["device_width"] // 8
    banks = size["bankgroups"] * size["banks_per_group"]
    devices = size["bus_width"] // max(size["device_width"], 1)
    rank_bytes = row_bytes * size["rows"] * banks * devices
    return {
        "hbm.bank_groups": size["bankgroups"],
        "hbm.banks_per_group": size["banks_per_group"],
        "hbm.rows": size["rows"],
        "hbm.row_bytes": row_bytes * devices,
        "hbm.bus_bits": size["bus_width"],
        "hbm.burst_length": size["BL"],
        "hbm.ranks": max(size["channel_size"] * 2**20 // max(rank_bytes, 1), 1),
    }


def _check_derived(found: Mapping[str, Found]) -> None:
    """Raises if a memory file states another layout than the DRAM file."""
    if "rows" not in found:
        return
    layout = _layout(found)
    banks = layout["hbm.ranks"] * layout["hbm.bank_groups"] * layout["hbm.banks_per_group"]
    burst = layout["hbm.bus_bits"] // 8 * layout["hbm.burst_length"]
    for name, derived in (("dram_banks_per_ch", banks), ("dram_req_size", burst)):
        if name in found and found[name].value != derived:
            raise ValueError(
                f"{found[name].file}: {name} = {found[name].value} contradicts"
                f" {found['rows'].file}, which gives {derived}"
            )
