"""What an iteration of a batch in places costs: the closed form of `timing.iteration`, by tables.

The work of a request depends on its length, and that of the NPU on the number of tokens, so both
are tables, made once for a machine: `Tables` has a row for each length, and a row for each number
of tokens. An iteration looks up its requests, adds them up by channel, and composes stages, layers
and the whole as `simulate` does, with the same functions. A prefill is `timing.prefill` itself.

The tables may have a leading axis of machines, over which `decode` and `prefill_prompts` can be
mapped; the model and the way it is spread over devices are fixed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neupims.costs.energy import Counts, energy
from neupims.machine.calibration import DEFAULT
from neupims.machine.hardware import Hardware, burst_bytes
from neupims.machine.layer_kinds import LayerKind, attended, find_mix, layer_kinds
from neupims.machine.record import Number
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.scheduling.policies import first_halves
from neupims.serving import clock
from neupims.serving.loop import Spent
from neupims.timing.attention import (
    PIM_NONE,
    Attention,
    attention_counts,
    attention_cycles,
    count_instructions,
)
from neupims.timing.capacity import layers_of_device
from neupims.timing.gemm import Tiling, Work, bytes_per_cycle, tiling
from neupims.timing.gemv import request_works
from neupims.timing.iteration import add_head, count_commands
from neupims.timing.links import link_seconds, messages
from neupims.timing.npu import Context, on_gpu, product_bits
from neupims.timing.overlap import DRAINED, side_by_side
from neupims.timing.prefill import prefill, prefill_attention
from neupims.timing.shapes import projection_sides
from neupims.timing.split import piece_lengths
from neupims.timing.stages import NPU_ATTENTION, QKV, REST, Operation, head_work, npu_operation

Interleaving = Literal["on", "off", "chosen"]
INTERLEAVINGS: tuple[Interleaving, ...] = ("on", "off", "chosen")


class Setting(NamedTuple):
    """What is fixed before a run is compiled."""

    model: Decoder
    parallel: Parallel
    system: System
    fidelity: Fidelity
    # Of "neupims": two sub-batches always, never, or in each iteration what takes less time.
    interleaving: Interleaving

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers of the model."""
        return layer_kinds(self.model, find_mix(self.model))

    def decode(self, tables: "Tables", lengths, holds) -> Spent:
        """Returns `decode` of this setting.

        Args:
            tables: As for `decode`.
            lengths: As for `decode`.
            holds: As for `decode`.
        """
        return decode(self, tables, lengths, holds)

    def prefill(self, tables: "Tables", prompts) -> Spent:
        """Returns `prefill_prompts` of this setting.

        Args:
            tables: As for `prefill_prompts`.
            prompts: As for `prefill_prompts`.
        """
        return prefill_prompts(self, tables, prompts)

    def mixed(self, tables: "Tables", lengths, holds, before, chunks) -> Spent:
        """Returns `decode_beside_chunks` of this setting.

        Args:
            tables: As for `decode_beside_chunks`.
            lengths: As for `decode_beside_chunks`.
            holds: As for `decode_beside_chunks`.
            before: As for `decode_beside_chunks`.
            chunks: As for `decode_beside_chunks`.
        """
        return decode_beside_chunks(self, tables, lengths, holds, before, chunks)


class Listed(NamedTuple):
    """Operations of the NPU one after another, for 0, 1, 2, ... tokens."""

    cycles: Float[Array, "tokens operations"]  # core cycles
    memory: Float[Array, "tokens operations"]  # of these, those that wait for the memory
    written: Number  # (tokens,): bytes that the last operation writes
    busy: Float[Array, " tokens"]  # core cycles with products in the arrays
    moved: Float[Array, " tokens"]  # bytes from and to the memory
    joules: Float[Array, " tokens"]  # of all layers of a device, apart from vector operations


class KindTables(NamedTuple):
    """One kind of layer."""

    # Of a request of 0, 1, 2, ... tokens, empty without PIM: core cycles of logit and attend alone;
    # beside the NPU; instructions of both; joules of all layers; bytes of results of a layer.
    lengths: Float[Array, "lengths 8"]
    qkv: Listed  # stage A
    rest: Listed  # stage E; on the NPU alone after attention
    layer: Listed  # stages C and D: the rest, and the next layer's qkv
    projection: Tiling  # of the first operation of the rest, for 0, 1, ... tokens
    vector_joules: Float[Array, " tokens"]  # of the vector units, of all layers


