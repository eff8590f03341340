"""The machine that serves, and its inputs of the loop: blocks of memory, requests, and checks."""

import numbers
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from neupims.machine.case import find_setting, select_model, select_system
from neupims.machine.config import read_model
from neupims.machine.division import ceil_divide, floor_divide
from neupims.machine.effects import idle_changes
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import find_mix
from neupims.machine.record import Number, check_whole, cut
from neupims.machine.supported import check_latent
from neupims.machine.systems import FIDELITIES, PIM_SYSTEMS, Fidelity
from neupims.machine.workload import LONGEST
from neupims.serving import clock
from neupims.serving.clock import Instant
from neupims.serving.cost import ModelCosts
from neupims.serving.policy import PLACEMENTS, Order, Placement
from neupims.serving.prefill_devices import Prefilled
from neupims.serving.requests import Arrivals
from neupims.serving.results import Served
from neupims.serving.state import NOBODY, Memory, Requests, Rules
from neupims.serving.tables import INTERLEAVINGS, Interleaving, Setting, Tables
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

PROMPTS = 16  # of one prefill, at most
CHUNKS = 4  # prompts that have a chunk in an iteration, at most
WINDOW = 64  # requests of the waiting room that a policy may choose from
BLOCK_TOKENS = 16  # of a block of keys and values without PIM
ROUND = 1024  # tables have whole multiples of this many lengths, so that few programs are compiled
PREFILLS = ("whole", "chunked", "separate")
Prefill = Literal["whole", "chunked", "separate"]


class Server(NamedTuple):
    """A machine that serves: what `run_requests` needs beside the requests."""

    hardware: Hardware
    setting: Setting
    rules: Rules
    placement: Placement
    spare: float  # share of a channel's blocks that are free after an admission


