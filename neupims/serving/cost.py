"""What an iteration of a batch in places costs: the closed form of `timing.iteration`, by tables.

An iteration looks up its requests in the tables of a machine, adds them up by channel, and
composes stages, layers and the whole as `simulate` does, with the same functions. A prefill is
`timing.prefill` itself. `decode` and `prefill_prompts` can be mapped over tables with a leading
axis of machines.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from neupims.costs.energy import Counts
from neupims.machine.calibration import DEFAULT
from neupims.machine.layer_kinds import LayerKind, attended, find_mix
from neupims.machine.record import Number
from neupims.machine.systems import PIM_SYSTEMS
from neupims.machine.workload import Batch
from neupims.scheduling.policies import first_halves
from neupims.serving import clock
from neupims.serving.state import Spent
from neupims.serving.tables import (
    Setting,
    Tables,
    count_joules,
    make_context,
    no_counts,
)
from neupims.timing.attention import Attention
from neupims.timing.capacity import layers_of_device
from neupims.timing.gemm import Work, bytes_per_cycle
from neupims.timing.iteration import count_commands
from neupims.timing.links import link_seconds, messages
from neupims.timing.npu import on_gpu, product_bits
from neupims.timing.overlap import DRAINED, side_by_side
from neupims.timing.pim_commands import PIM_NONE
from neupims.timing.prefill import prefill, prefill_attention
from neupims.timing.stage_attention import attention_cycles
from neupims.timing.stages import NPU_ATTENTION, QKV, REST, npu_operation


class ModelCosts(NamedTuple):
    """The costs of `loop` for a model on a system: equal settings are equal costs."""

    setting: Setting

    def decode(self, tables: Tables, lengths, holds) -> Spent:
        """Returns `decode` of this setting.

        Args:
            tables: As for `decode`.
            lengths: As for `decode`.
            holds: As for `decode`.
        """
        return decode(self.setting, tables, lengths, holds)

    def prefill(self, tables: Tables, prompts) -> Spent:
        """Returns `prefill_prompts` of this setting.

        Args:
            tables: As for `prefill_prompts`.
            prompts: As for `prefill_prompts`.
        """
        return prefill_prompts(self.setting, tables, prompts)

    def mixed(self, tables: Tables, lengths, holds, before, chunks) -> Spent:
        """Returns `decode_beside_chunks` of this setting.

        Args:
            tables: As for `decode_beside_chunks`.
            lengths: As for `decode_beside_chunks`.
            holds: As for `decode_beside_chunks`.
            before: As for `decode_beside_chunks`.
            chunks: As for `decode_beside_chunks`.
        """
        return decode_beside_chunks(self.setting, tables, lengths, holds, before, chunks)


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
        **vars(no_counts()) | {"link_bytes": sum(each.count * each.each_bytes for each in sent)}
    )
    joules = tables.watts * seconds
    if setting.system != "gpu":
        context = make_context(setting, hardware, model, find_mix(model))
        joules = joules + layers.joules + tables.head_joules[headed] + count_joules(context, counts)
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
    context = make_context(setting, hardware, kind.model, kind.mix)
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
        joules + count_joules(context, spent),
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

    def cycles_of(attention, which, *, beside=False):
        options = {"beside": beside, "system": setting.system, "fidelity": setting.fidelity}
        return attention_cycles(hardware, kind.model, parallel, attention, which, **options)

    layers = layers_of_device(kind.model, parallel)
    if interleaved:
        # By sub-batch, alone or beside the NPU, and operation.
        attended_cycles = jnp.stack(
            [
                jnp.stack([cycles_of(attention, which, beside=beside) for beside in (False, True)])
                for which in (0, 1)
            ]
        )
        cycles = _interleave(setting, tables, kind, table, tokens, attended_cycles, layers)
    else:
        whole = jax.tree.map(lambda value: value.sum(axis=0, keepdims=True), attention)
        whole = whole._replace(longest=attention.longest.max(keepdims=True))
        serial = table.qkv.cycles[total].sum() + table.rest.cycles[total].sum()
        cycles = layers * (serial + cycles_of(whole, 0).sum())
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
    context = make_context(setting, tables.hardware, kind.model, kind.mix)
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
        end = jnp.maximum(on_npu.end, on_pim.end)
        return end, end - on_npu.end < DRAINED

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
    context = make_context(setting, hardware, kind.model, kind.mix)
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
        count_joules(plain, spent),
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