class Tables(NamedTuple):
    """A machine, with the work of requests by length, and of the NPU by number of tokens."""

    hardware: Hardware  # fields as float32
    kinds: tuple[KindTables, ...]
    head_cycles: Float[Array, " tokens"]  # of the LM head; zeros where it is left out
    head_joules: Float[Array, " tokens"]
    watts: Float[Array, ""]  # of refresh and of all parts that wait, while PIM works, if it does


class Chunks(NamedTuple):
    """Parts of prompts that are computed beside decoding, (prompts,) each."""

    before: Int[Array, " prompts"]  # tokens that were computed before
    tokens: Int[Array, " prompts"]  # that are computed; 0 does not count


class Layers(NamedTuple):
    """One iteration of the layers of one kind."""

    cycles: Number  # core cycles of all layers of a device
    joules: Number  # without that of waiting
    npu_cycles: Number  # with products in the arrays
    pim_cycles: Number  # with PIM commands, in the mean of the channels
    bus_cycles: Number  # in which data move


def make_tables(setting: Setting, hardware: Hardware, tokens: int, length: int) -> Tables:
    """Returns the tables of a machine.

    Args:
        setting: The model, the system and the fidelity.
        hardware: The machine; numbers may be traced, so that machines can be mapped over.
        tokens: The most tokens of an iteration.
        length: The most tokens of a request.
    """
    return _make_tables(setting, jax.tree.map(jnp.float32, hardware), tokens, length)


@partial(jax.jit, static_argnames=("setting", "tokens", "length"))
def _make_tables(setting: Setting, hardware: Hardware, tokens: int, length: int) -> Tables:
    counts = jnp.arange(tokens + 1) * 1.0
    base = _context(setting, hardware, setting.model, find_mix(setting.model))

    def head(count):
        if not base.mix.lm_head:
            return jnp.zeros(2)
        work = head_work(base, count)
        return jnp.stack([work.cycles, _joules(base, add_head(base, _no_counts(), work, count))])

    heads = jax.vmap(head)(counts)
    return Tables(
        hardware,
        tuple(_kind_tables(setting, hardware, each, counts, length) for each in setting.kinds),
        heads[:, 0],
        heads[:, 1],
        _waiting_watts(base),
    )


def _context(setting: Setting, hardware: Hardware, model: Decoder, mix) -> Context:
    none = jnp.zeros(1, jnp.int32)
    batch = Batch(none, none, none)
    given = (hardware, model, batch, setting.parallel, DEFAULT)
    return Context(*given, setting.system, setting.fidelity, mix)


def _no_counts() -> Counts:
    return Counts(*[jnp.float32(0)] * len(Counts.__dataclass_fields__))


def _joules(context: Context, counts: Counts) -> Number:
    return energy(counts, context.hardware, pim=context.system in PIM_SYSTEMS).total


def _waiting_watts(context: Context) -> Number:
    """Returns the power of waiting and refresh: the energy of one second without work."""
    if context.system == "gpu":
        return 1.0 * context.hardware.gpu.board_watts
    second = 1.0 * context.hardware.npu.clock_hz
    nothing = Work(*[jnp.float32(0)] * len(Work._fields))
    counts = count_commands(context, nothing, PIM_NONE, 0.0, second, (), 0.0)
    if context.system in PIM_SYSTEMS:  # where PIM works, its row buffers wait too
        counts = Counts(**(vars(counts) | {"group_activations": jnp.float32(1e-20)}))
    return _joules(context, counts)


