"""What a device's memory must hold: weights, activations, and the keys and values of requests.

Without PIM, keys and values lie anywhere in the memory. With PIM, those of a request lie in one
channel, in tiles; a tile is the same row of all banks of a channel.

Source: src/scheduler/Scheduler.cc of the public simulator, and the paper, section 6: keys are kept
in tiles of as many tokens as banks, values in tiles of as many tokens as a row has numbers.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from neupims.machine.division import ceil_divide
from neupims.machine.hardware import Hardware, banks, memory_bytes
from neupims.machine.layer_kinds import attended, other_mlps
from neupims.machine.model_size import latent_parameters, layer_weight_bytes
from neupims.machine.record import Number
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import (
    FLOAT16_BYTES,
    Batch,
    Decoder,
    Parallel,
    kv_cache_bytes,
    weight_bytes,
)
from neupims.timing.layout import heads_of_device, layer_tiles
from neupims.timing.shapes import (
    expanded_latents,
    fc1_sides,
    fc2_sides,
    latent_queries,
    latent_values,
    projection_sides,
    qkv_sides,
)
from neupims.timing.split import group_of_channels, piece_lengths


class Overflow(NamedTuple):
    """What exceeds the memory of a device; each is true where it does."""

    weights: Bool[Array, ""]  # the weights alone
    request: Bool[Array, ""]  # the longest request, beside weights and activations
    batch: Bool[Array, ""]  # all requests together
    channel: Bool[Array, ""]  # the requests of one channel together; False without PIM


def device_bytes(hardware: Hardware, system: System) -> Number:
    """Returns the bytes of the memory of one device.

    Args:
        hardware: The machine.
        system: The system; "gpu" has the GPU's memory, others have the HBM.
    """
    return hardware.gpu.memory_bytes if system == "gpu" else memory_bytes(hardware.hbm)


def device_weight_bytes(model: Decoder, parallel: Parallel) -> Number:
    """Returns the bytes of the weights of the device that has the most layers.

    With more than one group of layers, it has one of embeddings and LM head. The matrices that make
    latents lie on every device of a layer.

    Args:
        model: The model.
        parallel: How the model is spread over devices.
    """
    layers = layer_weight_bytes(model) * layers_of_device(model, parallel) / model.layers
    tables = weight_bytes(model) - layer_weight_bytes(model)
    one = jnp.where(jnp.asarray(model.tied_embeddings) > 0, tables, tables / 2)
    shared = (layers + jnp.where(jnp.asarray(parallel.pp) > 1, one, tables)) / parallel.tp
    latents = model.weight_bits / 8 * latent_parameters(model) * layers_of_device(model, parallel)
    return shared + latents * (1 - 1 / parallel.tp)


def layers_of_device(model: Decoder, parallel: Parallel) -> Number:
    """Returns the layers of the device that has the most.

    Args:
        model: The model.
        parallel: How the model is spread over devices.
    """
    return ceil_divide(model.layers, parallel.pp)


def activation_bytes(model: Decoder, parallel: Parallel, tokens: Number) -> Number:
    """Returns the most bytes that activations take at once on a device.

    These are the residual stream, and the inputs and outputs of the widest operation of a layer.
    Inputs of products with weights have `activation_bits`, all else 16 bits.

    Args:
        model: The model.
        parallel: How the model is spread over devices.
        tokens: The tokens that are computed together.
    """
    narrow = model.activation_bits / 8  # bytes of an input of a product
    products, activations = [qkv_sides(model, parallel), projection_sides(model, parallel)], []
    latent = 1.0 * (jnp.asarray(model.kv_rank) > 0)
    products += [
        (latent * each.count * each.inner, latent * each.count * each.features)
        for of_latents in (latent_queries, latent_values, expanded_latents)
        for each in of_latents(model, parallel)
    ]
    for mlp in (model, *other_mlps(model)):
        fc1, fc2 = fc1_sides(mlp, parallel), fc2_sides(mlp, parallel)
        products += [fc1, fc2]
        activations.append(FLOAT16_BYTES * fc1[1] + narrow * fc2[0])
    each = [narrow * inner + FLOAT16_BYTES * outer for inner, outer in products]
    return tokens * (FLOAT16_BYTES * model.width + reduce(jnp.maximum, each + activations))


def request_tiles(
    hardware: Hardware,
    model: Decoder,
    seq_lens,
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
) -> Float[Array, " r"]:
    """Returns the tiles of the keys and values of each request, over all layers of one device.

    With `parallel.kv_split`, these are the tiles on each channel that the request lies in. Layers
    with a window keep its last tokens alone.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,).
        parallel: How the model is spread over devices.
        fidelity: The layout of keys and values (`timing.layout`), "simulator" or "intended".
    """

    def tiles(lengths):
        if fidelity == "intended":
            lengths = piece_lengths(lengths, parallel)
        return layer_tiles(hardware, model, lengths, parallel, fidelity=fidelity)

    windowed = 1.0 * model.window_layers / model.layers  # of the layers
    seen = tiles(attended(model, jnp.asarray(seq_lens)))
    mean = windowed * seen + (1 - windowed) * tiles(seq_lens)
    return mean * layers_of_device(model, parallel)


def request_bytes(
    hardware: Hardware,
    model: Decoder,
    seq_lens,
    parallel: Parallel,
    *,
    system: System,
    fidelity: Fidelity = "simulator",
) -> Float[Array, " r"]:
    """Returns the bytes of the keys and values of each request on one device.

    With PIM and `parallel.kv_split`, these are the bytes on each channel that the request lies in.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,).
        parallel: How the model is spread over devices.
        system: The system; with PIM they are whole tiles.
        fidelity: The layout of keys and values in tiles, "simulator" or "intended".
    """
    if system in PIM_SYSTEMS:
        tiles = request_tiles(hardware, model, seq_lens, parallel, fidelity=fidelity)
        return tiles * tile_bytes(hardware)
    _, kv_heads = heads_of_device(model, parallel)
    # Every device of a layer has the whole latent.
    heads = jnp.where(jnp.asarray(model.kv_rank) > 0, 1.0, kv_heads / model.kv_heads)
    layers = layers_of_device(model, parallel) / model.layers
    return kv_cache_bytes(model, jnp.asarray(seq_lens) * 1.0) * heads * layers


def pieces(parallel: Parallel, system: System) -> Number:
    """Returns the channels over which the keys and values of a request are spread; 1 without PIM.

    Args:
        parallel: How a request is spread over channels.
        system: The system.
    """
    return parallel.kv_split if system in PIM_SYSTEMS else 1


def tile_bytes(hardware: Hardware) -> Number:
    """Returns the bytes of one row of all banks of a channel.

    Args:
        hardware: The machine.
    """
    return banks(hardware.hbm) * hardware.hbm.row_bytes


def channel_tiles(
    hardware: Hardware, model: Decoder, parallel: Parallel, tokens: Number = 0
) -> Float[Array, ""]:
    """Returns the tiles of one channel beside weights and activations; negative if they overflow.

    Args:
        hardware: The machine.
        model: The model.
        parallel: How the model is spread over devices.
        tokens: The tokens that are computed together, for their activations (default: leave
            activations out).
    """
    used = device_weight_bytes(model, parallel) + activation_bytes(model, parallel, tokens)
    free = memory_bytes(hardware.hbm) - used
    return jnp.floor(free / hardware.hbm.num_channels / tile_bytes(hardware))


def free_bytes(
    hardware: Hardware, model: Decoder, parallel: Parallel, system: System, tokens: Number
) -> tuple[Number, Number]:
    """Returns the bytes that one request may use, and those that all requests may use.

    With PIM these are the whole tiles of a channel and of all channels; else they are the same.

    Args:
        hardware: The machine.
        model: The model.
        parallel: How the model is spread over devices.
        system: The system.
        tokens: The tokens that are computed together, for their activations.
    """
    if system in PIM_SYSTEMS:
        one = channel_tiles(hardware, model, parallel, tokens) * tile_bytes(hardware)
        return one, one * hardware.hbm.num_channels
    used = device_weight_bytes(model, parallel) + activation_bytes(model, parallel, tokens)
    free = device_bytes(hardware, system) - used
    return free, free


def find_overflow(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System = "neupims",
    fidelity: Fidelity = "simulator",
    prefill: bool = False,
    most_channels: int | None = None,
) -> Overflow:
    """Returns what of a batch exceeds the memory of a device. Numbers may be traced.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests, (r,); those of length 0 do not count.
        parallel: How the model is spread over devices.
        system: The system; "gpu" has the GPU's memory.
        fidelity: The layout of keys and values in tiles, "simulator" or "intended".
        prefill: Whether all tokens of the requests are computed together, not one of each.
        most_channels: Upper bound of the channels, where their number is traced (default: that of
            the hardware).
    """
    lengths = jnp.asarray(batch.seq_lens)
    tokens = jnp.sum(lengths * 1.0 if prefill else lengths > 0)
    of_request = request_bytes(hardware, model, lengths, parallel, system=system, fidelity=fidelity)
    one, every = free_bytes(hardware, model, parallel, system, tokens)
    fullest: Number = 0.0
    if system in PIM_SYSTEMS:
        channels = int(hardware.hbm.num_channels) if most_channels is None else most_channels
        groups = group_of_channels(batch.channels, hardware, parallel)
        fullest = jax.ops.segment_sum(of_request, groups, channels).max()
    found = (
        device_weight_bytes(model, parallel) > device_bytes(hardware, system),
        of_request.max() > one,
        of_request.sum() * pieces(parallel, system) > every,
        jnp.asarray(fullest > one) & (system in PIM_SYSTEMS),
    )
    return Overflow(*map(jnp.asarray, found))