def make_server(
    model: str | Path,
    *,
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
    placement: str | Placement = "greedy",
    prefill: Prefill = "whole",
    prefill_tokens: int = 8192,
    chunk_tokens: int = 512,
    spare: float = 0.01,
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
        chunk_tokens: The tokens of an iteration, where prompts are chunked.
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
    name_of(placement, PLACEMENTS, "placement")
    chosen = PLACEMENTS[placement] if isinstance(placement, str) else placement
    named = find_setting(system)
    if named.system != "neupims" and interleaving == "chosen":
        raise ValueError(f"interleaving chosen needs the system neupims, not {system}")
    if named.system == "neupims" and str(system).lower() != "neupims":
        meant: Interleaving = "on" if named.sub_batches == 2 else "off"
        if interleaving not in ("on", meant):
            raise ValueError(
                f"the system {system} means interleaving {meant}, not {interleaving}, which is for"
                " the system neupims"
            )
        interleaving = meant
    kind, _, machine = select_system(
        system, hardware=hardware, row_buffers=row_buffers, changes=changes
    )
    name, decoder, parallel = select_model(model, tp=tp, pp=pp, kv_split=kv_split)
    if lm_head:
        decoder = replace(decoder, lm_head=1)
    setting = Setting(decoder, parallel, kind, fidelity, interleaving)
    check_whole("chunk_tokens", chunk_tokens, 1, LONGEST)
    server = assemble_server(
        machine,
        setting,
        placement=chosen,
        batch=batch,
        prefill_tokens=prefill_tokens,
        chunk_tokens=chunk_tokens if prefill == "chunked" else 0,
        spare=spare,
    )
    return name, server


def assemble_server(
    machine: Hardware,
    setting: Setting,
    *,
    placement: Placement = PLACEMENTS["greedy"],
    batch: int = 256,
    prefill_tokens: int = 8192,
    chunk_tokens: int = 0,
    spare: float = 0.01,
) -> Server:
    """Returns the machine that serves a model, checked.

    Args:
        machine: The hardware.
        setting: The model and the system.
        placement: How a channel is chosen.
        batch: As for `serve`, like the next.
        prefill_tokens: The most tokens of one prefill.
        chunk_tokens: The tokens of an iteration; 0 computes prompts whole.
        spare: The share of a channel's blocks that stay free.

    Raises:
        ValueError: A number is impossible, the model is spread over a pipeline, or it cannot run on
            the system.
    """
    for name, count in (("batch", batch), ("prefill_tokens", prefill_tokens)):
        check_whole(name, count, 1, LONGEST)
    if not isinstance(spare, numbers.Real) or not 0 <= spare < 1:
        raise ValueError(
            f"the spare share of the memory must be from 0 to below 1, not {cut(spare)}"
        )
    parallel, kind, fidelity = setting.parallel, setting.system, setting.fidelity
    if parallel.pp != 1:
        raise ValueError(
            f"a pipeline of {parallel.pp} groups of layers is not served yet: give --pp 1 and"
            f" --tp {parallel.tp * parallel.pp}, the same devices"
        )
    check_latent(find_mix(setting.model), system=kind, fidelity=fidelity)
    own = int(machine.hbm.num_channels)
    check_split(parallel.kv_split, system=kind, fidelity=fidelity, channels=own)
    if kind != "gpu":
        check_scratchpad(machine)
    rules = Rules(
        1,
        batch,
        batch,
        CHUNKS if chunk_tokens else PROMPTS,
        prefill_tokens,
        chunk_tokens,
        WINDOW,
        placement.packing,
        ModelCosts(setting),
    )
    return fit_channels(Server(machine, setting, rules, placement, spare), own, own)


def fit_channels(server: Server, fewest: int, most: int) -> Server:
    """Returns a server whose arrays fit all machines that have from `fewest` to `most` channels.

    Args:
        server: The server; without PIM nothing changes.
        fewest: The least number of channels.
        most: The greatest number.
    """
    if server.setting.system not in PIM_SYSTEMS:
        return server
    split, rules = server.setting.parallel.kv_split, server.rules
    places = int(count_places(rules.batch, fewest // split))
    return server._replace(rules=rules._replace(rows=most // split, places=places))


def name_of(value: Any, known: Mapping[str, Any], what: str) -> str:
    """Returns the name of a choice, or of the function that was given instead.

    Args:
        value: A name, or what it would stand for.
        known: What names stand for.
        what: The choice, for the error.

    Raises:
        ValueError: The name is unknown.
    """
    if not isinstance(value, str):
        return getattr(value, "__name__", "own")
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, not {value!r}")
    return value


def describe_server(server: Server, model_name: str) -> dict[str, Any]:
    """Returns the names of a machine and its rules, as JSON has them.

    Args:
        server: The machine.
        model_name: Name or file of the model.
    """
    setting = server.setting
    return {
        "system": setting.system,
        "model": model_name,
        "model_notes": list(read_model(model_name).notes),
        # Prompts are computed as intended, so what matters in that fidelity alone matters here.
        "warnings": idle_changes(server.hardware, setting.system, "intended", [setting.model]),
        "fidelity": setting.fidelity,
        "interleaving": setting.interleaving if setting.system == "neupims" else None,
        "batch": server.rules.batch,
        "tp": int(setting.parallel.tp),
        "kv_split": int(setting.parallel.kv_split),
    }


def name_block(setting: Setting) -> str:
    """Returns what a block of keys and values is.

    Args:
        setting: The system.
    """
    with_pim = setting.system in PIM_SYSTEMS
    return "a row of all banks of a channel" if with_pim else f"{BLOCK_TOKENS} tokens"


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
        rows = jnp.round(hardware.hbm.num_channels / parallel.kv_split).astype(jnp.int32)
        there = jnp.arange(rules.rows) < rows
        pieces = piece_lengths(lengths, parallel)
        loads = server.placement.load(hardware, model, pieces, parallel)
    else:
        whole = -(-lengths // BLOCK_TOKENS) * BLOCK_TOKENS
        options: dict[str, Any] = {"system": system, "fidelity": setting.fidelity}
        each = request_bytes(hardware, model, jnp.array([BLOCK_TOKENS]), parallel, **options)[0]
        blocks = request_bytes(hardware, model, whole, parallel, **options) / each
        needed = jnp.ceil(blocks - 1e-3)  # whole but for rounding, as above
        free, _ = free_bytes(hardware, model, parallel, system, tokens)
        room, there, rows = floor_divide(free, each), jnp.ones(1, bool), jnp.int32(1)
        loads = 1.0 * lengths
    room = jnp.where(there, jnp.maximum(room, 0), 0).astype(jnp.int32)
    spare = jnp.floor(room.max() * server.spare).astype(jnp.int32)
    needed = jnp.where(lengths > 0, needed, 0).astype(jnp.int32)
    return Memory(needed, room, spare, loads, rows, count_places(rules.batch, rows))


def count_places(batch: int, rows: Number) -> Int[Array, ""]:
    """Returns the places of a channel: twice its share of the batch, and at most the batch.

    Args:
        batch: The most requests at once.
        rows: The channels.
    """
    return jnp.minimum(batch, 2 * ceil_divide(batch, rows)).astype(jnp.int32)


def check_lengths(
    server: Server, requests: Arrivals, prefill: Prefill, leave_out: bool
) -> tuple[Arrivals, tuple[str, ...]]:
    """Returns the requests that the memory holds, each alone, and notes on the others.

    The activations of the longest prompt take a part of the memory from all requests. A prompt that
    leaves no memory for its own keys and values is therefore left out before the others are looked
    at.

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
    if leave_out and prefill == "whole":
        longest = _longest_prompt(server, np.asarray(memory.needed), int(requests.inputs.max()))
        possible = requests.inputs <= longest
        if possible.any() and not possible.all():
            kept, notes = check_lengths(server, _select(requests, possible), prefill, leave_out)
            note = f"their prompts are longer than {longest} tokens"
            return kept, (_note(possible, note), *notes)
    worst = int(needed.argmax())
    if limit <= 0:
        weights = format_bytes(float(device_weight_bytes(setting.model, setting.parallel)))
        raise ValueError(
            f"no memory of a device is left for requests beside its weights, {weights}, and the"
            f" activations of {tokens} tokens: take more devices (--tp), or fewer tokens at once"
            " (--prefill-tokens, --batch)"
        )
    holds = np.flatnonzero(np.asarray(memory.needed) <= limit)[-1]
    where = "a channel" if setting.system in PIM_SYSTEMS else "the memory"
    if not leave_out or not fits.any():
        raise ValueError(
            f"request {worst} of {requests.name} grows to {most[worst]} tokens, but {where} holds"
            f" at most {holds} of one request, beside weights and activations, and"
            f" {int((~fits).sum())} of {len(fits)} requests are longer: take more devices (--tp),"
            " spread requests over channels (--kv-split, --fidelity intended)"
            f"{'' if leave_out else ', or --leave-out-too-long'}"
        )
    return _select(requests, fits), (_note(fits, f"they grow beyond {holds} tokens"),)


def _longest_prompt(server: Server, needed: Int[np.ndarray, " lengths"], most: int) -> int:
    """Returns the longest prompt of which the memory holds activations, keys and values."""

    def fails(prompt: int) -> bool:
        tokens = max(server.rules.batch, server.rules.prefill_tokens, prompt)
        memory = make_memory(server, server.hardware, 1, tokens)
        return bool(needed[prompt] > memory.room.max() - memory.spare)

    return bisect_left(range(1, most + 1), True, key=fails)


def _select(requests: Arrivals, chosen: Bool[np.ndarray, " n"]) -> Arrivals:
    columns = requests.nanoseconds, requests.inputs, requests.outputs
    times, inputs, outputs = (each[chosen] for each in columns)
    return Arrivals(requests.name, times, inputs, outputs, requests.notes)


def _note(kept: Bool[np.ndarray, " n"], why: str) -> str:
    return f"{int((~kept).sum())} of {len(kept)} requests are left out: {why}"


def most_tokens(rules: Rules) -> int:
    """Returns the most tokens of an iteration that decodes.

    Args:
        rules: The rules.
    """
    return max(rules.batch + 1, rules.chunk) if rules.chunk else rules.batch


def together(server: Server, requests: Arrivals, prefill: Prefill) -> int:
    """Returns the most tokens that are computed together.

    Args:
        server: The machine.
        requests: The requests.
        prefill: Where prompts are computed.
    """
    if prefill == "separate":
        return server.rules.batch
    if prefill == "chunked":
        return most_tokens(server.rules)
    return max(server.rules.batch, server.rules.prefill_tokens, int(requests.inputs.max()))


def make_requests(
    requests: Arrivals, order: Order, window: int, apart: Prefilled | None
) -> tuple[Requests, np.ndarray]:
    """Returns the requests as the loop takes them, and the number of each in the trace.

    Those that come from other devices with their first token come in the order in which they are
    ready, and the order takes that as their arrival; those of one token do not come at all.

    Args:
        requests: The requests.
        order: The order of admission, of the requests as they come.
        window: The places of the waiting room.
        apart: What other devices did with the prompts, if they did.

    Raises:
        ValueError: The order does not give each request a key.
    """
    come, lengths = requests.nanoseconds, requests.inputs
    prompts, outputs = requests.inputs, requests.outputs
    numbers = np.arange(len(come))
    if apart is not None:
        come, lengths, prompts, outputs = apart.arrived, lengths + 1, 0 * prompts, outputs - 1
        numbers = np.argsort(come, kind="stable")
        numbers = numbers[outputs[numbers] > 0]
    keys = np.zeros(0, np.int64)
    if len(numbers):
        inputs, made = requests.inputs[numbers], requests.outputs[numbers]
        keys = np.asarray(order(Arrivals(requests.name, come[numbers], inputs, made)), np.int64)
        if keys.shape != numbers.shape or keys.min() < 0 or keys.max() >= NOBODY:
            raise ValueError("an order gives each request a key from 0 to 2^30 - 1")

    def pad(values, last):
        return jnp.asarray(np.append(values, [last] * window), jnp.int32)

    high, low = clock.split(come[numbers])
    return Requests(
        Instant(pad(high, 2**31 - 1), pad(low, 0)),
        pad(lengths[numbers], 1),
        pad(prompts[numbers], 0),
        pad(outputs[numbers], 1),
        pad(keys, NOBODY - 1),
    ), numbers


def are_finite(tables: Tables) -> Bool[np.ndarray, " machines"]:
    """Returns whether all times and energies of each machine are finite, (machines,).

    Args:
        tables: The machine, or several with a leading axis.
    """
    count = np.size(tables.watts)
    leaves = (np.asarray(leaf).reshape(count, -1) for leaf in jax.tree.leaves(tables[1:]))
    return np.all([np.isfinite(leaf).all(axis=1) for leaf in leaves], axis=0)


def check_tables(tables: Tables) -> None:
    """Raises if a machine cannot run the model.

    Args:
        tables: The machine, or several with a leading axis.

    Raises:
        ValueError: A time or an energy of the tables is not finite.
    """
    if not are_finite(tables).all():
        raise ValueError(
            "this hardware cannot run the model: a time or an energy is not finite (`neupims"
            " simulate` says more)"
        )


def round_length(requests: Arrivals) -> int:
    """Returns the most tokens of a request, rounded up so that few programs are compiled.

    Args:
        requests: The requests.
    """
    return -(-int((requests.inputs + requests.outputs).max()) // ROUND) * ROUND


def gather(
    rows: Int[np.ndarray, "m 7"],
    numbers: Int[np.ndarray, " n"],
    requests: Arrivals,
    apart: Prefilled | None,
) -> Served:
    """Returns the times of all requests in the order of the trace.

    Args:
        rows: What the loop says of each request, `State.served`.
        numbers: The number in the trace of each request of the loop.
        requests: The requests.
        apart: What other devices did with the prompts, if they did.
    """
    rows = np.asarray(rows, np.int64)[: len(numbers)]
    admitted, first, last = (
        clock.join(Instant(rows[:, each], rows[:, each + 1])) for each in (0, 2, 4)
    )
    if apart is None:
        return Served(admitted, first, last, rows[:, 6])
    end, pauses = apart.end.copy(), np.zeros(len(requests.inputs), np.int64)
    end[numbers], pauses[numbers] = last, rows[:, 6]
    return Served(apart.began, apart.end, end, pauses)
