"""The load that a machine bears: latencies against the rate of arrival, and the highest good rate.

All rates of a round are lanes of one program. The distances between the arrivals of the trace are
stretched, so every rate sees the same requests in the same order.
"""

import numbers
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neupims.machine.record import cut, instead
from neupims.serving.lanes import run_lanes
from neupims.serving.objectives import Limit, read_limits
from neupims.serving.policy import ORDERS, PLACEMENTS, Order, Placement
from neupims.serving.requests import Arrivals, read_arrivals, stretch
from neupims.serving.results import Serving
from neupims.serving.server import (
    Prefill,
    Server,
    check_lengths,
    describe_server,
    make_memory,
    make_server,
    name_block,
    name_of,
    round_length,
    together,
)

ROUNDS = 3  # of the bisection
CLOSE = 1.01  # ratio of two rates between which nothing more is looked for
KNEE = 2.0  # times the mean latency of the lowest rate
MOST_RATES = 64


@dataclass(frozen=True)
class Sweep:
    """A trace that was served at several rates."""

    servings: tuple[Serving, ...]  # by rising rate
    rates: tuple[float, ...]  # requests a second
    limits: tuple[Limit, ...]
    share: float  # of the requests that must meet the objectives
    # The highest rate that was tried and, like all lower ones, meets them; None if the lowest does
    # not, or there are no objectives.
    highest: float | None
    bound: float | None  # the lowest rate that does not; None if all do
    knee: float | None  # the highest rate below which latency is not twice that of the lowest rate

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of JSON, as `serve --rate-sweep --json` prints them."""
        return {
            "rates": list(self.rates),
            "objectives": [str(each) for each in self.limits],
            "share": self.share,
            "highest_rate": self.highest,
            "lowest_rate_that_fails": self.bound,
            "knee_rate": self.knee,
            "runs": [each.to_dict() for each in self.servings],
        }


def sweep_rates(
    model: str | Path,
    trace: str | Path | Arrivals,
    rates: Sequence[float],
    *,
    slo: str | tuple[Limit, ...] = (),
    prefill: Prefill = "whole",
    share: float = 0.99,
    arrivals: str | None = None,
    first: int | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    order: str | Order = "fcfs",
    placement: str | Placement = "greedy",
    leave_out_too_long: bool = False,
    **options: Any,
) -> Sweep:
    """Returns a trace that was served at several rates, and the highest rate that is good.

    With objectives, the rates between the highest one that meets them and the next one are tried in
    further rounds, as many at once as `rates` has.

    Args:
        model: A named model, or a file.
        trace: As for `serve`.
        rates: Requests a second, at least two different ones.
        prefill: "whole" or "chunked".
        slo: Objectives, such as "ttft<2s,tpot<100ms".
        share: The share of the requests that must meet them.
        arrivals: The process of arrivals, as for `serve` (default: those of the trace).
        first: As for `serve`.
        columns: As for `serve`.
        seed: Seed of all random numbers.
        order: Who is admitted next.
        placement: To which channel.
        leave_out_too_long: As for `serve`.
        **options: Further arguments of `serve`: system, hardware, row_buffers, changes, tp, pp,
            kv_split, lm_head, fidelity, interleaving, batch, prefill_tokens,
            chunk_tokens, spare.

    Raises:
        ValueError: A rate is not positive, there are too few or too many, or as for `serve`.
        OSError: A file cannot be read.
    """
    tried = sorted(set(map(float, rates)))
    if not 2 <= len(tried) <= MOST_RATES or not (tried[0] > 0 and np.isfinite(tried[-1])):
        raise ValueError(
            f"a sweep needs from 2 to {MOST_RATES} different rates above 0, not"
            f" {', '.join(f'{each:g}' for each in tried)[:80]}"
        )
    if prefill == "separate":
        raise ValueError("a sweep computes prompts on the devices that decode: whole or chunked")
    if not isinstance(share, numbers.Real) or not 0 < share <= 1:
        raise ValueError(
            f"the share of good requests must be above 0 and at most 1, not {cut(share)}"
        )
    limits = read_limits(slo)
    requests = read_arrivals(
        trace, rate=tried[0], process=arrivals, columns=columns, first=first, seed=seed
    )
    name, server = make_server(model, placement=placement, prefill=prefill, **options)
    requests, notes = check_lengths(server, requests, prefill, leave_out_too_long)
    about = {
        **describe_server(server, name),
        "order": name_of(order, ORDERS, "order"),
        "placement": name_of(placement, PLACEMENTS, "placement"),
        "prefill": prefill,
        "chunk_tokens": server.rules.chunk or None,
    }
    chosen = ORDERS[order] if isinstance(order, str) else order
    found: dict[float, Serving] = {}

    def try_rates(several: Sequence[float]) -> None:
        lanes = [stretch(requests, each) for each in several]
        for rate, done in zip(
            several, _serve_lanes(server, lanes, chosen, about, limits, notes), strict=True
        ):
            found[rate] = done

    try_rates(tried)
    highest, bound = _bracket(found, share) if limits else (None, None)
    for _ in range(ROUNDS):
        if highest is None or bound is None or bound / highest < CLOSE:
            break
        inner = np.geomspace(highest, bound, len(tried) + 2)[1:-1]
        try_rates([float(each) for each in inner])
        highest, bound = _bracket(found, share)
    ordered = sorted(found)
    return Sweep(
        tuple(found[each] for each in ordered),
        tuple(ordered),
        limits,
        share,
        highest,
        bound,
        _find_knee(found),
    )


def _serve_lanes(
    server: Server,
    lanes: Sequence[Arrivals],
    order: Order,
    about: dict[str, Any],
    limits: tuple[Limit, ...],
    notes: tuple[str, ...],
) -> list[Serving]:
    began = time.perf_counter()
    runs = run_lanes(server, [server.hardware], lanes, order)
    tokens = together(server, lanes[0], "chunked" if server.rules.chunk else "whole")
    memory = make_memory(server, server.hardware, round_length(lanes[0]), tokens)
    taken = {"wall_seconds": (time.perf_counter() - began) / len(lanes)}
    return [
        Serving(
            arrivals,
            run.served,
            run.totals,
            about | taken,
            limits,
            int(server.setting.parallel.tp),
            int(np.asarray(memory.room).sum()),
            name_block(server.setting),
            run.watts,
            notes=notes,
        )
        for arrivals, run in zip(lanes, runs, strict=True)
    ]


def _bracket(found: Mapping[float, Serving], share: float) -> tuple[float | None, float | None]:
    """Returns the highest rate below the first one that fails, and that one."""
    highest = None
    for rate in sorted(found):
        if found[rate].meets < share:
            return highest, rate
        highest = rate
    return highest, None


def _find_knee(found: Mapping[float, Serving]) -> float | None:
    """Returns the highest rate before the mean latency is twice that of the lowest rate."""
    ordered = sorted(found)
    least = found[ordered[0]].measures["latency"].mean()
    knee = ordered[0]
    for rate in ordered:
        if found[rate].measures["latency"].mean() > KNEE * least:
            return knee
        knee = rate
    return None


def parse_rates(text: str) -> list[float]:
    """Returns rates from a text: "1,2,4", or "LOW:HIGH:N" for N rates with equal ratios.

    Args:
        text: The text.

    Raises:
        ValueError: The text has another form.
    """
    try:
        if ":" in text:
            if text.count(":") != 2:
                raise ValueError("a range has two colons")
            low, high, count = text.split(":")
            if not 2 <= int(count) <= MOST_RATES:
                raise ValueError(f"N must be {instead(int(count), 2, MOST_RATES, True)}")
            ends = float(low), float(high)
            if not all(0 < each < np.inf for each in ends):
                raise ValueError("LOW and HIGH must be finite and above 0")
            found = np.geomspace(*ends, int(count))
            return [float(f"{each:.9g}") for each in found]  # 8, not 7.999999999999999
        return [float(each) for each in text.split(",")]
    except ValueError as fault:
        raise ValueError(
            "rates are R,R,... or LOW:HIGH:N, requests a second, such as 1:32:6, not"
            f" {text[:80]!r} ({fault})"
        ) from None