def _kind_tables(
    setting: Setting,
    hardware: Hardware,
    kind: LayerKind,
    counts: Float[Array, " tokens"],
    length: int,
) -> KindTables:
    model, parallel = kind.model, setting.parallel
    context = _context(setting, hardware, model, kind.mix)
    layers = layers_of_device(model, parallel)

    def listed(operations: Sequence[Operation], after: Operation | None = None) -> Listed:
        def one(count):
            done: list[Work] = []
            before: Number = 0.0 if after is None else _attention_written(context, count)
            for operation in operations:
                done.append(npu_operation(operation, context, count, before))
                before = done[-1].write_bytes
            total = jax.tree.map(lambda *values: sum(values), *done)
            spent = count_commands(context, total, PIM_NONE, layers, 0.0, (), 0.0)
            return Listed(
                jnp.stack([each.cycles for each in done]),
                jnp.stack([each.memory_cycles for each in done]),
                before,
                total.busy_cycles,
                total.read_bytes + total.write_bytes,
                _joules(context, spent),
            )

        return jax.vmap(one)(counts)

    def vector_joules(count):
        nothing = Work(*[jnp.float32(0)] * len(Work._fields))
        spent = count_commands(context, nothing, PIM_NONE, layers, 0.0, (), count)
        return _joules(context, spent)

    with_pim = setting.system in PIM_SYSTEMS
    inner, features = projection_sides(model, parallel)
    return KindTables(
        _length_table(setting, context, length) if with_pim else jnp.zeros((0, 8)),
        listed(QKV),
        listed(REST, None if with_pim else NPU_ATTENTION),
        listed((*REST, *QKV)),
        tiling(hardware, counts, 1.0 * inner, 1.0 * features, product_bits(context)),
        jax.vmap(vector_joules)(counts),
    )


def _length_table(setting: Setting, context: Context, length: int) -> Float[Array, "lengths 8"]:
    """Returns the work of requests of 0, 1, ... `length` tokens on their channel."""
    hardware, model, parallel = context.hardware, context.model, context.parallel
    lengths = jnp.arange(length + 1)
    seen = attended(model, lengths) if context.mix.windows else lengths
    pieces = piece_lengths(seen, parallel) if setting.fidelity == "intended" else seen
    alone, beside = request_works(
        hardware,
        model,
        pieces,
        parallel,
        fidelity=setting.fidelity,
        waits=(None, DEFAULT.reopen_cycles),
    )
    if setting.system == "npu-pim":
        issued = count_instructions(hardware, model, seen, parallel, setting.fidelity)
    else:
        issued = jnp.zeros_like(alone)

    def count(one):
        batch = Batch(one[None], jnp.zeros_like(one[None]), jnp.zeros_like(one[None]))
        return attention_counts(hardware, model, batch, parallel, fidelity=setting.fidelity)

    layers = layers_of_device(model, parallel)
    nothing = Work(*[jnp.float32(0)] * len(Work._fields))

    def spend(one):
        pim = count(one)
        spent = count_commands(context, nothing, pim, layers, 0.0, (), 0.0)
        return jnp.stack([_joules(context, spent), pim.results * burst_bytes(hardware.hbm)])

    there = (lengths > 0)[:, None]
    issued = jnp.where(there, issued, 0.0)
    spent = jnp.where(there, jax.vmap(spend)(seen), 0.0)
    return jnp.concatenate([alone, beside, issued, spent], axis=1)


def _attention_written(context: Context, tokens: Number) -> Number:
    """Returns the bytes that attention on the NPU writes for a number of tokens."""
    one = jnp.ones(1, jnp.int32)
    single = context._replace(batch=Batch(one, one * 0, one * 0))
    return tokens * npu_operation(NPU_ATTENTION, single, 1.0).write_bytes


def decode(
    setting: Setting,
    tables: Tables,
    lengths: Int[Array, "rows places"],
    holds: Bool[Array, "rows places"],
) -> Spent:
    """Returns what an iteration takes that gives each request one token, as `simulate` does.

    Args:
        setting: The model and the system.
        tables: The machine.
        lengths: The tokens of each place. Rows are the channels of PIM, or groups of channels
            where `parallel.kv_split` spreads requests.
        holds: Whether a request in that place is computed.
    """
    return _choose(setting, tables, jnp.where(holds, lengths, 0), None)


def decode_beside_chunks(
    setting: Setting,
    tables: Tables,
    lengths: Int[Array, "rows places"],
    holds: Bool[Array, "rows places"],
    before: Int[Array, " prompts"],
    chunks: Int[Array, " prompts"],
) -> Spent:
    """Returns what an iteration takes that decodes requests and computes chunks of prompts.

    Products with weights take the tokens of the chunks with those of the first sub-batch. Attention
    of a chunk runs on the NPU (or the GPU) and nothing runs beside it; it takes what the prompt up
    to the end of the chunk takes, less what it takes up to its beginning. The LM head is computed
    of the tokens of the requests and one of each prompt.

    Args:
        setting: The model and the system.
        tables: The machine, with rows for all tokens of an iteration.
        lengths: The tokens of each place.
        holds: Whether a request in that place is decoded.
        before: The tokens of each prompt that were computed before.
        chunks: The tokens of each prompt that are computed; 0 does not count.
    """
    return _choose(setting, tables, jnp.where(holds, lengths, 0), Chunks(before, chunks))


