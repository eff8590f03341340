"""The workload: a model spread over devices, and batches of requests."""

import numbers

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from neupims.machine.model import Decoder as Decoder
from neupims.machine.model_size import kv_cache_bytes as kv_cache_bytes
from neupims.machine.model_size import weight_bytes as weight_bytes
from neupims.machine.record import COUNT_MOST, instead, record

FLOAT16_BYTES = 2
SHOWN = 80  # characters of a wrong line that an error repeats
LONGEST = 10**6  # tokens of a request; a longer one is taken for a typing error


@record
class Parallel:
    """How a model is spread over devices, and a request over the channels of each.

    Raises:
        ValueError: A number is not a whole number of at least 1.
    """

    tp: int  # devices that share each layer (tensor parallel)
    pp: int  # groups into which the layers are cut (pipeline parallel)
    kv_split: int = 1  # channels that share the keys and values of a request (`timing.split`)
    # Equal groups of the tp devices, to which the experts of a layer are dealt; the devices of a
    # group share each of its experts.
    ep: int = 1

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, numbers.Integral) or not 1 <= int(value) <= COUNT_MOST:
                raise ValueError(f"{name} must be {instead(value, 1, COUNT_MOST, True)}")


def check_parallel(decoder: Decoder, parallel: Parallel) -> None:
    """Raises unless the heads divide over the devices and each group of devices has a layer.

    Args:
        decoder: The model.
        parallel: How it is spread over devices.

    Raises:
        ValueError: They do not fit together; the sentence names tp, pp or ep.
    """
    if decoder.heads % parallel.tp:
        raise ValueError(f"tp must divide the {decoder.heads} heads, but is {parallel.tp}")
    if decoder.kv_heads % parallel.tp and parallel.tp % decoder.kv_heads:
        raise ValueError(
            f"tp must divide the {decoder.kv_heads} key and value heads or be a multiple of them,"
            f" but is {parallel.tp}"
        )
    if parallel.ep > 1:
        _check_dealt(decoder, parallel)
    if parallel.pp > decoder.layers:
        raise ValueError(f"pp must be at most the {decoder.layers} layers, but is {parallel.pp}")


def _check_dealt(decoder: Decoder, parallel: Parallel) -> None:
    if not decoder.experts:
        raise ValueError(f"ep must be 1 for a model without experts, but is {parallel.ep}")
    for name, number in (("devices of a layer (tp)", parallel.tp), ("experts", decoder.experts)):
        if number % parallel.ep:
            raise ValueError(f"ep must divide the {number} {name}, but is {parallel.ep}")


@record
class Batch:
    """Requests that each get one token, in the order in which their channels serve them.

    A request of length 0 does not count, so that batches of different size can share an axis. A
    batch of schedules is the same record with a leading axis.
    """

    seq_lens: Int[Array, " r"]  # tokens whose keys and values are read
    channels: Int[Array, " r"]  # channel that holds them
    sub_batches: Int[Array, " r"]  # 0 or 1: which half computes it when halves are interleaved


