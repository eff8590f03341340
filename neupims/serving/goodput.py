"""The goodput of machines: the highest rate of requests at which percentiles stay below limits.

The definition is that of DistServe (Zhong et al., arXiv:2401.09670). Machines are lanes of one
program, each with its own rate; a bisection takes one run of all lanes for each step.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Bool, Float

from neupims.machine.hardware import Hardware
from neupims.serving.lanes import Lane, Machines, make_machines, serve_lanes
from neupims.serving.objectives import Tail, excess
from neupims.serving.policy import Order, first_come
from neupims.serving.requests import Arrivals, stretch
from neupims.serving.results import measure
from neupims.serving.server import Server

LANES = 16  # machines of one program, on one core
FEW = 4  # machines of another one, so that few machines do not wait for many
LEAST = 64.0  # a goodput below this part of the most that the machine serves counts as 0
# Rates that are tried, the first one at that most. The result is below the true one by a factor of
# at most LEAST^(1/2^(STEPS - 1)), 1.7 %.
STEPS = 9


def find_goodputs(
    server: Server,
    hardware: Sequence[Hardware],
    requests: Arrivals,
    tails: tuple[Tail, ...],
    order: Order = first_come,
) -> Float[np.ndarray, " n"]:
    """Returns the goodput of each machine, (n,) requests a second.

    It is the highest rate that was tried at which all limits hold, with the distances between the
    arrivals stretched. It is at most the rate at which the machine serves all requests when they
    come at once, because a short trace says nothing of higher rates. It is 0 where the machine
    cannot hold a request, or the limits hold at no rate that was tried.

    Args:
        server: The rules, the model and the placement; its machine has the most channels.
        hardware: The machines.
        requests: The requests, not all at one instant.
        tails: The limits on percentiles.
        order: The order of admission.

    Raises:
        ValueError: All requests arrive at once.
    """
    stretch(requests, 1.0)
    size = FEW if len(hardware) <= FEW else LANES
    groups = [[*hardware[first : first + size]] for first in range(0, len(hardware), size)]

    def find(group: list[Hardware]) -> Float[np.ndarray, " lanes"]:
        filled = group + [group[-1]] * (size - len(group))
        return _find_goodputs(server, filled, requests, tails, order)[: len(group)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate([np.zeros(0), *pool.map(find, groups)])


def _find_goodputs(
    server: Server,
    hardware: list[Hardware],
    requests: Arrivals,
    tails: tuple[Tail, ...],
    order: Order,
) -> Float[np.ndarray, " lanes"]:
    machines = make_machines(server, hardware, requests)
    able = _are_able(machines, requests)
    if not able.any():
        return np.zeros(len(hardware))
    # A machine that cannot serve would never end: another one takes its lane.
    stand_in = np.where(able, np.arange(len(able)), able.argmax())
    tables, memory = jax.tree.map(lambda leaf: leaf[stand_in], (machines.tables, machines.memory))
    machines = machines._replace(tables=tables, memory=memory)

    def serve(lanes: list[Arrivals]) -> list[tuple[Arrivals, Lane]]:
        return list(zip(lanes, serve_lanes(machines, lanes, order), strict=True))

    at_once = replace(requests, nanoseconds=0 * requests.nanoseconds)
    ends = [lane.served.end.max() for _, lane in serve([at_once] * len(hardware))]
    most = len(requests.inputs) * 1e9 / np.array(ends, np.float64)
    low, high, tried = most / LEAST, most, most
    best = np.zeros(len(hardware))
    for _ in range(STEPS):
        runs = serve([stretch(requests, float(rate)) for rate in tried])
        good = np.array([excess(tails, measure(came, lane.served)) <= 1 for came, lane in runs])
        best = np.where(good, tried, best)
        low, high = np.where(good, tried, low), np.where(good, high, tried)
        tried = np.where(best < most, np.sqrt(low * high), most)
    return np.where(able, best, 0.0)


def _are_able(machines: Machines, requests: Arrivals) -> Bool[np.ndarray, " lanes"]:
    """Returns whether a machine has finite times, and memory for each request alone."""
    lanes = machines.number
    able = np.ones(lanes, bool)
    for leaf in jax.tree.leaves(machines.tables[1:]):
        able &= np.isfinite(np.asarray(leaf)).reshape(lanes, -1).all(axis=1)
    memory = machines.memory
    longest = (requests.inputs + requests.outputs - 1).max()
    room = np.asarray(memory.room).max(axis=1) - np.asarray(memory.spare)
    return able & (np.asarray(memory.needed)[:, longest] <= room)
