"""Attention on the memory's own multipliers: cycles of the logit (keys times query) and attend
(values times weights) products.

A request's keys and values lie in one channel. Its work is a list of groups: one GWRITE (a row of
the vector into the channel's buffer), then tiles (the same row of all banks: close, open, multiply,
read the results). A rank of the channel is refreshed every interval; a tile or GWRITE starts only
if the controller's estimate of it fits before the next refresh, so an interval holds a whole number
of tiles and a quarter of the time is lost.

Two forms. `channel_cycles_exact` follows that rule through a channel's list and equals the public
simulator to the cycle for PIM-only streams; the start within the refresh interval is an argument,
because an operation's is unknown. `request_work` is a closed form that adds over requests: the cost
of a group is what it takes when repeated for ever, from counting the tiles of each interval. Times
are memory cycles, all as float32; the recurrence counts them from the last refresh, so that they
stay whole numbers in lists of any length.

Where the controller's estimate is longer than an interval without its refresh no tile ever starts:
both forms say infinity.

Source: the timing of the public simulator (github.com/casys-kaist/NeuPIMs, extern/NewtonSim:
channel_state.cc, timing.cc, neupims_command_queue.cc) and the commands of
src/operations/NeuPIMSLogitSoftmax.cc and NeuPIMSAttend.cc.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neupims.machine.hardware import Hardware, banks, burst_cycles
from neupims.machine.record import Number
from neupims.machine.workload import FLOAT16_BYTES, Decoder, Parallel

INTERVALS = 18  # refresh intervals that the closed form follows; the first SETTLING are not counted
SETTLING = 4
TABULATED = (
    8  # tiles of a group, of those costs that the closed form computes once for all requests
)
ENDLESS = 64.0  # tiles of a group that shows what one more tile takes
# of a tile, of those costs that the closed form computes once; a row of 512 numbers has 32 commands
# of 16
PRODUCTS = 32


class Groups(NamedTuple):
    """Groups of one kind: how many a request has, and the tiles, results a tile and products a
    result of each. Arrays that broadcast.
    """

    groups: Number
    tiles: Number
    results: Number
    products: Number


class Timing(NamedTuple):
    """Memory cycles of a channel's PIM commands that do not depend on the work."""

    ranks: Number
    dual: Number  # 1 with two row buffers, 0 with one
    interval: Number  # from one rank's refresh to the next one's
    refresh_start: (
        Number  # from the boundary until PIM commands go on: the rank's banks are closed first
    )
    refresh_end: Number  # from the boundary until the refreshed rank opens rows again
    opening: Number  # from the first activation to the first product, all banks closed
    closing: Number  # from the last product to the first activation of the next tile
    spread: Number  # from a rank's first activation to its last, and to the product
    read_to_close: Number
    beat: Number  # between two products
    gwrite: Number  # with its row open
    reopen: Number  # more, where the row is closed
    conflict: Number  # more, where another row is open (one row buffer, after a tile)
    gwrite_estimate: Number
    conflict_estimate: Number
    tile_estimate: Number  # without its products
    closing_estimate: Number  # of that, for closing the rows of the tile before
    least_products: Number
    result_latency: Number


