"""Requests with arrivals: from traces with times, or lengths with random arrivals at a rate."""

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from neupims.machine.distributions import is_distribution, sample_tokens
from neupims.machine.record import check_seed
from neupims.machine.trace_files import read_rows, read_table_of
from neupims.machine.workload import LONGEST, SHOWN

POISSON = "poisson"
# Names of columns with arrivals, in lower case without spaces and underscores, and nanoseconds.
ARRIVALS = {
    **dict.fromkeys(("arrival", "arrivals", "arrivaltime", "arrivaltimes"), 10**9),
    "arrivalseconds": 10**9,
    "arrivalms": 10**6,
    "arrivalus": 10**3,
    "arrivalns": 1,
}
STAMP = "timestamp"  # a date in Azure's traces, milliseconds in Mooncake's
MOONCAKE = {"inputlength", "outputlength"}
NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?\s*", re.ASCII)
MOST_SECONDS = 10**8  # three years


@dataclass(frozen=True)
class Arrivals:
    """Requests in their order of arrival."""

    name: str  # of the trace
    nanoseconds: Int[np.ndarray, " n"]  # when they arrive
    inputs: Int[np.ndarray, " n"]  # tokens of the prompt
    outputs: Int[np.ndarray, " n"]  # tokens of the answer
    notes: tuple[str, ...] = ()  # sentences: what was assumed or left out

    @property
    def rate(self) -> float:
        """Requests a second, from the first arrival to the last one; infinite for one instant."""
        span = int(self.nanoseconds[-1] - self.nanoseconds[0])
        return (len(self.nanoseconds) - 1) / (span / 1e9) if span else math.inf


def read_arrivals(
    source: str | Path,
    *,
    rate: float | None = None,
    process: str | None = None,
    columns: Mapping[str, str] | None = None,
    first: int | None = None,
    seed: int = 0,
) -> Arrivals:
    """Returns the requests of a trace, or of a distribution, with their arrivals.

    A trace has input and output tokens, as `neupims.read_requests` reads them, and one column of
    arrivals: `arrival_s` or `arrival` (seconds), `arrival_ms`, the `TIMESTAMP` of Azure's traces
    (dates), or the `timestamp` of Mooncake's (milliseconds).

    Args:
        source: The file, or the text of a distribution with outputs, such as "sharegpt:1000".
        rate: Requests a second. Where the trace has arrivals, their distances are stretched to this
            mean rate (default: as they are); else it must be given.
        process: "poisson" draws independent arrivals, "gamma:CV" draws distances with this
            coefficient of variation: 1 is Poisson, more is burstier (default: the arrivals of the
            trace, Poisson where it has none).
        columns: Column name by role, "arrival", "input" or "output" (default: found by name).
        first: The number of requests from the beginning (default: all).
        seed: Seed of all random numbers.

    Raises:
        ValueError: The trace is empty, an arrival is negative or earlier than the one before, the
            rate is not positive, or there are neither arrivals nor a rate.
        OSError: The file cannot be read.
    """
    check_seed(seed)
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"the rate must be more than 0 requests a second, not {rate:g}")
    random = np.random.default_rng(seed)
    text, notes = str(source), []
    times = None
    if is_distribution(text):
        name = text
        found, assumed = sample_tokens(text, random)
        notes += assumed
    else:
        name = Path(source).stem
        given = dict(columns or {})
        times = _read_times(text, given.pop("arrival", None))
        found = read_table_of(text, given or None)
    if "output" not in found:
        raise ValueError(
            f"{name} has lengths, but serving needs input and output tokens: take a file with both,"
            " sharegpt:N or alpaca:N"
        )
    inputs, outputs = found["input"], found["output"]
    if not len(inputs):
        raise ValueError(f"{name} holds no request")
    if first is not None:
        if not 1 <= first <= len(inputs):
            raise ValueError(
                f"{name} has {len(inputs)} requests: the number to take must be from 1 to"
                f" {len(inputs)}, not {first}"
            )
        inputs, outputs = inputs[:first], outputs[:first]
        times = None if times is None else times[:first]
    if process is not None or times is None:
        if rate is None:
            raise ValueError(
                f"{name} {'has no arrivals' if times is None else 'gets new arrivals'}: give a rate"
                " (--rate, requests a second)"
            )
        times = draw_arrivals(len(inputs), rate, process or POISSON, random)
        rate = None
        notes.append(f"arrivals are drawn: {process or POISSON}, seed {seed}")
    answered = outputs > 0
    if missing := int((~answered).sum()):
        notes.append(f"{missing} requests without output are left out")
    arrivals = Arrivals(
        name, times[answered], np.maximum(inputs, 1)[answered], outputs[answered], tuple(notes)
    )
    if not len(arrivals.inputs):
        raise ValueError(f"{name} holds no request with output")
    if (arrivals.inputs + arrivals.outputs).max() > LONGEST:
        raise ValueError(f"{name} has a request of more than {LONGEST} tokens")
    return arrivals if rate is None else stretch(arrivals, rate)


