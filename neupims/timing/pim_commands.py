"""Timing of PIM commands: what a GWRITE, a tile and a group of tiles take on a channel.

A group is one GWRITE, which brings a row of vectors into the channel's buffer, and then tiles: the
same row of all banks is closed, opened and multiplied, and the results are read. A rank of the
channel is refreshed every interval. A tile or GWRITE starts only if the controller's estimate of it
fits before the next refresh, so an interval holds a whole number of tiles and a quarter of the time
is lost. Where the controller's estimate is longer than an interval without its refresh, no tile
ever starts, and times are infinite. Times are memory cycles in float32.

Source: the timing of the public simulator (github.com/casys-kaist/NeuPIMs, extern/NewtonSim:
channel_state.cc, timing.cc, neupims_command_queue.cc).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from neupims.machine.division import ceil_divide, floor_divide
from neupims.machine.hardware import Hardware, banks, burst_cycles, product_cycles
from neupims.machine.record import Number

INTERVALS = 18  # refresh intervals that the closed form follows; the first SETTLING do not count
SETTLING = 4


class Groups(NamedTuple):
    """Groups of one kind, as arrays that broadcast over requests."""

    groups: Number  # of a request
    tiles: Number  # of a group
    results: Number  # of a tile
    products: Number  # of a result
    last_results: Number  # of the last tile of a group


class PIMCounts(NamedTuple):
    """PIM commands of one layer on all channels."""

    gwrites: Number  # of one page into the buffer of the vector
    tiles: Number  # rows of all banks that are opened and multiplied
    results: Number  # reads of one number of each bank
    products: Number  # in all banks of a channel


PIM_NONE = PIMCounts(0.0, 0.0, 0.0, 0.0)


def results_of(groups: Groups) -> Number:
    """Returns the results of all tiles of one group.

    Args:
        groups: The groups; their number is not used.
    """
    return (groups.tiles - 1) * groups.results + groups.last_results


def total_commands(kinds: Sequence[Groups]) -> PIMCounts:
    """Returns the commands of all groups of several kinds, request by request.

    Args:
        kinds: The groups of each kind, which broadcast over requests.
    """
    results = [each.groups * results_of(each) for each in kinds]
    return PIMCounts(
        gwrites=sum(each.groups for each in kinds),
        tiles=sum(each.groups * each.tiles for each in kinds),
        results=sum(results),
        products=sum(count * each.products for count, each in zip(results, kinds, strict=True)),
    )


class Timing(NamedTuple):
    """Memory cycles of a channel's PIM commands that do not depend on the work."""

    ranks: Number  # of a channel, a count
    dual: Number  # 1 with two row buffers, 0 with one
    interval: Number  # from the refresh of one rank to that of the next
    # From the boundary until PIM commands go on: the rank's banks are closed first.
    refresh_start: Number
    refresh_end: Number  # from the boundary until the refreshed rank opens rows again
    opening: Number  # from the first activation to the first product, all banks closed
    closing: Number  # from the last product to the first activation of the next tile
    spread: Number  # from a rank's first activation to its last, and to the product
    read_to_close: Number  # from the last product to the closing of its row
    beat: Number  # between two products
    gwrite: Number  # with its row open
    reopen: Number  # more, where the row is closed
    conflict: Number  # more, where another row is open (one row buffer, after a tile)
    gwrite_estimate: Number  # the controller's estimate of a GWRITE
    conflict_estimate: Number  # the same where another row is open
    tile_estimate: Number  # the controller's estimate of a tile, without its products
    closing_estimate: Number  # of that, for closing the rows of the tile before
    least_products: Number  # that one result takes at least, a count
    result_latency: Number  # from the last product to its result


# The fields that depend on `wait` in `pim_timing`.
WAITING = ("gwrite", "reopen", "conflict", "gwrite_estimate")


