"""The page and the trace of one simulated step: a decode step, or the prefill of a batch."""

from pathlib import Path
from typing import Any

import numpy as np

from neupims.envelope import describe_error
from neupims.machine.case import Case
from neupims.machine.hardware import Hardware, banks, burst_cycles, peak_bytes_per_cycle
from neupims.machine.layer_kinds import LayerKind, attended, find_mix, layer_kinds
from neupims.machine.systems import PIM_SYSTEMS
from neupims.machine.workload import FLOAT16_BYTES, Decoder
from neupims.pages.perfetto import write_perfetto
from neupims.pages.report import write_report
from neupims.pages.step_plots import operation_name
from neupims.simulation import Simulation
from neupims.timing.gemm import SIXTEEN, Bits, products_at_once
from neupims.timing.iteration import see_window
from neupims.timing.layout import heads_of_device
from neupims.timing.npu import Context
from neupims.timing.prefill import prefill_operations
from neupims.timing.stages import Operation, npu_operation, operations, stages


def write_step(step: Simulation, *, page: Path | None = None, trace: Path | None = None) -> None:
    """Writes the page and the Chrome trace of a step.

    Args:
        step: The result of `simulate_case`.
        page: HTML file; None writes no page.
        trace: JSON file for ui.perfetto.dev; None writes no trace.

    Raises:
        OSError: A file cannot be written.
        ImportError: A page is asked for, and Jinja is not installed.
    """
    result, case = step.to_dict(), step.case
    if page:
        phase = "the prefill" if case.prefill else "one decode step"
        write_report(
            page,
            make_sections(step),
            title=f"{result['system']}: {phase} of {result['model']}",
            facts=make_facts(step),
        )
    if trace:
        with_pim = case.system in PIM_SYSTEMS
        loads = np.asarray(step.iteration.channel_cycles).tolist() if with_pim else ()
        write_perfetto(
            trace,
            result,
            clock_hz=float(case.hardware.npu.clock_hz),
            channel_cycles=loads,
            devices=int(case.parallel.tp),
        )


def make_facts(step: Simulation) -> dict[str, Any]:
    """Returns names and values for the head of the page.

    Args:
        step: The result of `simulate_case`.
    """
    result, case = step.to_dict(), step.case
    halves, buffers = result["sub_batches"], result["row_buffers"]
    pim = [
        f"{halves} sub-batch{'es' if halves > 1 else ''}",
        f"{buffers} row buffer{'s' if buffers > 1 else ''}",
    ]
    pim = pim if case.system in PIM_SYSTEMS else []
    listed = {
        "model": (
            f"{result['model']}, tensor parallel over {case.parallel.tp}, pipeline over"
            f" {case.parallel.pp}"
        ),
        "batch": f"{result['batch']} requests of {int(case.batch.seq_lens.max())} tokens at most",
        "machine": ", ".join([result["system"], *pim, f"{result['fidelity']} fidelity"]),
        "iteration": (
            f"{result['iteration_seconds'] * 1e3:.3f} ms, {result['tokens_per_second']:,.0f}"
            " tokens/s"
        ),
        "layer": f"{result['layer_cycles']:,.0f} core cycles",
        "energy": (
            f"{result['energy_joules']:.3g} J of one device,"
            f" {result['energy_joules'] / result['iteration_seconds']:.0f} W on average,"
            f" {result['energy_joules_per_token'] * 1e3:.4g} mJ a token of all devices"
        ),
    }
    return listed | describe_error(result)


def make_sections(step: Simulation) -> list[dict[str, Any]]:
    """Returns the sections of the page, for `write_report`.

    Args:
        step: The result of `simulate_case`.
    """
    result, case = step.to_dict(), step.case
    with_pim = case.system in PIM_SYSTEMS
    shares = [
        ("NPU busy", "npu_utilization"),
        ("PIM busy", "pim_utilization"),
        ("memory bus", "bandwidth_utilization"),
    ]
    explanation = (
        "Stages follow each other; a stage ends when both units have ended. Operations on NPU and"
        " PIM that share a stage run at the same time."
    )
    found: list[dict[str, Any]] = [
        {
            "kind": "gantt",
            "title": "Stages",
            "text": explanation if with_pim else "",
            "ops": result["ops"],
            "stage_cycles": result["stage_cycles"],
        },
        {
            "kind": "bars",
            "title": "Utilisation",
            "text": (
                "Shares of a layer's cycles, as the public simulator defines them: arrays with a"
                " product in their pipeline, channels with PIM commands waiting or running, buses"
                " that move data."
            ),
            "shares": [
                {"name": name, "share": result[key]}
                for name, key in shares
                if with_pim or key != "pim_utilization"
            ],
        },
        {
            "kind": "roofline",
            "title": "Roofline",
            "text": (
                "Operations of a layer on one device under the roofs of its NPU with the memory's"
                " buses, of PIM with the banks' own bandwidth, and of a GPU. Operations of the same"
                " name are added up. A short one may stand above its roof: it ends when the"
                " memory's queues have taken its results, before they are written."
            ),
            "points": roofline_points(step),
            "roofs": roofline_roofs(case.hardware, _narrowest(case.model)),
        },
    ]
    if with_pim:
        loads = np.asarray(step.iteration.channel_cycles)
        halves = [(f"sub-batch {i + 1}", loads[i]) for i in range(2) if loads[i].any()]
        found.append(
            {
                "kind": "channels",
                "title": "Channels",
                "text": (
                    "Attention on each channel. The longest channel of a sub-batch, dashed, is what"
                    " its stage waits for."
                ),
                "loads": [
                    {"name": name, "cycles": load[: int(case.hardware.hbm.num_channels)].tolist()}
                    for name, load in halves
                ],
            }
        )
    if result["system"] != "gpu":
        spent = result["energy_parts_joules"]
        total = sum(spent.values())
        rows = [
            (name.replace("_", " "), joules, 100 * joules / total) for name, joules in spent.items()
        ]
        found.append(
            {
                "kind": "table",
                "title": "Energy of an iteration",
                "columns": ("part", "J", "%"),
                "rows": [*rows, ("together", total, 100.0)],
            }
        )
    return found


