"""Service level objectives: limits on what each request waits for, such as "ttft<2s,tpot<100ms"."""

import math
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from neupims.machine.workload import SHOWN

MEASURES = ("ttft", "tpot", "latency", "queueing")
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
LIMIT = re.compile(r"\s*([a-z]+)\s*<=?\s*([0-9.]+(?:e-?[0-9]+)?)\s*(s|ms|us)\s*", re.ASCII)


class Limit(NamedTuple):
    """A limit on one measure of each request."""

    measure: str  # one of MEASURES
    seconds: float

    def __str__(self) -> str:
        """The limit as it is written."""
        return f"{self.measure}<{self.seconds:g}s"


def parse_limits(text: str) -> tuple[Limit, ...]:
    """Returns the limits of a text such as "ttft<2s,tpot<100ms".

    Args:
        text: Limits that are separated by commas; each is MEASURE<NUMBER with the unit s, ms or us.

    Raises:
        ValueError: The text is not of that form, or names a measure twice.
    """
    limits: list[Limit] = []
    for part in text.split(","):
        match = LIMIT.fullmatch(part)
        try:
            seconds = float(match[2]) * UNITS[match[3]] if match else 0.0
        except ValueError:
            seconds = 0.0
        if not match or match[1] not in MEASURES or not 0 < seconds < math.inf:
            raise ValueError(
                f"an objective is {', '.join(MEASURES[:-1])} or {MEASURES[-1]} below a time, such"
                f" as ttft<2s,tpot<100ms, not {part.strip()[:SHOWN]!r}"
            )
        if match[1] in (each.measure for each in limits):
            raise ValueError(f"the objective {match[1]} is given twice: {text[:SHOWN]!r}")
        limits.append(Limit(match[1], seconds))
    return tuple(limits)


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
