"""Serves a trace: reads the machine and the requests, runs the rules, and gathers the results."""

import numbers
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from neupims.machine.record import cut
from neupims.machine.systems import Fidelity
from neupims.serving import clock
from neupims.serving.ahead import look_ahead
from neupims.serving.loop import run_to_end
from neupims.serving.objectives import Limit, read_limits
from neupims.serving.policy import ORDERS, PLACEMENTS, Order, Placement
from neupims.serving.prefill_devices import Prefilled, prefill_apart
from neupims.serving.requests import Arrivals, read_arrivals
from neupims.serving.results import Iterations, Served, Serving, Totals, sum_up
from neupims.serving.server import (
    Prefill,
    Server,
    check_lengths,
    check_tables,
    describe_server,
    gather,
    make_memory,
    make_requests,
    make_server,
    most_tokens,
    name_block,
    name_of,
    round_length,
    together,
)
from neupims.serving.state import Spent, Step
from neupims.serving.tables import Interleaving, make_tables

# (requests that have left, all requests, seconds that were simulated, iterations)
Progress = Callable[[int, int, float, int], None]


def serve(
    model: str | Path,
    trace: str | Path | Arrivals,
    *,
    rate: float | None = None,
    arrivals: str | None = None,
    first: int | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    system: str = "neupims",
    hardware: str | Path = "neupims",
    row_buffers: int | None = None,
    changes: Mapping[str, Any] | None = None,
    tp: int | None = None,
    pp: int | None = None,
    kv_split: int | None = None,
    lm_head: bool = False,
    fidelity: Fidelity = "simulator",
    interleaving: Interleaving = "on",
    batch: int = 256,
    order: str | Order = "fcfs",
    placement: str | Placement = "greedy",
    prefill: Prefill = "whole",
    prefill_tokens: int = 8192,
    chunk_tokens: int = 512,
    prefill_groups: int = 1,
    spare: float = 0.01,
    slo: str | tuple[Limit, ...] = (),
    leave_out_too_long: bool = False,
    progress: Progress | None = None,
) -> Serving:
    """Returns a trace that was served by continuous batching (`serving.loop` has the rules).

    Args:
        model: A named model, or a file.
        trace: A file or a distribution, as for `read_arrivals`; or requests.
        rate: Requests a second, as for `read_arrivals`, like the next four.
        arrivals: The process of arrivals.
        first: The number of requests from the beginning of the trace.
        columns: Column name by role.
        seed: Seed of all random numbers.
        system: "neupims", "npu-pim", "npu-only" or "gpu".
        hardware: A named machine, or a file.
        row_buffers: Row buffers of a bank (default: those of the system).
        changes: Fields of the hardware by dotted name.
        tp: Devices that share a layer (default: as published for the model, else 1).
        pp: Groups into which the layers are cut; must be 1 (default: as published, else 1).
        kv_split: Channels that share the keys and values of a request (default: 1).
        lm_head: Whether each step computes the LM head too.
        fidelity: "simulator" or "intended"; a prefill is always as intended.
        interleaving: Of "neupims": two sub-batches "on", "off", or in each iteration the "chosen"
            one that takes less time.
        batch: The most requests at once.
        order: Who is admitted next: a name of `policy.ORDERS`, or a function.
        placement: To which channel: a name of `policy.PLACEMENTS`, or functions.
        prefill: "whole": admitted prompts are computed in an iteration of their own, which decoding
            waits for; "chunked": in chunks beside decoding; "separate": by other devices of the
            same kind.
        prefill_tokens: The most tokens of one prefill, if it has more than one prompt.
        chunk_tokens: The most tokens of an iteration, decoded ones too, with `prefill="chunked"`.
        prefill_groups: Groups of devices for prompts, with `prefill="separate"`.
        spare: The share of a channel's blocks that are free after an admission.
        slo: Objectives, such as "ttft<2s,tpot<100ms".
        leave_out_too_long: Whether requests that no channel holds are left out, with a note.
        progress: Called now and then.

    Raises:
        ValueError: A name is unknown, a value is impossible, the trace is empty or not in order, a
            request is longer than the memory, or the machine cannot run the model.
        OSError: A file cannot be read.

    Example:
        >>> import neupims
        >>> done = neupims.serve("llama3-8b", "alpaca:20", rate=50, tp=1)
        >>> done.measures["ttft"].shape
        (20,)
    """
    began = time.perf_counter()
    limits = read_limits(slo)
    requests = read_arrivals(
        trace, rate=rate, process=arrivals, columns=columns, first=first, seed=seed
    )
    model_name, server = make_server(
        model,
        system=system,
        hardware=hardware,
        row_buffers=row_buffers,
        changes=changes,
        tp=tp,
        pp=pp,
        kv_split=kv_split,
        lm_head=lm_head,
        fidelity=fidelity,
        interleaving=interleaving,
        batch=batch,
        placement=placement,
        prefill=prefill,
        prefill_tokens=prefill_tokens,
        chunk_tokens=chunk_tokens,
        spare=spare,
    )
    count = isinstance(prefill_groups, numbers.Integral)
    if not count or prefill_groups < 1 or (prefill_groups > 1 and prefill != "separate"):
        raise ValueError(
            "prefill_groups must be a whole number of at least 1, and more than 1 needs prefill"
            f" separate (--prefill separate), not {cut(prefill_groups)}"
        )
    requests, notes = check_lengths(server, requests, prefill, leave_out_too_long)
    order_name = name_of(order, ORDERS, "order")
    chosen = ORDERS[order] if isinstance(order, str) else order
    setting = server.setting
    apart = None
    if prefill == "separate":
        apart = prefill_apart(setting, server.hardware, requests, groups=prefill_groups)
    ran = run_requests(server, requests, chosen, apart, progress)
    about = {
        **describe_server(server, model_name),
        "order": order_name,
        "placement": name_of(placement, PLACEMENTS, "placement"),
        "prefill": prefill,
        "chunk_tokens": server.rules.chunk or None,
        "wall_seconds": time.perf_counter() - began,
    }
    return Serving(
        requests,
        ran.served,
        ran.totals,
        about,
        limits,
        int(setting.parallel.tp),
        ran.room,
        name_block(setting),
        ran.watts,
        ran.iterations,
        0.0 if apart is None else apart.joules * setting.parallel.tp,
        notes,
    )


