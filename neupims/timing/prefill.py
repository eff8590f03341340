"""Prefill: the prompts of a batch through a decoder, all their tokens at once, on the NPU.

The paper sends prompts to NPUs beside the memory that computes, and the public simulator refuses
them, so nobody has measured this: it is the machine as intended. Products are those of decoding
with more tokens. Attention of a head keeps its scores on chip and computes only the blocks that a
causal mask leaves.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from neupims.machine.calibration import DEFAULT, Calibration
from neupims.machine.hardware import Hardware
from neupims.machine.workload import FLOAT16_BYTES, Batch, Decoder, Parallel
from neupims.timing.gemm import LEAST_STREAM, Work, bytes_per_cycle
from neupims.timing.gemv import heads_of_device
from neupims.timing.schedule import (
    NPU_ATTENTION,
    Iteration,
    link_seconds,
    measured,
    messages,
    no_attention,
    npu_operation,
    on_gpu,
    side_by_side,
    stages,
)
from neupims.timing.vector import softmax_cycles

PREFILL_SYSTEMS = ("npu-only", "gpu")
# of a prompt's softmax, evenly spaced, whose mean time stands for all: rows grow from one key to
# all
ROWS = 16


@partial(jax.jit, static_argnames="system")
def prefill(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: Literal["npu-only", "gpu"] = "npu-only",
    calibration: Calibration = DEFAULT,
) -> Iteration:
    """The keys and values of every prompt, and with them the first token: `batch.seq_lens` are the
    lengths of the prompts, channels do not matter.

    The result is that of a step of the "npu-only" system, with one stage; `tokens_per_second`
    counts the prompts' tokens. The first token of a pipeline comes later: `first_token_seconds`.

    Raises:
        ValueError: `system` is neither "npu-only" nor "gpu".
    """
    if system not in PREFILL_SYSTEMS:
        raise ValueError(f"prefill runs on {' or '.join(PREFILL_SYSTEMS)}, not {system!r}")
    tokens = jnp.stack([jnp.sum(batch.seq_lens * 1.0), jnp.float32(0)])
    (stage,) = stages("npu-only", 1)
    options: dict[str, Any] = {"calibration": calibration, "system": system, "fidelity": "intended"}
    works = []
    for name in stage.npu:
        if name == NPU_ATTENTION:
            work = prefill_attention(
                hardware, model, batch.seq_lens, parallel, calibration=calibration
            )
            works.append(on_gpu(hardware, work) if system == "gpu" else work)
        else:
            works.append(
                npu_operation(hardware, model, batch, parallel, name, tokens[0], 0.0, **options)
            )
    side, _ = side_by_side(hardware, calibration, works, jnp.zeros(0), jnp.zeros(0))
    cycles = side.ends - side.starts
    records = (hardware, model, batch, parallel, no_attention())
    return measured(
        *records,
        [works],
        side.ends[-1:],
        side.starts,
        cycles,
        system=system,
        sub_batches=1,
        tokens=tokens,
    )


def first_token_seconds(
    hardware: Hardware, model: Decoder, batch: Batch, parallel: Parallel, iteration: Iteration
) -> float:
    """The time until the prompts have passed all pp groups of devices: pp iterations, the last of
    which sends its activations to nobody.
    """
    _, forward = messages(model, parallel, 1.0, jnp.sum(batch.seq_lens * 1.0), 1.0)
    return float(parallel.pp * iteration.iteration_seconds - link_seconds(hardware, forward))


def prefill_attention(
    hardware: Hardware, model: Decoder, seq_lens, parallel: Parallel, *, calibration: Calibration
) -> Work:
    """Causal attention of whole prompts: of its three resources (arrays, vector units, memory) the
    one that takes longest.

    A block of as many queries as the arrays are wide stays in them while the keys up to it stream
    past, and then its weights while the values do: block i meets i blocks of keys and of values.
    Softmax of a query takes a pass over the keys before it. Keys and values of a head are read once
    where they fit half of the scratchpad, else again for each block of queries.
    """
    npu = hardware.npu
    heads, kv_heads = heads_of_device(model, parallel)
    head, lengths = 1.0 * model.width / model.heads, seq_lens * 1.0
    width, height = 1.0 * npu.array_width, 1.0 * npu.array_height
    stream = jnp.maximum(width / npu.num_arrays, LEAST_STREAM)
    blocks = jnp.ceil(lengths / width)
    pairs = blocks * (blocks + 1) / 2  # of a block of queries with a block of keys
    depth = jnp.ceil(head / width)
    logit = depth * (blocks * height + stream * (pairs - blocks))
    attend = pairs * (height + stream * (depth - 1))
    arrays = heads * jnp.sum(jnp.where(lengths > 0, logit + attend, 0))
    row = softmax_cycles(hardware, lengths[:, None] * ((jnp.arange(ROWS) + 0.5) / ROWS)).mean(
        axis=1
    )
    vectors = heads * jnp.sum(jnp.where(lengths > 0, lengths * row, 0)) / npu.vector_units
    tokens = lengths.sum()
    fits = 2 * FLOAT16_BYTES * lengths * head <= npu.scratchpad_bytes / 2
    keys = jnp.sum(jnp.where(fits, lengths, pairs * width))  # and values, that are read
    read = FLOAT16_BYTES * head * (tokens * heads + 2 * keys * kv_heads)
    written = FLOAT16_BYTES * tokens * head * heads
    memory = (read + written) / calibration.queued_efficiency / bytes_per_cycle(hardware)
    busy = jnp.maximum(arrays, vectors)
    cycles = jnp.maximum(memory, busy) + height + width + stream
    macs = 2 * heads * head * jnp.sum(lengths * (lengths + 1) / 2)
    return Work(cycles, jnp.maximum(memory - busy, 0), arrays, read, written, macs)