def _choose(setting: Setting, tables: Tables, lengths, chunks: Chunks | None) -> Spent:
    """Returns what the iteration takes with the interleaving of the setting."""
    if setting.system != "neupims" or setting.interleaving == "off":
        return _decode(setting, tables, lengths, 0 * lengths, chunks, interleaved=False)
    halves = split_halves(lengths > 0)
    if setting.interleaving == "on":
        return _decode(setting, tables, lengths, halves, chunks, interleaved=True)
    serial, both = (
        _decode(setting, tables, lengths, halves, chunks, interleaved=each)
        for each in (False, True)
    )
    faster = clock.is_after(serial.time, both.time)
    return jax.tree.map(lambda a, b: jnp.where(faster, a, b), both, serial)


def _decode(
    setting: Setting,
    tables: Tables,
    lengths,
    halves,
    chunks: Chunks | None,
    *,
    interleaved: bool,
) -> Spent:
    """Returns what the iteration takes with the halves interleaved, or all of it as one batch."""
    hardware, model, parallel = tables.hardware, setting.model, setting.parallel
    there = lengths > 0
    tokens = jnp.stack([(there & (halves == which)).sum() for which in (0, 1)])
    headed = tokens.sum()
    if chunks is not None:
        tokens = tokens.at[0].add(chunks.tokens.sum())
        headed = headed + (chunks.tokens > 0).sum()
    total = tokens.sum()
    run = _with_pim if setting.system in PIM_SYSTEMS else _without_pim
    layers = Layers(*[jnp.float32(0)] * len(Layers._fields))
    for kind, table in zip(setting.kinds, tables.kinds, strict=True):
        found = run(setting, tables, kind, table, lengths, halves, tokens, interleaved=interleaved)
        if chunks is not None:
            beside = _attend_chunks(setting, tables, kind, chunks)
            found = jax.tree.map(lambda a, b: a + b, found, beside)
        layers = jax.tree.map(lambda sum_, new, of=kind.share: sum_ + of * new, layers, found)
    sent = messages(
        model,
        parallel,
        layers_of_device(model, parallel),
        total * 1.0,
        jnp.maximum((tokens > 0).sum(), 1) * 1.0 if interleaved else 1.0,
    )
    cycles = layers.cycles + tables.head_cycles[headed]
    clock_hz = hardware.npu.clock_hz
    seconds = cycles / clock_hz + link_seconds(hardware, sent[0]) + link_seconds(hardware, sent[1])
    counts = Counts(
        **vars(_no_counts()) | {"link_bytes": sum(each.count * each.each_bytes for each in sent)}
    )
    joules = tables.watts * seconds
    if setting.system != "gpu":
        context = _context(setting, hardware, model, find_mix(model))
        joules = joules + layers.joules + tables.head_joules[headed] + _joules(context, counts)
    return Spent(
        clock.from_seconds(seconds),
        joules,
        layers.npu_cycles / clock_hz,
        layers.pim_cycles / clock_hz,
        layers.bus_cycles / clock_hz,
    )


def split_halves(there: Bool[Array, "rows places"]) -> Int[Array, "rows places"]:
    """Returns the sub-batch of each place by the simulator's rule (`scheduling.policies`).

    The list of a channel is in the order of its places.

    Args:
        there: Whether a request in that place is computed.
    """
    rank = jnp.cumsum(there, axis=1) - there
    first = first_halves(there.sum(axis=1))
    return (there & (rank >= first[:, None])).astype(jnp.int32)


