"""Prefill: the prompts of a batch through a decoder, all their tokens at once, on the NPU.

The paper runs prompts on separate NPUs, and the public simulator does not run them. No measurement
exists, so this is the machine as intended. Products are those of decoding with more tokens.
Attention of a head keeps its scores on chip and computes only the blocks that a causal mask leaves.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from neupims.machine.calibration import DEFAULT, Calibration
from neupims.machine.division import ceil_divide
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import attended, find_mix, layer_kinds
from neupims.machine.record import Number
from neupims.machine.workload import FLOAT16_BYTES, Batch, Decoder, Parallel
from neupims.timing.attention import no_attention
from neupims.timing.gemm import LEAST_STREAM, Work, bytes_per_cycle
from neupims.timing.iteration import Iteration, mean_of_layers, summarize
from neupims.timing.layout import heads_of_device
from neupims.timing.links import link_seconds, messages
from neupims.timing.npu import Context, matrix_product, product_bits
from neupims.timing.overlap import side_by_side
from neupims.timing.pim_commands import PIM_NONE
from neupims.timing.shapes import expanded_latents, projection_sides, qkv_sides
from neupims.timing.stage_attention import attention_totals
from neupims.timing.stages import Operation, npu_operation, stages
from neupims.timing.vector import softmax_cycles

PREFILL_SYSTEMS = ("npu-only", "gpu")
# The mean softmax time of a prompt comes from this number of evenly spaced rows: rows grow from one
# key to all keys.
ROWS = 16


def prefill(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: Literal["npu-only", "gpu"] = "npu-only",
    calibration: Calibration = DEFAULT,
) -> Iteration:
    """Returns the iteration that computes keys, values and the first token of every prompt.

    In a pipeline of devices the first token comes later: see `first_token_seconds`.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests; `batch.seq_lens` are the lengths of the prompts, and channels do not
            matter.
        parallel: How the model is spread over devices.
        system: "npu-only" or "gpu".
        calibration: The fitted constants.

    Returns:
        An iteration of the "npu-only" system, with one stage; `tokens_per_second` counts the tokens
        of the prompts.

    Raises:
        ValueError: `system` is neither "npu-only" nor "gpu".
    """
    if system not in PREFILL_SYSTEMS:
        raise ValueError(f"prefill runs on {' or '.join(PREFILL_SYSTEMS)}, not {system!r}")
    kinds = layer_kinds(model, find_mix(model))
    runs = [
        _prefill(hardware, each.model, batch, parallel, calibration, system=system, mix=each.mix)
        for each in kinds
    ]
    return mean_of_layers(kinds, runs)


@partial(jax.jit, static_argnames=("system", "mix"))
def _prefill(hardware, model, batch, parallel, calibration, *, system, mix) -> Iteration:
    context = Context(hardware, model, batch, parallel, calibration, system, "intended", mix)
    tokens = jnp.stack([jnp.sum(batch.seq_lens * 1.0), jnp.float32(0)])
    works = [npu_operation(each, context, tokens[0]) for each in prefill_operations()]
    side, _ = side_by_side(hardware, calibration, works, (), ())
    return summarize(
        context,
        attention_totals(no_attention()),
        PIM_NONE,
        [works],
        [side.end],
        side.starts,
        side.cycles,
        sub_batches=1,
        tokens=tokens,
        headed=jnp.sum(batch.seq_lens > 0) * 1.0,
    )


def prefill_operations() -> tuple[Operation, ...]:
    """Returns the operations of a prefill: those of "npu-only" with causal attention.

    Keys and values of heads are made from latents, where the model has them.
    """
    (stage,) = stages("npu-only", 1)
    of_prefill = {
        "attn.QKVgen": matrix_product(qkv_sides, of_latents=expanded_latents),
        "attn.attn.FusedMHA": _attend_causally,
        "attn.proj": matrix_product(projection_sides),
    }
    return tuple(
        each._replace(work=of_prefill.get(each.name, each.work)) for each in stage.operations
    )


def _attend_causally(context: Context, tokens, written_before, tile=None) -> Work:
    return prefill_attention(
        context.hardware,
        context.model,
        context.batch.seq_lens,
        context.parallel,
        calibration=context.calibration,
        written_bits=product_bits(context).inputs,
    )


def first_token_seconds(
    hardware: Hardware, model: Decoder, batch: Batch, parallel: Parallel, iteration: Iteration
) -> float:
    """Returns the seconds until the prompts have passed all groups of devices.

    These are `parallel.pp` iterations, the last of which sends its activations to nobody. The
    LM head is computed in the last one alone.

    Args:
        hardware: The machine.
        model: The model.
        batch: The prompts.
        parallel: How the model is spread over devices.
        iteration: The result of `prefill`.
    """
    _, forward = messages(model, parallel, 1.0, jnp.sum(batch.seq_lens * 1.0), 1.0)
    heads = (parallel.pp - 1) * iteration.head_cycles / hardware.npu.clock_hz
    groups = parallel.pp * iteration.iteration_seconds - heads
    return float(groups - link_seconds(hardware, forward))


def prefill_attention(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Int[Array, " r"],
    parallel: Parallel,
    *,
    calibration: Calibration,
    written_bits: Number = 16,
) -> Work:
    """Returns the work of causal attention of whole prompts.

    The slowest of three resources (arrays, vector units, memory) sets the time. A block of as many
    queries as the arrays are wide stays in them while the keys up to it stream past. Then its
    weights stay while the values stream past: block i meets i blocks of keys and of values. Softmax
    of a query takes a pass over the keys before it. Keys and values of a head are read once if they
    fit half of the scratchpad, else again for each block of queries.

    With latent attention each head has its keys, with their rotary channels, and its values.

    With a window, a block of queries meets at most the blocks of the window and one more, a query
    attends to at most the window, and keys and values of the window must fit.

    Args:
        hardware: The machine.
        model: The model; its `window`, if it has one, is that of the layer.
        seq_lens: The tokens of each prompt, (r,).
        parallel: How the model is spread over devices.
        calibration: The fitted constants; only `queued_efficiency` is used.
        written_bits: The bits of the results, which the output projection takes.

    Returns:
        The work on one device, with cycles in core cycles.
    """
    npu = hardware.npu
    heads, kv_heads = heads_of_device(model, parallel)
    latent = jnp.asarray(model.kv_rank) > 0
    kv_heads = jnp.where(latent, heads, kv_heads)
    key, value = 1.0 * model.head_dim + model.rope_dim, 1.0 * model.value_dim
    lengths = seq_lens * 1.0
    width, height = 1.0 * npu.array_width, 1.0 * npu.array_height
    stream = jnp.maximum(width / npu.num_arrays, LEAST_STREAM)
    blocks = ceil_divide(lengths, width)
    seen = attended(model, lengths)  # by the last query
    most = jnp.minimum(blocks, ceil_divide(seen, width) + 1)  # blocks of keys for one of queries
    # of a block of queries with a block of keys
    pairs = most * (most + 1) / 2 + (blocks - most) * most
    logit = ceil_divide(key, width) * (blocks * height + stream * (pairs - blocks))
    attend = pairs * (height + stream * (ceil_divide(value, width) - 1))
    arrays = heads * jnp.sum(jnp.where(lengths > 0, logit + attend, 0))
    rows = attended(model, lengths[:, None] * ((jnp.arange(ROWS) + 0.5) / ROWS))
    row = softmax_cycles(hardware, rows).mean(axis=1)
    vectors = heads * jnp.sum(jnp.where(lengths > 0, lengths * row, 0)) / npu.vector_units
    tokens = lengths.sum()
    number_bytes = jnp.where(latent, FLOAT16_BYTES, model.kv_bits / 8)
    fits = number_bytes * seen * (key + value) <= npu.scratchpad_bytes / 2
    keys = jnp.sum(jnp.where(fits, lengths, pairs * width))  # and values, that are read
    read = FLOAT16_BYTES * tokens * heads * key + number_bytes * keys * kv_heads * (key + value)
    written = written_bits / 8 * tokens * value * heads
    memory = (read + written) / calibration.queued_efficiency / bytes_per_cycle(hardware)
    busy = jnp.maximum(arrays, vectors)
    cycles = jnp.maximum(memory, busy) + height + width + stream
    macs = heads * (key + value) * jnp.sum(seen * (seen + 1) / 2 + (lengths - seen) * seen)
    return Work(cycles, jnp.maximum(memory - busy, 0), arrays, read, written, macs)
