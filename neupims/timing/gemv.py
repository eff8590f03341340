"""Attention in the memory: the time of requests, in closed form.

The products are logit (keys times query) and attend (values times weights). The work of a request
is a list of groups of PIM commands (`timing.layout`), and `request_work` adds up what each group
takes (`timing.pim_commands`): its mean time in an endless repetition of the group.
`gemv_exact.channel_cycles_exact` follows the same rule command by command.

Source: the commands of src/operations/NeuPIMSLogitSoftmax.cc and NeuPIMSAttend.cc of the public
simulator (github.com/casys-kaist/NeuPIMs).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neupims.machine.division import ceil_divide, floor_divide
from neupims.machine.hardware import Hardware
from neupims.machine.record import Number
from neupims.machine.systems import Fidelity
from neupims.machine.workload import Decoder, Parallel
from neupims.timing.columns import (
    REQUESTS_TOGETHER,
    pack_pairs,
    reduce_requests,
    sum_by_place,
    unpack_pairs,
)
from neupims.timing.layout import attend_groups, logit_groups
from neupims.timing.pim_commands import (
    WAITING,
    Groups,
    PIMCounts,
    Timing,
    group_cycles,
    pim_timing,
    power_of_two,
    smooth_group_cycles,
    total_commands,
)

# Tiles of a group whose costs the closed form computes once for all requests.
TABULATED = 8
ENDLESS = 64.0  # tiles of a group that shows what one more tile takes
# Products of a tile whose costs the closed form computes once; a row of 512 numbers has 32 commands
# of 16.
PRODUCTS = 32
CLASSES = 6  # of these products, up to a power of two each: 1, 2, 4, 8, 16, 32

# From the lengths of requests, (r, *designs), to arrays of that shape: the cycles of logit for each
# wait, those of attend for each wait, and the four numbers of `PIMCounts`.
RequestWork = Callable[[Array], tuple[Array, ...]]


class ChannelWork(NamedTuple):
    """The work of requests, summed by place."""

    cycles: Float[Array, "waits places 2 ..."]  # core cycles of logit and of attend
    requests: Float[Array, "places ..."]  # number of requests
    counts: PIMCounts  # the commands of all places together, (*designs)


def request_work(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Int[Array, " r"],
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
    wait: Number | None = None,
) -> Float[Array, "r 2"]:
    """Returns the core cycles that each request takes of its channel, refreshes included.

    They add over the requests of a channel.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,); a request of length 0 takes no time.
        parallel: How many devices share a layer.
        fidelity: "simulator" packs whole tiles into refresh intervals, as the controller does; in
            "intended" an interval loses its mean share of a tile.
        wait: As in `pim_timing`.

    Returns:
        Core cycles of logit and of attend, (r, 2).
    """
    return request_works(hardware, model, seq_lens, parallel, fidelity=fidelity, waits=(wait,))[0]


def request_works(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Int[Array, " r"],
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
    waits: tuple[Number | None, ...],
    two_buffers: bool = False,
) -> Float[Array, "waits r 2"]:
    """Returns `request_work` for several waits, (waits, r, 2). One loop computes all of them.

    Args:
        hardware: As in `request_work`.
        model: As in `request_work`.
        seq_lens: As in `request_work`.
        parallel: As in `request_work`.
        fidelity: As in `request_work`.
        waits: Values of `wait` as in `pim_timing`, each memory cycles or None.
        two_buffers: Whether the machine is known to have several row buffers; False where it has
            one, or where their number is traced.
    """
    lengths = jnp.asarray(seq_lens) * 1.0
    work = _make_work(hardware, model, lengths, parallel, waits, fidelity, two_buffers)
    cycles = jnp.stack(work(lengths)[: 2 * len(waits)]).reshape(2, len(waits), -1)
    return jnp.moveaxis(cycles, 0, -1)


def channel_work(
    hardware: Hardware,
    model: Decoder,
    lengths: Float[Array, "r ..."],
    places: Int[Array, "r ..."],
    parallel: Parallel,
    *,
    count: int,
    fidelity: Fidelity = "simulator",
    waits: tuple[Number | None, ...],
    two_buffers: bool = False,
) -> ChannelWork:
    """Returns the sums of `request_works` over the requests of each place.

    All designs are computed side by side (`timing.columns`): fields of the records are numbers, or
    arrays of designs.

    Args:
        hardware: As in `request_work`.
        model: As in `request_work`.
        lengths: The tokens of each request, (r, *designs); one of length 0 takes no time.
        places: The place of each request, such as its channel, (r, *designs).
        parallel: As in `request_work`.
        count: The number of places.
        fidelity: As in `request_work`.
        waits: As in `request_works`.
        two_buffers: As in `request_works`.
    """
    work = _make_work(hardware, model, lengths, parallel, waits, fidelity, two_buffers)
    if lengths.size == places.size == len(lengths):  # the same schedule for all designs
        return _sum_side_by_side(work, lengths, places.reshape(-1), count, len(waits))
    return _sum_one_by_one(work, lengths, places, count, len(waits))


def _sum_one_by_one(work: RequestWork, lengths, places, count: int, waits: int) -> ChannelWork:
    """Returns `channel_work` for requests with different places in different designs."""

    # This loop keeps the works in memory, so that they are computed with designs last.
    def of_request(length):
        return [value[0] for value in work(length[None])]

    works = jax.lax.map(of_request, lengths, batch_size=REQUESTS_TOGETHER)  # each (r, *designs)
    cycles, counts = works[: 2 * waits], works[2 * waits :]
    there = jnp.broadcast_to(1.0 * (lengths > 0), cycles[0].shape)
    sums = sum_by_place(jnp.stack([*cycles, there], axis=1), places, count)
    cycles = sums[:, :-1].reshape(count, 2, waits, *sums.shape[2:])
    return ChannelWork(
        jnp.moveaxis(cycles, 2, 0), sums[:, -1], PIMCounts(*(each.sum(axis=0) for each in counts))
    )


def _sum_side_by_side(work: RequestWork, lengths, places, count: int, waits: int) -> ChannelWork:
    """Returns `channel_work` for requests with the same place in all designs, (r,).

    The requests of a place come one after another, those of all places side by side, so that no
    request's work has to be kept.
    """
    places = jnp.where(lengths.reshape(-1) > 0, places, count)
    ordered = lengths[jnp.argsort(places)].reshape(-1)
    held = jnp.zeros(count, jnp.int32).at[places].add(1, mode="drop")
    first = jnp.cumsum(held) - held

    def of_places(number):
        request = jnp.minimum(first + number, len(ordered) - 1)
        mine = jnp.where(number < held, ordered[request], 0.0)
        return pack_pairs(work(mine.reshape(-1, *lengths.shape[1:])))

    def add(number, sums):
        return jax.tree.map(jnp.add, sums, of_places(number))

    zeros = [jnp.zeros(each.shape, each.dtype) for each in jax.eval_shape(of_places, 0)]
    sums = jax.lax.fori_loop(0, held.max(), add, zeros)
    works = unpack_pairs(sums, 2 * waits + len(PIMCounts._fields))
    cycles = jnp.stack(works[: 2 * waits]).reshape(2, waits, *works[0].shape)
    return ChannelWork(
        jnp.moveaxis(cycles, 0, 2),
        held.reshape(-1, *[1] * (lengths.ndim - 1)) * 1.0,
        PIMCounts(*(each.sum(axis=0) for each in works[2 * waits :])),
    )


def _make_work(
    hardware: Hardware,
    model: Decoder,
    lengths: Array,
    parallel: Parallel,
    waits: Sequence[Number | None],
    fidelity: Fidelity,
    two_buffers: bool,
) -> RequestWork:
    """Returns the function that gives the core cycles and the commands of some of the requests.

    Fields of the records are numbers, or arrays of designs. `lengths` are those of all requests,
    (r,), or (r, designs), or (r, 1).
    """
    designs = jnp.broadcast_shapes(
        lengths.shape[1:], *map(jnp.shape, jax.tree.leaves((hardware, model, parallel, waits)))
    )
    to_core = hardware.npu.clock_hz / hardware.hbm.clock_hz
    times = _stack(hardware, waits, designs)

    def groups_of(some):
        return [
            layout(hardware, model, some, parallel, fidelity=fidelity)
            for layout in (logit_groups, attend_groups)
        ]

    tables = None
    if fidelity == "simulator":
        most = reduce_requests(jnp.maximum, lambda some: groups_of(some)[1][1].products, lengths)
        logit, attend = groups_of(jnp.ones(()))
        tables = _make_tables(times, logit, attend, most, designs, two_buffers)

    def work(some):
        logit, attend = groups_of(some)
        if tables is None:
            found = [_smooth_cycles(times, kind) for kind in (logit, attend)]
        else:
            found = [_look_up_logit(tables, *logit), _look_up_attend(tables, *attend)]
        cycles = [jnp.where(some > 0, each * to_core, 0.0) for each in found]
        counts = total_commands((*logit, *attend))
        return *cycles[0], *cycles[1], *(each + jnp.zeros_like(some) for each in counts)

    return work


def _stack(hardware: Hardware, waits: Sequence[Number | None], designs: tuple[int, ...]) -> Timing:
    """Returns timings whose fields that depend on the wait are arrays, (waits, 1, *designs)."""
    each = [pim_timing(hardware, wait) for wait in waits]
    columns = {
        name: jnp.stack([jnp.broadcast_to(1.0 * getattr(times, name), designs) for times in each])
        for name in WAITING
    }
    return each[0]._replace(**{name: column[:, None] for name, column in columns.items()})


def _smooth_cycles(times: Timing, kind: tuple[Groups, Groups]) -> Array:
    cycles = [
        jnp.where(group.groups > 0, group.groups * smooth_group_cycles(times, group), 0.0)
        for group in kind
    ]
    return cycles[0] + cycles[1]


class _Tables(NamedTuple):
    """Memory cycles that requests look up; each is an array (waits, entries, *designs)."""

    row: Array  # of logit's groups of one request, by the tiles of a group
    tile: Array  # of each further tile
    page: Array  # of one group of attend with a full page
    rest: Array  # of the last one, by class of its products
    limits: Array  # products up to which a class goes, (classes, *designs)


def _make_tables(
    times: Timing,
    logit: tuple[Groups, Groups],
    attend: tuple[Groups, Groups],
    most_products: Array,
    designs: tuple[int, ...],
    two_buffers: bool,
) -> _Tables:
    """Returns the tables. One loop makes them, from the groups of a request of one token.

    Groups of logit differ in their number of tiles: the tables have the first few, and each further
    tile takes the same time, as a group of many tiles hides its GWRITE in the rest of an interval.
    The last groups of attend differ in their products: there are as many numbers of them as a row
    has commands, evenly spaced, rounded up. With two row buffers only the controller's estimate
    depends on them, which takes powers of two: a table of these is enough.
    """
    (full_row, last_row), (full_page, last_page) = logit, attend

    def column(values):
        return jnp.asarray(values, jnp.float32).reshape(-1, *[1] * len(designs))

    numbers = column([*range(1, TABULATED + 1), ENDLESS])
    spacing = jnp.maximum(ceil_divide(most_products, PRODUCTS), 1)
    if two_buffers:
        products = power_of_two(spacing) * column(2.0 ** np.arange(CLASSES))
        limits = floor_divide(products, spacing) * spacing
    else:
        products = limits = spacing * column(np.arange(1.0, PRODUCTS + 1))
    parts = [
        (full_row.groups, numbers, full_row.results, full_row.products),
        (last_row.groups, numbers, last_row.results, last_row.products),
        (1.0, full_page.tiles, full_page.results, full_page.products),
        (1.0, last_page.tiles, last_page.results, products),
    ]
    sizes = (len(numbers), len(numbers), 1, len(products))
    weight, tiles, results, products = (
        jnp.concatenate(
            [
                jnp.broadcast_to(jnp.asarray(part[which], jnp.float32), (size, *designs))
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        for which in range(4)
    )
    table = group_cycles(times, Groups(1.0, tiles, results, products, results), weight)
    full, last, page, rest = (
        table[:, end - size : end]
        for end, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True)
    )
    row = full + last
    return _Tables(row[:, :TABULATED], row[:, TABULATED:] / ENDLESS, page, rest, limits)


def _look_up_logit(tables: _Tables, full_row: Groups, last_row: Groups) -> Array:
    tiles = last_row.tiles
    cycles = tables.row[:, :1]
    for number in range(2, TABULATED + 1):
        cycles = jnp.where(tiles >= number, tables.row[:, number - 1 : number], cycles)
    further = tiles - TABULATED
    return cycles + jnp.where(further > 0, further * tables.tile, 0.0)


def _look_up_attend(tables: _Tables, full_page: Groups, last_page: Groups) -> Array:
    rest = tables.rest[:, :1]
    for number in range(1, tables.rest.shape[1]):
        larger = last_page.products > tables.limits[number - 1]
        rest = jnp.where(larger, tables.rest[:, number : number + 1], rest)
    full = jnp.where(full_page.groups > 0, full_page.groups * tables.page, 0.0)
    return full + last_page.groups * rest