def _without_pim(setting, tables, kind, table, lengths, halves, tokens, *, interleaved) -> Layers:
    """Returns the layers in which attention runs on the NPU or on a GPU."""
    hardware = tables.hardware
    seen = (attended(kind.model, lengths) if kind.mix.windows else lengths).reshape(-1)
    context = _context(setting, hardware, kind.model, kind.mix)
    context = context._replace(batch=Batch(seen, seen * 0, seen * 0))
    total = tokens.sum()
    attention = npu_operation(NPU_ATTENTION, context, total * 1.0)
    works = (lengths > 0).any()  # there may be chunks of prompts alone
    attention = jax.tree.map(lambda value: jnp.where(works, value, 0.0), attention)
    layers = layers_of_device(kind.model, setting.parallel)
    cycles = table.qkv.cycles[total].sum() + attention.cycles + table.rest.cycles[total].sum()
    busy = table.qkv.busy[total] + attention.busy_cycles + table.rest.busy[total]
    moved = attention.read_bytes + attention.write_bytes
    spent = count_commands(context, attention, PIM_NONE, layers, 0.0, (), 0.0)
    joules = table.qkv.joules[total] + table.rest.joules[total] + table.vector_joules[total]
    moved = moved + table.qkv.moved[total] + table.rest.moved[total]
    rate = bytes_per_cycle(hardware)
    if setting.system == "gpu":
        rate = hardware.gpu.bytes_per_second / hardware.npu.clock_hz
    return Layers(
        layers * cycles,
        joules + _joules(context, spent),
        layers * busy,
        0.0 * cycles,
        layers * moved / rate,
    )


def _with_pim(setting, tables, kind, table, lengths, halves, tokens, *, interleaved) -> Layers:
    """Returns the layers in which attention runs in the memory."""
    hardware, parallel = tables.hardware, setting.parallel
    work = table.lengths[lengths]  # (rows, places, 8)
    there, total = lengths > 0, tokens.sum()
    mine = jnp.stack([there & (halves == which) for which in (0, 1)])  # (2, rows, places)
    sums = jnp.where(mine[..., None], work, 0.0).sum(axis=2)  # (2, rows, 8)
    seen = attended(kind.model, lengths) if kind.mix.windows else lengths
    attention = Attention(
        sums[:, None, :, 0:2],
        sums[:, None, :, 2:4],
        sums[:, None, :, 4:6],
        mine.sum(axis=2)[:, None] * 1.0,
        jnp.where(mine, seen, 0).max(axis=(1, 2)) * 1.0,
    )

    def times(part, load):
        options = {"system": setting.system, "fidelity": setting.fidelity}
        return attention_cycles(hardware, kind.model, parallel, part, load, **options)

    layers = layers_of_device(kind.model, parallel)
    if interleaved:
        loads = jnp.stack([attention.alone, attention.beside], axis=1)
        both = jax.vmap(lambda part, load: jax.vmap(lambda one: times(part, one))(load))
        cycles = _interleave(setting, tables, kind, table, tokens, both(attention, loads), layers)
    else:
        whole = attention._replace(longest=attention.longest.max())
        whole = jax.tree.map(lambda value: value.sum(axis=0) if value.ndim else value, whole)
        serial = table.qkv.cycles[total].sum() + table.rest.cycles[total].sum()
        cycles = layers * (serial + times(whole, whole.alone).sum())
    ours = tokens if interleaved else total[None]
    layer = jax.tree.map(lambda value: value[ours].sum(), table.layer)
    moved = layer.moved + sums[..., 7].sum()
    rows = hardware.hbm.num_channels / parallel.kv_split
    return Layers(
        cycles,
        layer.joules + table.vector_joules[total] + sums[..., 6].sum(),
        layers * layer.busy,
        layers * sums[..., 0:2].sum() / rows,
        layers * moved / bytes_per_cycle(hardware),
    )