class Ran(NamedTuple):
    """A run of the loop."""

    served: Served
    totals: Totals
    iterations: Iterations
    watts: float  # of one device that waits
    room: int  # blocks of all channels


def run_requests(
    server: Server,
    requests: Arrivals,
    order: Order,
    apart: Prefilled | None,
    progress: Progress | None,
) -> Ran:
    """Returns what became of all requests.

    Args:
        server: The machine.
        requests: The requests; each fits the memory alone.
        order: The order of admission.
        apart: What other devices did with the prompts, if they did.
        progress: Called after each chunk of iterations.

    Raises:
        ValueError: The machine cannot run the model.
    """
    rules, length = look_ahead(server.rules), round_length(requests)
    prefill: Prefill = "chunked" if rules.chunk else "whole" if apart is None else "separate"
    memory = make_memory(server, server.hardware, length, together(server, requests, prefill))
    tables = make_tables(server.setting, server.hardware, most_tokens(rules), length)
    check_tables(tables)
    given, numbers = make_requests(requests, order, rules.window, apart)
    steps, iterations = [], 0
    for state, chunk in run_to_end(rules, tables, memory, given):
        steps.append(drop_empty(chunk))
        iterations += len(steps[-1].computed)
        if progress is not None:
            left = int((np.asarray(state.served[: len(numbers), 4]) >= 0).sum())
            now = float(clock.join(state.now)) / 1e9
            progress(left, len(numbers), now, iterations)
    whole: Step = jax.tree.map(lambda *parts: np.concatenate(parts), *steps)
    served = gather(np.asarray(state.served), numbers, requests, apart)
    room = int(np.asarray(memory.room).sum())
    return Ran(served, sum_up(whole), _list(whole), float(tables.watts), room)


def drop_empty(steps: Step) -> Step:
    """Returns the rows in which something was computed, as NumPy arrays.

    Args:
        steps: What happened in each iteration, with rows without one.
    """
    there = np.asarray((steps.computed > 0) | (steps.prompt_tokens > 0))
    return jax.tree.map(lambda part: np.asarray(part)[there], steps)


def _list(whole: Step) -> Iterations:
    """Returns the iterations."""
    spent: Spent = whole.spent
    counted = (whole.computed, whole.prompt_tokens, whole.waiting, whole.blocks, whole.fullest)
    used = (spent.joules, spent.npu_seconds, spent.pim_seconds, spent.bus_seconds)
    return Iterations(
        clock.join(whole.now),
        clock.join(spent.time) / 1e9,
        *(np.asarray(each, np.int64) for each in (*counted, whole.paused)),
        *(np.asarray(each, np.float64) for each in used),
    )
