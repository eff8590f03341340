"""How many tokens' keys and values the memory holds.

A tile is the same row of all banks of a channel.

Source: src/scheduler/Scheduler.cc of the public simulator, and the paper, section 6: keys are kept
in tiles of as many tokens as banks, values in tiles of as many tokens as a row has numbers.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neupims.machine.division import ceil_divide
from neupims.machine.hardware import Hardware, banks, memory_bytes
from neupims.machine.systems import Fidelity
from neupims.machine.workload import Batch, Decoder, Parallel, weight_bytes
from neupims.timing.layout import layer_tiles
from neupims.timing.split import group_of_channels, piece_lengths


def request_tiles(
    hardware: Hardware,
    model: Decoder,
    seq_lens,
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
) -> Float[Array, " r"]:
    """Returns the tiles of the keys and values of each request, over all layers of one device.

    With `parallel.kv_split`, these are the tiles on each channel that the request lies in.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,).
        parallel: How the model is spread over devices.
        fidelity: The layout of keys and values (`timing.layout`), "simulator" or "intended".
    """
    if fidelity == "intended":
        seq_lens = piece_lengths(seq_lens, parallel)
    tiles = layer_tiles(hardware, model, seq_lens, parallel, fidelity=fidelity)
    return tiles * ceil_divide(model.layers, parallel.pp)


def channel_tiles(hardware: Hardware, model: Decoder, parallel: Parallel) -> Float[Array, ""]:
    """Returns the tiles of one channel that the weights leave free; negative if they do not fit.

    Args:
        hardware: The machine.
        model: The model.
        parallel: How the model is spread over devices.
    """
    free = memory_bytes(hardware.hbm) - weight_bytes(model) / (parallel.tp * parallel.pp)
    return jnp.floor(
        free / hardware.hbm.num_channels / (banks(hardware.hbm) * hardware.hbm.row_bytes)
    )


def check_capacity(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
) -> str:
    """Returns a warning if the requests of a channel do not fit together, else an empty string.

    The timing of a batch that does not fit is still defined, and the public simulator gives one: it
    simulates one layer.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests.
        parallel: How the model is spread over devices.
        fidelity: The layout of keys and values, "simulator" or "intended".

    Raises:
        ValueError: One request alone needs more than its channel holds.
    """
    needed = np.asarray(request_tiles(hardware, model, batch.seq_lens, parallel, fidelity=fidelity))
    available = float(channel_tiles(hardware, model, parallel))
    worst = int(needed.argmax())
    if needed[worst] > available:
        raise ValueError(
            f"request {worst} of {int(batch.seq_lens[worst])} tokens needs {int(needed[worst])}"
            f" tiles of its channel, which has {int(max(available, 0))} beside the weights"
        )
    groups = group_of_channels(batch.channels, hardware, parallel)
    loads = np.bincount(np.asarray(groups), weights=needed)
    full = int(loads.argmax())
    if loads[full] > available:
        return (
            f"the requests of channel {full} need {int(loads[full])} tiles, it has {int(available)}"
            " beside the weights: the batch would not fit"
        )
    return ""
