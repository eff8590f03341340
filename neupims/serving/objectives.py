"""Service level objectives: limits on what each request waits for, such as "ttft<2s,tpot<100ms".

A limit on a percentile, such as "ttft_p99<2s", is one on all requests together.
"""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from neupims.machine.record import cut
from neupims.machine.workload import SHOWN

MEASURES = ("ttft", "tpot", "latency", "queueing")
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
# A measure, what is behind it, a number, and a unit.
LIMIT = r"\s*([a-z]+){}\s*<=?\s*([0-9.]+(?:e-?[0-9]+)?)\s*(s|ms|us)\s*"


class Limit(NamedTuple):
    """A limit on one measure of each request."""

    measure: str  # one of MEASURES
    seconds: float

    def __str__(self) -> str:
        """The limit as it is written."""
        return f"{self.measure}<{self.seconds:g}s"


class Tail(NamedTuple):
    """A limit on a percentile of a measure over all requests."""

    measure: str  # one of MEASURES
    percent: float  # of the requests that are below it
    seconds: float

    def __str__(self) -> str:
        """The limit as it is written."""
        return f"{self.measure}_p{self.percent:g}<{self.seconds:g}s"


def parse_limits(text: str) -> tuple[Limit, ...]:
    """Returns the limits of a text such as "ttft<2s,tpot<100ms".

    Args:
        text: Limits that are separated by commas; each is MEASURE<NUMBER with the unit s, ms or us.

    Raises:
        ValueError: The text is not of that form, or names a measure twice.
    """
    example = "ttft<2s,tpot<100ms"
    return tuple(Limit(measure, seconds) for measure, _, seconds in _parse(text, "()", example))


def read_limits(slo: str | tuple[Limit, ...]) -> tuple[Limit, ...]:
    """Returns limits that are given as text, as for `parse_limits`, or as records.

    Args:
        slo: The text or the records; () for none.

    Raises:
        ValueError: It is neither, or the text has another form.
    """
    if isinstance(slo, str):
        return parse_limits(slo)
    if not isinstance(slo, tuple) or not all(isinstance(each, Limit) for each in slo):
        raise ValueError(f"slo must be text such as ttft<2s,tpot<100ms, or Limits, not {cut(slo)}")
    return slo


def parse_tails(text: str) -> tuple[Tail, ...]:
    """Returns the limits of a text such as "ttft_p99<2s,tpot_p99<100ms".

    Args:
        text: As for `parse_limits`, with _p and a percentile, above 0 and at most 100, behind each
            measure.

    Raises:
        ValueError: The text is not of that form, or names a percentile of a measure twice.
    """
    example = "ttft_p99<2s,tpot_p99<100ms"
    return tuple(Tail(*each) for each in _parse(text, r"_p([0-9]+(?:\.[0-9]+)?)", example))


def _parse(text: str, percentile: str, example: str) -> Iterator[tuple[str, float, float]]:
    """Yields measure, percentile (100 where its form is the empty group), and seconds."""
    form = re.compile(LIMIT.format(percentile), re.ASCII)
    given = set()
    for part in text.split(","):
        match = form.fullmatch(part)
        percent = seconds = 0.0
        with suppress(ValueError):  # of a number such as 1..5
            if match and match[1] in MEASURES:
                percent, seconds = float(match[2] or 100), float(match[3]) * UNITS[match[4]]
        if not match or not 0 < percent <= 100 or not 0 < seconds < math.inf:
            raise ValueError(
                f"an objective is {', '.join(MEASURES[:-1])} or {MEASURES[-1]} below a time, such"
                f" as {example}, not {part.strip()[:SHOWN]!r}"
            )
        if (match[1], percent) in given:
            raise ValueError(f"the objective {match[1]} is given twice: {text[:SHOWN]!r}")
        given.add((match[1], percent))
        yield match[1], percent, seconds


def meet(
    limits: tuple[Limit, ...], measures: dict[str, Float[np.ndarray, " n"]]
) -> Bool[np.ndarray, " n"]:
    """Returns whether each request meets all limits, (n,).

    A request of one token has no time per further token, and meets every limit on it.

    Args:
        limits: The limits.
        measures: Seconds of each request by measure; NaN where there is none.
    """
    met = np.ones(len(next(iter(measures.values()))), bool)
    for limit in limits:
        met &= ~(measures[limit.measure] > limit.seconds)
    return met


def excess(tails: tuple[Tail, ...], measures: dict[str, Float[np.ndarray, " n"]]) -> float:
    """Returns the largest ratio of a percentile and its limit; at most 1 where all are met.

    A measure that no request has meets every limit.

    Args:
        tails: The limits.
        measures: Seconds of each request by measure; NaN where there is none.
    """
    ratios = [0.0]
    for tail in tails:
        values = measures[tail.measure]
        values = values[~np.isnan(values)]
        if len(values):
            ratios.append(float(np.percentile(values, tail.percent)) / tail.seconds)
    return max(ratios)