def _interleave(setting, tables, kind, table, tokens, attention, layers) -> Number:
    """Returns the core cycles of stages A and B, C and D in each further layer, E and F.

    A stage is the longer of its NPU operations and its attention. If it ended with the NPU, what
    that wrote last delays the first operation of the next stage. All stages are computed at once,
    C, D and E for both ends of the stage before.

    Args:
        setting: The model and the system.
        tables: The machine.
        kind: The kind of layer.
        table: Its tables.
        tokens: The tokens of both sub-batches, (2,).
        attention: Cycles of logit and attend of both sub-batches, alone and beside the NPU,
            (2, 2, 2).
        layers: The layers of a device.
    """
    context = _context(setting, tables.hardware, kind.model, kind.mix)
    first, second = tokens[0], tokens[1]
    qkv, rest, layer = table.qkv, table.rest, table.layer

    def norm(count, left):
        work = npu_operation(QKV[0], context, count * 1.0, left)
        return jnp.stack([work.cycles, work.memory_cycles])

    def projection(count, left, tile):
        work = npu_operation(REST[0], context, count * 1.0, left, tile)
        return jnp.stack([work.cycles, work.memory_cycles])

    # Stages B, C, C, D, D, E, E: the tokens of their NPU side, and whose attention is beside.
    counts = jnp.stack([second, first, first, second, second, first, first])
    beside = np.array([0, 1, 1, 0, 0, 1, 1])
    works = jnp.stack([layer.cycles[counts], layer.memory[counts]], axis=-1)  # (7, 9, 2)
    works = (
        works.at[0].set(0.0).at[0, 1].set(jnp.stack([qkv.cycles[second, 1], qkv.memory[second, 1]]))
    )
    works = works.at[5:, len(REST) :].set(0.0)
    # Of C and E after D, of D, and of F, where the stage before ended with the NPU.
    late = jnp.stack([first, second, second])
    written = jnp.stack([qkv.written[second], qkv.written[first], rest.written[first]])
    tiles = jax.tree.map(lambda value: value[late], table.projection)
    delayed = jax.vmap(projection)(late, written, tiles)
    works = works.at[0, 0].set(norm(second, qkv.written[first]))
    works = works.at[np.array([2, 4, 6]), 0].set(delayed[np.array([0, 1, 0])])

    def run(operations, pim):
        zero = jnp.float32(0)
        npu = [Work(each[0], each[1], zero, zero, zero, zero) for each in operations]
        on_npu, on_pim = side_by_side(tables.hardware, DEFAULT, npu, *pim)
        end = jnp.maximum(on_npu.ends[-1], on_pim.ends[-1])
        return end, end - on_npu.ends[-1] < DRAINED

    ends, drains = jax.vmap(run)(works, attention[beside])
    a = qkv.cycles[first].sum()
    c = 1 + drains[0]
    d = 3 + drains[c]
    e = 5 + drains[d]
    alone = rest.cycles[second].sum()
    f = alone + jnp.where(drains[e], delayed[2, 0] - rest.cycles[second, 0], 0.0)
    return a + ends[0] + (layers - 1) * (ends[c] + ends[d]) + ends[e] + f


def _attend_chunks(setting: Setting, tables: Tables, kind: LayerKind, chunks: Chunks) -> Layers:
    """Returns the layers' attention of chunks, on the NPU or on a GPU."""
    hardware = tables.hardware
    context = _context(setting, hardware, kind.model, kind.mix)
    plain = context._replace(fidelity="intended")

    def up_to(ends):
        work = prefill_attention(
            hardware,
            kind.model,
            jnp.where(chunks.tokens > 0, ends, 0),
            setting.parallel,
            calibration=DEFAULT,
            written_bits=product_bits(context).inputs,
        )
        return on_gpu(hardware, work) if setting.system == "gpu" else work

    # Each chunk fills the arrays again, so what attention of nothing takes is not subtracted.
    ends = (chunks.before + chunks.tokens, chunks.before, 0 * chunks.before)
    work = jax.tree.map(lambda a, b, c: jnp.maximum(a - (b - c), 0.0), *map(up_to, ends))
    layers = layers_of_device(kind.model, setting.parallel)
    spent = count_commands(plain, work, PIM_NONE, layers, 0.0, (), 0.0)
    rate = bytes_per_cycle(hardware)
    if setting.system == "gpu":
        rate = hardware.gpu.bytes_per_second / hardware.npu.clock_hz
    moved = work.read_bytes + work.write_bytes
    return Layers(
        layers * work.cycles,
        _joules(plain, spent),
        layers * work.busy_cycles,
        0.0 * work.cycles,
        layers * moved / rate,
    )


def prefill_prompts(
    setting: Setting,
    tables: Tables,
    prompts: Int[Array, " prompts"],
) -> Spent:
    """Returns what the prefill of all prompts takes, on the NPU or the GPU of the system.

    Args:
        setting: The model and the system.
        tables: The machine.
        prompts: The tokens of each prompt; those of length 0 do not count.
    """
    batch = Batch(prompts, prompts * 0, prompts * 0)
    system: Literal["gpu", "npu-only"] = "gpu" if setting.system == "gpu" else "npu-only"
    done = prefill(tables.hardware, setting.model, batch, setting.parallel, system=system)
    layers = layers_of_device(setting.model, setting.parallel)
    busy = layers * done.layer_cycles / tables.hardware.npu.clock_hz
    return Spent(
        clock.from_seconds(done.iteration_seconds),
        done.energy_joules,
        busy * done.npu_utilization,
        0.0 * busy,
        busy * done.bandwidth_utilization,
    )
