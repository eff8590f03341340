"""What fits the memory of a device: the largest batch at a context length, the longest context."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from neupims.machine.case import select_model, select_system
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import find_mix
from neupims.machine.record import instead, to_values
from neupims.machine.supported import check_latent
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import LONGEST, Decoder, Parallel, make_batch
from neupims.timing.capacity import (
    activation_bytes,
    device_bytes,
    device_weight_bytes,
    free_bytes,
    pieces,
    request_bytes,
)
from neupims.timing.memory_check import list_mends
from neupims.timing.split import check_split

Binding = Literal["weights", "channel", "memory", "limit"]
MOST_REQUESTS = 2**20


class Bound(NamedTuple):
    """The largest number that fits."""

    value: int  # the smaller one of the next two; 0 where none fits
    channel: int | None  # that each channel holds its share; None without PIM
    memory: int  # that the whole memory holds
    # What bounds the value: the weights, which leave no room; a channel; the whole memory; or
    # "limit", the largest number that is tried.
    binding: Binding


@dataclass(frozen=True)
class Fit:
    """What fits the memory of one device; bytes are those of one device, tokens those of a request.

    Requests have equal contexts and are dealt evenly to the channels.
    """

    model: str  # name or file
    system: System  # one of SYSTEMS
    fidelity: Fidelity  # the layout of keys and values
    tp: int  # devices that share a layer
    pp: int  # groups of layers
    memory_bytes: float  # of the memory
    weight_bytes: float  # of the weights
    activation_bytes: float  # of one token of each request of the batch
    kv_bytes: float  # of the keys and values of the batch, as they are stored
    context: int  # tokens of each request: as given, or the longest
    batch: int  # requests: as given, or the most
    largest_batch: Bound | None  # at the given context; None where none was given
    largest_context: Bound | None  # of the given batch, or of one request if nothing was given
    fits: bool  # whether the batch fits at this context
    kv_bytes_per_token: float  # at this context, with the padding of tiles
    channel_tokens_left: int | None  # of one more request on the fullest channel; None without PIM
    memory_tokens_left: int  # of more requests of this context, in the whole memory
    # How many would do where what was asked does not fit, and with `kv_split`; None where it does.
    devices: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of JSON, as `fit --json` prints them."""
        return to_values(self)


def fit(
    model: str | Path,
    *,
    system: str = "neupims",
    hardware: str | Path = "neupims",
    changes: Mapping[str, float | str] | None = None,
    tp: int | None = None,
    pp: int | None = None,
    kv_split: int | None = None,
    context: int | None = None,
    batch: int | None = None,
    fidelity: Fidelity = "simulator",
) -> Fit:
    """Returns the largest batch at a context, or the longest context of a batch, and what is left.

    Weights, activations of a decode step, keys and values must fit each device. With pp groups,
    the batch is that of all groups: each has 1 / pp of it at a time.

    Args:
        model: A named model, or a TOML or JSON file.
        system: "neupims", "npu-pim", "npu-only", "gpu", or a spelling of the validation files.
        hardware: A named machine, or a TOML or JSON file.
        changes: Fields of the hardware by dotted name.
        tp: Devices that share a layer (default: as published for the model, else 1).
        pp: Groups into which the layers are cut (default: as published, else 1).
        kv_split: Channels that share the keys and values of a request (default: 1).
        context: Tokens of each request (default: find the longest context of the batch).
        batch: Requests (default: find the most at the context; one if no context is given).
        fidelity: The layout of keys and values in the tiles of PIM: "simulator", or "intended",
            which fills the rows.

    Raises:
        ValueError: A name is unknown, a value is impossible, or the model has latent attention,
            for which the public simulator has no layout.
        OSError: A file cannot be read.

    Example:
        >>> from neupims import fit
        >>> fit("llama3-8b", system="gpu", context=2048).largest_batch.value
        96
    """
    for name, value, most in (("context", context, LONGEST), ("batch", batch, MOST_REQUESTS)):
        if value is not None and (value != int(value) or not 1 <= value <= most):
            raise ValueError(f"{name} must be {instead(value, 1, most, True)}")
    known, _, machine = select_system(system, hardware=hardware, changes=changes)
    name, decoder, parallel = select_model(model, tp=tp, pp=pp, kv_split=kv_split)
    check_split(
        parallel.kv_split, system=known, fidelity=fidelity, channels=int(machine.hbm.num_channels)
    )
    if known in PIM_SYSTEMS:
        check_latent(find_mix(decoder), system=known, fidelity=fidelity)
    room = _Room(machine, decoder, parallel, known, fidelity)
    asked = (1 if batch is None else batch, context or 1)
    most_requests = most_tokens = None
    if context is None:
        batch = 1 if batch is None else batch
        most_tokens = room.bound(partial(room.left, batch), LONGEST)
        context = most_tokens.value
    elif batch is None:
        most_requests = room.bound(partial(room.left, tokens=context), MOST_REQUESTS)
        batch = most_requests.value
    size = room.kv_bytes(max(context, 1)) * int(pieces(parallel, known))
    channel_left, memory_left = room.left(batch, context)
    fits = bool(context and batch and channel_left >= 0 and memory_left >= 0)
    return Fit(
        model=name,
        system=known,
        fidelity=fidelity,
        tp=int(parallel.tp),
        pp=int(parallel.pp),
        memory_bytes=float(device_bytes(machine, known)),
        weight_bytes=float(device_weight_bytes(decoder, parallel)),
        activation_bytes=float(activation_bytes(decoder, parallel, batch)),
        kv_bytes=size * batch if context else 0.0,
        context=context,
        batch=batch,
        largest_batch=most_requests,
        largest_context=most_tokens,
        fits=fits,
        kv_bytes_per_token=size / max(context, 1),
        channel_tokens_left=room.tokens_of(channel_left) if known in PIM_SYSTEMS else None,
        memory_tokens_left=int(max(memory_left, 0.0) / size * max(context, 1)),
        devices=None if fits else room.say_devices(*asked),
    )


