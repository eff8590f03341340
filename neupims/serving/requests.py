"""Requests with arrivals: from traces with times, or lengths with random arrivals at a rate."""

import datetime
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from neupims.machine.distributions import is_distribution, sample_tokens
from neupims.machine.record import check_seed, cut
from neupims.machine.trace_files import find_column, read_rows, read_table_of
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
DATE = re.compile(r"(.+?)(?:\.([0-9]+))?(Z|[+-][0-9]{2}:?[0-9]{2})?", re.ASCII)
UNIT = re.compile(r"[\s_\-.](ms|us|ns|s|seconds)$")  # the end of a column's name
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
MOST_SECONDS = 10**8  # three years


@dataclass(frozen=True)
class Arrivals:
    """Requests in their order of arrival.

    Raises:
        ValueError: There is no request, arrays differ in length or are not of whole numbers,
            arrivals are negative, out of order or after three years, or a request has no prompt, no
            output, or more than `LONGEST` tokens.
    """

    name: str  # of the trace
    nanoseconds: Int[np.ndarray, " n"]  # when they arrive
    inputs: Int[np.ndarray, " n"]  # tokens of the prompt
    outputs: Int[np.ndarray, " n"]  # tokens of the answer
    notes: tuple[str, ...] = ()  # sentences: what was assumed or left out

    def __post_init__(self) -> None:
        """Checks the requests."""
        times, shape = self.nanoseconds, (len(self.inputs),)
        columns = times, self.inputs, self.outputs
        if any(each.shape != shape or each.dtype.kind not in "iu" for each in columns):
            raise ValueError(
                f"the arrivals, inputs and outputs of {self.name} must be arrays of whole numbers,"
                " as many of each"
            )
        if not len(self.inputs):
            raise ValueError(f"{self.name} holds no request")
        if times[0] < 0 or (times[1:] < times[:-1]).any():
            raise ValueError(f"the arrivals of {self.name} must rise from 0 or later")
        if times[-1] > MOST_SECONDS * 10**9:
            raise ValueError(f"the arrivals of {self.name} take more than three years")
        if min(self.inputs.min(), self.outputs.min()) < 1:
            raise ValueError(f"each request of {self.name} must have input and output tokens")
        if (self.inputs + self.outputs).max() > LONGEST:
            raise ValueError(f"{self.name} has a request of more than {LONGEST} tokens")

    @property
    def rate(self) -> float:
        """Requests a second, from the first arrival to the last one; infinite for one instant."""
        span = int(self.nanoseconds[-1] - self.nanoseconds[0])
        return (len(self.nanoseconds) - 1) / (span / 1e9) if span else math.inf


