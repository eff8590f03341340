"""Where keys and values lie in the rows of a channel, and the PIM commands that read them.

A request's keys and values lie in one channel. A tile is the same row of all banks of the channel.
The vector's buffer of a channel holds as many numbers as a tile uses of a row, and a group of
commands is one GWRITE into it and the tiles that it multiplies.

"simulator" fidelity is the layout of the public simulator. In a row of keys each bank holds one
token, with as many heads as fit. In a row of values each bank holds one channel of a head, with as
many tokens as fit. Each query head is a pass of its own, also where query heads share keys.

"intended" fills rows and lets the queries of a group share one opening of a row. Both follow from
one rule: the buffer is full of vectors, and a row is full of what they multiply.

- Keys: the buffer holds the queries of one or more groups. A row holds their keys of as many tokens
  as fit, and each token is multiplied by each query of its group.
- Values: the buffer holds the weights of q queries for as many tokens as fit. A row holds these
  tokens for q channels of the head, and each channel is multiplied by the weights of each query.

A group of queries that does not fit the buffer takes several passes. More queries in a pass make a
tile longer, and long tiles fit badly between two refreshes, so the layout is the one of a few
numbers of passes whose tokens take the least time. Where queries do not divide evenly over passes,
each pass has the mean number of them.

Numbers of the cache of 8 or 4 bits (`kv_bits`) fill a row, and the buffer, with 2 or 4 times as
many. A command multiplies its 32 bytes of them: the vector has the type of the cache.

Latent attention has one "head" that all query heads of a device share: its keys are the latent and
the rotary key of a token, its values the latent again. Keys lie token by token, values channel by
channel, so PIM keeps the latent twice. A key that is longer than a row takes several ("parts").

Source: src/tensor/PIMTensor.cc, src/operations/NeuPIMSLogitSoftmax.cc and NeuPIMSAttend.cc of the
    public simulator; its pull request 8 shows rows with several tokens of a head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neupims.machine.division import ceil_divide, divide, floor_divide
from neupims.machine.hardware import Hardware, banks
from neupims.machine.record import Number
from neupims.machine.systems import Fidelity
from neupims.machine.workload import Decoder, Parallel
from neupims.timing.pim_commands import Groups, pim_timing, smooth_group_cycles

# "intended" tries the least number of passes over a row, and its multiples by these.
MORE_PASSES = (1.0, 2.0, 4.0, 8.0)
MANY_TILES = 64.0  # of a group: its GWRITE then takes little of its time


class KeyLayout(NamedTuple):
    """How a row of keys is filled and read."""

    passes: Number  # over each row, until all queries of a group have met it
    queries: Number  # of a head, in one pass: the mean
    heads: Number  # whose keys share a row
    tokens: Number  # of each of these heads in the row of a bank
    last_heads: Number  # the same of the last row, which has the remaining heads
    last_tokens: Number
    rows: Number  # of all heads and these tokens, where a vector fits a row
    parts: Number  # rows that one vector takes; more than 1 where it is longer than a row


class ValueLayout(NamedTuple):
    """How a row of values is filled and read."""

    passes: Number  # over each row, until all queries of a group have met it
    queries: Number  # in one pass: the mean
    channels: Number  # of a head in the row of a bank
    tokens: Number  # of each channel in the row
    tiles: Number  # that hold all channels of a head for these tokens
    last_channels: Number  # in the last one of them


def heads_of_device(model: Decoder, parallel: Parallel) -> tuple[Number, Number]:
    """Returns the query heads, and the key and value heads, of one device.

    Where there are fewer key and value heads than devices, several devices hold the same ones. A
    latent is one head, which each device holds.

    Args:
        model: The model.
        parallel: How many devices share a layer.
    """
    latent = jnp.asarray(model.kv_rank) > 0
    kv_heads = jnp.where(latent, 1.0, jnp.maximum(divide(model.kv_heads, parallel.tp), 1.0))
    return divide(model.heads, parallel.tp), kv_heads


def page_elements(hardware: Hardware, model: Decoder) -> Number:
    """Returns the numbers of the key-value cache in the part of a row that a tile uses.

    Args:
        hardware: The machine; its `pim.page_bytes` matters.
        model: The model; its `kv_bits` matter.
    """
    return floor_divide(8.0 * hardware.pim.page_bytes, model.kv_bits)


def products_of_command(hardware: Hardware, model: Decoder) -> Number:
    """Returns the products of one command in a bank: as many as its bytes hold numbers of a key.

    Args:
        hardware: The machine; its `pim.macs_per_bank` is for numbers of 16 bits.
        model: The model; its `kv_bits` matter.
    """
    return divide(16.0 * hardware.pim.macs_per_bank, model.kv_bits)


def logit_groups(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Float[Array, "..."],
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
) -> tuple[Groups, Groups]:
    """Returns the groups of keys times query: those with a full row of heads, and the last one.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,), or (r, designs) where fields of the records are
            arrays of designs.
        parallel: How many devices share a layer.
        fidelity: "simulator" or "intended".
    """
    tokens_of_bank = ceil_divide(seq_lens, banks(hardware.hbm))
    there = 1.0 * (seq_lens > 0)
    if fidelity == "simulator":
        heads, kv_heads = heads_of_device(model, parallel)
        width, page = 1.0 * model.head_dim, page_elements(hardware, model)
        rows = ceil_divide(kv_heads * width, page)
        full = ceil_divide(page, width)
        rest = kv_heads * width - (rows - 1) * page
        passes = divide(heads, kv_heads)
        products = ceil_divide(width, products_of_command(hardware, model))
        last = jnp.where(rest >= page, full, ceil_divide(rest, width))
        return (
            Groups(there * passes * (rows - 1), tokens_of_bank, full, products, full),
            Groups(there * passes, tokens_of_bank, last, products, last),
        )
    keys = key_layout(hardware, model, parallel)
    products = _key_products(hardware, model)

    def read(rows, heads, tokens) -> Groups:
        tiles = ceil_divide(tokens_of_bank, tokens)
        last = tokens_of_bank - (tiles - 1) * tokens
        results = jnp.where(tiles > 1, tokens, last) * heads * keys.queries
        count = there * keys.passes * keys.parts * rows
        return Groups(count, tiles, results, products, last * heads * keys.queries)

    return read(keys.rows - 1, keys.heads, keys.tokens), read(
        1.0, keys.last_heads, keys.last_tokens
    )


def attend_groups(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Float[Array, "..."],
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
) -> tuple[Groups, Groups]:
    """Returns the groups of values times weights: those with a full row of tokens, and the last.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: As in `logit_groups`.
        parallel: How many devices share a layer.
        fidelity: "simulator" or "intended".
    """
    heads, kv_heads = heads_of_device(model, parallel)
    macs = products_of_command(hardware, model)
    there = 1.0 * (seq_lens > 0)
    if fidelity == "simulator":
        width, page = 1.0 * model.head_dim, page_elements(hardware, model)
        rows = ceil_divide(seq_lens, page)
        rest = seq_lens - (rows - 1) * page
        tiles = ceil_divide(width, banks(hardware.hbm))
        return (
            Groups(there * heads * (rows - 1), tiles, 1.0, floor_divide(page, macs), 1.0),
            Groups(there * heads, tiles, 1.0, there * ceil_divide(rest, macs), 1.0),
        )
    values = value_layout(hardware, model, parallel)
    rows = ceil_divide(seq_lens, values.tokens)
    rest = seq_lens - (rows - 1) * values.tokens
    results, last = values.channels * values.queries, values.last_channels * values.queries
    results = jnp.where(values.tiles > 1, results, last)
    count = there * values.passes * kv_heads
    return (
        Groups(count * (rows - 1), values.tiles, results, ceil_divide(values.tokens, macs), last),
        Groups(count, values.tiles, results, there * ceil_divide(rest, macs), last),
    )


def layer_tiles(
    hardware: Hardware,
    model: Decoder,
    seq_lens,
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
) -> Float[Array, " r"]:
    """Returns the tiles that the keys and values of each request take in one layer, (r,).

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,).
        parallel: How many devices share a layer.
        fidelity: "simulator" or "intended".
    """
    _, kv_heads = heads_of_device(model, parallel)
    lengths = jnp.asarray(seq_lens) * 1.0
    tokens_of_bank = ceil_divide(lengths, banks(hardware.hbm))
    if fidelity == "simulator":
        width, page = kv_heads * model.head_dim, page_elements(hardware, model)
        keys = tokens_of_bank * ceil_divide(width, page)
        return keys + ceil_divide(lengths, page) * ceil_divide(width, banks(hardware.hbm))
    key = key_layout(hardware, model, parallel)
    value = value_layout(hardware, model, parallel)
    rows = (key.rows - 1) * ceil_divide(tokens_of_bank, key.tokens)
    keys = key.parts * (rows + ceil_divide(tokens_of_bank, key.last_tokens))
    return keys + kv_heads * ceil_divide(lengths, value.tokens) * value.tiles


def key_layout(hardware: Hardware, model: Decoder, parallel: Parallel) -> KeyLayout:
    """Returns the layout of keys in "intended" fidelity.

    Args:
        hardware: The machine.
        model: The model.
        parallel: How many devices share a layer.
    """
    heads, kv_heads = heads_of_device(model, parallel)
    width, page = 1.0 * model.key_dim, page_elements(hardware, model)
    vectors = jnp.maximum(floor_divide(page, width), 1)  # that a row, or the buffer, holds
    group = divide(heads, kv_heads)
    passes = _passes(ceil_divide(group, vectors), group, (hardware, model, parallel))
    queries = divide(group, passes)
    heads_of_row = jnp.clip(floor_divide(vectors, jnp.ceil(queries)), 1, kv_heads)
    tokens = floor_divide(vectors, heads_of_row)
    results = tokens * heads_of_row * queries
    many = Groups(1.0, MANY_TILES, results, _key_products(hardware, model), results)
    cycles = passes / heads_of_row * smooth_group_cycles(pim_timing(hardware), many) / tokens
    passes, queries, held, tokens = _fastest(cycles, passes, queries, heads_of_row, tokens)
    rows = ceil_divide(kv_heads, held)
    last = kv_heads - (rows - 1) * held
    parts = ceil_divide(width, page)
    return KeyLayout(passes, queries, held, tokens, last, floor_divide(vectors, last), rows, parts)


def value_layout(hardware: Hardware, model: Decoder, parallel: Parallel) -> ValueLayout:
    """Returns the layout of values in "intended" fidelity.

    Args:
        hardware: The machine.
        model: The model.
        parallel: How many devices share a layer.
    """
    heads, kv_heads = heads_of_device(model, parallel)
    width, page = 1.0 * model.attended_dim, page_elements(hardware, model)
    of_bank = ceil_divide(width, banks(hardware.hbm))  # channels of a head that each bank holds
    group = divide(heads, kv_heads)
    least = ceil_divide(group, jnp.minimum(of_bank, page))
    passes = _passes(least, group, (hardware, model, parallel))
    queries = divide(group, passes)
    channels = jnp.ceil(queries)
    tokens = floor_divide(page, channels)
    tiles = ceil_divide(of_bank, channels)
    last = of_bank - (tiles - 1) * channels
    row = Groups(
        1.0,
        tiles,
        jnp.where(tiles > 1, channels, last) * queries,
        ceil_divide(tokens, products_of_command(hardware, model)),
        last * queries,
    )
    cycles = passes * smooth_group_cycles(pim_timing(hardware), row) / tokens
    return ValueLayout(*_fastest(cycles, passes, queries, channels, tokens, tiles, last))


def _passes(least: Number, most: Number, records: Any) -> Number:
    """Returns the numbers of passes that are compared, (choices,), or (choices, designs or 1)."""
    passes = jnp.stack([jnp.minimum(least * more, most) for more in MORE_PASSES])
    designs = max(map(jnp.ndim, jax.tree.leaves(records)))
    return passes.reshape(*passes.shape, *[1] * (1 + designs - passes.ndim))


def _fastest(cycles: Number, *choices: Number) -> tuple[Number, ...]:
    """Returns each of the choices where the cycles are the least."""
    best = jnp.argmin(cycles, axis=0)

    def pick(choice):
        found = jnp.broadcast_to(choice, cycles.shape)
        return sum(jnp.where(best == place, found[place], 0.0) for place in range(len(found)))

    return tuple(pick(choice) for choice in choices)


def _key_products(hardware: Hardware, model: Decoder) -> Number:
    """Returns the products of a key, or of the part of it that fits a row, with a query."""
    width = 1.0 * model.key_dim
    part = jnp.minimum(width, page_elements(hardware, model))
    return ceil_divide(part, products_of_command(hardware, model))