def timing(hardware: Hardware, wait: Number | None = None) -> Timing:
    """The command timing of the hardware.

    `wait` is given where the NPU uses the same channel: its traffic opens other rows of the bank of
    GWRITE, which must be closed and opened again, `wait` memory cycles after the reads in flight.
    """
    hbm, pim = hardware.hbm, hardware.pim
    rank_banks = 1.0 * hbm.bank_groups * hbm.banks_per_group
    activations = jnp.ceil(
        rank_banks / pim.banks_per_activation
    )  # of one rank, spaced by tFAW; the ranks follow each other by one cycle
    closes = jnp.ceil(banks(hbm) / pim.banks_per_precharge)  # one a cycle
    spread = (activations - 1) * hbm.tfaw_cycles + hbm.trcd_read_cycles
    opening = 1.0 + spread + (hbm.ranks - 1)
    beat = jnp.maximum(burst_cycles(hbm), hbm.tccd_s_cycles)
    gwrite = 1.0 * pim.gwrite_bursts * (hbm.tccd_s_cycles + hbm.tccd_l_cycles)
    conflict = 1.0 + hbm.trp_cycles + hbm.trcd_read_cycles
    conflict_estimate = gwrite + hbm.trtp_cycles + hbm.trp_cycles + hbm.trcd_read_cycles
    if wait is None:
        opened, estimate = gwrite + 1, gwrite
    else:
        opened, estimate = gwrite + 1 + conflict + wait, conflict_estimate
    return Timing(
        ranks=1.0 * hbm.ranks,
        dual=1.0 * (jnp.asarray(pim.row_buffers) > 1),
        interval=jnp.maximum(jnp.floor(hbm.trefi_cycles / hbm.ranks), 1),
        refresh_start=rank_banks + hbm.trp_cycles,
        refresh_end=rank_banks + hbm.trp_cycles + hbm.trfc_cycles,
        opening=opening,
        closing=jnp.maximum(closes, hbm.trp_cycles) + 0.0,
        spread=spread,
        read_to_close=1.0 * hbm.trtp_cycles,
        beat=beat,
        gwrite=opened,
        reopen=(1.0 if wait is None else 0.0) * hbm.trcd_read_cycles,
        conflict=conflict if wait is None else 0.0 * conflict,
        gwrite_estimate=estimate,
        conflict_estimate=conflict_estimate,
        tile_estimate=hbm.tfaw_cycles * (activations * hbm.ranks / 2 - 1) + hbm.trcd_read_cycles,
        closing_estimate=1.0 * hbm.trtp_cycles * banks(hbm),
        least_products=1.0 * pim.least_products,
        result_latency=hbm.read_latency_cycles + burst_cycles(hbm),
    )


def heads_of_device(model: Decoder, parallel: Parallel) -> tuple[Number, Number]:
    """Query heads, and key and value heads, of one device. Fewer key and value heads than devices
    are held more than once.
    """
    return model.heads / parallel.tp, jnp.maximum(model.kv_heads / parallel.tp, 1.0)


def page_elements(hardware: Hardware) -> Number:
    """float16 numbers of a row that a tile uses."""
    return jnp.floor(hardware.pim.page_bytes / FLOAT16_BYTES)


def logit_groups(
    hardware: Hardware, model: Decoder, seq_lens: Float[Array, " r"], parallel: Parallel
) -> tuple[Groups, Groups]:
    """The groups of keys times query: those with a full row of heads, and the last one.

    A tile holds one token in each bank, and as many heads as a row. Query heads that share keys
    each need their own pass: a row's buffer holds one vector.
    """
    heads, kv_heads = heads_of_device(model, parallel)
    width, page = model.width / model.heads, page_elements(hardware)
    rows = jnp.ceil(kv_heads * width / page)
    full = jnp.ceil(page / width)
    rest = kv_heads * width - (rows - 1) * page
    passes = heads / kv_heads
    tiles = jnp.ceil(seq_lens / banks(hardware.hbm))
    products = jnp.ceil(width / hardware.pim.macs_per_bank)
    there = 1.0 * (seq_lens > 0)
    return (
        Groups(there * passes * (rows - 1), tiles, full, products),
        Groups(
            there * passes, tiles, jnp.where(rest >= page, full, jnp.ceil(rest / width)), products
        ),
    )


def attend_groups(
    hardware: Hardware, model: Decoder, seq_lens: Float[Array, " r"], parallel: Parallel
) -> tuple[Groups, Groups]:
    """The groups of values times weights: those with a full row of tokens, and the last one. A tile
    holds one channel of a head in each bank.
    """
    heads, _ = heads_of_device(model, parallel)
    width, page = model.width / model.heads, page_elements(hardware)
    rows = jnp.ceil(seq_lens / page)
    rest = seq_lens - (rows - 1) * page
    tiles = jnp.ceil(width / banks(hardware.hbm))
    there = 1.0 * (seq_lens > 0)
    return (
        Groups(
            there * heads * (rows - 1), tiles, 1.0, jnp.floor(page / hardware.pim.macs_per_bank)
        ),
        Groups(there * heads, tiles, 1.0, jnp.ceil(rest / hardware.pim.macs_per_bank)),
    )