def draw_arrivals(
    count: int, rate: float, process: str, random: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Returns random arrivals in nanoseconds, (n,).

    Args:
        count: The number of requests.
        rate: Requests a second.
        process: "poisson" or "gamma:CV".
        random: The random numbers.

    Raises:
        ValueError: The process is unknown.
    """
    variation = 1.0
    if process != POISSON:
        kind, _, number = process.partition(":")
        if kind != "gamma" or not NUMBER.fullmatch(number) or not 0 < float(number) <= 100:
            raise ValueError(
                "arrivals are poisson, or gamma:CV with a coefficient of variation above 0 and at"
                f" most 100, not {process[:SHOWN]!r}"
            )
        variation = float(number)
    shape = 1 / variation**2
    gaps = random.gamma(shape, 1 / rate / shape, count)
    return np.round(np.cumsum(gaps) * 1e9).astype(np.int64)


def stretch(arrivals: Arrivals, rate: float) -> Arrivals:
    """Returns requests whose distances are stretched to another mean rate.

    Args:
        arrivals: The requests.
        rate: Requests a second.

    Raises:
        ValueError: All requests arrive at once.
    """
    if not math.isfinite(arrivals.rate) or not arrivals.rate:
        raise ValueError(
            f"the requests of {arrivals.name} arrive at one instant, which cannot be stretched to a"
            " rate: choose --arrivals poisson"
        )
    start = arrivals.nanoseconds[0]
    times = np.round((arrivals.nanoseconds - start) * (arrivals.rate / rate)).astype(np.int64)
    return replace(arrivals, nanoseconds=times)


def _read_times(path: str, column: str | None) -> Int[np.ndarray, " n"] | None:
    """Returns the arrivals of a trace file in nanoseconds, or None where it has no such column."""
    names, rows = read_rows(path)
    plain = [re.sub(r"[\s_\-.]", "", name).lower() for name in names]
    known = [place for place, name in enumerate(plain) if _unit(name, plain) is not None]
    if column is not None:
        if column not in names:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(names)[:SHOWN]}")
        place = names.index(column)
    elif len(known) == 1:
        (place,) = known
    elif known:
        listed = " or ".join(names[each] for each in known)
        raise ValueError(f"{path}: the arrival may be {listed}: choose one, --columns arrival=NAME")
    else:
        return None
    unit = _unit(plain[place], plain) or _unit(f"arrival{plain[place][-2:]}", plain) or 10**9
    times: list[int] = []
    for line, row in rows:
        cell = row[place] if place < len(row) else None
        time = _parse_time(path, line, cell, unit, dates=plain[place] == STAMP)
        if times and time < times[-1]:
            raise ValueError(
                f"{path}, line {line}: the arrival is {(times[-1] - time) / 1e9:g} s before that of"
                " the request above: sort the trace by arrival"
            )
        times.append(time)
    found = np.array(times, np.int64)
    if len(found) and isinstance(rows[0][1][place], str) and not _is_number(rows[0][1][place]):
        return found - found[0]  # dates
    return found


def _unit(name: str, names: list[str]) -> int | None:
    """Returns the nanoseconds of one unit of a column; None where it does not hold arrivals."""
    if name == STAMP:
        return 10**6 if set(names) >= MOONCAKE else 10**9
    return ARRIVALS.get(name)


def _is_number(cell: Any) -> bool:
    return NUMBER.fullmatch(str(cell)) is not None


def _parse_time(path: str, line: int, cell: Any, unit: int, *, dates: bool) -> int:
    """Returns the nanoseconds of a cell: a number of units, or a date."""
    text = "" if cell is None else str(cell).strip()
    if _is_number(text):
        if dates and unit == 10**9:
            raise ValueError(
                f"{path}, line {line}: a timestamp {text[:SHOWN]} may be of seconds or of"
                " milliseconds: name the column arrival_s or arrival_ms"
            )
        time = round(Decimal(text) * unit)
        if time < 0:
            raise ValueError(
                f"{path}, line {line}: the arrival must not be negative, but is {text}"
            )
        if time > MOST_SECONDS * 10**9:
            raise ValueError(f"{path}, line {line}: the arrival {text} is more than three years")
        return time
    moment, _, fraction = text.partition(".")
    try:
        since = datetime.datetime.fromisoformat(moment) - datetime.datetime(1970, 1, 1)
        return (since.days * 86400 + since.seconds) * 10**9 + int(fraction[:9].ljust(9, "0") or 0)
    except (ValueError, TypeError):
        shown = repr(text[:SHOWN]) if text else "nothing"
        raise ValueError(
            f"{path}, line {line}: the arrival must be a number or a date, not {shown}"
        ) from None
