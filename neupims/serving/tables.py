"""Tables of a machine: the work of requests by length, and of the NPU by number of tokens.

They are made once for a machine, or mapped over many; the model and the way it is spread over
devices are fixed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neupims.costs.energy import Counts, energy
from neupims.machine.calibration import DEFAULT
from neupims.machine.hardware import Hardware, burst_bytes
from neupims.machine.layer_kinds import LayerKind, Mix, attended, find_mix, layer_kinds
from neupims.machine.record import Number
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.timing.attention import attention_counts, count_instructions
from neupims.timing.capacity import layers_of_device
from neupims.timing.gemm import Tiling, Work, tiling
from neupims.timing.gemv import request_works
from neupims.timing.iteration import add_head, count_commands
from neupims.timing.npu import Context, product_bits
from neupims.timing.pim_commands import PIM_NONE
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
    base = make_context(setting, hardware, setting.model, find_mix(setting.model))

    def head(count):
        if not base.mix.lm_head:
            return jnp.zeros(2)
        work = head_work(base, count)
        return jnp.stack(
            [work.cycles, count_joules(base, add_head(base, no_counts(), work, count))]
        )

    heads = jax.vmap(head)(counts)
    return Tables(
        hardware,
        tuple(_kind_tables(setting, hardware, each, counts, length) for each in setting.kinds),
        heads[:, 0],
        heads[:, 1],
        _waiting_watts(base),
    )


def make_context(setting: Setting, hardware: Hardware, model: Decoder, mix: Mix) -> Context:
    """Returns the inputs of operations of the NPU, without requests.

    Args:
        setting: The system and the fidelity.
        hardware: The machine.
        model: The model, or one with a single kind of layer.
        mix: What it has.
    """
    none = jnp.zeros(1, jnp.int32)
    batch = Batch(none, none, none)
    given = (hardware, model, batch, setting.parallel, DEFAULT)
    return Context(*given, setting.system, setting.fidelity, mix)


def no_counts() -> Counts:
    """Returns counts of nothing."""
    return Counts(*[jnp.float32(0)] * len(Counts.__dataclass_fields__))


def count_joules(context: Context, counts: Counts) -> Number:
    """Returns the energy of one device.

    Args:
        context: The hardware and the system.
        counts: What it does.
    """
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
    return count_joules(context, counts)


def _kind_tables(
    setting: Setting,
    hardware: Hardware,
    kind: LayerKind,
    counts: Float[Array, " tokens"],
    length: int,
) -> KindTables:
    model, parallel = kind.model, setting.parallel
    context = make_context(setting, hardware, model, kind.mix)
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
                count_joules(context, spent),
            )

        return jax.vmap(one)(counts)

    def vector_joules(count):
        nothing = Work(*[jnp.float32(0)] * len(Work._fields))
        spent = count_commands(context, nothing, PIM_NONE, layers, 0.0, (), count)
        return count_joules(context, spent)

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
        return jnp.stack([count_joules(context, spent), pim.results * burst_bytes(hardware.hbm)])

    there = (lengths > 0)[:, None]
    issued = jnp.where(there, issued, 0.0)
    spent = jnp.where(there, jax.vmap(spend)(seen), 0.0)
    return jnp.concatenate([alone, beside, issued, spent], axis=1)


def _attention_written(context: Context, tokens: Number) -> Number:
    """Returns the bytes that attention on the NPU writes for a number of tokens."""
    one = jnp.ones(1, jnp.int32)
    single = context._replace(batch=Batch(one, one * 0, one * 0))
    return tokens * npu_operation(NPU_ATTENTION, single, 1.0).write_bytes