def tile_cycles(times: Timing, results, products) -> tuple[Number, Number, Number]:
    """Of one tile after another: its period, the part of it after the first product, and the
    controller's estimate.
    """
    filled = jnp.maximum(products, times.least_products)
    composite = (
        (results - 1) * times.beat * (filled + 1)
    )  # the last result overlaps the next tile's closing
    single = results * times.beat * (products + 1) - times.beat
    multiply = jnp.where(times.dual > 0, composite, single)
    counted = jnp.maximum(_power_of_two(results * products), times.least_products)
    estimate = (
        times.tile_estimate
        + times.closing_estimate
        + times.beat * counted
        + times.beat * (results - 1)
    )
    return times.read_to_close + times.closing + times.opening + multiply, multiply, estimate


def starved(times: Timing, estimate: Number) -> Number:
    """Whether the next refresh is always too near to start a tile, or to fill the vector's
    buffer.
    """
    closed = times.gwrite_estimate + jnp.maximum(
        times.conflict - 1, 0
    )  # the row of GWRITE is, after its rank's refresh
    gwrite = jnp.where(times.dual > 0, closed, jnp.maximum(closed, times.conflict_estimate))
    return times.interval - times.refresh_start <= jnp.maximum(estimate, gwrite)


def group_cycles(times: Timing, groups: Groups, weight: Number = 1.0) -> Number:
    """Memory cycles of one group when groups like it follow each other for ever, refreshes
    included, times `weight`; 0 where that is 0.

    Follows INTERVALS refresh intervals in closed form: how many tiles start in each, given the
    tiles left from the one before. The state is one complex number: tiles so far, with a half more
    where the GWRITE of the next group is done, and the end of the last one within the interval.
    From a state of several arrays the compiler makes a loop for each, and each computes the whole
    step. The last step makes the result, as what reads it would else compute that part again,
    element by element.
    """
    period, multiply, estimate = tile_cycles(times, groups.results, groups.products)
    tiles, single = groups.tiles, times.dual <= 0
    gwrite = times.gwrite + jnp.where(single, times.conflict, 0.0)
    last_tile = times.interval - estimate
    last_gwrite = times.interval - jnp.where(single, times.conflict_estimate, times.gwrite_estimate)
    first_product = times.refresh_end + times.spread
    row_ready = jnp.where(
        single, times.refresh_end - times.reopen, times.refresh_end + times.reopen
    )

    def follow(interval, state):
        done, late = jnp.floor(state.real), state.imag
        in_this = state.real - jnp.floor(state.real / tiles) * tiles
        left = jnp.where(in_this == 0, 0, tiles - jnp.floor(in_this))
        first_rank = interval % times.ranks == 0  # its refresh closes the row of GWRITE
        begin = jnp.maximum(late, times.refresh_start)
        start = jnp.where(
            left > 0, begin, jnp.where(first_rank, jnp.maximum(late, row_ready), begin) + gwrite
        )
        left = jnp.where(left > 0, left, tiles)
        end = (
            jnp.maximum(start + times.closing + times.opening, first_product)
            + multiply
            + times.read_to_close
        )
        room = last_tile - end
        in_group = jnp.clip(jnp.ceil(room / period), 0, left - 1)
        room = room - (left - 1) * period
        groups_more = jnp.maximum(jnp.floor(room / (tiles * period + gwrite)), 0)
        room = room - groups_more * (tiles * period + gwrite) - gwrite
        tiles_more = jnp.where(in_group < left - 1, 0, jnp.clip(jnp.ceil(room / period), 0, tiles))
        groups_more = jnp.where(in_group < left - 1, 0, groups_more)
        more = in_group + groups_more * tiles + tiles_more
        end = end + more * period + gwrite * (groups_more + (tiles_more > 0))
        over = (in_group >= left - 1) & (
            (tiles_more <= 0) | (tiles_more >= tiles)
        )  # a group has just ended
        fits = start < last_tile  # else this interval ends with the GWRITE
        written = jnp.where(fits, over & (end < last_gwrite), left >= tiles)
        return jax.lax.complex(
            done + jnp.where(fits, 1 + more, 0) + 0.5 * written,
            jnp.where(fits, end, start) - times.interval,
        )

    zero = 0.0 * (tiles + period + weight)
    settled = jax.lax.fori_loop(0, SETTLING, follow, jax.lax.complex(zero, zero))
    scale = jnp.where(
        starved(times, estimate), jnp.inf, (INTERVALS - SETTLING) * times.interval * tiles * weight
    )

    def follow_to_the_end(interval, state):
        after = follow(interval, state)
        cycles = jnp.where(
            weight > 0, scale / (jnp.floor(after.real) - jnp.floor(settled.real)), 0.0
        )
        return jax.lax.complex(jnp.where(interval == INTERVALS - 1, cycles, after.real), after.imag)

    return jax.lax.fori_loop(SETTLING, INTERVALS, follow_to_the_end, settled).real


