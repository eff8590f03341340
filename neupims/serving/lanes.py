"""Many runs at once: machines, or rates of arrival, as lanes.

Lanes share the rules, the model, and the lengths of the requests. Each has its own machine and its
own arrivals. On an accelerator they are mapped over in one compiled program. The cores of a CPU
take one lane after another with the same program: a run alone computes several decode steps at once
(`serving.ahead`) and no prefill where there is none, which mapped lanes cannot.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from neupims.machine.hardware import Hardware
from neupims.processors import count_processors
from neupims.serving.ahead import look_ahead
from neupims.serving.clock import Instant
from neupims.serving.loop import is_done, run, run_to_end, start
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
from neupims.serving.state import Memory, Requests, Rules, State, Step
from neupims.serving.tables import Tables, make_tables

CHUNK = 512  # iterations between two looks at whether all lanes are done


class Lane(NamedTuple):
    """What became of one lane."""

    served: Served
    totals: Totals
    watts: float  # of one device that waits


class Machines(NamedTuple):
    """Machines that serve requests of the same lengths, with a leading axis if they are several."""

    server: Server
    tables: Tables
    memory: Memory

    @property
    def number(self) -> int:
        """The number of machines."""
        return int(np.size(self.tables.watts))


def make_machines(server: Server, hardware: Sequence[Hardware], requests: Arrivals) -> Machines:
    """Returns machines for lanes. They are not checked.

    Args:
        server: The rules, the model and the placement.
        hardware: The machines.
        requests: Their lengths are those of all lanes.
    """
    tokens = together(server, requests, "chunked" if server.rules.chunk else "whole")
    stacked = jax.tree.map(lambda *fields: jnp.array(fields, jnp.float32), *hardware)
    # Machines are traced: whatever machine the server has, the compiled program is the same.
    key = server._replace(hardware=Hardware())
    tables, memory = _prepare(key, stacked, round_length(requests), tokens)
    return Machines(server, tables, memory)


@partial(jax.jit, static_argnames=("server", "length", "tokens"))
def _prepare(server: Server, machines, length: int, tokens: int) -> tuple[Tables, Memory]:
    tables = partial(make_tables, server.setting, tokens=most_tokens(server.rules), length=length)
    memory = partial(make_memory, server, length=length, tokens=tokens)
    found = jax.vmap(tables)(machines), jax.vmap(memory)(machines)
    one = machines.hbm.num_channels.shape[0] == 1
    return jax.tree.map(lambda leaf: leaf[0], found) if one else found


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
    for each in arrivals:
        if not (
            np.array_equal(each.inputs, arrivals[0].inputs)
            and np.array_equal(each.outputs, arrivals[0].outputs)
        ):
            raise ValueError("lanes must have the same requests: only their arrivals may differ")
    machines = make_machines(server, hardware, arrivals[0])
    check_tables(machines.tables)
    return serve_lanes(machines, arrivals, order)


def serve_lanes(
    machines: Machines, arrivals: Sequence[Arrivals], order: Order = first_come
) -> list[Lane]:
    """Returns what `run_lanes` returns, of machines that are made and checked already.

    Args:
        machines: The machine of each lane; or one for all.
        arrivals: The requests of each lane, or one for all; lengths are those of the machines.
        order: The order of admission.
    """
    made = [make_requests(one, order, machines.server.rules.window, None)[0] for one in arrivals]
    count = max(machines.number, len(made))
    run_all = _run_apart if are_apart() else _run_together
    numbers = np.arange(len(arrivals[0].inputs))
    watts = np.broadcast_to(np.asarray(machines.tables.watts), (count,))
    return [
        Lane(gather(served, numbers, arrivals[0], None), totals, float(watts[lane]))
        for lane, (served, totals) in enumerate(run_all(machines, made, count))
    ]


def are_apart() -> bool:
    """Returns whether lanes run one after another, not side by side in one program."""
    return jax.default_backend() == "cpu"


# The rows of `State.served`, and the sums over the iterations.
Outcome = tuple[np.ndarray, Totals]


def _run_apart(machines: Machines, made: list[Requests], count: int) -> list[Outcome]:
    """Runs the lanes one after another, on all cores."""
    rules = look_ahead(machines.server.rules)

    def run_lane(lane: int) -> Outcome:
        given = machines.tables, machines.memory
        if np.ndim(machines.tables.watts):  # several machines
            given = jax.tree.map(lambda leaf: leaf[lane], given)
        sums, served = [], None
        for state, step in run_to_end(rules, *given, made[lane % len(made)]):
            sums.append(sum_up(jax.tree.map(np.asarray, step)))
            served = state.served
        return np.asarray(served), reduce(add_totals, sums)

    with ThreadPoolExecutor(count_processors()) as pool:
        return list(pool.map(run_lane, range(count)))


def _run_together(machines: Machines, made: list[Requests], count: int) -> list[Outcome]:
    """Runs the lanes side by side in one program."""
    rules, requests = machines.server.rules, made[0]
    if len(made) > 1:
        high, low = (jnp.stack([one.arrival[word] for one in made]) for word in (0, 1))
        keys = jnp.stack([one.keys for one in made])
        requests = requests._replace(arrival=Instant(high, low), keys=keys)
    state = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), start(rules, made[0])
    )
    by_machine, by_arrival = bool(np.ndim(machines.tables.watts)), len(made) > 1
    sums, done = [], False
    while not done:
        state, step, finished = _follow(
            rules, machines.tables, machines.memory, requests, state, by_machine, by_arrival
        )
        sums.append(sum_up(jax.tree.map(np.asarray, step)))
        done = bool(np.asarray(finished).all())
    served, totals = np.asarray(state.served), reduce(add_totals, sums)
    return [(served[lane], Totals(*(value[lane] for value in totals))) for lane in range(count)]


@partial(jax.jit, static_argnames=("rules", "by_machine", "by_arrival"))
def _follow(
    rules: Rules,
    tables: Tables,
    memory: Memory,
    requests: Requests,
    state: State,
    by_machine: bool,
    by_arrival: bool,
) -> tuple[State, Step, Bool[Array, " lanes"]]:
    """Returns the states after `CHUNK` iterations, what happened, and which lanes are done."""

    def chunk(tables, memory, requests, state):
        state, step = run(rules, tables, memory, requests, state, CHUNK)
        return state, step, is_done(rules, requests, state)

    machines = 0 if by_machine else None
    axes = jax.tree.map(lambda _: None, requests)
    if by_arrival:
        axes = axes._replace(arrival=Instant(0, 0), keys=0)
    return jax.vmap(chunk, in_axes=(machines, machines, axes, 0))(tables, memory, requests, state)
