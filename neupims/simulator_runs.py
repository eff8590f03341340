"""Measured runs of the public simulator: from its columns and files to our records.

A folder holds `runs.csv` (one run a row: knobs, then measurements), `ops.csv` (the operations of
the runs) and `traces/`. A prediction reads only the knob columns, up to `sub_batch_mode`, and the
trace.
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from neupims.machine.case import Case
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace_all
from neupims.machine.simulator_files import CORE_FIELDS, MEMORY_FIELDS, WITHOUT_EFFECT
from neupims.machine.systems import SPELLINGS
from neupims.machine.traces import read_trace
from neupims.machine.workload import Decoder, Parallel, check_parallel
from neupims.timing.iteration import TRACED_CHANNELS
from neupims.timing.stages import STAGES

# Columns of runs.csv and the field of the simulator's files that each gives.
COLUMNS = {
    "dram_channels": "dram_channels",
    "dram_freq_mhz": "dram_freq",
    "num_cores": "num_cores",
    "core_width": "core_width",
    "core_height": "core_height",
    "vector_core_count": "vector_core_count",
    "vector_core_width": "vector_core_width",
    "sram_kb": "sram_size",
    "core_freq_mhz": "core_freq",
    "icnt_freq_mhz": "icnt_freq",
}
# Fields of the DRAM file from which the ranks of a channel follow.
BANKS = {"bankgroups": "hbm.bank_groups", "banks_per_group": "hbm.banks_per_group"}
CHANNEL_MIB = 1024  # channel_size of the simulator's DRAM file
KNOBS_END = "sub_batch_mode"
PADDED = (64, 512, 2048, 8192)  # requests; few shapes, few compilations


class NotCovered(Exception):
    """Raised for a run that cannot be modelled; the sentence says why."""


def read_runs(folder: str | Path) -> tuple[list[dict[str, str]], dict[str, list[dict[str, str]]]]:
    """Returns the rows of `runs.csv`, and those of `ops.csv` by run.

    Args:
        folder: The folder of both files.

    Raises:
        OSError: A file is missing.
        ValueError: A file is malformed or lacks a column; the sentence names it.
    """
    tables = []
    for name, needed in (
        (
            "runs.csv",
            ("run_id", "system", "trace", "n_head", "n_embd", "n_tp", KNOBS_END, "layer_cycles"),
        ),
        ("ops.csv", ("run_id", "stage", "op", "cycles")),
    ):
        with open(Path(folder) / name, newline="", encoding="utf-8-sig") as file:
            try:
                rows = csv.DictReader(file)
                missing = [column for column in needed if column not in (rows.fieldnames or [])]
                if missing:
                    raise ValueError(f"{Path(folder) / name} has no column {', '.join(missing)}")
                tables.append(list(rows))
            except (UnicodeDecodeError, csv.Error) as error:
                raise ValueError(f"{Path(folder) / name} is not a CSV file: {error}") from None
    runs, listed = tables
    by_run: dict[str, list[dict[str, str]]] = {}
    for row in listed:
        by_run.setdefault(row["run_id"], []).append(row)
    return runs, by_run


def knobs(run: dict[str, str]) -> dict[str, str]:
    """Returns the columns of a run that a prediction may read, by name.

    Args:
        run: A row of `runs.csv`.
    """
    names = list(run)
    return {name: run[name] for name in names[: names.index(KNOBS_END) + 1]}


def case_of(run: dict[str, str], folder: str | Path) -> Case:
    """Returns the case that a run measured: one layer of its model.

    Args:
        run: A row of `runs.csv`; only its knobs are read.
        folder: The folder of the runs, for its traces.

    Raises:
        NotCovered: The run cannot be modelled.
    """
    known = knobs(run)
    if absent := [name for name, value in known.items() if value is None]:
        raise NotCovered(f"its row ends before {absent[0]}")
    if known["system"] not in SPELLINGS:
        raise NotCovered(f"unknown system {known['system']!r}")
    system, sub_batches, row_buffers = SPELLINGS[known["system"]]
    try:
        hardware = _read_hardware(known, row_buffers)
        heads, width, devices = (
            _read_number(name, known[name]) for name in ("n_head", "n_embd", "n_tp")
        )
        model = Decoder(layers=1, width=width, heads=heads, kv_heads=heads, mlp_width=4 * width)
        batch = read_trace(
            Path(folder) / "traces" / known["trace"], num_channels=int(hardware.hbm.num_channels)
        )
        parallel = Parallel(devices, 1)
        check_parallel(model, parallel)
    except (ValueError, OSError) as error:
        raise NotCovered(str(error)) from None
    return Case(hardware, model, batch, parallel, system, sub_batches)


def _read_hardware(known: dict[str, str], row_buffers: int) -> Hardware:
    changes: dict[str, Any] = {"pim.row_buffers": row_buffers}
    for column, field in COLUMNS.items():
        if known.get(column):
            name, unit = (MEMORY_FIELDS | CORE_FIELDS)[field]
            changes[name] = _read_number(column, known[column]) * unit
    channel_mib = CHANNEL_MIB
    for column, table in (("dram_overrides", MEMORY_FIELDS), ("core_overrides", CORE_FIELDS)):
        for field, value in _read_overrides(column, known.get(column) or "{}").items():
            if field in table:
                name, unit = table[field]
                changes[name] = _read_number(field, value) * unit
            elif field in BANKS:
                changes[BANKS[field]] = _read_number(field, value)
            elif field == "channel_size":
                channel_mib = _read_number(field, value)
            elif field not in WITHOUT_EFFECT:
                raise NotCovered(f"{column} changes {field}, which is not modelled")
    hardware = replace_all(Hardware(), changes)
    return replace_all(hardware, {"hbm.ranks": _count_ranks(hardware, channel_mib)})


def _count_ranks(hardware: Hardware, channel_mib: float) -> int:
    """Returns the ranks of a channel, which the simulator derives from its size."""
    hbm = hardware.hbm
    rank_bytes = hbm.bank_groups * hbm.banks_per_group * hbm.rows * hbm.row_bytes
    ranks = channel_mib * 2**20 / rank_bytes
    if ranks < 1 or ranks != int(ranks):
        raise NotCovered(
            f"a channel of {channel_mib:g} MiB must be whole ranks of {rank_bytes / 2**20:g} MiB"
        )
    return int(ranks)


def _read_overrides(column: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise NotCovered(f"{column} must be a JSON object of fields, not {text}")
    return found


def _read_number(name: str, value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise NotCovered(f"{name} must be a number, not {value!r}")
    return int(number) if number == int(number) else number


def pad_case(case: Case) -> Case:
    """Returns the case with its requests padded to one of a few numbers, by requests of length 0.

    Its numbers are floats, which compiled functions take as arguments, so that many cases share a
    compilation.

    Args:
        case: The case.
    """
    longest = next(
        size for size in (*PADDED, len(case.batch.seq_lens)) if size >= len(case.batch.seq_lens)
    )
    batch = jax.tree.map(lambda part: np.pad(part, (0, longest - len(part))), case.batch)
    hardware, model, parallel = (
        jax.tree.map(float, record) for record in (case.hardware, case.model, case.parallel)
    )
    return case._replace(hardware=hardware, model=model, batch=batch, parallel=parallel)


def most_channels(case: Case) -> int:
    """Returns the bound on channels with which a padded case is simulated.

    Args:
        case: The case.
    """
    return max(TRACED_CHANNELS, int(case.hardware.hbm.num_channels))


def read_measured(
    run: dict[str, str], listed: list[dict[str, str]]
) -> dict[tuple[str, str, str], float]:
    """Returns measured core cycles by (level, stage, name).

    Args:
        run: A row of `runs.csv`.
        listed: Its rows of `ops.csv`.

    Raises:
        NotCovered: A measured value is not a number of at least 1.
    """
    found: dict[tuple[str, str, str], Any] = {
        ("op", row["stage"], row["op"]): row["cycles"] for row in listed
    }
    for stage in STAGES:
        if run.get(f"cyc_{stage}"):
            found["stage", stage, stage] = run[f"cyc_{stage}"]
    if run["system"] == "npu-only":
        found["stage", "all", "all"] = run["layer_cycles"]
    found["layer", "", "layer"] = run["layer_cycles"]
    cycles = {
        key: float(_read_number(" ".join(("the cycles of", *filter(None, key))), value))
        for key, value in found.items()
    }
    for key, value in cycles.items():
        if value < 1:
            raise NotCovered(
                f"the cycles of {' '.join(filter(None, key))} must be at least 1, not {value:g}"
            )
    return cycles