@dataclass(frozen=True)
class _Room:
    """The memory of a device for requests of equal contexts, dealt evenly to the channels."""

    hardware: Hardware
    model: Decoder
    parallel: Parallel
    system: System
    fidelity: Fidelity

    @property
    def channels(self) -> int:
        """The parts of the memory that hold requests, each on its own: groups of channels."""
        if self.system not in PIM_SYSTEMS:
            return 1
        return int(self.hardware.hbm.num_channels) // int(self.parallel.kv_split)

    def kv_bytes(self, tokens: int) -> float:
        """Returns the bytes of the keys and values of one request."""
        records = (self.hardware, self.model, np.array([tokens]), self.parallel)
        options: dict[str, Any] = {"system": self.system, "fidelity": self.fidelity}
        return float(request_bytes(*records, **options)[0])

    def left(self, requests: int, tokens: int) -> tuple[float, float]:
        """Returns the bytes left on the fullest channel and in the whole memory; may be negative.

        Without PIM they are the same.
        """
        size = self.kv_bytes(tokens) if tokens else 0.0
        parts = int(pieces(self.parallel, self.system))
        one, every = free_bytes(self.hardware, self.model, self.parallel, self.system, requests)
        return float(one) - size * -(-requests // self.channels), float(
            every
        ) - size * requests * parts

    def tokens_of(self, size: float) -> int:
        """Returns the longest context of one request that these bytes hold."""
        return _bisect(lambda tokens: self.kv_bytes(tokens) <= size, LONGEST)

    def bound(self, left: Callable[[int], tuple[float, float]], most: int) -> Bound:
        """Returns the largest number, up to `most`, that leaves bytes."""
        channel = _bisect(lambda number: left(number)[0] >= 0, most)
        memory = _bisect(lambda number: left(number)[1] >= 0, most)
        value = min(channel, memory)
        whole = self.channels == 1 or memory < channel or memory == 0
        binding: Binding = "memory" if whole else "channel"
        if value == most:
            binding = "limit"
        if self.left(1, 0)[1] < 0:
            binding = "weights"
        return Bound(value, channel if self.system in PIM_SYSTEMS else None, memory, binding)

    def say_devices(self, requests: int, tokens: int) -> str:
        """Returns how many devices would hold requests of equal contexts, dealt evenly."""
        channels = np.arange(requests) % self.channels * int(self.parallel.kv_split)
        batch = make_batch(
            np.full(requests, tokens), channels, num_channels=int(self.hardware.hbm.num_channels)
        )
        records = (self.hardware, self.model, batch, self.parallel)
        return "; ".join(list_mends(*records, system=self.system, fidelity=self.fidelity))


def _bisect(holds: Callable[[int], bool], most: int) -> int:
    """Returns the largest number from 1 to `most` for which `holds` is true; 0 if there is none."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