def read_arrivals(
    source: str | Path | Arrivals,
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
        source: The file, or the text of a distribution with outputs, such as "sharegpt:1000"; or
            requests, whose arrivals may be changed, or of which the first ones may be taken.
        rate: Requests a second. Where the trace has arrivals, their distances are stretched to this
            mean rate (default: as they are); else it must be given.
        process: "poisson" draws independent arrivals, "gamma:CV" draws distances with this
            coefficient of variation: 1 is Poisson, more is burstier (default: the arrivals of the
            trace, Poisson where it has none).
        columns: Column name by role, "arrival", "input" or "output"; a number counts columns from 1
            (default: found by name).
        first: The number of requests from the beginning (default: all).
        seed: Seed of all random numbers.

    Raises:
        ValueError: The trace is empty, an arrival is negative or earlier than the one before, the
            rate is not positive, there are neither arrivals nor a rate, or columns are given for
            what has none.
        OSError: The file cannot be read.
    """
    check_seed(seed)
    number = isinstance(rate, numbers.Real)
    if rate is not None and not (number and math.isfinite(rate) and rate > 0):
        raise ValueError(
            f"the rate must be a finite number above 0, in requests a second, not {cut(rate)}"
        )
    random = np.random.default_rng(seed)
    text, notes = source.name if isinstance(source, Arrivals) else str(source), []
    name, times = text, None
    if columns and (isinstance(source, Arrivals) or is_distribution(text)):
        raise ValueError(f"{text} is no file, and has no columns: leave them out")
    if isinstance(source, Arrivals):
        times, notes = source.nanoseconds, [*source.notes]
        found = {"input": source.inputs, "output": source.outputs}
    elif is_distribution(text):
        found, notes = sample_tokens(text, random)
    else:
        name = Path(source).stem
        given = dict(columns or {})
        times, notes = _read_times(text, given.pop("arrival", None))
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
        if not isinstance(first, numbers.Integral) or not 1 <= first <= len(inputs):
            raise ValueError(
                f"{name} has {len(inputs)} requests: the number to take must be from 1 to"
                f" {len(inputs)}, not {first!r}"
            )
        inputs, outputs = inputs[:first], outputs[:first]
        times = None if times is None else times[:first]
    if process is not None or times is None:
        if rate is None:
            raise ValueError(
                f"{name} {'has no arrivals' if times is None else 'gets new arrivals'}: give a rate"
                " (--rate, requests a second)"
            )
        process = POISSON if process is None else process
        times = draw_arrivals(len(inputs), rate, process, random)
        rate = None
        notes.append(f"arrivals are drawn: {process}, seed {seed}")
    answered = outputs > 0
    if missing := int((~answered).sum()):
        notes.append(f"{missing} requests without output are left out")
    if not answered.any():
        raise ValueError(f"{name} holds no request with output")
    times, inputs, outputs = times[answered], inputs[answered], outputs[answered]
    if empty := int((inputs < 1).sum()):
        notes.append(f"{empty} requests without input get a prompt of one token")
    arrivals = Arrivals(name, times, np.maximum(inputs, 1), outputs, tuple(notes))
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
        ValueError: The process is unknown, or the arrivals take more than three years.
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
    gaps = random.gamma(shape, 1 / shape, count)
    with np.errstate(over="ignore"):
        return _to_whole(np.cumsum(gaps) * (1e9 / np.float64(rate)), rate)


def _to_whole(nanoseconds: Float[np.ndarray, " n"], rate: float) -> Int[np.ndarray, " n"]:
    """Returns whole nanoseconds, if the last is within three years."""
    if not nanoseconds[-1] <= MOST_SECONDS * 1e9:
        raise ValueError(
            f"at {rate:g} requests a second, {len(nanoseconds)} requests arrive in more than three"
            " years: give a higher rate"
        )
    return np.round(nanoseconds).astype(np.int64)


def stretch(arrivals: Arrivals, rate: float) -> Arrivals:
    """Returns requests whose distances are stretched to another mean rate.

    Args:
        arrivals: The requests.
        rate: Requests a second.

    Raises:
        ValueError: All requests arrive at once, or they would take more than three years.
    """
    if not math.isfinite(arrivals.rate) or not arrivals.rate:
        raise ValueError(
            f"the requests of {arrivals.name} arrive at one instant, which cannot be stretched to a"
            " rate: take at least two requests that arrive apart, or draw their arrivals"
            " (serve --arrivals poisson)"
        )
    start = arrivals.nanoseconds[0]
    with np.errstate(over="ignore", invalid="ignore"):
        times = (arrivals.nanoseconds - start) * (np.float64(arrivals.rate) / rate)
    return replace(arrivals, nanoseconds=_to_whole(times, rate))


def _read_times(path: str, column: str | None) -> tuple[Int[np.ndarray, " n"] | None, list[str]]:
    """Returns the arrivals of a trace file in nanoseconds, if it has them, and what was assumed."""
    names, rows = read_rows(path)
    plain = [re.sub(r"[\s_\-.]", "", name).lower() for name in names]
    known = [place for place, name in enumerate(plain) if _unit(name, plain) is not None]
    if column is not None:
        place = find_column(path, names, column)
    elif len(known) == 1:
        (place,) = known
    elif known:
        listed = " or ".join(names[each] for each in known)
        raise ValueError(f"{path}: the arrival may be {listed}: choose one, --columns arrival=NAME")
    else:
        return None, []
    padded = ((line, row[place] if place < len(row) else None) for line, row in rows)
    cells = [(line, "" if cell is None else str(cell).strip()) for line, cell in padded]
    numbers = bool(cells) and NUMBER.fullmatch(cells[0][1]) is not None
    unit, notes = _unit(plain[place], plain), []
    if unit is None:
        end = UNIT.search(names[place].lower())
        unit = ARRIVALS[f"arrival{end[1]}"] if end else 10**9
        if numbers and not end:
            notes = [f"arrivals, column {names[place]}, are taken as seconds"]
    ambiguous = plain[place] == STAMP and unit == 10**9
    times: list[int] = []
    for line, text in cells:
        where = f"{path}, line {line}"
        if numbers and ambiguous:
            raise ValueError(
                f"{where}: a timestamp {text[:SHOWN]} may be of seconds or of milliseconds: name"
                " the column arrival_s or arrival_ms"
            )
        time = _parse_number(where, text, unit) if numbers else _parse_date(where, text)
        if times and time < times[-1]:
            raise ValueError(
                f"{where}: the arrival is {(times[-1] - time) / 1e9:g} s before that of the request"
                " above: sort the trace by arrival"
            )
        if time - (0 if numbers else (times or [time])[0]) > MOST_SECONDS * 10**9:
            raise ValueError(f"{where}: the arrival {text[:SHOWN]} is after more than three years")
        times.append(time)
    start = 0 if numbers or not times else times[0]
    return np.array([time - start for time in times], np.int64), notes


def _unit(name: str, names: list[str]) -> int | None:
    """Returns the nanoseconds of one unit of a column; None where it does not hold arrivals."""
    if name == STAMP:
        return 10**6 if set(names) >= MOONCAKE else 10**9
    return ARRIVALS.get(name)


def _parse_number(where: str, text: str, unit: int) -> int:
    """Returns the nanoseconds of a number of units."""
    if not NUMBER.fullmatch(text):
        raise ValueError(
            f"{where}: the arrival must be a number like those above, not {_show(text)}"
        )
    time = round(Decimal(text) * unit)
    if time < 0:
        raise ValueError(f"{where}: the arrival must not be negative, but is {text[:SHOWN]}")
    return time


def _parse_date(where: str, text: str) -> int:
    """Returns the nanoseconds since 1970 of a date; it is of UTC where it has no time zone."""
    match = DATE.fullmatch(text)
    try:
        if not match:
            raise ValueError
        moment = datetime.datetime.fromisoformat(match[1] + (match[3] or ""))
    except ValueError:
        raise ValueError(
            f"{where}: the arrival must be a number or a date, not {_show(text)}"
        ) from None
    since = moment.replace(tzinfo=moment.tzinfo or datetime.UTC) - EPOCH
    return (since.days * 86400 + since.seconds) * 10**9 + int((match[2] or "")[:9].ljust(9, "0"))


def _show(text: str) -> str:
    return repr(text[:SHOWN]) if text else "nothing"
