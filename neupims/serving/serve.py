"""Serves a trace: reads the machine and the requests, runs the rules, and gathers the results."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neupims.machine.case import find_setting, select_model, select_system
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import find_mix
from neupims.machine.supported import check_latent
from neupims.machine.systems import FIDELITIES, PIM_SYSTEMS, Fidelity
from neupims.serving import clock
from neupims.serving.clock import Instant
from neupims.serving.cost import INTERLEAVINGS, Interleaving, Setting, Tables, make_tables
from neupims.serving.loop import (
    NOBODY,
    Memory,
    Requests,
    Rules,
    Spent,
    State,
    Step,
    is_done,
    run_chunk,
    start,
)
from neupims.serving.objectives import Limit, parse_limits
from neupims.serving.policy import ORDERS, PLACEMENTS, Order, Placement
from neupims.serving.prefill_devices import Prefilled, prefill_apart
from neupims.serving.requests import Arrivals, read_arrivals
from neupims.serving.results import Iterations, Served, Serving
from neupims.timing.capacity import (
    channel_tiles,
    device_weight_bytes,
    free_bytes,
    request_bytes,
    request_tiles,
)
from neupims.timing.gemm import check_scratchpad
from neupims.timing.memory_check import format_bytes
from neupims.timing.split import check_split, piece_lengths

CHUNK = 2048  # iterations between two reports of progress
WINDOW = 64  # requests of the waiting room that a policy may choose from
BLOCK_TOKENS = 16  # of a block of keys and values without PIM
ROUND = 1024  # tables have whole multiples of this many lengths, so that few programs are compiled
PREFILLS = ("whole", "separate")
Prefill = Literal["whole", "separate"]
# (requests that have left, all requests, seconds that were simulated, iterations)
Progress = Callable[[int, int, float, int], None]


class Server(NamedTuple):
    """A machine that serves: what `run_requests` needs beside the requests."""

    hardware: Hardware
    setting: Setting
    rules: Rules
    placement: Placement
    spare: float  # share of a channel's blocks that are free after an admission


def serve(
    model: str | Path,
    trace: str | Path | Arrivals,
    *,
    rate: float | None = None,
    arrivals: str | None = None,
    first: int | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    system: str = "neupims",
    hardware: str | Path = "neupims",
    row_buffers: int | None = None,
    changes: Mapping[str, Any] | None = None,
    tp: int | None = None,
    pp: int | None = None,
    kv_split: int | None = None,
    lm_head: bool = False,
    fidelity: Fidelity = "simulator",
    interleaving: Interleaving = "on",
    batch: int = 256,
    order: str | Order = "fcfs",
    placement: str | Placement = "greedy",
    prefill: Prefill = "whole",
    prefill_tokens: int = 8192,
    prefill_groups: int = 1,
    spare: float = 0.01,
    slo: str | tuple[Limit, ...] = (),
    leave_out_too_long: bool = False,
    progress: Progress | None = None,
) -> Serving:
    """Returns a trace that was served by continuous batching (`serving.loop` has the rules).

    Args:
        model: A named model, or a file.
        trace: A file or a distribution, as for `read_arrivals`; or requests.
        rate: Requests a second, as for `read_arrivals`, like the next four.
        arrivals: The process of arrivals.
        first: The number of requests from the beginning of the trace.
        columns: Column name by role.
        seed: Seed of all random numbers.
        system: "neupims", "npu-pim", "npu-only" or "gpu".
        hardware: A named machine, or a file.
        row_buffers: Row buffers of a bank (default: those of the system).
        changes: Fields of the hardware by dotted name.
        tp: Devices that share a layer (default: as published for the model, else 1).
        pp: Groups into which the layers are cut; must be 1 (default: as published, else 1).
        kv_split: Channels that share the keys and values of a request (default: 1).
        lm_head: Whether each step computes the LM head too.
        fidelity: "simulator" or "intended"; a prefill is always as intended.
        interleaving: Of "neupims": two sub-batches "on", "off", or in each iteration the "chosen"
            one that takes less time.
        batch: The most requests at once.
        order: Who is admitted next: a name of `policy.ORDERS`, or a function.
        placement: To which channel: a name of `policy.PLACEMENTS`, or functions.
        prefill: "whole": admitted prompts are computed in an iteration of their own, which decoding
            waits for; "separate": by other devices of the same kind.
        prefill_tokens: The most tokens of one prefill, if it has more than one prompt.
        prefill_groups: Groups of devices for prompts, with `prefill="separate"`.
        spare: The share of a channel's blocks that are free after an admission.
        slo: Objectives, such as "ttft<2s,tpot<100ms".
        leave_out_too_long: Whether requests that no channel holds are left out, with a note.
        progress: Called now and then.

    Raises:
        ValueError: A name is unknown, a value is impossible, the trace is empty or not in order, a
            request is longer than the memory, or the machine cannot run the model.
        OSError: A file cannot be read.

    Example:
        >>> import neupims
        >>> done = neupims.serve("llama3-8b", "alpaca:20", rate=50, tp=1)
        >>> done.measures["ttft"].shape
        (20,)
    """
    began = time.perf_counter()
    limits = parse_limits(slo) if isinstance(slo, str) else slo
    requests = (
        trace
        if isinstance(trace, Arrivals)
        else read_arrivals(
            trace, rate=rate, process=arrivals, columns=columns, first=first, seed=seed
        )
    )
    model_name, server = make_server(
        model,
        system=system,
        hardware=hardware,
        row_buffers=row_buffers,
        changes=changes,
        tp=tp,
        pp=pp,
        kv_split=kv_split,
        lm_head=lm_head,
        fidelity=fidelity,
        interleaving=interleaving,
        batch=batch,
        placement=placement,
        prefill=prefill,
        prefill_tokens=prefill_tokens,
        spare=spare,
    )
    if prefill_groups < 1 or (prefill_groups > 1 and prefill != "separate"):
        raise ValueError(
            "prefill_groups must be at least 1, and needs prefill separate: --prefill separate"
        )
    requests, notes = check_lengths(server, requests, prefill, leave_out_too_long)
    order_name = _name_of(order, ORDERS, "order")
    chosen = ORDERS[order] if isinstance(order, str) else order
    setting = server.setting
    apart = None
    if prefill == "separate":
        apart = prefill_apart(setting, server.hardware, requests, groups=prefill_groups)
    served, iterations, watts, room = run_requests(server, requests, chosen, apart, progress)
    neupims_only = setting.interleaving if setting.system == "neupims" else None
    about = {
        "system": setting.system,
        "model": model_name,
        "fidelity": fidelity,
        "interleaving": neupims_only,
        "batch": batch,
        "order": order_name,
        "placement": _name_of(placement, PLACEMENTS, "placement"),
        "prefill": prefill,
        "tp": int(setting.parallel.tp),
        "kv_split": int(setting.parallel.kv_split),
        "wall_seconds": time.perf_counter() - began,
    }
    with_pim = setting.system in PIM_SYSTEMS
    return Serving(
        requests,
        served,
        iterations,
        about,
        limits,
        int(setting.parallel.tp),
        room,
        "a row of all banks of a channel" if with_pim else f"{BLOCK_TOKENS} tokens",
        watts,
        0.0 if apart is None else apart.joules * setting.parallel.tp,
        notes,
    )


def make_server(
    model: str | Path,
    *,
    system: str,
    hardware: str | Path,
    row_buffers: int | None,
    changes: Mapping[str, Any] | None,
    tp: int | None,
    pp: int | None,
    kv_split: int | None,
    lm_head: bool,
    fidelity: Fidelity,
    interleaving: Interleaving,
    batch: int,
    placement: str | Placement,
    prefill: Prefill,
    prefill_tokens: int,
    spare: float,
) -> tuple[str, Server]:
    """Returns the name of a model, and the machine that serves it, checked.

    Args:
        model: As for `serve`, like the other arguments.
        system: The system.
        hardware: The machine.
        row_buffers: Row buffers of a bank.
        changes: Fields of the hardware.
        tp: Devices that share a layer.
        pp: Groups into which the layers are cut.
        kv_split: Channels that share a request.
        lm_head: Whether each step computes the LM head.
        fidelity: The fidelity.
        interleaving: Whether there are two sub-batches.
        batch: The most requests at once.
        placement: How a channel is chosen.
        prefill: Where prompts are computed.
        prefill_tokens: The most tokens of one prefill.
        spare: The share of a channel's blocks that stay free.

    Raises:
        ValueError: A name is unknown, or a value is impossible.
        OSError: A file cannot be read.
    """
    for name, value, known in (
        ("fidelity", fidelity, FIDELITIES),
        ("interleaving", interleaving, INTERLEAVINGS),
        ("prefill", prefill, PREFILLS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    if batch < 1 or prefill_tokens < 1:
        raise ValueError(
            "the batch and the tokens of a prefill must be at least 1, not"
            f" {batch} and {prefill_tokens}"
        )
    if not 0 <= spare < 1:
        raise ValueError(f"the spare share of the memory must be from 0 to below 1, not {spare:g}")
    _name_of(placement, PLACEMENTS, "placement")
    chosen = PLACEMENTS[placement] if isinstance(placement, str) else placement
    named = find_setting(system)
    if named.system == "neupims" and str(system).lower() != "neupims":
        interleaving = "on" if named.sub_batches == 2 else "off"
    kind, _, machine = select_system(
        system, hardware=hardware, row_buffers=row_buffers, changes=changes
    )
    name, decoder, parallel = select_model(model, tp=tp, pp=pp, kv_split=kv_split)
    if parallel.pp != 1:
        raise ValueError(
            f"a pipeline of {parallel.pp} groups of layers is not served yet: give --pp 1 and"
            f" --tp {parallel.tp * parallel.pp}, the same devices"
        )
    if lm_head:
        decoder = replace(decoder, lm_head=1)
    check_latent(find_mix(decoder), system=kind, fidelity=fidelity)
    channels = int(machine.hbm.num_channels)
    check_split(parallel.kv_split, system=kind, fidelity=fidelity, channels=channels)
    if kind != "gpu":
        check_scratchpad(machine)
    rows, places = 1, batch
    if kind in PIM_SYSTEMS:
        rows = channels // parallel.kv_split
        places = min(batch, 2 * math.ceil(batch / rows))
    setting = Setting(decoder, parallel, kind, fidelity, interleaving)
    rules = Rules(rows, places, batch, prefill_tokens, WINDOW, chosen.packing, setting)
    return name, Server(machine, setting, rules, chosen, spare)


def _name_of(value: Any, known: Mapping[str, Any], what: str) -> str:
    if not isinstance(value, str):
        return getattr(value, "__name__", "own")
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, not {value!r}")
    return value


def make_memory(server: Server, hardware: Hardware, length: int, tokens: int) -> Memory:
    """Returns the blocks of a machine. Numbers of the hardware may be traced.

    With PIM a block is a row of all banks of a channel; else it is that of `BLOCK_TOKENS` tokens.

    Args:
        server: The rules, the model and the placement.
        hardware: The machine.
        length: The most tokens of a request.
        tokens: The most tokens that are computed together, for their activations.
    """
    setting, rules = server.setting, server.rules
    model, parallel, system = setting.model, setting.parallel, setting.system
    lengths = jnp.arange(length + 1)
    if system in PIM_SYSTEMS:
        tiles = request_tiles(hardware, model, lengths, parallel, fidelity=setting.fidelity)
        needed = jnp.ceil(tiles - 1e-3)  # layers times a mean over layers is whole but for rounding
        room = channel_tiles(hardware, model, parallel, tokens)
        there = jnp.arange(rules.rows) < hardware.hbm.num_channels / parallel.kv_split
        pieces = piece_lengths(lengths, parallel)
        loads = server.placement.load(hardware, model, pieces, parallel)
    else:
        whole = -(-lengths // BLOCK_TOKENS) * BLOCK_TOKENS
        options: dict[str, Any] = {"system": system, "fidelity": setting.fidelity}
        each = request_bytes(hardware, model, jnp.array([BLOCK_TOKENS]), parallel, **options)[0]
        needed = jnp.ceil(request_bytes(hardware, model, whole, parallel, **options) / each - 1e-3)
        free, _ = free_bytes(hardware, model, parallel, system, tokens)
        room, there = jnp.floor(free / each), jnp.ones(1, bool)
        loads = 1.0 * lengths
    room = jnp.where(there, jnp.maximum(room, 0), 0).astype(jnp.int32)
    spare = jnp.floor(room.max() * server.spare).astype(jnp.int32)
    return Memory(jnp.where(lengths > 0, needed, 0).astype(jnp.int32), room, spare, loads)


def check_lengths(
    server: Server, requests: Arrivals, prefill: Prefill, leave_out: bool
) -> tuple[Arrivals, tuple[str, ...]]:
    """Returns the requests that the memory holds, each alone, and a note on the others.

    Args:
        server: The machine.
        requests: The requests.
        prefill: Where prompts are computed.
        leave_out: Whether those that are too long are left out.

    Raises:
        ValueError: A request is longer than the memory, and none are to be left out; or no request
            fits, or the weights do not.
    """
    setting = server.setting
    most = requests.inputs + requests.outputs - 1
    tokens = together(server, requests, prefill)
    memory = make_memory(server, server.hardware, int(most.max()), tokens)
    limit = int(memory.room.max() - memory.spare)
    needed = np.asarray(memory.needed)[most]
    fits = needed <= limit
    if fits.all():
        return requests, ()
    worst = int(needed.argmax())
    if limit <= 0:
        weights = format_bytes(float(device_weight_bytes(setting.model, setting.parallel)))
        raise ValueError(
            f"the weights take {weights} of each device and the activations of {tokens} tokens"
            " the rest: no memory is left for requests; take more devices (--tp)"
        )
    holds = np.flatnonzero(np.asarray(memory.needed) <= limit)[-1]
    where = "a channel" if setting.system in PIM_SYSTEMS else "the memory"
    if not leave_out or not fits.any():
        raise ValueError(
            f"request {worst} of {requests.name} grows to {most[worst]} tokens, but {where} holds"
            f" at most {holds} of one request, beside weights and activations, and"
            f" {int((~fits).sum())} of {len(fits)} requests are longer: take more devices (--tp),"
            " spread requests over channels (--kv-split, --fidelity intended), or"
            " --leave-out-too-long"
        )
    kept = Arrivals(
        requests.name,
        requests.nanoseconds[fits],
        requests.inputs[fits],
        requests.outputs[fits],
        requests.notes,
    )
    left_out = int((~fits).sum())
    note = f"{left_out} of {len(fits)} requests are left out: they grow beyond {holds} tokens"
    return kept, (note,)


def together(server: Server, requests: Arrivals, prefill: Prefill) -> int:
    """Returns the most tokens that are computed together.

    Args:
        server: The machine.
        requests: The requests.
        prefill: Where prompts are computed.
    """
    if prefill == "separate":
        return server.rules.batch
    return max(server.rules.batch, server.rules.prefill_tokens, int(requests.inputs.max()))


def make_requests(
    requests: Arrivals, order: Order, window: int, apart: Prefilled | None
) -> tuple[Requests, np.ndarray]:
    """Returns the requests as the loop takes them, and the number of each in the trace.

    Those that come from other devices with their first token come in the order in which they are
    ready; those of one token do not come at all.

    Args:
        requests: The requests.
        order: The order of admission.
        window: The places of the waiting room.
        apart: What other devices did with the prompts, if they did.

    Raises:
        ValueError: The order does not give each request a key.
    """
    keys = np.asarray(order(requests), np.int64)
    if keys.shape != requests.inputs.shape or keys.min() < 0 or keys.max() >= NOBODY:
        raise ValueError("an order gives each request a key from 0 to 2^30 - 1")
    come, lengths = requests.nanoseconds, requests.inputs
    prompts, outputs = requests.inputs, requests.outputs
    numbers = np.arange(len(come))
    if apart is not None:
        come, lengths, prompts, outputs = apart.arrived, lengths + 1, 0 * prompts, outputs - 1
        numbers = np.argsort(come, kind="stable")
        numbers = numbers[outputs[numbers] > 0]
        keys = np.arange(len(come))[np.argsort(np.argsort(come, kind="stable"))]

    def pad(values, last):
        return jnp.asarray(np.append(values[numbers], [last] * window), jnp.int32)

    high, low = clock.split(come)
    return Requests(
        Instant(pad(high, 2**31 - 1), pad(low, 0)),
        pad(lengths, 1),
        pad(prompts, 0),
        pad(outputs, 1),
        pad(keys, NOBODY - 1),
    ), numbers


def run_requests(
    server: Server,
    requests: Arrivals,
    order: Order,
    apart: Prefilled | None,
    progress: Progress | None,
) -> tuple[Served, Iterations, float, int]:
    """Returns times of requests, iterations, the watts of a device that waits, and all blocks.

    Args:
        server: The machine.
        requests: The requests; each fits the memory alone.
        order: The order of admission.
        apart: What other devices did with the prompts, if they did.
        progress: Called after each chunk of iterations.

    Raises:
        ValueError: The machine cannot run the model.
    """
    rules, setting = server.rules, server.setting
    most = int((requests.inputs + requests.outputs).max())
    length = -(-most // ROUND) * ROUND
    prefill: Prefill = "whole" if apart is None else "separate"
    memory = make_memory(server, server.hardware, length, together(server, requests, prefill))
    tables = make_tables(setting, server.hardware, rules.batch, length)
    check_tables(setting, tables)
    given, numbers = make_requests(requests, order, rules.window, apart)
    state, steps, total = start(rules, given), [], len(numbers)
    while total:
        state, chunk = run_chunk(rules, tables, memory, given, state, iterations=CHUNK)
        steps.append(jax.tree.map(np.asarray, chunk))
        done = bool(is_done(rules, given, state))
        if progress is not None:
            left = int((np.asarray(state.served[:total, 4]) >= 0).sum())
            now = float(clock.join(state.now)) / 1e9
            progress(left, total, now, len(steps) * CHUNK)
        if done:
            break
    room = int(np.asarray(memory.room).sum())
    return _gather(state, numbers, requests, apart), _join(steps), float(tables.watts), room


def check_tables(setting: Setting, tables: Tables) -> None:
    """Raises if the machine cannot run the model.

    Args:
        setting: The model and the system.
        tables: The machine.

    Raises:
        ValueError: A time or an energy of the tables is not finite.
    """
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tables[1:])):
        raise ValueError(
            "this hardware cannot run the model: a time or an energy is not finite (`neupims"
            " simulate` says more)"
        )


def _gather(
    state: State, numbers: np.ndarray, requests: Arrivals, apart: Prefilled | None
) -> Served:
    """Returns the times of all requests in the order of the trace."""
    rows = np.asarray(state.served, np.int64)[: len(numbers)]
    admitted, first, last = (
        clock.join(Instant(rows[:, each], rows[:, each + 1])) for each in (0, 2, 4)
    )
    if apart is None:
        return Served(admitted, first, last, rows[:, 6])
    end, pauses = apart.end.copy(), np.zeros(len(requests.inputs), np.int64)
    end[numbers], pauses[numbers] = last, rows[:, 6]
    return Served(apart.began, apart.end, end, pauses)


def _join(steps: list[Step]) -> Iterations:
    """Returns the iterations of all chunks, without the steps in which nothing was computed."""
    if not steps:
        none = np.zeros(0)
        return Iterations(none.astype(np.int64), none, *[none.astype(np.int64)] * 6, *[none] * 4)
    whole: Step = jax.tree.map(lambda *parts: np.concatenate(parts), *steps)
    spent: Spent = whole.spent
    there = whole.computed > 0
    counted = (whole.computed, whole.prompt_tokens, whole.waiting, whole.blocks, whole.fullest)
    used = (spent.joules, spent.npu_seconds, spent.pim_seconds, spent.bus_seconds)
    return Iterations(
        clock.join(whole.now)[there],
        clock.join(spent.time)[there] / 1e9,
        *(np.asarray(each, np.int64)[there] for each in (*counted, whole.paused)),
        *(np.asarray(each, np.float64)[there] for each in used),
    )