def pim_timing(hardware: Hardware, wait: Number | None = None) -> Timing:
    """Returns the command timing of the hardware. Any new DRAM timing enters the model here.

    Args:
        hardware: The machine.
        wait: Given where the NPU uses the same channel. Its traffic opens other rows of the bank
            of GWRITE, which must be closed and opened again, `wait` memory cycles after the reads
            in flight. None where PIM works alone.

    Returns:
        Memory cycles.
    """
    hbm, pim = hardware.hbm, hardware.pim
    rank_banks = 1.0 * hbm.bank_groups * hbm.banks_per_group
    # Activations of one rank are spaced by tFAW; the ranks follow each other by one cycle.
    activations = ceil_divide(rank_banks, pim.banks_per_activation)
    closes = ceil_divide(banks(hbm), pim.banks_per_precharge)  # one a cycle
    spread = (activations - 1) * hbm.tfaw_cycles + hbm.trcd_read_cycles
    opening = 1.0 + spread + (hbm.ranks - 1)
    beat = product_cycles(hardware)
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
        interval=jnp.maximum(floor_divide(hbm.trefi_cycles, hbm.ranks), 1),
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


def tile_cycles(times: Timing, results, products) -> tuple[Number, Number, Number]:
    """Returns the period of tiles that follow each other, its multiplying part, and the estimate.

    Args:
        times: The command timing.
        results: The results of a tile.
        products: The products of a result.

    Returns:
        Memory cycles of the period, of the part after the first product, and of the controller's
        estimate.
    """
    filled = jnp.maximum(products, times.least_products)
    # The last result overlaps the next tile's closing.
    composite = (results - 1) * times.beat * (filled + 1)
    single = results * times.beat * (products + 1) - times.beat
    multiply = jnp.where(times.dual > 0, composite, single)
    counted = jnp.maximum(power_of_two(results * products), times.least_products)
    estimate = (
        times.tile_estimate
        + times.closing_estimate
        + times.beat * counted
        + times.beat * (results - 1)
    )
    return times.read_to_close + times.closing + times.opening + multiply, multiply, estimate


def is_starved(times: Timing, estimate: Number) -> Number:
    """Returns whether a tile or a GWRITE never fits between two refreshes and so never starts.

    Args:
        times: The command timing.
        estimate: The controller's estimate of a tile in memory cycles, as `tile_cycles` returns it.
    """
    # The row of GWRITE is closed after its rank's refresh.
    closed = times.gwrite_estimate + jnp.maximum(times.conflict - 1, 0)
    gwrite = jnp.where(times.dual > 0, closed, jnp.maximum(closed, times.conflict_estimate))
    return times.interval - times.refresh_start <= jnp.maximum(estimate, gwrite)


