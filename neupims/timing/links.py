"""Messages between the devices of a model, and the time that they take on the link."""

from typing import NamedTuple

import jax.numpy as jnp

from neupims.machine.hardware import Hardware
from neupims.machine.record import Number
from neupims.machine.workload import FLOAT16_BYTES, Decoder, Parallel


class Messages(NamedTuple):
    """Messages of one size that one device sends one after another."""

    count: Number  # messages
    each_bytes: Number  # of one message


def messages(
    model: Decoder, parallel: Parallel, layers: Number, tokens: Number, sub_batches: Number
) -> tuple[Messages, Messages]:
    """Returns the messages that a device sends in one iteration.

    In each layer two ring all-reduces of the activations of each sub-batch go among the devices
    that share it. After its last layer a device sends the activations to the next group.

    Args:
        model: The model; its width is used.
        parallel: How it is spread over devices.
        layers: The layers of one device.
        tokens: The tokens of all sub-batches.
        sub_batches: The number of sub-batches that have requests.

    Returns:
        The messages of the all-reduces, and those to the next group.
    """
    shares, activations = 1.0 * parallel.tp, FLOAT16_BYTES * tokens * model.width / sub_batches
    return (
        Messages(layers * sub_batches * 2 * 2 * (shares - 1), activations / shares),
        Messages(jnp.where(jnp.asarray(parallel.pp) > 1, sub_batches, 0), activations),
    )


def link_seconds(hardware: Hardware, sent: Messages) -> Number:
    """Returns the seconds that messages take one after another.

    Args:
        hardware: The machine; its link is used.
        sent: The messages.
    """
    each = sent.each_bytes / hardware.link.bandwidth_bytes_per_second
    return sent.count * (each + hardware.link.latency_seconds)
