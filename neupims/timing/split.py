"""Keys and values of one request on several channels of PIM (`Parallel.kv_split`).

With a split over s channels, the tokens of a request lie in s equal pieces, one on each channel of
a group. Of C channels there are C / s groups: channels with the same remainder modulo C / s belong
together. So requests that are dealt to channels 0, 1, 2, ... go to different groups, and each
channel of a group has the same load.

Each channel computes logit and attend of its piece. All logits go to the vector units of the NPU in
any case, so softmax is that of the whole row. Only the results of attend are merged: the vector
units add s vectors of each head.

The public simulator keeps a request in one channel, so a split needs "intended" fidelity.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from neupims.machine.division import ceil_divide, floor_divide
from neupims.machine.hardware import Hardware
from neupims.machine.model import Decoder
from neupims.machine.record import Number
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import Parallel


def piece_lengths(seq_lens: Number, parallel: Parallel) -> Number:
    """Returns the tokens of each request on each of its channels, rounded up.

    Args:
        seq_lens: The tokens of each request, (r,).
        parallel: How a request is spread over channels.
    """
    return ceil_divide(jnp.asarray(seq_lens), parallel.kv_split).astype(jnp.int32)


def group_of_channels(channels: Number, hardware: Hardware, parallel: Parallel) -> Number:
    """Returns the group of each channel, from 0 on, as 32-bit whole numbers.

    Args:
        channels: Channels.
        hardware: The machine; its channels are counted.
        parallel: How a request is spread over channels.
    """
    groups = jnp.maximum(floor_divide(hardware.hbm.num_channels, parallel.kv_split), 1)
    return (jnp.asarray(channels) % groups.astype(jnp.int32)).astype(jnp.int32)


def spread_over_channels(
    sums: Float[Array, "2 pieces channels 2 ..."], hardware: Hardware, parallel: Parallel
) -> Float[Array, "2 pieces channels 2 ..."]:
    """Returns the work of each channel from that of groups; each channel has that of its group.

    Args:
        sums: The work of each group, with zeros behind the last one.
        hardware: The machine; its channels are counted.
        parallel: How a request is spread over channels.
    """
    channels = jnp.arange(sums.shape[2]).reshape(-1, *[1] * (sums.ndim - 4))
    groups = group_of_channels(channels, hardware, parallel)  # (channels, *designs)
    if groups.size == len(groups):  # the same in all designs
        spread = sums[:, :, groups.reshape(-1)]
    else:
        spread = jnp.take_along_axis(sums, groups[None, None, :, None], axis=2)
    return jnp.where((channels < hardware.hbm.num_channels)[:, None], spread, 0.0)


def merge_cycles(
    hardware: Hardware, model: Decoder, parallel: Parallel, requests: Number, heads: Number
) -> Number:
    """Returns the core cycles in which the vector units add the results of attend.

    Args:
        hardware: The machine; its vector units are used.
        model: The model; the channels of a value are used.
        parallel: How a request is spread over channels.
        requests: The number of requests.
        heads: The query heads of a device.
    """
    sums = ceil_divide(model.attended_dim, hardware.npu.vector_lanes) * (parallel.kv_split - 1)
    return requests * heads * sums / hardware.npu.vector_units


def is_split(hardware: Hardware, parallel: Parallel, fidelity: Fidelity) -> Bool[Array, ""]:
    """Returns whether the channels of the machine can be grouped as asked for.

    Args:
        hardware: The machine; its channels may be traced.
        parallel: How a request is spread over channels; may be traced.
        fidelity: "simulator", where a split is not possible, or "intended".
    """
    split = jnp.asarray(parallel.kv_split)
    if fidelity == "simulator":
        return split == 1
    return (jnp.asarray(hardware.hbm.num_channels) % split == 0) & (split >= 1)


def check_split(
    split: Number, *, system: System, fidelity: Fidelity, channels: Number | None = None
) -> None:
    """Raises unless the keys and values of a request can be spread over channels as asked for.

    Traced numbers pass: there `neupims.simulate` flags its result.

    Args:
        split: The channels that share a request.
        system: The system that computes attention.
        fidelity: "simulator" or "intended".
        channels: The channels of the machine, which the split must divide (default: not checked).

    Raises:
        ValueError: The system or the fidelity knows no split, or the split does not divide the
            channels.
    """
    if isinstance(split, jax.core.Tracer) or np.all(np.asarray(split) == 1):
        return
    if system not in PIM_SYSTEMS:
        raise ValueError(
            f"kv_split spreads keys over the channels of PIM: leave it out with the system {system}"
        )
    if fidelity == "simulator":
        raise ValueError(
            "kv_split above 1 needs the fidelity intended, because the public simulator keeps a"
            " request in one channel: --fidelity intended"
        )
    if channels is None or isinstance(channels, jax.core.Tracer):
        return
    if np.any(np.asarray(channels) % np.asarray(split)):
        raise ValueError(f"kv_split must divide the {channels} channels, but is {split}")
