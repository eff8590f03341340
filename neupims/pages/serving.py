"""The page and the trace of a run of serving, and the page of a sweep of rates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neupims.files import write_text
from neupims.pages.report import write_report
from neupims.serving.rates import Sweep
from neupims.serving.results import Iterations, Serving

MOST_POINTS = 400  # of a curve
MEASURES = {
    "queueing": "queueing",
    "ttft": "time to the first token",
    "tpot": "time per output token",
    "latency": "latency",
}


def write_serving(path: str | Path, found: Serving) -> None:
    """Writes a page with the batch, the queue and the memory over time, and distributions.

    Args:
        path: The HTML file.
        found: The result of `serve`.

    Raises:
        OSError: The page cannot be written.
        ImportError: Jinja is not installed.
    """
    told = found.to_dict()
    sections = [_latencies(told), *_distributions(found)]
    if found.iterations is not None:
        sections = [*_timelines(found, found.iterations), *sections]
    names = ("system", "interleaving", "fidelity", "order", "placement", "prefill", "devices")
    facts = {name: told[name] for name in names if told[name] is not None}
    facts |= {
        "requests": told["requests"],
        "tokens a second": told["tokens_per_second"],
        "mJ a token": told["energy_joules_per_token"] * 1e3,
    }
    if found.limits:
        facts["objectives"] = ", ".join(told["objectives"])
        facts["requests that meet them, %"] = 100 * told["meets_objectives"]
        facts["goodput, requests a second"] = told["goodput_requests_per_second"]
    if notes := [*told["trace_notes"], *told["notes"]]:
        facts["notes"] = "; ".join(notes)
    title = f"{told['trace']} served with {told['model']} on {told['system']}"
    write_report(path, sections, title=title, facts=facts)


def _latencies(told: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (label, *("" if each is None else each * 1e3 for each in told[name].values()))
        for name, label in MEASURES.items()
    ]
    return {
        "kind": "table",
        "title": "Times of requests",
        "text": "Milliseconds.",
        "columns": ("of a request", "mean", "p50", "p90", "p99", "max"),
        "rows": rows,
    }


def _distributions(found: Serving) -> list[dict[str, Any]]:
    """Those of all measures that any request has."""
    each = {name: values[~np.isnan(values)] for name, values in found.measures.items()}
    return [
        _distribution(name, np.sort(values) * 1e3) for name, values in each.items() if len(values)
    ]


def _distribution(name: str, values: np.ndarray) -> dict[str, Any]:
    """The share of the requests that take at most so long; milliseconds in rising order."""
    places = np.unique(np.linspace(0, len(values) - 1, MOST_POINTS).astype(int))
    points = {
        "name": MEASURES[name],
        "x": [float(values[place]) for place in places],
        "y": [100 * (int(place) + 1) / len(values) for place in places],
    }
    return {
        "kind": "curves",
        "title": f"Distribution of the {MEASURES[name]}",
        "text": "The share of the requests that take at most so long.",
        "series": [points],
        "x_name": f"{MEASURES[name]}, ms",
        "y_name": "requests, %",
        "log_x": bool(values[0] > 0),
    }


def _timelines(found: Serving, iterations: Iterations) -> list[dict[str, Any]]:
    """The batch, the queue, and the memory in use, in the mean of equal parts of the run."""
    came = found.arrivals.nanoseconds
    begin, end = int(came[0]), int(found.served.end.max())
    edges = np.linspace(begin, end, MOST_POINTS + 1)
    part = np.clip(np.searchsorted(edges, iterations.end, side="left") - 1, 0, MOST_POINTS - 1)
    spent = np.bincount(part, iterations.seconds, MOST_POINTS)
    middle = ((edges[:-1] + edges[1:]) / 2e9).tolist()

    def mean(values):
        total = np.bincount(part, iterations.seconds * values, MOST_POINTS)
        return (total / np.where(spent > 0, spent, 1)).tolist()

    admitted = np.sort(found.served.admitted)
    waiting = np.searchsorted(came, edges[1:], side="right") - np.searchsorted(
        admitted, edges[1:], side="right"
    )
    decodes = iterations.prompt_tokens == 0
    blocks = mean(100 * iterations.blocks / found.room)
    charts = (
        ("Batch", "Requests that an iteration computes: those of a decode step.", "requests",
         mean(iterations.requests * decodes)),
        ("Queue", "Requests that have arrived and are not admitted.", "requests",
         waiting.tolist()),
        ("Memory", "Blocks of keys and values in use.", "of all blocks, %", blocks),
    )  # fmt: skip
    return [
        {
            "kind": "curves",
            "title": title,
            "text": text,
            "series": [{"name": title.lower(), "x": middle, "y": values}],
            "x_name": "seconds",
            "y_name": unit,
        }
        for title, text, unit, values in charts
    ]


def write_sweep(path: str | Path, found: Sweep) -> None:
    """Writes a page with latencies and throughput against the rate.

    Args:
        path: The HTML file.
        found: The result of `sweep_rates`.

    Raises:
        OSError: The page cannot be written.
        ImportError: Jinja is not installed.
    """
    told = found.to_dict()
    first = told["runs"][0]
    rates = list(found.rates)
    charts = [
        _against_rate(rates, label, [(name, [run[key][name] for run in told["runs"]], 1e3)
                                     for name in ("p50", "p99")], "ms")
        for key, label in MEASURES.items()
        if key != "queueing"
    ]  # fmt: skip
    throughput = [("tokens a second", [run["tokens_per_second"] for run in told["runs"]], 1.0)]
    charts.append(_against_rate(rates, "throughput", throughput, "tokens a second"))
    facts = {name: first[name] for name in ("system", "fidelity", "requests", "devices")}
    if found.limits:
        met = [("meet", [run["meets_objectives"] for run in told["runs"]], 100.0)]
        limits = ", ".join(told["objectives"])
        charts.append(_against_rate(rates, f"requests that meet {limits}", met, "%"))
        facts["objectives"] = limits
        facts["highest good rate"] = "none" if found.highest is None else found.highest
    facts["knee, requests a second"] = "above" if found.knee is None else found.knee
    title = f"{first['trace']} at several rates: {first['model']} on {first['system']}"
    write_report(path, charts, title=title, facts=facts)


def _against_rate(
    rates: list[float],
    label: str,
    curves: Sequence[tuple[str, list[float | None], float]],
    unit: str,
) -> dict[str, Any]:
    series = [
        {
            "name": name,
            "x": rates,
            "y": [float("nan") if value is None else value * factor for value in values],
        }
        for name, values, factor in curves
    ]
    return {
        "kind": "curves",
        "title": f"{label[0].upper()}{label[1:]}",
        "series": series,
        "x_name": "requests a second",
        "y_name": f"{label}, {unit}" if unit != label else unit,
        "log_x": True,
    }


def write_serving_trace(path: str | Path, found: Serving, most: int = 2000) -> None:
    """Writes the first iterations as a Chrome trace (ui.perfetto.dev).

    Args:
        path: The JSON file.
        found: The result of `serve`.
        most: The number of iterations.

    Raises:
        ValueError: The result has no iterations.
        OSError: The file cannot be written.
    """
    done = found.iterations
    if done is None:
        raise ValueError("a sweep keeps no iterations: serve one rate to write a trace")
    ends = done.end[:most] / 1e3
    begins = ends - done.seconds[:most] * 1e6
    last = float(ends[-1])
    lanes = {0: "iterations", 1: "requests"}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": lane, "args": {"name": name}}
        for lane, name in lanes.items()
    ]
    for place, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        prompts = int(done.prompt_tokens[place])
        count = int(done.requests[place])
        name = f"prefill of {prompts} tokens" if prompts else f"decode {count}"
        events.append(
            {"ph": "X", "name": name, "pid": 0, "tid": 0, "ts": begin, "dur": end - begin}
        )
        shown = {"batch": count, "waiting": int(done.waiting[place])}
        shown["blocks"] = int(done.blocks[place])
        events += [
            {"ph": "C", "name": key, "pid": 0, "ts": begin, "args": {key: value}}
            for key, value in shown.items()
        ]
    served = found.served
    for number in np.flatnonzero(served.admitted / 1e3 <= last).tolist():
        came = found.arrivals.nanoseconds[number] / 1e3
        parts = (
            ("waits", came, served.admitted[number] / 1e3),
            ("prefill", served.admitted[number] / 1e3, served.first[number] / 1e3),
            ("decode", served.first[number] / 1e3, served.end[number] / 1e3),
        )
        for name, begin, end in parts:
            about = {"cat": "request", "id": number, "pid": 0, "tid": 1, "name": name}
            events.append({"ph": "b", "ts": float(begin), **about})
            events.append({"ph": "e", "ts": float(end), **about})
    trace = {"displayTimeUnit": "ms", "traceEvents": events}
    write_text(path, json.dumps(trace, allow_nan=False))
