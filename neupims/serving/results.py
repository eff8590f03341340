"""What a run of serving gave: times of each request, and what happened in each iteration."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from neupims.machine.record import Number
from neupims.machine.systems import FIDELITY_ANSWERS
from neupims.serving import clock
from neupims.serving.objectives import Limit, meet
from neupims.serving.requests import Arrivals
from neupims.serving.state import Step

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Served:
    """Times of each request in nanoseconds since time 0, in the order of arrival, (n,) each."""

    admitted: Int[np.ndarray, " n"]  # when its prefill may begin
    first: Int[np.ndarray, " n"]  # when its first token is there
    end: Int[np.ndarray, " n"]  # when its last token is there
    pauses: Int[np.ndarray, " n"]  # how often it lost its keys and values


@dataclass(frozen=True)
class Iterations:
    """What happened in each iteration, (iterations,) each."""

    end: Int[np.ndarray, " i"]  # nanoseconds
    seconds: Float[np.ndarray, " i"]
    requests: Int[np.ndarray, " i"]  # that got a token
    prompt_tokens: Int[np.ndarray, " i"]  # that were computed; 0 in a decode step
    waiting: Int[np.ndarray, " i"]  # requests in the waiting room, at most its size
    blocks: Int[np.ndarray, " i"]  # of keys and values in use
    fullest: Int[np.ndarray, " i"]  # the same in the fullest channel
    paused: Int[np.ndarray, " i"]  # requests that lost their keys and values at its start
    joules: Float[np.ndarray, " i"]  # of one device
    npu_seconds: Float[np.ndarray, " i"]  # with products in the arrays
    pim_seconds: Float[np.ndarray, " i"]  # with PIM commands
    bus_seconds: Float[np.ndarray, " i"]  # in which the buses move data


class Totals(NamedTuple):
    """Sums over all iterations; each may have an axis of lanes."""

    iterations: Number
    decode_iterations: Number
    seconds: Number  # of all iterations
    prefill_seconds: Number
    request_seconds: Number  # requests of decode steps times their time
    block_seconds: Number  # blocks in use times their time
    most_blocks: Number
    waiting_seconds: Number  # of iterations while requests wait
    waiting_tokens: Number  # that these iterations made
    joules: Number  # of one device
    npu_seconds: Number
    pim_seconds: Number
    bus_seconds: Number


def sum_up(step: Step) -> Totals:
    """Returns the sums over iterations, in 64 bits.

    Args:
        step: The iterations, (iterations,) or (lanes, iterations) each.
    """
    spent = step.spent
    seconds = clock.join(spent.time) / 1e9
    computed, prompts = np.asarray(step.computed), np.asarray(step.prompt_tokens) > 0
    decodes, waits = (computed > 0) & ~prompts, np.asarray(step.waiting) > 0

    def add(values):
        return np.asarray(values, np.float64).sum(axis=-1)

    return Totals(
        add((computed > 0) | prompts),
        add(decodes),
        add(seconds),
        add(seconds * prompts),
        add(seconds * computed * decodes),
        add(seconds * np.asarray(step.blocks)),
        np.asarray(step.blocks).max(axis=-1, initial=0),
        add(seconds * waits),
        add(computed * waits),
        *(add(each) for each in spent[1:]),
    )


def add_totals(one: Totals, other: Totals) -> Totals:
    """Returns the sums over the iterations of both.

    Args:
        one: Sums over iterations.
        other: Sums over other iterations.
    """
    added = Totals(*(a + b for a, b in zip(one, other, strict=True)))
    return added._replace(most_blocks=np.maximum(one.most_blocks, other.most_blocks))


def measure(arrivals: Arrivals, served: Served) -> dict[str, Float[np.ndarray, " n"]]:
    """Returns seconds of each request: ttft, tpot (NaN for one token), latency and queueing.

    Args:
        arrivals: The requests.
        served: What became of them.
    """
    came, steps = arrivals.nanoseconds, arrivals.outputs - 1
    each = np.where(steps > 0, (served.end - served.first) / np.maximum(steps, 1), np.nan)
    return {
        "ttft": (served.first - came) / 1e9,
        "tpot": each / 1e9,
        "latency": (served.end - came) / 1e9,
        "queueing": (served.admitted - came) / 1e9,
    }


@dataclass(frozen=True)
class Serving:
    """A trace that was served."""

    arrivals: Arrivals
    served: Served
    totals: Totals
    about: dict[str, Any]  # the names of system, model and policies, as JSON has them
    limits: tuple[Limit, ...]  # service level objectives
    devices: int  # that decode
    room: int  # blocks of all channels
    block_tokens: str  # what a block is
    waiting_watts: float  # of one device that waits
    iterations: Iterations | None = None  # None where only sums were kept
    prefill_joules: float = 0.0  # of separate devices for prompts, all together
    notes: tuple[str, ...] = ()

    @property
    def measures(self) -> dict[str, Float[np.ndarray, " n"]]:
        """Seconds of each request: ttft, tpot (NaN for one token), latency and queueing."""
        return measure(self.arrivals, self.served)

    @property
    def seconds(self) -> float:
        """The time from the first arrival to the last token."""
        return float(self.served.end.max() - self.arrivals.nanoseconds[0]) / 1e9

    @property
    def meets(self) -> float:
        """The share of the requests that meet all objectives."""
        return float(meet(self.limits, self.measures).mean())

    @property
    def goodput(self) -> float:
        """Requests a second that meet all objectives."""
        return self.meets * len(self.arrivals.inputs) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of JSON, as `serve --json` prints them.

        Times are seconds. Energy is that of all devices, with that of waiting.
        """
        arrivals, totals, seconds = self.arrivals, self.totals, self.seconds
        count, tokens = len(arrivals.inputs), int(arrivals.outputs.sum())
        busy = float(totals.seconds)
        joules = float(totals.joules) + self.waiting_watts * max(seconds - busy, 0.0)
        joules = self.devices * joules + self.prefill_joules
        decoding = busy - float(totals.prefill_seconds)
        return {
            **self.about,
            "trace": arrivals.name,
            "trace_notes": list(arrivals.notes),
            "requests": count,
            "input_tokens": int(arrivals.inputs.sum()),
            "output_tokens": tokens,
            "arrival_rate": arrivals.rate if np.isfinite(arrivals.rate) else None,
            "seconds": seconds,
            **{name: summarize(values) for name, values in self.measures.items()},
            "requests_per_second": count / seconds,
            "tokens_per_second": tokens / seconds,
            # Throughput of a full machine: while requests wait.
            "saturated_tokens_per_second": (
                float(totals.waiting_tokens / totals.waiting_seconds)
                if totals.waiting_seconds
                else None
            ),
            "objectives": [str(each) for each in self.limits],
            "meets_objectives": self.meets if self.limits else None,
            "goodput_requests_per_second": self.goodput if self.limits else None,
            "iterations": int(totals.iterations),
            "decode_iterations": int(totals.decode_iterations),
            "busy_share": busy / seconds,
            "prefill_share": float(totals.prefill_seconds) / seconds,
            "mean_batch": float(totals.request_seconds) / decoding if decoding else None,
            "npu_utilization": float(totals.npu_seconds) / seconds,
            "pim_utilization": float(totals.pim_seconds) / seconds,
            "bandwidth_utilization": float(totals.bus_seconds) / seconds,
            "kv_blocks": self.room,
            "kv_block": self.block_tokens,
            "kv_occupancy_mean": float(totals.block_seconds) / max(busy, 1e-12) / self.room,
            "kv_occupancy_max": float(totals.most_blocks) / self.room,
            "pauses": int(self.served.pauses.sum()),
            "paused_requests": int((self.served.pauses > 0).sum()),
            "energy_joules": joules,
            "energy_joules_per_token": joules / tokens,
            "devices": self.devices,
            "fidelity_answers": FIDELITY_ANSWERS[self.about["fidelity"]],
            "notes": list(self.notes),
        }


def summarize(values: Float[np.ndarray, " n"]) -> dict[str, float | None]:
    """Returns mean, percentiles and maximum of numbers, None where there are none.

    Args:
        values: The numbers; NaN do not count.
    """
    there = values[~np.isnan(values)]
    names = ["mean", *(f"p{each}" for each in PERCENTILES), "max"]
    if not len(there):
        return dict.fromkeys(names)
    found = [there.mean(), *np.percentile(there, PERCENTILES), there.max()]
    return dict(zip(names, map(float, found), strict=True))