def _narrowest(model: Decoder) -> Bits:
    """The fewest bits that a product of the model multiplies."""
    weights = model.weight_bits
    if model.experts:
        weights = min(weights, model.expert_bits)
    return Bits(model.activation_bits, weights)


def roofline_roofs(hardware: Hardware, bits: Bits = SIXTEEN) -> list[dict[str, Any]]:
    """Returns the roofs of NPU, PIM and GPU for `step_plots.roofline`.

    Each is a dictionary of name, flops_per_second and bytes_per_second (peaks of one device).

    Args:
        hardware: The machine.
        bits: The widths of the numbers that NPU and GPU multiply (default: 16).
    """
    npu, hbm = hardware.npu, hardware.hbm
    macs = npu.num_arrays * npu.array_width * npu.array_height
    products_per_cycle = hbm.num_channels * banks(hbm) * hardware.pim.macs_per_bank
    operands = products_per_cycle * hbm.clock_hz / burst_cycles(hbm)  # per second
    return [
        {
            "name": "NPU",
            "flops_per_second": float(2.0 * macs * npu.clock_hz * products_at_once(npu, bits)),
            "bytes_per_second": peak_bytes_per_cycle(hbm) * hbm.clock_hz,
        },
        {
            "name": "PIM",
            "flops_per_second": 2.0 * operands,
            "bytes_per_second": FLOAT16_BYTES * operands,
        },
        {
            "name": "GPU",
            "flops_per_second": float(
                hardware.gpu.flops_per_second * products_at_once(hardware.gpu, bits)
            ),
            "bytes_per_second": float(hardware.gpu.bytes_per_second),
        },
    ]


def roofline_points(step: Simulation) -> list[dict[str, Any]]:
    """Returns the operations of a layer on one device for `step_plots.roofline`.

    Each is a dictionary of name, roof, flops, bytes and seconds. Operations of the same name are
    added up.

    Args:
        step: The result of `simulate_case`.
    """
    case = step.case
    planned = {stage.name: stage for stage in stages(case.system, case.sub_batches)}
    in_layer = ("C", "D") if "C" in planned else tuple(planned)
    clock_hz = float(case.hardware.npu.clock_hz)
    lengths = np.asarray(case.batch.seq_lens)
    sub_batch = np.asarray(case.batch.sub_batches) if "C" in planned else 0 * lengths
    found: dict[str, dict[str, Any]] = {}
    listed = prefill_operations() if case.prefill else operations(case.system, case.sub_batches)
    for each, cycles in zip(listed, step.iteration.op_cycles.tolist(), strict=True):
        if each.stage not in in_layer:
            continue
        stage = planned[each.stage]
        mine = lengths[
            (sub_batch == (stage.pim_sub_batch if each.platform == "PIM" else stage.npu_sub_batch))
            & (lengths > 0)
        ]
        tokens = int(mine.sum()) if case.prefill else len(mine)
        flops = moved = 0.0
        for kind in layer_kinds(case.model, find_mix(case.model)):  # the mean over the layers
            work = (
                _attention(case, kind, mine)
                if each.platform == "PIM"
                else _npu(case, kind, each, tokens)
            )
            flops, moved = flops + kind.share * work[0], moved + kind.share * work[1]
        roof = "GPU" if case.system == "gpu" else {"SA": "NPU", "PIM": "PIM"}[each.platform]
        point = found.setdefault(
            each.name,
            {"name": _label(each.name), "roof": roof, "flops": 0.0, "bytes": 0.0, "seconds": 0.0},
        )
        for key, value in (("flops", flops), ("bytes", moved), ("seconds", cycles / clock_hz)):
            point[key] += value
    return [point for point in found.values() if point["bytes"] > 0 and point["seconds"] > 0]


def _label(name: str) -> str:
    """The short name of an operation, or the full name if a layer has it twice."""
    return name if name.endswith((".ln", ".res")) else operation_name(name)


def _attention(case: Case, kind: LayerKind, lengths: np.ndarray) -> tuple[float, float]:
    """FLOP and bytes of logit or attend, their mean: 2 FLOP for each key (value) element and query
    head of its group.
    """
    model = kind.model
    heads, kv_heads = map(float, heads_of_device(model, case.parallel))
    elements = float(np.sum(attended(model, lengths))) * (model.key_dim + model.attended_dim) / 2
    return 2 * elements * heads, model.kv_bits / 8 * elements * kv_heads


def _npu(case: Case, kind: LayerKind, operation: Operation, tokens: int) -> tuple[float, float]:
    """FLOP and bytes of an operation of the NPU."""
    batch = case.batch if case.prefill else see_window(case.batch, kind)
    records = (case.hardware, kind.model, batch, case.parallel)
    context = Context(*records, system=case.system, fidelity=case.fidelity, mix=kind.mix)
    work = npu_operation(operation, context, 1.0 * tokens)
    wide = context._replace(mix=kind.mix._replace(narrow=False))  # all numbers have 16 bits
    written = float(npu_operation(operation, wide, 1.0 * tokens).write_bytes) / FLOAT16_BYTES
    elements = operation.element_operations * written
    return 2 * float(work.macs) + elements, float(work.read_bytes + work.write_bytes)
