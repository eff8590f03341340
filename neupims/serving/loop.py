"""The rules of continuous batching, as one scan over iterations.

Time passes from boundary to boundary; between two of them lies one iteration. At a boundary:

1. **Arrive.** Requests whose time has come join the waiting room, in their order of arrival.
2. **Make room.** Keys and values of a request lie in one channel. Each request has one token more
   than before; while the requests of a channel need more blocks than it has, the youngest of them
   is paused: it loses its keys and values, keeps its place, and is to be recomputed. Then each
   channel in which nobody was paused just now takes back its oldest paused request, if it fits.
3. **Admit.** The request of the waiting room that is first in the order of the policy gets a place
   in the channel that the packing prefers, among those that have a free place, no paused request,
   and blocks for its prompt. If no channel has, it waits, and so do all behind it. This repeats
   until the batch is full, the prompts exceed the tokens of one prefill, or nobody waits.
4. **Compute.** If any request has prompt tokens to compute, the iteration is their prefill, and
   decoding waits; else it decodes one token of each request. A prefill has at most so many prompts
   as the rules say, in the order of channels and places; others follow in the next iteration. If
   there is no request at all, time jumps to the next arrival. With chunks, decoding does not wait:
   an iteration decodes one token of each request whose prompt is computed, and beside them it
   computes the rest of `chunk` tokens of prompts, at least one. The oldest prompts come first, at
   most so many as the rules say; one that ends in the iteration gives its first token.
5. **Leave.** Every request that was computed has one more token. Those that have all of their
   tokens leave, and their blocks are free at the next boundary.

The state has a fixed size: rows of places, one row for each channel. What an iteration costs is a
function that is passed in (`cost` has that of the model), and so are the packing and the order.
Blocks are whole numbers, time is whole nanoseconds (`clock`), so that the same rules in plain
Python give the same times. `ahead` computes several decode steps at once where that changes
nothing.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from neupims.serving import clock
from neupims.serving.ahead import decode_ahead, is_quiet
from neupims.serving.clock import Instant
from neupims.serving.state import (
    NOBODY,
    Channels,
    Memory,
    Places,
    Requests,
    Rules,
    Spent,
    State,
    Step,
)

CHUNK = 2048  # steps of one call of the compiled program


def start(rules: Rules, requests: Requests) -> State:
    """Returns the state at time 0, in which nobody has arrived.

    Args:
        rules: The rules.
        requests: The requests.
    """
    shape = (rules.rows, rules.places)
    zero, none = jnp.zeros(shape, jnp.int32), jnp.full(shape, NOBODY, jnp.int32)
    never = Instant(zero - 1, zero)
    places = Places(none, zero, zero, zero, zero > 0, zero, never, never)
    count = requests.keys.shape[0]
    return State(
        Instant(jnp.int32(0), jnp.int32(0)),
        jnp.int32(0),
        jnp.int32(0),
        jnp.full(rules.window, NOBODY, jnp.int32),
        places,
        jnp.full((count, 7), -1, jnp.int32),
    )


def run(
    rules: Rules, tables: Any, memory: Memory, requests: Requests, state: State, iterations: int
) -> tuple[State, Step]:
    """Returns the state after a number of steps, and what happened in each iteration.

    A step is one iteration, or, with `rules.ahead`, up to so many, and there is a row for each that
    there may be: (iterations * ahead,). Rows without an iteration are 0. After the last request has
    left, nothing changes any more.

    Args:
        rules: The rules.
        tables: What the costs need to know; the first argument of `rules.costs`.
        memory: The blocks.
        requests: The requests.
        state: The state before.
        iterations: The number of steps.
    """
    state, steps = jax.lax.scan(
        lambda state, _: step(rules, tables, memory, requests, state),
        state,
        None,
        length=iterations,
    )
    return state, jax.tree.map(lambda part: part.reshape(-1), steps)


def is_done(rules: Rules, requests: Requests, state: State) -> Bool[Array, ""]:
    """Returns whether every request has left.

    Args:
        rules: The rules.
        requests: The requests.
        state: The state.
    """
    count = requests.keys.shape[0] - rules.window
    there = (state.places.request < NOBODY).any() | (state.waiting < NOBODY).any()
    return (state.arrived >= count) & ~there


def step(
    rules: Rules, tables: Any, memory: Memory, requests: Requests, state: State
) -> tuple[State, Step]:
    """Returns the state after one iteration or several, and what happened in each, (ahead,).

    Args:
        rules: The rules.
        tables: What the costs need to know.
        memory: The blocks.
        requests: The requests.
        state: The state before.
    """
    state = arrive(rules, requests, state)
    places, needed, paused = make_room(memory, state.places)
    state, needed = admit(rules, memory, requests, state._replace(places=places), needed)

    def one() -> tuple[State, Step]:
        after, spent, computed, tokens = compute(rules, tables, requests, state)
        waiting = (state.waiting < NOBODY).sum()
        blocks = needed.sum(), needed.max()
        happened = Step(after.now, spent, computed, tokens, waiting, *blocks, paused)
        return after, jax.tree.map(partial(_as_first_row, rules), happened)

    def several() -> tuple[State, Step]:
        return decode_ahead(rules, tables, memory, requests, state)

    after, steps = one() if rules.ahead == 1 else jax.lax.cond(is_quiet(rules, state), several, one)
    return leave(after), steps


def _as_first_row(rules: Rules, value: Array) -> Array:
    """Returns the value of the first of the iterations of a step, with 0 for the others."""
    value = jnp.asarray(value)
    return jnp.zeros(rules.ahead, value.dtype).at[0].set(value)


def arrive(rules: Rules, requests: Requests, state: State) -> State:
    """Returns the state with those in the waiting room whose time has come, as far as it has room.

    Args:
        rules: The rules; the waiting room has `window` places.
        requests: The requests.
        state: The state.
    """
    come = Instant(
        *(
            jax.lax.dynamic_slice(part, (state.arrived,), (rules.window,))
            for part in requests.arrival
        )
    )
    count = (~clock.is_after(come, state.now)).sum()
    free = state.waiting >= NOBODY
    rank = jnp.cumsum(free) - 1
    takes = free & (rank < count)
    return state._replace(
        waiting=jnp.where(takes, state.arrived + rank, state.waiting).astype(jnp.int32),
        arrived=state.arrived + takes.sum(),
    )


def make_room(memory: Memory, places: Places) -> tuple[Places, Int[Array, " rows"], Int[Array, ""]]:
    """Returns the places after pauses and returns, the blocks in use, and the number of pauses.

    Args:
        memory: The blocks.
        places: The places.
    """
    there = places.request < NOBODY
    each = memory.needed[places.length]

    def used(paused):
        return jnp.where(there & ~paused, each, 0).sum(axis=1)

    def pause(paused):
        holds = there & ~paused
        youngest = jnp.argmax(jnp.where(holds, places.request, -1), axis=1)
        here = jnp.arange(paused.shape[1]) == youngest[:, None]
        return paused | (here & holds & (used(paused) > memory.room)[:, None])

    paused = jax.lax.while_loop(
        lambda paused: jnp.any(used(paused) > memory.room), pause, places.paused
    )
    lost = paused & ~places.paused
    needed = used(paused)
    waits = paused & ~lost.any(axis=1)[:, None]
    oldest = jnp.argmin(jnp.where(waits, places.request, NOBODY), axis=1)
    back = waits & (jnp.arange(paused.shape[1]) == oldest[:, None])
    back = back & (each + needed[:, None] <= (memory.room - memory.spare)[:, None])
    places = places._replace(
        paused=paused & ~back,
        prompt=jnp.where(lost, places.length, places.prompt),
        pauses=places.pauses + lost,
    )
    return places, needed + jnp.where(back, each, 0).sum(axis=1), lost.sum()


def admit(
    rules: Rules, memory: Memory, requests: Requests, state: State, needed: Int[Array, " rows"]
) -> tuple[State, Int[Array, " rows"]]:
    """Returns the state with the requests that were admitted, and the blocks in use.

    Args:
        rules: The rules.
        memory: The blocks.
        requests: The requests.
        state: The state.
        needed: The blocks in use in each channel.
    """
    keys = jnp.where(state.waiting < NOBODY, requests.keys[state.waiting], NOBODY)
    paused = state.places.paused.any(axis=1)

    def try_next(carry):
        waiting, keys, places, needed, tokens, admitted, _ = carry
        there = places.request < NOBODY
        chosen = jnp.argmin(keys)
        request = waiting[chosen]
        length, prompt = requests.lengths[request], requests.prompts[request]
        blocks = memory.needed[length]
        fits = (needed + blocks <= memory.room - memory.spare) & ~paused
        fits = fits & (there.sum(axis=1) < memory.places)
        budget = (prompt == 0) | (tokens == 0) | (tokens + prompt <= rules.prefill_tokens)
        goes = fits.any() & budget & (there.sum() < rules.batch)
        loads = jnp.where(there, memory.loads[places.length], 0.0).sum(axis=1)
        channels = Channels(loads, there.sum(axis=1), admitted, memory.rows)
        row = jnp.argmin(jnp.where(fits, rules.packing(channels), jnp.inf))
        at = (row, jnp.argmin(there[row]))  # its first free place

        def put(array, value):
            return array.at[at].set(jnp.where(goes, value, array[at]).astype(array.dtype))

        places = Places(
            put(places.request, request),
            put(places.length, length),
            put(places.prompt, prompt),
            put(places.left, requests.outputs[request]),
            put(places.paused, False),
            put(places.pauses, 0),
            Instant(
                put(places.admitted.high, state.now.high), put(places.admitted.low, state.now.low)
            ),
            Instant(put(places.first.high, -1), put(places.first.low, 0)),
        )
        return (
            waiting.at[chosen].set(jnp.where(goes, NOBODY, request)),
            keys.at[chosen].set(jnp.where(goes, NOBODY, keys[chosen])),
            places,
            needed.at[row].add(jnp.where(goes, blocks, 0)),
            tokens + jnp.where(goes, prompt, 0),
            admitted + goes,
            goes,
        )

    def may_go_on(carry):
        waiting, _, places, *_, goes = carry
        return goes & (waiting < NOBODY).any() & ((places.request < NOBODY).sum() < rules.batch)

    to_compute = jnp.where(state.places.paused, 0, state.places.prompt).sum()
    waiting, _, places, needed, _, admitted, _ = jax.lax.while_loop(
        may_go_on,
        try_next,
        (state.waiting, keys, state.places, needed, to_compute, state.admitted, jnp.bool_(True)),
    )
    return state._replace(waiting=waiting, places=places, admitted=admitted), needed


def compute(
    rules: Rules, tables: Any, requests: Requests, state: State
) -> tuple[State, Spent, Int[Array, ""], Int[Array, ""]]:
    """Returns the state after an iteration, what it took, and the requests and prompt tokens of it.

    Args:
        rules: The rules.
        tables: What the costs need to know.
        requests: The requests.
        state: The state.
    """
    places = state.places
    holds = (places.request < NOBODY) & ~places.paused
    choose = compute_chunks if rules.chunk else compute_whole
    spent, parts, ends = choose(rules, tables, places, holds)
    works = (ends | (parts > 0)).any()
    spent = jax.tree.map(lambda value: jnp.where(works, value, jnp.zeros_like(value)), spent)
    count = requests.keys.shape[0] - rules.window
    coming = Instant(*(part[jnp.minimum(state.arrived, count - 1)] for part in requests.arrival))
    jumps = ~works & (state.arrived < count)
    now = clock.where(jumps, coming, clock.add(state.now, spent.time))
    now = clock.where(clock.is_after(state.now, now), state.now, now)
    made = ends & (places.first.high < 0)
    places = places._replace(
        length=places.length + ends,
        prompt=places.prompt - parts,
        left=places.left - ends,
        first=clock.where(made, now, places.first),
    )
    return state._replace(now=now, places=places), spent, ends.sum(), parts.sum()


# What an iteration takes, the prompt tokens that it computes of each place, and whether the request
# gets a token.
Computed = tuple[Spent, Int[Array, "rows places"], Bool[Array, "rows places"]]


def compute_whole(
    rules: Rules, tables: Any, places: Places, holds: Bool[Array, "rows places"]
) -> Computed:
    """Returns the prefill of whole prompts, or, without any, a decode step of all requests.

    Args:
        rules: The rules.
        tables: What the costs need to know.
        places: The places.
        holds: Whether a request in that place has its memory.
    """
    prompts = holds & (places.prompt > 0)
    is_prefill = prompts.any()
    rank = (jnp.cumsum(prompts.reshape(-1)) - 1).reshape(prompts.shape)
    prompts = prompts & (rank < rules.prompts)
    mine = prompts & (rank == jnp.arange(rules.prompts)[:, None, None])  # (prompts, rows, places)
    lengths = jnp.where(mine, places.prompt, 0).sum(axis=(1, 2))
    spent = jax.lax.cond(
        is_prefill,
        lambda: rules.costs.prefill(tables, lengths),
        lambda: rules.costs.decode(tables, places.length, holds),
    )
    return spent, jnp.where(prompts, places.prompt, 0), jnp.where(is_prefill, prompts, holds)


def compute_chunks(
    rules: Rules, tables: Any, places: Places, holds: Bool[Array, "rows places"]
) -> Computed:
    """Returns a decode step of all requests without a prompt, beside chunks of the oldest prompts.

    Args:
        rules: The rules.
        tables: What the costs need to know.
        places: The places.
        holds: Whether a request in that place has its memory.
    """
    prompts = holds & (places.prompt > 0)
    decodes = holds & ~prompts
    budget = jnp.maximum(rules.chunk - decodes.sum(), 1)
    parts = jnp.zeros_like(places.prompt)
    before, chunks = [], []
    waits = jnp.where(prompts, places.request, NOBODY)
    for _ in range(rules.prompts):
        oldest = waits.min()
        mine = (waits == oldest) & (oldest < NOBODY)
        todo = jnp.where(mine, places.prompt, 0).sum()
        chunk = jnp.minimum(todo, budget)
        budget = budget - chunk
        parts = parts + jnp.where(mine, chunk, 0)
        before.append(jnp.where(mine, places.length, 0).sum() - todo)
        chunks.append(chunk)
        waits = jnp.where(mine, NOBODY, waits)
    given = (tables, places.length, decodes)
    spent = jax.lax.cond(
        prompts.any(),
        lambda: rules.costs.mixed(*given, jnp.stack(before), jnp.stack(chunks)),
        lambda: rules.costs.decode(*given),
    )
    return spent, parts, decodes | (prompts & (parts == places.prompt))


def leave(state: State) -> State:
    """Returns the state without the requests that have all of their tokens.

    Args:
        state: The state at the end of an iteration.
    """
    places = state.places
    gone = (places.request < NOBODY) & (places.left <= 0)
    ended = (jnp.broadcast_to(part, gone.shape) for part in state.now)
    rows = jnp.stack([*places.admitted, *places.first, *ended, places.pauses], axis=-1)
    numbers = jnp.where(gone, places.request, state.served.shape[0])
    return state._replace(
        served=state.served.at[numbers].set(rows, mode="drop"),
        places=places._replace(
            request=jnp.where(gone, NOBODY, places.request),
            length=jnp.where(gone, 0, places.length),
        ),
    )


run_chunk = partial(jax.jit, static_argnames=("rules", "iterations"))(run)


def run_to_end(
    rules: Rules, tables: Any, memory: Memory, requests: Requests
) -> Iterator[tuple[State, Step]]:
    """Yields the state, and what happened, after every `CHUNK` steps until every request has left.

    Args:
        rules: The rules.
        tables: What the costs need to know.
        memory: The blocks.
        requests: The requests.
    """
    state, done = start(rules, requests), False
    while not done:
        state, steps = run_chunk(rules, tables, memory, requests, state, iterations=CHUNK)
        yield state, steps
        done = bool(is_done(rules, requests, state))
