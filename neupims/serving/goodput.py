"""The goodput of machines: the highest rate of requests at which percentiles stay below limits.

It is like that of DistServe (Zhong et al., arXiv:2401.09670), but each limit is on a percentile of
its own, and the rate is that of the whole machine, not of one GPU. Machines are lanes of one
program, each with its own rate; a bisection takes one run of each lane for each step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Bool, Float

from neupims.machine.hardware import Hardware
from neupims.machine.systems import PIM_SYSTEMS
from neupims.serving.lanes import Lane, Machines, are_apart, make_machines, serve_lanes
from neupims.serving.objectives import Tail, excess
from neupims.serving.policy import Order, first_come
from neupims.serving.requests import Arrivals, stretch
from neupims.serving.results import measure
from neupims.serving.server import Server, are_finite, fit_channels

NEAR = 8  # channels: machines of one program differ in fewer
LANES = 16  # machines whose tables are made together
FEW = 4  # the same where there are few
LEAST = 64.0  # a goodput below this part of the most that the machine serves counts as 0
# Rates that are tried, the first one at that most. Where limits that hold at a rate hold at all
# lower ones, the result is at most LEAST^(1/2^(STEPS - 1)), 1.7 %, below the true one.
STEPS = 9


def find_goodputs(
    server: Server,
    hardware: Sequence[Hardware],
    requests: Arrivals,
    tails: tuple[Tail, ...],
    order: Order = first_come,
) -> Float[np.ndarray, " n"]:
    """Returns the goodput of each machine, (n,) requests a second.

    It is the highest rate that a bisection found at which all limits hold, with the distances
    between the arrivals stretched. It is at most the rate at which the machine serves all requests
    when they come at once, because a short trace says nothing of higher rates. It is 0 where the
    machine cannot hold a request, or the limits hold at no rate that was tried.

    Args:
        server: The rules, the model and the placement; its machine does not matter.
        hardware: The machines.
        requests: The requests, not all at one instant.
        tails: The limits on percentiles.
        order: The order of admission.

    Raises:
        ValueError: All requests arrive at once.
    """
    stretch(requests, 1.0)
    found = np.zeros(len(hardware))
    for fitting, rows in _group(server, hardware):
        some = [hardware[row] for row in rows]
        found[rows] = _find_goodputs(fitting, some, requests, tails, order)
    return found


def _group(server: Server, hardware: Sequence[Hardware]) -> Iterator[tuple[Server, list[int]]]:
    """The programs of all machines: a server that fits up to `LANES` of them, and their rows.

    Rows and places of a program are those of all its machines. So machines with about as many
    channels share one; if all have the same number, nothing is wasted.
    """
    split, channels = server.setting.parallel.kv_split, np.zeros(len(hardware), np.int64)
    if server.setting.system in PIM_SYSTEMS:
        channels[:] = [int(each.hbm.num_channels) for each in hardware]
    step = NEAR * split
    for bucket in np.unique(-(-channels // step)):
        rows = np.flatnonzero(-(-channels // step) == bucket)
        fewest, most = channels[rows].min(), channels[rows].max()
        if fewest < most:
            fewest, most = (bucket - 1) * step + split, bucket * step
        fitting = fit_channels(server, int(fewest), int(most))
        for first in range(0, len(rows), LANES):
            yield fitting, rows[first : first + LANES].tolist()


def _find_goodputs(
    server: Server,
    hardware: list[Hardware],
    requests: Arrivals,
    tails: tuple[Tail, ...],
    order: Order,
) -> Float[np.ndarray, " lanes"]:
    count = len(hardware)
    size = FEW if count <= FEW else LANES
    machines = make_machines(server, hardware + hardware[-1:] * (size - count), requests)
    able = _are_able(machines, requests)[: count if are_apart() else size]
    if not able.any():
        return np.zeros(count)
    # A machine that cannot serve would never end: another one takes its lane.
    stand_in = np.where(able, np.arange(len(able)), able.argmax())
    tables, memory = jax.tree.map(lambda leaf: leaf[stand_in], (machines.tables, machines.memory))
    machines = machines._replace(tables=tables, memory=memory)

    def serve(lanes: list[Arrivals]) -> list[tuple[Arrivals, Lane]]:
        return list(zip(lanes, serve_lanes(machines, lanes, order), strict=True))

    at_once = replace(requests, nanoseconds=0 * requests.nanoseconds)
    ends = [lane.served.end.max() for _, lane in serve([at_once] * len(able))]
    most = len(requests.inputs) * 1e9 / np.array(ends, np.float64)
    low, high, tried = most / LEAST, most, most
    best = np.zeros(len(able))
    for _ in range(STEPS):
        runs = serve([stretch(requests, float(rate)) for rate in tried])
        good = np.array([excess(tails, measure(came, lane.served)) <= 1 for came, lane in runs])
        best = np.where(good, tried, best)
        low, high = np.where(good, tried, low), np.where(good, high, tried)
        tried = np.where(best < most, np.sqrt(low * high), most)
    return np.where(able, best, 0.0)[:count]


def _are_able(machines: Machines, requests: Arrivals) -> Bool[np.ndarray, " lanes"]:
    """Returns whether a machine has finite times, and memory for each request alone."""
    memory = machines.memory
    longest = (requests.inputs + requests.outputs - 1).max()
    room = np.asarray(memory.room).max(axis=1) - np.asarray(memory.spare)
    return are_finite(machines.tables) & (np.asarray(memory.needed)[:, longest] <= room)
