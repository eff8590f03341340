"""Why a design cannot exist or cannot run a workload, as numbers that can be traced and counted."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from neupims.machine.hardware import Hardware
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.timing.capacity import find_overflow
from neupims.timing.gemm import holds_tile
from neupims.timing.split import is_split

# By code; the code 0 is a design that is possible, and `evaluator.NOT_FINITE`, -1, the last reason.
REASONS = (
    "",
    "heads do not divide over the devices of a layer",
    "experts or the devices of a layer do not divide into groups (ep)",
    "more groups of layers than layers",
    "a request on a channel that does not exist",
    "pages longer than a row",
    "kv_split does not divide the channels, or has no meaning in this fidelity",
    "the scratchpad holds no three blocks as wide as an array",
    "weights exceed the memory",
    "a request alone exceeds the memory beside the weights",
    "a request alone exceeds a channel beside the weights (parallel.kv_split spreads it)",
    "the batch exceeds the memory beside the weights",
    "the requests of a channel exceed it",
    "not timed: a time or an energy is not finite",
)


def reason_code(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System = "neupims",
    fidelity: Fidelity = "simulator",
    full_channels: bool = False,
    most_channels: int | None = None,
) -> Int[Array, ""]:
    """Returns the code of the first reason that holds, or 0 if the design is possible.

    Args:
        hardware: The machine; numbers may be traced.
        model: The model.
        batch: The requests; those of length 0 do not count.
        parallel: How the model is spread over devices.
        system: The system; "gpu" has the GPU's memory.
        fidelity: The layout of keys and values in tiles, "simulator" or "intended".
        full_channels: Whether the requests of a channel may overflow it while the whole memory
            holds them, as in the public simulator.
        most_channels: Upper bound of the channels, where their number is traced.
    """
    with_pim = system in PIM_SYSTEMS
    heads, kv_heads, experts = map(jnp.asarray, (model.heads, model.kv_heads, model.experts))
    tp, ep = jnp.asarray(parallel.tp), jnp.asarray(parallel.ep)
    there = batch.seq_lens > 0
    lost = jnp.where(there, batch.channels, 0).max() >= hardware.hbm.num_channels
    over = find_overflow(
        *(hardware, model, batch, parallel),
        system=system,
        fidelity=fidelity,
        most_channels=most_channels,
    )
    reasons = (
        (heads % tp != 0) | ((kv_heads % tp != 0) & (tp % kv_heads != 0)),
        (tp % ep != 0) | (experts % ep != 0) | ((ep > 1) & (experts <= 0)),
        jnp.asarray(parallel.pp) > model.layers,
        lost & (system != "gpu"),
        (jnp.asarray(hardware.pim.page_bytes) > hardware.hbm.row_bytes) & with_pim,
        ~is_split(hardware, parallel, fidelity) & with_pim,
        ~holds_tile(hardware) & (system != "gpu"),
        over.weights,
        over.request & (not with_pim),
        over.request & with_pim,
        over.batch,
        over.channel & (not full_channels),
    )
    holds = jnp.stack([jnp.asarray(each) for each in reasons])
    return jnp.where(holds.any(), 1 + jnp.argmax(holds), 0)
