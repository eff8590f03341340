"""Several decode steps at once, where nothing else can happen between them.

Most iterations of a machine that is not full change nothing but the lengths: nobody arrives, is
admitted, is paused or leaves. The costs of the next few decode steps are then computed side by
side, which takes little more than those of one. As many of them count as end before the first
event; the results are those of one step after another, to the rounding of sums.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from neupims.serving import clock
from neupims.serving.clock import Instant
from neupims.serving.state import NOBODY, Memory, Requests, Rules, State, Step

STEPS = 8  # decode steps that are computed together
PART = 4  # of the places of a channel: requests must be in the first quarter


def look_ahead(rules: Rules) -> Rules:
    """Returns the rules of a run that computes decode steps together: good where it runs alone.

    Lanes of one program would compute one step and several at each boundary.

    Args:
        rules: The rules.
    """
    return rules._replace(ahead=STEPS, few=-(-rules.places // PART))


def is_quiet(rules: Rules, state: State) -> Bool[Array, ""]:
    """Returns whether all requests that are there decode, stay after this step, and are few.

    Args:
        rules: The rules; few requests are in the first `few` places of their channels.
        state: The state after the admissions.
    """
    places = state.places
    there = places.request < NOBODY
    other = places.paused | (places.prompt > 0) | (places.left < 2)
    return there.any() & ~(there & other).any() & ~there[:, rules.few :].any()


def decode_ahead(
    rules: Rules,
    tables: Any,
    memory: Memory,
    requests: Requests,
    state: State,
) -> tuple[State, Step]:
    """Returns the state after one decode step or several, and what happened in each, (ahead,).

    The first step is that of this boundary. A further one counts where no request has left before
    it, nobody has come whom the waiting room would take, and all channels have the blocks that it
    needs. Nobody who waits could be admitted in between: requests only need more blocks.

    Args:
        rules: The rules.
        tables: What the costs need to know.
        memory: The blocks.
        requests: The requests.
        state: The state after the admissions, which is quiet (`is_quiet`).
    """
    places, steps = state.places, jnp.arange(rules.ahead)
    there = places.request < NOBODY
    here = there[:, : rules.few]
    lengths = places.length[:, : rules.few] + steps[:, None, None]  # (ahead, rows, few)
    spent = jax.vmap(lambda each: rules.costs.decode(tables, each, here))(lengths)
    used = jnp.where(here, memory.needed[lengths], 0).sum(axis=2)  # (ahead, rows)
    ends = _add_up(state.now, spent.time)
    coming = Instant(*(part[state.arrived] for part in requests.arrival))
    full = (state.waiting < NOBODY).all()
    undisturbed = full | clock.is_after(coming, ends)
    goes_on = jnp.append(True, undisturbed[:-1])
    goes_on &= (used <= memory.room).all(axis=1)
    goes_on &= steps < jnp.where(there, places.left, NOBODY).min()
    done = jnp.cumsum(~goes_on) == 0
    count = done.sum()
    made = there & (places.first.high < 0)
    places = places._replace(
        length=places.length + count * there,
        left=places.left - count * there,
        first=clock.where(made, Instant(*(part[0] for part in ends)), places.first),
    )
    happened = Step(
        ends,
        spent,
        there.sum(),
        jnp.int32(0),
        (state.waiting < NOBODY).sum(),
        used.sum(axis=1),
        used.max(axis=1),
        jnp.int32(0),  # nobody is paused
    )
    after = state._replace(now=Instant(*(part[count - 1] for part in ends)), places=places)
    return after, jax.tree.map(lambda part: jnp.where(done, part, jnp.zeros_like(part)), happened)


def _add_up(now: Instant, times: Instant) -> Instant:
    """Returns when each of several iterations ends, (ahead,)."""
    _, ends = jax.lax.scan(lambda now, time: (clock.add(now, time),) * 2, now, times, unroll=True)
    return ends