def smooth_group_cycles(times: Timing, groups: Groups) -> Number:
    """`group_cycles` without its steps: the mean loss of an interval for the whole number of tiles
    in it. Never less with slower timings.
    """
    period, _, estimate = tile_cycles(times, groups.results, groups.products)
    gwrite = times.gwrite + jnp.where(times.dual > 0, 0.0, times.conflict)
    lost = times.refresh_end + times.spread - times.closing - times.opening
    share = (times.interval - lost - estimate + period / 2) / times.interval
    return jnp.where(
        starved(times, estimate),
        jnp.inf,
        (gwrite + groups.tiles * period) / jnp.maximum(share, 1e-3),
    )


def request_work(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Int[Array, " r"],
    parallel: Parallel,
    *,
    steps: bool = True,
    wait: Number | None = None,
) -> Float[Array, "r 2"]:
    """Core cycles that each request takes of its channel for logit and for attend, refreshes
    included. They add over the requests of a channel.

    With `steps` as the controller packs whole tiles into refresh intervals, without in the mean;
    `wait` as in `timing`. A request of length 0 takes none.
    """
    return request_works(hardware, model, seq_lens, parallel, steps=steps, waits=(wait,))[0]


def request_works(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Int[Array, " r"],
    parallel: Parallel,
    *,
    steps: bool = True,
    waits: tuple[Number | None, ...],
) -> Float[Array, "waits r 2"]:
    """`request_work` for each of the `waits`."""
    lengths = jnp.asarray(seq_lens) * 1.0
    to_core = hardware.npu.clock_hz / hardware.hbm.clock_hz
    kinds = [
        groups_of(hardware, model, lengths, parallel) for groups_of in (logit_groups, attend_groups)
    ]
    each = [timing(hardware, wait) for wait in waits]
    times = jax.tree.map(
        lambda *values: jnp.stack([jnp.asarray(value, jnp.float32) for value in values])[:, None],
        *each,
    )
    if steps:
        logit, attend = _tabulated(times, *kinds)
    else:
        logit, attend = (
            sum(
                jnp.where(group.groups > 0, group.groups * smooth_group_cycles(times, group), 0.0)
                for group in kind
            )
            for kind in kinds
        )
    return jnp.where(lengths[:, None] > 0, jnp.stack([logit, attend], axis=-1) * to_core, 0.0)