def group_cycles(times: Timing, groups: Groups, weight: Number = 1.0) -> Number:
    """Returns the mean memory cycles of one group in an endless repetition of the group.

    Refreshes are included. All tiles of a group have the same number of results: `last_results` is
    not used. The function follows INTERVALS refresh intervals in closed form: how
    many tiles start in each, given the tiles left over from the one before. The state is one
    complex number: its real part counts the tiles so far, plus a half if the GWRITE of the next
    group is done; its imaginary part is the end of the last tile within the interval. If the state
    were several arrays, the compiler would make a loop for each of them, and each would compute the
    whole step.

    Args:
        times: The command timing.
        groups: Tiles, results and products of a group; its number of groups is not used.
        weight: A factor of the result, which is 0 where the factor is 0.

    Returns:
        Memory cycles, infinite where no tile ever starts.
    """
    period, multiply, estimate = tile_cycles(times, groups.results, groups.products)
    tiles, single = 1.0 * groups.tiles, times.dual <= 0
    gwrite = times.gwrite + jnp.where(single, times.conflict, 0.0)
    last_tile = times.interval - estimate
    last_gwrite = times.interval - jnp.where(single, times.conflict_estimate, times.gwrite_estimate)
    first_product = times.refresh_end + times.spread
    row_ready = jnp.where(
        single, times.refresh_end - times.reopen, times.refresh_end + times.reopen
    )
    reopening, to_end = times.closing + times.opening, multiply + times.read_to_close
    # In an interval that begins with the refresh of the first rank, the row of GWRITE is closed.
    interval_number = jnp.arange(float(INTERVALS)).reshape(-1, *[1] * jnp.ndim(row_ready))
    rounds = floor_divide(interval_number, times.ranks)
    first_rank = rounds * times.ranks == interval_number
    ready = jnp.where(first_rank, row_ready, times.refresh_start)
    one_group = tiles * period + gwrite
    # The reciprocals are computed once; a product corrects what their rounding may do.
    per_tiles, per_period, per_group = 1 / tiles, 1 / period, 1 / one_group

    def follow(interval, state):
        counted, late = state.real, state.imag
        # A quarter more is never near a multiple of the tiles, whatever the reciprocal's rounding.
        in_group = counted - jnp.floor((counted + 0.25) * per_tiles) * tiles
        done = jnp.floor(in_group)
        start = jnp.where(
            in_group > 0,
            _larger(late, times.refresh_start),
            _larger(late, ready[interval]) + gwrite,
        )
        end = _larger(start + reopening, first_product) + to_end
        # From the end of the GWRITE of this group, as if all its tiles were of this interval.
        first_end = (done + 1) * period
        room = _larger(last_tile - end, -period / 2) + first_end
        whole_groups = jnp.round((room + gwrite) * per_group)
        whole_groups = jnp.where(
            whole_groups * one_group > room + gwrite, whole_groups - 1, whole_groups
        )
        room = room - whole_groups * one_group
        more = jnp.round(room * per_period)
        more = jnp.where(more * period < room, more + 1, more)
        more = _smaller(_larger(more, 0.0), tiles)
        written_end = end - first_end - gwrite + whole_groups * one_group
        end = written_end + more * period + jnp.where(more > 0, gwrite, 0.0)
        over = (more <= 0) | (more >= tiles)  # a group has just ended
        fits = start < last_tile  # else this interval ends with the GWRITE
        written = jnp.where(fits, over & (end < last_gwrite), done <= 0)
        started = jnp.where(fits, whole_groups * tiles + more - done, 0.0)
        return jax.lax.complex(
            jnp.floor(counted) + started + jnp.where(written, 0.5, 0.0),
            jnp.where(fits, end, start) - times.interval,
        )

    zero = jnp.zeros(
        jnp.broadcast_shapes(*map(jnp.shape, (one_group, last_tile, ready[0], weight)))
    )
    settled = jax.lax.fori_loop(0, SETTLING, follow, jax.lax.complex(zero, zero))
    last = jax.lax.fori_loop(SETTLING, INTERVALS, follow, settled)
    counted = jnp.floor(last.real) - jnp.floor(settled.real)
    cycles = (INTERVALS - SETTLING) * times.interval * tiles * weight / counted
    cycles = jnp.where(is_starved(times, estimate), jnp.inf, cycles)
    return jnp.where(weight > 0, cycles, 0.0)


def _larger(one: Number, other: Number) -> Number:
    """The larger of two numbers; `jnp.maximum` takes four times as long, for what is NaN."""
    return jnp.where(one > other, one, other)


def _smaller(one: Number, other: Number) -> Number:
    return jnp.where(one < other, one, other)


def smooth_group_cycles(times: Timing, groups: Groups) -> Number:
    """Returns `group_cycles` without its steps: each interval loses the mean share of a tile.

    Longer timings never give a smaller result.

    Args:
        times: The command timing.
        groups: Tiles, results and products of a group; its number of groups is not used. A group
            of one tile has `last_results` results.

    Returns:
        Memory cycles, infinite where no tile ever starts.
    """
    period, _, estimate = tile_cycles(times, groups.results, groups.products)
    last_period, _, _ = tile_cycles(times, groups.last_results, groups.products)
    gwrite = times.gwrite + jnp.where(times.dual > 0, 0.0, times.conflict)
    lost = times.refresh_end + times.spread - times.closing - times.opening
    used = times.interval - lost - estimate + period / 2
    # The same for all waits: one quotient serves them.
    stretch = times.interval / jnp.maximum(used, 1e-3 * times.interval)
    cycles = (gwrite + (groups.tiles - 1) * period + last_period) * stretch
    return jnp.where(is_starved(times, estimate), jnp.inf, cycles)


def power_of_two(number: Number) -> Number:
    """Returns the least power of two that is not less, exactly.

    Args:
        number: Numbers of at least 1, or numbers for which the result is 1.
    """
    whole = jnp.maximum(jnp.asarray(number, jnp.float32), 1.0)
    # The exponent of a float32 lies above its 23 bits of mantissa, which carry into it here.
    bits = jax.lax.bitcast_convert_type(whole, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & ~0x7FFFFF, jnp.float32)
