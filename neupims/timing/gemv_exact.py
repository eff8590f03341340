"""Attention in the memory by the controller's rule, command by command.

`channel_cycles_exact` follows a channel's list of requests and equals the public simulator to the
cycle for streams of PIM commands alone. The start within the refresh interval is an argument,
because an operation's is unknown. Times are memory cycles in float32, counted from the last
refresh, so that they stay whole numbers in lists of any length. `timing.gemv` has the command
timing, and the closed form of the same work.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neupims.machine.division import ceil_divide, divide, floor_divide
from neupims.machine.hardware import Hardware
from neupims.machine.record import Number
from neupims.machine.systems import Fidelity
from neupims.machine.workload import Decoder, Parallel
from neupims.timing.layout import attend_groups, logit_groups
from neupims.timing.pim_commands import Groups, Timing, is_starved, pim_timing, tile_cycles


class _State(NamedTuple):
    """Where the recurrence stands in a channel's list."""

    now: Array  # since the last refresh
    refreshes: Array  # of all ranks, since the start
    rank: Array  # to be refreshed next
    row_open: Array  # the row of GWRITE
    opened: Array  # a tile has run: rows are open
    conflict: Array  # a tile has run since the last GWRITE
    request: Array
    group: Array  # of the request
    left: Array  # tiles of the group, -1 before its GWRITE


@partial(jax.jit, static_argnames=("operation", "fidelity"))
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
    fidelity: Fidelity = "simulator",
) -> Float[Array, ""]:
    """Returns the memory cycles until a channel has the last result of its requests.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of the channel's requests in their order, (r,); 0 is no request.
        parallel: How many devices share a layer.
        phase: The start within a round of refreshes of all ranks, from 0 up to 1.
        ready: When the first command of each request reaches the channel, memory cycles, (r,).
        wait: As in `pim_commands.pim_timing`.
        operation: "logit" or "attend".
        fidelity: The layout of keys and values, "simulator" or "intended".

    Returns:
        Memory cycles; infinity where no tile ever fits before a refresh, 0 without requests.
    """
    groups = list_groups(
        hardware, model, seq_lens, parallel, operation=operation, fidelity=fidelity
    )
    return follow_list(list_timing(hardware, wait), groups, phase, ready)


@partial(jax.jit, static_argnames=("operation", "fidelity"))
def list_groups(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Int[Array, "*lists r"],
    parallel: Parallel,
    *,
    operation: str,
    fidelity: Fidelity = "simulator",
) -> tuple[Groups, Groups]:
    """Returns the groups of each request of lists: those of full rows, and the last one.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of the requests of each list, (*lists, r); 0 is no request.
        parallel: How many devices share a layer.
        operation: "logit" or "attend".
        fidelity: The layout of keys and values, "simulator" or "intended".

    Returns:
        Groups whose fields are arrays (*lists, r).
    """
    layout = {"logit": logit_groups, "attend": attend_groups}[operation]
    found = layout(hardware, model, jnp.asarray(seq_lens) * 1.0, parallel, fidelity=fidelity)
    return jax.tree.map(
        lambda value: jnp.broadcast_to(jnp.asarray(value, jnp.float32), seq_lens.shape), found
    )


@jax.jit
def list_timing(hardware: Hardware, wait: Number | None = None) -> Timing:
    """Returns `pim_timing` as arrays of one type, so that `follow_list` is compiled once.

    Args:
        hardware: The machine.
        wait: As in `pim_commands.pim_timing`.
    """
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), pim_timing(hardware, wait))


def follow_list(
    times: Timing,
    groups: tuple[Groups, Groups],
    phase: Float[Array, ""],
    ready: Float[Array, " r"],
) -> Float[Array, ""]:
    """Returns `channel_cycles_exact` of a list of requests with known groups and timing.

    Args:
        times: The command timing, as arrays.
        groups: The groups of each request, fields (r,): those of full rows, and the last one.
        phase: As in `channel_cycles_exact`.
        ready: As in `channel_cycles_exact`.
    """
    full, last = groups
    requests = ready.shape[0]
    ranks = jnp.asarray(times.ranks).astype(jnp.int32)
    start = phase * times.interval * times.ranks
    window = floor_divide(start, times.interval)
    start = start - window * times.interval

    def of(request):
        return lambda values: values[jnp.minimum(request, requests - 1)]

    def step(state: _State) -> _State:
        pick = of(state.request)
        count = pick(full.groups) + pick(last.groups)
        # Rows of one pass over the request.
        rows = divide(pick(full.groups), jnp.maximum(pick(last.groups), 1)) + 1
        is_last = state.group % rows == rows - 1
        _, tiles, results, products, last_results = (
            jnp.where(is_last, pick(of_last), pick(of_full))
            for of_last, of_full in zip(last, full, strict=True)
        )
        results = jnp.where(state.left == 1, last_results, results)
        shorter = 1.0 * (results != last_results)  # the last tile, which does not count as `more`
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
            rank=(state.rank + 1) % ranks,
            row_open=state.row_open & (state.rank != 0),
        )
        # Rank 0 was the last to be refreshed.
        blocked = (state.rank == 1 % ranks) & (state.refreshes > 0)
        ready_row = jnp.where(
            blocked, times.refresh_end - jnp.where(conflict, times.reopen, 0.0), 0.0
        )
        opening = jnp.where(conflict, times.conflict, jnp.where(state.row_open, 0.0, times.reopen))
        begin = jnp.where(conflict | ~state.row_open, jnp.maximum(now, ready_row), now)
        written = state._replace(
            now=begin + opening + times.gwrite,
            row_open=jnp.array(True),
            conflict=jnp.array(False),
            left=tiles,
        )

        first = now + times.opening + jnp.where(state.opened, times.closing, 0.0)
        first = jnp.maximum(
            first, jnp.where(state.refreshes > 0, times.refresh_end + times.spread, first)
        )
        end = first + multiply + times.read_to_close
        later_estimate = estimate + jnp.where(state.opened, 0.0, times.closing_estimate)
        more = jnp.clip(
            ceil_divide(times.interval - later_estimate - end, period), 0, state.left - 1 - shorter
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
            lambda a, b: jnp.where(is_starved(times, estimate), a, b),
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
        rank=window.astype(jnp.int32) % ranks,
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
