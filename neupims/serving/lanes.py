"""Many runs at once: machines, or rates of arrival, as lanes of one compiled program.

Lanes share the rules, the model, and the lengths of the requests. Each has its own machine and its
own arrivals.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neupims.machine.hardware import Hardware
from neupims.serving.clock import Instant
from neupims.serving.loop import is_done, run, start
from neupims.serving.policy import Order, first_come
from neupims.serving.requests import Arrivals
from neupims.serving.results import Served, Totals, add_totals, sum_up
from neupims.serving.server import (
    Server,
    check_tables,
    gather,
    make_memory,
    make_requests,
    most_tokens,
    round_length,
    together,
)
from neupims.serving.tables import make_tables

CHUNK = 512  # iterations between two looks at whether all lanes are done


class Lane(NamedTuple):
    """What became of one lane."""

    served: Served
    totals: Totals
    watts: float  # of one device that waits


def run_lanes(
    server: Server,
    hardware: Sequence[Hardware],
    arrivals: Sequence[Arrivals],
    order: Order = first_come,
) -> list[Lane]:
    """Returns the times of the requests, and what all iterations took, of each lane.

    Prompts are computed by the devices that decode.

    Args:
        server: The rules, the model and the placement.
        hardware: The machine of each lane; or one machine for all of them.
        arrivals: The requests of each lane, with the same lengths; or one for all.
        order: The order of admission.

    Raises:
        ValueError: Lengths differ, or a machine cannot run the model.
    """
    count = max(len(hardware), len(arrivals))
    for each in arrivals:
        if not (
            np.array_equal(each.inputs, arrivals[0].inputs)
            and np.array_equal(each.outputs, arrivals[0].outputs)
        ):
            raise ValueError("lanes must have the same requests: only their arrivals may differ")
    rules, setting = server.rules, server.setting
    length = round_length(arrivals[0])
    tokens = together(server, arrivals[0], "chunked" if rules.chunk else "whole")
    machines = jax.tree.map(lambda *fields: jnp.array(fields, jnp.float32), *hardware)
    tables = jax.jit(
        jax.vmap(partial(make_tables, setting, tokens=most_tokens(rules), length=length))
    )(machines)
    check_tables(tables)
    memory = jax.jit(jax.vmap(partial(make_memory, server, length=length, tokens=tokens)))(machines)
    made = [make_requests(one, order, rules.window, None)[0] for one in arrivals]
    requests = made[0]._replace(
        arrival=Instant(
            jnp.stack([one.arrival.high for one in made]),
            jnp.stack([one.arrival.low for one in made]),
        ),
        keys=jnp.stack([one.keys for one in made]),
    )
    by_machine = 0 if len(hardware) > 1 else None
    by_arrival = 0 if len(arrivals) > 1 else None
    if by_machine is None:
        tables, memory = jax.tree.map(lambda leaf: leaf[0], (tables, memory))
    if by_arrival is None:
        requests = requests._replace(
            arrival=Instant(*(part[0] for part in requests.arrival)), keys=requests.keys[0]
        )
    axes = jax.tree.map(lambda _: None, requests)
    if by_arrival == 0:
        axes = axes._replace(arrival=Instant(0, 0), keys=0)

    def chunk(tables, memory, requests, state):
        state, step = run(rules, tables, memory, requests, state, CHUNK)
        return state, step, is_done(rules, requests, state)

    follow = jax.jit(jax.vmap(chunk, in_axes=(by_machine, by_machine, axes, 0)))
    first = start(rules, requests._replace(keys=made[0].keys))
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), first)
    totals: Totals | None = None
    done = False
    while not done or totals is None:
        state, step, finished = follow(tables, memory, requests, state)
        found = sum_up(jax.tree.map(np.asarray, step))
        totals = found if totals is None else add_totals(totals, found)
        done = bool(np.asarray(finished).all())
    numbers = np.arange(len(arrivals[0].inputs))
    watts = np.broadcast_to(np.asarray(tables.watts), (count,))
    return [
        Lane(
            gather(np.asarray(state.served[lane]), numbers, arrivals[0], None),
            Totals(*(value[lane] for value in totals)),
            float(watts[lane]),
        )
        for lane in range(count)
    ]