def make_batch(seq_lens, channels, sub_batches=None, *, num_channels: int = 32) -> Batch:
    """Returns a checked batch.

    Args:
        seq_lens: The tokens of each request, (r,).
        channels: The channel that holds each request, (r,).
        sub_batches: The sub-batch of each request, 0 or 1, (r,) (default: by the simulator's rule,
            `halves`).
        num_channels: The channels of the machine.

    Raises:
        ValueError: There is no request; a length is not a whole number from 1 to 10^6; a channel is
            not below `num_channels`; a sub-batch is not 0 or 1.

    Example:
        >>> from neupims import make_batch
        >>> make_batch([300, 512, 40, 77], channels=[0, 1, 0, 1]).sub_batches.tolist()
        [0, 0, 1, 1]
    """
    seq_lens = _as_numbers("the lengths", seq_lens)
    channels = _as_numbers("the channels", channels)
    if seq_lens.ndim != 1 or seq_lens.shape != channels.shape:
        raise ValueError(
            f"one length and one channel for each request, not {seq_lens.shape} lengths and"
            f" {channels.shape} channels"
        )
    if not seq_lens.size:
        raise ValueError("a batch needs at least one request")
    for request, (length, channel) in enumerate(
        zip(seq_lens.tolist(), channels.tolist(), strict=True)
    ):
        if not 1 <= length <= LONGEST or length != int(length):
            raise ValueError(
                f"the length of request {request} must be a whole number from 1 to {LONGEST}, not"
                f" {length}"
            )
        if not 0 <= channel < num_channels or channel != int(channel):
            raise ValueError(
                f"the channel of request {request} must be from 0 to {num_channels - 1}, not"
                f" {channel}"
            )
    if sub_batches is None:
        sub_batches = halves(channels, num_channels)
    else:
        sub_batches = _as_numbers("the sub-batches", sub_batches)
        _check_sub_batches(sub_batches, seq_lens.shape)
    return Batch(*(jnp.asarray(part, jnp.int32) for part in (seq_lens, channels, sub_batches)))


def check_batch(batch: Batch, num_channels: int) -> None:
    """Raises unless a machine can hold the batch. Requests of length 0 do not count.

    Args:
        batch: The batch, (r,).
        num_channels: The channels of the machine.

    Raises:
        ValueError: No request counts; the parts do not fit together; a channel is not below
            `num_channels`.
    """
    if not isinstance(batch, Batch):
        raise ValueError(f"a batch must be a Batch (make_batch), not {type(batch).__name__}")
    names = ("the lengths", "the channels", "the sub-batches")
    lengths, channels, sub_batches = (
        _as_numbers(name, part)
        for name, part in zip(
            names, (batch.seq_lens, batch.channels, batch.sub_batches), strict=True
        )
    )
    counts = lengths > 0
    if not counts.any():
        raise ValueError("a batch needs at least one request")
    length = np.where(counts, lengths, 1)
    make_batch(length, np.where(counts, channels, 0), sub_batches, num_channels=num_channels)


def _as_numbers(name: str, values) -> np.ndarray:
    """Returns values as an array of numbers."""
    try:
        found = np.asarray(values)
    except ValueError:  # rows of different lengths
        found = np.array(None)
    if found.dtype.kind not in "iuf":
        raise ValueError(f"{name} of a batch must be whole numbers, not {str(values)[:SHOWN]!r}")
    return found


def _check_sub_batches(sub_batches: np.ndarray, shape: tuple[int, ...]) -> None:
    if sub_batches.shape != shape:
        raise ValueError(
            f"one sub-batch for each request, not {sub_batches.shape} sub-batches and {shape}"
            " lengths"
        )
    if not np.isin(sub_batches, (0, 1)).all():
        wrong = sub_batches[~np.isin(sub_batches, (0, 1))][0]
        raise ValueError(f"the sub-batch of a request must be 0 or 1, not {wrong:g}")


def halves(channels: Int[Array, " r"], num_channels: int) -> Int[Array, " r"]:
    """Returns the sub-batch of each request by the simulator's rule.

    The first half of each channel's list is sub-batch 0. Channels with an odd number of requests
    give the larger half to sub-batch 0 and to sub-batch 1 in turn, sub-batch 0 first.

    Args:
        channels: The channel of each request, (r,).
        num_channels: The channels of the machine.

    Reference:
        `_partition_alg_simple` in src/scheduler/Scheduler.cc of the public simulator; algorithm 3
        of the paper.
    """
    sub_batches = np.zeros(len(channels), np.int32)
    larger_first = True
    for channel in range(num_channels):
        mine = np.flatnonzero(np.asarray(channels) == channel)
        first = len(mine) // 2
        if len(mine) % 2:
            first += larger_first
            larger_first = not larger_first
        sub_batches[mine[first:]] = 1
    return jnp.asarray(sub_batches)