def _tabulated(
    times: Timing, logit: tuple[Groups, Groups], attend: tuple[Groups, Groups]
) -> tuple[Number, Number]:
    """Cycles of each request's logit and attend groups, (waits, r) each, from tables that one loop
    makes.

    Groups of logit differ in their number of tiles: the tables have the first few, and beyond them
    each takes the same, as a group of many tiles hides its GWRITE in what is left of an interval.
    The last groups of attend differ in their products: the table has as many numbers as a row has
    commands, evenly spaced, rounded up.
    """
    (full_row, last_row), (full_page, last_page) = logit, attend
    numbers = jnp.append(jnp.arange(1.0, TABULATED + 1), ENDLESS)
    heads = jnp.max(last_page.groups)
    spacing = jnp.ceil(jnp.max(last_page.products) / PRODUCTS)
    parts = [
        (jnp.max(full_row.groups), numbers, full_row.results, full_row.products),
        (jnp.max(last_row.groups), numbers, last_row.results, last_row.products),
        (heads, full_page.tiles, full_page.results, full_page.products * jnp.ones(1)),
        (heads, last_page.tiles, last_page.results, spacing * jnp.arange(1.0, PRODUCTS + 1)),
    ]
    sizes = (len(numbers), len(numbers), 1, PRODUCTS)
    weight, tiles, results, products = (
        jnp.concatenate(
            [
                jnp.broadcast_to(jnp.asarray(part[column], jnp.float32), (size,))
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        for column in range(4)
    )
    table = group_cycles(times, Groups(1.0, tiles, results, products), weight)
    full, last, page, rest = (
        table[:, end - size : end]
        for end, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True)
    )
    place = jnp.clip(last_row.tiles, 1, TABULATED)
    row = place.astype(jnp.int32) - 1
    beyond = (last_row.tiles - place) * (full[:, -1:] + last[:, -1:]) / ENDLESS
    pages = full_page.groups / jnp.maximum(heads, 1e-9)
    return (
        full[:, row] + last[:, row] + jnp.where(last_row.tiles > place, beyond, 0.0),
        jnp.where(pages > 0, pages * page, 0.0)
        + rest[:, jnp.ceil(last_page.products / spacing).astype(jnp.int32) - 1],
    )


class _State(NamedTuple):
    now: Array  # since the last refresh
    refreshes: Array  # of all ranks, since the start
    rank: Array  # to be refreshed next
    row_open: Array  # the row of GWRITE
    opened: Array  # a tile has run: rows are open
    conflict: Array  # a tile has run since the last GWRITE
    request: Array
    group: Array  # of the request
    left: Array  # tiles of the group, -1 before its GWRITE


@partial(jax.jit, static_argnames="operation")
def channel_cycles_exact(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Int[Array, " r"],
    parallel: Parallel,
    phase: Float[Array, ""],
    ready: Float[Array, " r"],
    wait: Number | None = None,
    *,
    operation: str,
) -> Float[Array, ""]:
    """Memory cycles until a channel has the last result of its requests, in their order, by the
    controller's rule.

    `operation` is "logit" or "attend"; `phase` is the start within a round of refreshes of all
    ranks, from 0 up to 1; `ready` is when the first command of each request reaches the channel;
    `wait` as in `timing`. A request of length 0 is none.
    """
    times = timing(hardware, wait)
    full, last = {"logit": logit_groups, "attend": attend_groups}[operation](
        hardware, model, seq_lens * 1.0, parallel
    )
    requests = seq_lens.shape[0]
    start = phase * times.interval * hardware.hbm.ranks
    window = jnp.floor(start / times.interval)
    start = start - window * times.interval

    def of(request):
        return lambda values: jnp.broadcast_to(values, (requests,))[
            jnp.minimum(request, requests - 1)
        ]

    def step(state: _State) -> _State:
        pick = of(state.request)
        count = pick(full.groups) + pick(last.groups)
        rows = (
            pick(full.groups) / jnp.maximum(pick(last.groups), 1) + 1
        )  # of one pass over the request
        is_last = state.group % rows == rows - 1
        results = jnp.where(is_last, pick(last.results), pick(full.results))
        products = jnp.where(is_last, pick(last.products), pick(full.products))
        period, multiply, estimate = tile_cycles(times, results, products)
        estimate = estimate - jnp.where(state.opened, 0.0, times.closing_estimate)
        arrived = start + pick(ready) - state.refreshes * times.interval
        now = jnp.where(
            (state.group == 0) & (state.left < 0), jnp.maximum(state.now, arrived), state.now
        )
        conflict = state.conflict & (times.dual <= 0)
        gwrite_estimate = jnp.where(
            conflict,
            times.conflict_estimate,
            times.gwrite_estimate
            + jnp.where(state.row_open, 0, jnp.maximum(times.conflict - 1, 0)),
        )
        is_gwrite = state.left < 0
        waits = times.interval - now <= jnp.where(is_gwrite, gwrite_estimate, estimate)

        refreshed = state._replace(
            now=jnp.maximum(now - times.interval, times.refresh_start),
            refreshes=state.refreshes + 1,
            rank=(state.rank + 1) % hardware.hbm.ranks,
            row_open=state.row_open & (state.rank != 0),
        )
        blocked = (state.rank == 1 % hardware.hbm.ranks) & (
            state.refreshes > 0
        )  # rank 0 was the last to be refreshed
        ready_row = jnp.where(
            blocked, times.refresh_end - jnp.where(conflict, times.reopen, 0.0), 0.0
        )
        opening = jnp.where(conflict, times.conflict, jnp.where(state.row_open, 0.0, times.reopen))
        begin = jnp.where(conflict | ~state.row_open, jnp.maximum(now, ready_row), now)
        written = state._replace(
            now=begin + opening + times.gwrite,
            row_open=jnp.array(True),
            conflict=jnp.array(False),
            left=pick(last.tiles),
        )

        first = now + times.opening + jnp.where(state.opened, times.closing, 0.0)
        first = jnp.maximum(
            first, jnp.where(state.refreshes > 0, times.refresh_end + times.spread, first)
        )
        end = first + multiply + times.read_to_close
        later_estimate = estimate + jnp.where(state.opened, 0.0, times.closing_estimate)
        more = jnp.clip(
            jnp.ceil((times.interval - later_estimate - end) / period), 0, state.left - 1
        )
        left = state.left - 1 - more
        group = state.group + (left == 0)
        over = group >= count
        tiled = state._replace(
            now=end + more * period,
            opened=jnp.array(True),
            conflict=jnp.array(True),
            left=jnp.where(left == 0, -1.0, left),
            group=jnp.where(over, 0.0, group),
            request=state.request + over,
        )
        done = jax.tree.map(lambda a, b: jnp.where(is_gwrite, a, b), written, tiled)
        done = jax.tree.map(lambda a, b: jnp.where(waits, a, b), refreshed, done)
        done = jax.tree.map(
            lambda a, b: jnp.where(starved(times, estimate), a, b),
            done._replace(
                request=jnp.int32(requests), opened=jnp.array(True), now=jnp.float32(jnp.inf)
            ),
            done,
        )
        none = count <= 0
        return jax.tree.map(
            lambda a, b: jnp.where(none, a, b), state._replace(request=state.request + 1), done
        )

    first_state = _State(
        now=start,
        refreshes=jnp.int32(0),
        rank=window.astype(jnp.int32) % hardware.hbm.ranks,
        row_open=jnp.array(False),
        opened=jnp.array(False),
        conflict=jnp.array(False),
        request=jnp.int32(0),
        group=jnp.float32(0),
        left=jnp.float32(-1),
    )
    end = jax.lax.while_loop(lambda state: state.request < requests, step, first_state)
    cycles = end.refreshes * times.interval + (
        end.now - start - times.read_to_close + times.result_latency
    )
    return jnp.where(end.opened, cycles, 0.0)


def _power_of_two(number: Number) -> Number:
    """The least power of two that is not less, exactly."""
    whole = jnp.maximum(jnp.asarray(number, jnp.float32), 1.0)
    mantissa, exponent = jnp.frexp(whole)
    return jnp.ldexp(jnp.float32(1), jnp.where(mantissa == 0.5, exponent - 1, exponent))
