"""A case: one batch of one model on one system, ready to be simulated or scheduled."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neupims.files import SUFFIXES
from neupims.machine.config import load_hardware, read_model
from neupims.machine.hardware import Hardware
from neupims.machine.systems import FIDELITIES, SPELLINGS, SYSTEMS, Fidelity, Setting, System
from neupims.machine.traces import Packing, Requests, place_requests, read_requests
from neupims.machine.workload import Batch, Decoder, Parallel, check_batch, check_parallel


class Case(NamedTuple):
    """One batch of one model on one system: all that a simulation needs."""

    hardware: Hardware  # one device and its link
    model: Decoder  # its dimensions
    batch: Batch  # requests with their channels and sub-batches, (r,)
    parallel: Parallel  # how the model is spread over devices
    system: System = "neupims"  # one of SYSTEMS
    sub_batches: int = 2  # 1, or 2 interleaved ones ("neupims" only)
    fidelity: Fidelity = "simulator"  # or "intended"
    model_name: str = ""  # name or file, as results show it
    prefill: bool = False  # whether to run the prompts of the batch instead of one decode step
    model_notes: tuple[str, ...] = ()  # what the file of the model leaves open (`read_model`)
    trace_notes: tuple[str, ...] = ()  # what was assumed about the requests (`read_requests`)


def make_case(
    model: str | Path,
    trace: str | Path | Batch | Requests,
    *,
    packing: Packing | None = None,
    system: str = "neupims",
    hardware: str | Path = "neupims",
    sub_batches: int | None = None,
    row_buffers: int | None = None,
    changes: Mapping[str, Any] | None = None,
    tp: int | None = None,
    pp: int | None = None,
    kv_split: int | None = None,
    ep: int | None = None,
    lm_head: bool = False,
    fidelity: Fidelity = "simulator",
) -> Case:
    """Returns the case that names and files describe, checked as the command-line tool checks it.

    Args:
        model: A named model, or a TOML or JSON file.
        trace: A file or a distribution, as for `read_requests`; or requests, or a batch.
        packing: One of `neupims.scheduling.packing`, or another function that deals the requests to
            the channels of the machine (default: their channels are those of the trace).
        system: "neupims", "npu-pim", "npu-only", "gpu", or a spelling of the validation files.
        hardware: A named machine, or a file (`load_hardware`).
        sub_batches: 1 or 2 (default: 2 for "neupims", else 1).
        row_buffers: Row buffers of a bank, 1 or 2 (default: those of the system).
        changes: Fields of the hardware by dotted name, such as {"hbm.num_channels": 16} or
            {"hbm.trp_cycles": "14 ns"}, as for `set_fields`.
        tp: Devices that share a layer (default: as published for the model, else 1).
        pp: Groups into which the layers are cut (default: as published, else 1).
        kv_split: Channels that share the keys and values of a request (default: 1).
        ep: Groups of the tp devices to which experts are dealt (default: 1).
        lm_head: Whether each step computes the LM head too (default: as the model's file says).
        fidelity: "simulator" or "intended".

    Raises:
        ValueError: A name is unknown, a value is impossible, or values contradict each other.
        OSError: A file cannot be read.
    """
    if fidelity not in FIDELITIES:
        raise ValueError(f"fidelity must be one of {', '.join(FIDELITIES)}, not {fidelity!r}")
    name, count, machine = select_system(
        system,
        hardware=hardware,
        sub_batches=sub_batches,
        row_buffers=row_buffers,
        changes=changes,
    )
    model_name, decoder, parallel = select_model(model, tp=tp, pp=pp, kv_split=kv_split, ep=ep)
    if lm_head:
        decoder = dataclasses.replace(decoder, lm_head=1)
    batch, trace_notes = _make_batch(trace, packing, machine, decoder, parallel)
    return Case(
        machine,
        decoder,
        batch,
        parallel,
        name,
        count,
        fidelity,
        model_name,
        model_notes=read_model(model_name).notes,
        trace_notes=trace_notes,
    )


def _make_batch(
    trace: str | Path | Batch | Requests,
    packing: Packing | None,
    hardware: Hardware,
    model: Decoder,
    parallel: Parallel,
) -> tuple[Batch, tuple[str, ...]]:
    """The batch on the channels of its trace or of a packing, and what was assumed."""
    channels = int(hardware.hbm.num_channels)
    if isinstance(trace, str | Path):
        trace = read_requests(trace)
    notes = trace.notes if isinstance(trace, Requests) else ()
    if packing is not None:
        name = getattr(packing, "__name__", str(packing)).replace("_", " ")
        batch = packing(hardware, model, trace.seq_lens, parallel)
        notes = (*notes, f"the requests are dealt to {channels} channels: {name}")
    else:
        batch = place_requests(trace, channels) if isinstance(trace, Requests) else trace
    check_batch(batch, channels)
    return batch, notes


def select_system(
    system: str = "neupims",
    *,
    hardware: str | Path = "neupims",
    sub_batches: int | None = None,
    row_buffers: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[System, int, Hardware]:
    """Returns the system, its number of sub-batches, and its hardware.

    Args:
        system: As for `make_case`, like the other arguments.
        hardware: A named machine, or a file (`load_hardware`).
        sub_batches: 1 or 2 (default: those of the system).
        row_buffers: Row buffers of a bank, 1 or 2 (default: those of the system).
        changes: Fields of the hardware by dotted name.

    Raises:
        ValueError: The system is unknown, a value is impossible, or values contradict each other.
        OSError: A file cannot be read.
    """
    setting = find_setting(system, sub_batches)
    fields = {"pim.row_buffers": 1} if setting.row_buffers == 1 else {}
    if row_buffers is not None:
        fields["pim.row_buffers"] = row_buffers
    machine = load_hardware(hardware, fields | dict(changes or {}))
    return setting.system, setting.sub_batches, machine


def find_setting(system: str, sub_batches: int | None = None) -> Setting:
    """Returns what the name of a system stands for.

    Args:
        system: As for `make_case`, like the other argument.
        sub_batches: 1 or 2 (default: those of the system).

    Raises:
        ValueError: The system is unknown, or its number of sub-batches is another one.
    """
    if sub_batches not in (None, 1, 2):
        raise ValueError(f"sub-batches must be 1 or 2, not {sub_batches!r}")
    name = str(system).lower()
    for known in SYSTEMS:
        if name == known:
            count = sub_batches or (2 if name == "neupims" else 1)
            if name != "neupims" and count == 2:
                raise ValueError(f"sub-batches 2 needs the system neupims, not {name}")
            return Setting(known, count, 1 if name == "npu-pim" else 2)
    if name not in SPELLINGS:
        listed = ", ".join(dict.fromkeys((*SYSTEMS, *SPELLINGS)))
        raise ValueError(f"the system must be one of {listed}, not {system!r}")
    setting = SPELLINGS[name]
    if sub_batches not in (None, setting.sub_batches):
        raise ValueError(
            f"the system {system} means sub-batches {setting.sub_batches}, not {sub_batches}"
        )
    return setting


def select_model(
    model: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    kv_split: int | None = None,
    ep: int | None = None,
) -> tuple[str, Decoder, Parallel]:
    """Returns the name of a model, its dimensions, and how it is spread over devices.

    Args:
        model: A named model, or a TOML or JSON file.
        tp: Devices that share a layer (default: as published for the model, else 1).
        pp: Groups into which the layers are cut (default: as published, else 1).
        kv_split: Channels that share the keys and values of a request (default: 1).
        ep: Groups of the tp devices to which experts are dealt (default: 1).

    Raises:
        ValueError: The model is unknown or malformed, or does not divide over the devices.
        OSError: The file cannot be read.
    """
    name = os.fspath(model)
    if not os.path.exists(name) and not name.lower().endswith(SUFFIXES):
        name = name.lower()
    file = read_model(name)
    decoder, published = file.model, file.parallel
    spread = Parallel(
        published.tp if tp is None else tp,
        published.pp if pp is None else pp,
        1 if kv_split is None else kv_split,
        1 if ep is None else ep,
    )
    check_parallel(decoder, spread)
    return name, decoder, spread
