"""The model against measured runs of the public simulator: predictions from the knobs alone, and
their errors by operation, stage and layer.

A folder holds `runs.csv` (one run a row: knobs, then what was measured), `ops.csv` (its operations)
and `traces/`. Only the knob columns, up to `sub_batch_mode`, and the trace are read for a
prediction. Errors are absolute percentages of the measured cycles.
"""

import csv
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.systems import SPELLINGS, Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel, check_parallel, read_trace
from neupims.timing.schedule import MOST_CHANNELS, STAGES, operations, simulate, stages

# Fields of the simulator's memory and core files -> ours, with the factor from its unit to ours.
MEMORY_FIELDS = {
    "tRCDRD": ("hbm.trcd_read_cycles", 1),
    "tRCDWR": ("hbm.trcd_write_cycles", 1),
    "tRP": ("hbm.trp_cycles", 1),
    "tRAS": ("hbm.tras_cycles", 1),
    "tRRD_S": ("hbm.trrd_s_cycles", 1),
    "tRRD_L": ("hbm.trrd_l_cycles", 1),
    "tFAW": ("hbm.tfaw_cycles", 1),
    "tCCD_S": ("hbm.tccd_s_cycles", 1),
    "tCCD_L": ("hbm.tccd_l_cycles", 1),
    "tRTP": ("hbm.trtp_cycles", 1),
    "tRTRS": ("hbm.trtrs_cycles", 1),
    "tWR": ("hbm.twr_cycles", 1),
    "CL": ("hbm.read_latency_cycles", 1),
    "CWL": ("hbm.write_latency_cycles", 1),
    "tREFI": ("hbm.trefi_cycles", 1),
    "tRFC": ("hbm.trfc_cycles", 1),
    "dram_page_size": ("pim.page_bytes", 1),
    "pim_comp_coverage": ("pim.macs_per_bank", 1),
    "dram_freq": ("hbm.clock_hz", 1e6),
    "channels": ("hbm.num_channels", 1),
    "dram_channels": ("hbm.num_channels", 1),
}
CORE_FIELDS = {
    "core_width": ("npu.array_width", 1),
    "core_height": ("npu.array_height", 1),
    "core_freq": ("npu.clock_hz", 1e6),
    "num_cores": ("npu.num_cores", 1),
    "sram_size": ("npu.scratchpad_bytes", 1024),
    "vector_core_count": ("npu.vector_units", 1),
    "vector_core_width": ("npu.vector_lanes", 1),
    "icnt_freq": ("npu.interconnect_hz", 1e6),
}
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
# fmt: off
# In the simulator's files, and without effect on its cycles: not read, overwritten, hard-coded
# beside, only for energy, or of a policy that is off.
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
# Accepted and without effect on the predictions, because none was seen in the runs or it is small.
WITHOUT_MODELLED_EFFECT = {
    "tRAS", "tRRD_S", "tRRD_L", "tRTRS", "tWR", "CWL", "tRCDWR", "num_cores", "vector_core_count",
    "vector_core_width", "icnt_freq",
}
# fmt: on
KNOBS_END = "sub_batch_mode"
PRODUCTS = ("QKVgen", "proj", "fc1", "fc2")
LONG_CYCLES = 20_000
PADDED = (64, 512, 2048, 8192)  # requests; few shapes, few compilations


class Case(NamedTuple):
    """One run's records."""

    hardware: Hardware
    model: Decoder
    batch: Batch
    parallel: Parallel
    system: System
    sub_batches: int


class NotCovered(Exception):
    """A run that cannot be modelled, and why."""


def read_runs(folder: str | Path) -> tuple[list[dict[str, str]], dict[str, list[dict[str, str]]]]:
    """The rows of `runs.csv`, and those of `ops.csv` by run.

    Raises:
        OSError: a file is missing.
        ValueError: a column is missing.
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
    """The columns of a run that a prediction may read."""
    names = list(run)
    return {name: run[name] for name in names[: names.index(KNOBS_END) + 1]}


def case_of(run: dict[str, str], folder: str | Path) -> Case:
    """The records that a run's knobs stand for.

    Raises:
        NotCovered: the run cannot be modelled.
    """
    known = knobs(run)
    if absent := [name for name, value in known.items() if value is None]:
        raise NotCovered(f"its row ends before {absent[0]}")
    if known["system"] not in SPELLINGS:
        raise NotCovered(f"unknown system {known['system']!r}")
    system, sub_batches, row_buffers = SPELLINGS[known["system"]]
    try:
        hardware = _hardware(known, row_buffers)
        heads, width, devices = (
            _number(name, known[name]) for name in ("n_head", "n_embd", "n_tp")
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


def _hardware(known: dict[str, str], row_buffers: int) -> Hardware:
    hardware = replace(Hardware(), "pim.row_buffers", row_buffers)
    for column, field in COLUMNS.items():
        if known.get(column):
            name, unit = (MEMORY_FIELDS | CORE_FIELDS)[field]
            hardware = replace(hardware, name, _number(column, known[column]) * unit)
    for column, fields in (("dram_overrides", MEMORY_FIELDS), ("core_overrides", CORE_FIELDS)):
        for field, value in _overrides(column, known.get(column) or "{}").items():
            if field in fields:
                name, unit = fields[field]
                hardware = replace(hardware, name, _number(field, value) * unit)
            elif field not in WITHOUT_EFFECT:
                raise NotCovered(f"{column} changes {field}, which is not modelled")
    return hardware


def _overrides(column: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise NotCovered(f"{column} must be a JSON object of fields, not {text}")
    return found


def _number(name: str, value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise NotCovered(f"{name} must be a number, not {value!r}")
    return int(number) if number == int(number) else number


def padded(case: Case) -> Case:
    """The same with one of few numbers of requests, and with numbers that are arguments of compiled
    functions and not constants in them.
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
    """The bound on the channels with which a padded case is simulated; few shapes, few
    compilations.
    """
    return max(MOST_CHANNELS, int(case.hardware.hbm.num_channels))


def predict(
    case: Case, *, fidelity: Fidelity = "simulator", path: str = "exact", **options
) -> dict[tuple[str, str, str], float]:
    """Predicted core cycles by (level, stage, name): each operation, each stage, and the layer.
    `options` are those of `simulate`.
    """
    known = padded(case)
    options |= {
        "system": case.system,
        "sub_batches": case.sub_batches,
        "fidelity": fidelity,
        "path": path,
        "most_channels": most_channels(case),
    }
    result = simulate(known.hardware, known.model, known.batch, known.parallel, **options)
    op_cycles, stage_cycles = jax.device_get((result.op_cycles, result.stage_cycles))
    predicted = {}
    for operation, cycles in zip(
        operations(case.system, case.sub_batches), op_cycles.tolist(), strict=True
    ):
        predicted["op", operation.stage, operation.name] = cycles
    names = [stage.name for stage in stages(case.system, case.sub_batches)]
    by_stage = dict(zip(STAGES, stage_cycles.tolist(), strict=True))
    for name in names:
        predicted["stage", name, name] = by_stage["A" if name == "all" else name]
    predicted["layer", "", "layer"] = float(result.layer_cycles)
    return predicted


def measured(
    run: dict[str, str], listed: list[dict[str, str]]
) -> dict[tuple[str, str, str], float]:
    """Measured core cycles by (level, stage, name).

    Raises:
        NotCovered: one is not a number of at least 1.
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
        key: float(_number(" ".join(("the cycles of", *filter(None, key))), value))
        for key, value in found.items()
    }
    for key, value in cycles.items():
        if value < 1:
            raise NotCovered(
                f"the cycles of {' '.join(filter(None, key))} must be at least 1, not {value:g}"
            )
    return cycles


def validate(
    folder: str | Path, *, fidelity: Fidelity = "simulator", path: str = "exact", progress=iter
) -> dict[str, Any]:
    """Predicts every run of the folder and compares.

    Returns `{"groups", "rows", "not_covered"}` as `--json` prints them: errors by level, system and
    kind; every pair; and the runs left out, with reasons.
    """
    runs, listed = read_runs(folder)
    rows, not_covered = [], []
    for run in progress(runs):
        if run.get("status", "ok") not in ("", "ok"):
            not_covered.append(
                {
                    "run_id": run["run_id"],
                    "reason": f"the simulator did not end it: {run['status']}",
                }
            )
            continue
        try:
            pairs = _compared(
                run, listed.get(run["run_id"], []), folder, fidelity=fidelity, path=path
            )
        except NotCovered as reason:
            not_covered.append({"run_id": run["run_id"], "reason": str(reason)})
            continue
        for (level, stage, name), (value, predicted) in pairs.items():
            rows.append(
                {
                    "run_id": run["run_id"],
                    "system": run["system"],
                    "level": level,
                    "stage": stage,
                    "name": name,
                    "measured": value,
                    "predicted": predicted,
                }
            )
    return {"groups": group_errors(rows), "rows": rows, "not_covered": not_covered}


def _compared(run, listed, folder, **options) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Measured and predicted cycles of one run by (level, stage, name)."""
    predicted, pairs = predict(case_of(run, folder), **options), {}
    if not all(map(math.isfinite, predicted.values())):
        raise NotCovered(
            "this hardware cannot run it: the predicted time is not finite (PIM tiles must fit"
            " between refreshes)"
        )
    for key, value in measured(run, listed).items():
        if key not in predicted:
            raise NotCovered(
                f"it measured {' '.join(filter(None, key))}, which {run['system']} does not have"
            )
        pairs[key] = (value, predicted[key])
    return pairs


def kind_of(name: str) -> str:
    """PIM, GEMM, attention of the NPU, or vector work."""
    if "NeuPIMS" in name:
        return "pim"
    if "FusedMHA" in name:
        return "attention"
    return "gemm" if name.endswith(PRODUCTS) else "vector"


def group_errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count, mean, median, 95th percentile and maximum of the absolute percentage error, by system
    ("all" too) and level; operations by kind and by name.
    """
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        error = 100 * abs(row["predicted"] / row["measured"] - 1)
        for system in (row["system"], "all"):
            if row["level"] == "op":
                kind = kind_of(row["name"])
                keys = [(kind, "all"), (kind, row["name"])]
                if kind == "gemm" and row["measured"] > LONG_CYCLES:
                    keys.append((f"gemm > {LONG_CYCLES} cycles", "all"))
            elif row["level"] == "stage":
                keys = [("stage", "all"), ("stage", row["stage"])]
            else:
                keys = [("layer", "layer")]
            for kind, name in keys:
                groups.setdefault((row["level"], system, kind, name), []).append(error)
    return [
        {
            "level": level,
            "system": system,
            "kind": kind,
            "name": name,
            "n": len(errors),
            "mean": float(np.mean(errors)),
            "median": float(np.median(errors)),
            "p95": float(np.percentile(errors, 95)),
            "max": float(np.max(errors)),
        }
        for (level, system, kind, name), errors in sorted(groups.items())
    ]


def expected_error(
    system: str, sub_batches: int, fidelity: str, *, row_buffers: int = 2, path: str = "exact"
) -> dict[str, Any] | None:
    """Error of the layer, stages and operations in the committed validation of this system by this
    path; None where nothing was measured.

    The paper's machine ("intended") and the GPU have not been measured by anybody's simulator.
    """
    row_buffers = (
        row_buffers if system == "neupims" else {"npu-pim": 1}.get(system, 2)
    )  # of others it changes no cycle
    spelling = next(
        (
            name
            for name, setting in SPELLINGS.items()
            if setting == (system, sub_batches, row_buffers)
        ),
        "",
    )
    table = json.loads(
        resources.files("neupims").joinpath("expected_error.json").read_text(encoding="utf-8")
    )
    if fidelity != "simulator" or spelling not in table[path]:
        return None
    return table[path][spelling] | {"path": path, "of": table["of"]}
