"""`search`: better schedules of one batch, and how far from the best possible they are."""

import argparse
from pathlib import Path
from typing import Any

from neupims.commands.common import (
    Case,
    add_workload_arguments,
    check_run,
    console,
    print_json,
    simulated,
    workload,
)
from neupims.machine.record import describe
from neupims.machine.systems import SYSTEMS

DEFAULT_BUDGET = 20000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `search`."""
    add_workload_arguments(parser)
    parser.add_argument(
        "--strategy",
        default="evolution",
        help="evolution, random, annealing, evosax or all (default: evolution)",
    )
    parser.add_argument(
        "--budget",
        type=int,
        default=DEFAULT_BUDGET,
        metavar="N",
        help=f"schedules that each strategy evaluates for each seed (default: {DEFAULT_BUDGET})",
    )
    parser.add_argument(
        "--population",
        type=int,
        default=64,
        metavar="N",
        help="schedules of one round (default: 64)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=4,
        metavar="N",
        help="independent searches of each strategy (default: 4)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the first of them (default: 0)"
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="start from random schedules, not from the baselines",
    )
    parser.add_argument(
        "--realisable",
        action="store_true",
        help="only what the public simulator can execute: a trace that its own rule halves",
    )
    parser.add_argument(
        "--export-trace",
        type=Path,
        metavar="FILE",
        help="write the best schedule as a trace of the simulator (needs --realisable)",
    )
    parser.add_argument(
        "--new-only",
        type=int,
        metavar="N",
        help="only the last N requests of the trace may choose their channel; the others stay",
    )
    parser.add_argument(
        "--order-levels",
        type=int,
        default=1,
        metavar="N",
        help="priorities that order a channel's list (default: 1, order by request)",
    )
    parser.add_argument(
        "--hardware-knob",
        action="append",
        default=[],
        metavar="NAME=LOW:HIGH",
        help="search this field of the hardware too; may repeat",
    )
    parser.add_argument(
        "--measure", default="time", help="time, energy or energy-delay of a layer (default: time)"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="score the published and the best schedule by the exact path too",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write one page with curves and channel loads",
    )


def run(arguments: argparse.Namespace) -> int:
    case = workload(arguments)
    _check(arguments, case)
    result = searched(case, arguments)
    if arguments.html:
        _write_page(arguments.html, result)
    if arguments.json:
        print_json(result)
    else:
        _print_tables(result)
    return 0


def _check(arguments: argparse.Namespace, case: Case) -> None:
    if case.system != "neupims":
        raise ValueError(f"schedules are searched for --system neupims, not {case.system}")
    if arguments.export_trace and not arguments.realisable:
        raise ValueError(
            "--export-trace needs --realisable: other schedules have no trace that the simulator"
            " would halve so"
        )
    if arguments.export_trace and arguments.hardware_knob:
        raise ValueError(
            "--export-trace writes a schedule for the given hardware, so it excludes"
            " --hardware-knob"
        )
    if arguments.exact and arguments.hardware_knob:
        raise ValueError(
            "--exact scores schedules on the given hardware, so it excludes --hardware-knob"
        )
    check_run(arguments.html, arguments.export_trace, seed=arguments.seed)
    for name in ("budget", "population", "seeds", "order_levels"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}"
            )
    requests = len(case.batch.seq_lens)
    if requests < 2:
        raise ValueError("a schedule needs at least 2 requests")
    if arguments.new_only is not None and not 0 <= arguments.new_only <= requests:
        raise ValueError(
            f"--new-only must be from 0 to the {requests} requests of the trace, not"
            f" {arguments.new_only}"
        )


def searched(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--json` prints. Costs are core cycles of a layer (or what `--measure` says); gains are
    shares of the published cost.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from neupims.scheduling.decision import (
        decide,
        decision_batch,
        export_trace,
        make_genome,
        repair,
    )
    from neupims.scheduling.objective import Layer, make_problem
    from neupims.scheduling.oracle import gap, lower_bound
    from neupims.scheduling.search import STRATEGIES, baselines, interval_of_mean, search
    from neupims.timing.capacity import channel_tiles, check_capacity
    from neupims.validation import expected_error

    names = list(STRATEGIES) if arguments.strategy == "all" else [arguments.strategy]
    space = _space(case, arguments)
    channels = int(case.hardware.hbm.num_channels)
    resident = None
    if arguments.new_only is not None:
        resident = np.where(
            np.arange(len(case.batch.seq_lens)) < len(case.batch.seq_lens) - arguments.new_only,
            case.batch.channels,
            -1,
        )
    warning = check_capacity(case.hardware, case.model, case.batch, case.parallel)
    room = (
        float("inf") if warning else float(channel_tiles(case.hardware, case.model, case.parallel))
    )
    problem = make_problem(
        case.hardware,
        case.model,
        case.parallel,
        case.batch.seq_lens,
        resident=resident,
        room=room,
        fidelity=case.fidelity,
    )
    objective = Layer(space, case.fidelity, arguments.measure)
    evaluate = jax.jit(jax.vmap(lambda genome: objective(problem, decide(space, genome))))
    published = make_genome(
        space,
        case.batch.channels,
        case.batch.sub_batches,
        interleaved=case.sub_batches == 2,
        knobs=_given(case, space),
    )
    known = {"as published": published} | baselines(space, problem, np.asarray(published.knobs))
    starts = jax.tree.map(lambda *parts: jnp.stack(parts), *known.values())
    at_start = evaluate(starts)
    costs = dict(zip(known, np.asarray(at_start.objective, np.float64).tolist(), strict=True))
    before = costs["as published"]
    bound = (
        float(lower_bound(space, problem))
        if arguments.measure == "time" and not space.knobs
        else None
    )

    def line(cost: float, **more) -> dict[str, Any]:
        return {
            "cost": cost,
            "gain": 1 - cost / before,
            "gap_to_bound": gap(cost, bound) if bound else None,
        } | more

    rows = {name: line(cost) for name, cost in costs.items()}
    best_name = min(costs, key=lambda name: costs[name])
    best = costs[best_name], known[best_name], best_name
    found = {}
    for name in names:
        done = search(
            name,
            objective,
            space,
            problem,
            jax.random.key(arguments.seed),
            budget=arguments.budget,
            population=arguments.population,
            seeds=arguments.seeds,
            starts=None if arguments.from_scratch else starts,
        )
        ends = np.asarray(done.cost.objective, np.float64)
        mean, half = interval_of_mean(done.curve)
        first = int(ends.argmin())
        found[name] = line(
            float(ends[first]),
            mean_cost=float(ends.mean()),
            evaluations=done.evaluations,
            seeds=arguments.seeds,
            curve={
                "evaluations": [arguments.population * (index + 1) for index in range(len(mean))],
                "best": mean.tolist(),
                "low": (mean - half).tolist(),
                "high": (mean + half).tolist(),
            },
        )
        if ends[first] < best[0]:
            best = (
                float(ends[first]),
                jax.tree.map(lambda leaf, first=first: leaf[first], done.genome),
                name,
            )
    genome = repair(space, problem.resident, best[1])
    decision = decide(space, genome)
    if arguments.export_trace:
        export_trace(
            arguments.export_trace,
            decision_batch(problem.seq_lens, decision),
            num_channels=channels,
        )
    interleaved = (
        bool(genome.interleaved) if len(space.sub_batches) == 2 else space.sub_batches == (2,)
    )
    error = expected_error(
        "neupims",
        2 if interleaved else 1,
        case.fidelity,
        row_buffers=int(case.hardware.pim.row_buffers),
        path="closed",
    )
    gain = 1 - best[0] / before
    exact = None
    if arguments.exact:
        scored = {
            "published": (case.batch, case.sub_batches),
            "best": (decision_batch(problem.seq_lens, decision), 2 if interleaved else 1),
        }
        scores = {
            when: float(
                simulated(case._replace(batch=batch, sub_batches=count), "exact").layer_cycles
            )
            for when, (batch, count) in scored.items()
        }
        exact = scores | {"gain": 1 - scores["best"] / scores["published"]}
    return {
        "model": case.model_name,
        "batch": len(case.batch.seq_lens),
        "fidelity": case.fidelity,
        "realisable": space.realisable,
        "measure": arguments.measure,
        "warning": warning or None,
        "published": before,
        "lower_bound": bound,
        "baselines": rows,
        "strategies": found,
        "best": (
            line(best[0], found_by=best[2], sub_batches=2 if interleaved else 1)
            | {"gain_plus_minus": gain_error(error, gain) if arguments.measure == "time" else None}
            | {
                "knobs": dict(
                    zip(
                        (knob.name for knob in space.knobs),
                        np.asarray(genome.knobs).tolist(),
                        strict=True,
                    )
                )
            }
        ),
        "exact": exact,
        "expected_error": error,
        "channel_cycles": {
            "before": _loads(problem, decide(space, published), channels, case.sub_batches == 2),
            "after": _loads(problem, decision, channels, interleaved),
        },
        "trace": str(arguments.export_trace) if arguments.export_trace else None,
    }


def gain_error(error: dict[str, Any] | None, gain: float) -> float | None:
    """How much the gain may be off where each of the two times has the model's mean error,
    independently of the other; None if that is unknown.

    The two times are of one batch on one machine, so part of their errors is common and cancels:
    this is the careful figure.
    """
    if error is None:
        return None
    return 2**0.5 * error["layer_mean_percent"] / 100 * (1 - gain)


def _space(case: Case, arguments: argparse.Namespace):
    from neupims.exploration.space import SETTINGS, make_space, parse_knob
    from neupims.scheduling.decision import CHANNELS_KNOB, Knob, Space

    knobs: list[Knob] = []
    if arguments.hardware_knob:
        for each in make_space(
            dict(map(parse_knob, arguments.hardware_knob)), hardware=case.hardware
        ).knobs:
            if each.values or each.log or each.name in SETTINGS:
                raise ValueError(
                    f"--hardware-knob needs a field of the hardware as NAME=LOW:HIGH; {each.name}"
                    " is searched otherwise or by `explore`"
                )
            knobs.append(Knob(each.name, each.low, each.high, each.whole))
    channels = max(
        [
            int(case.hardware.hbm.num_channels),
            *(int(knob.high) for knob in knobs if knob.name == CHANNELS_KNOB),
        ]
    )
    if any(knob.name == CHANNELS_KNOB for knob in knobs) and arguments.new_only is not None:
        raise ValueError(
            "--new-only keeps requests on their channels, so their number cannot be searched"
        )
    fixed = arguments.sub_batches is not None or arguments.system.lower() not in SYSTEMS
    chosen = (case.sub_batches,) if fixed else (1, 2)
    return Space(channels, arguments.realisable, chosen, arguments.order_levels, tuple(knobs))


def _given(case: Case, space) -> list[float]:
    """The knobs as the given hardware has them."""
    numbers = {each.name: float(each.value) for each in describe(case.hardware)}
    return [numbers[knob.name] for knob in space.knobs]


def _loads(problem, decision, channels: int, interleaved: bool) -> list[list[float]]:
    """Attention cycles of each sub-batch on each channel; one batch is sub-batch 0."""
    import numpy as np

    loads = np.zeros((2, max(channels, int(np.asarray(decision.channels).max()) + 1)))
    np.add.at(
        loads,
        (np.asarray(decision.sub_batches) * interleaved, np.asarray(decision.channels)),
        np.asarray(problem.work).sum(axis=1),
    )
    return loads.tolist()


def _print_tables(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    lines = console()
    unit = {"time": "layer cycles", "energy": "J", "energy-delay": "J x cycles"}[result["measure"]]
    kind = "realisable schedules" if result["realisable"] else "schedules"
    table = Table(
        title=(
            f"{kind} of {result['batch']} requests, {result['model']}, {result['fidelity']}"
            " fidelity"
        ),
        box=box.SIMPLE,
        title_justify="left",
    )
    for name in ("schedule", unit, "mean of seeds", "gain", "above bound", "evaluations"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    for name, row in (result["baselines"] | result["strategies"]).items():
        mean = _number(row["mean_cost"]) if "mean_cost" in row else ""
        above = "" if row["gap_to_bound"] is None else f"{row['gap_to_bound']:.2%}"
        table.add_row(
            name,
            _number(row["cost"]),
            mean,
            f"{row['gain']:.2%}",
            above,
            f"{row['evaluations']:,}" if "evaluations" in row else "",
        )
    if result["lower_bound"]:
        table.add_row(
            "lower bound",
            _number(result["lower_bound"]),
            "",
            f"{1 - result['lower_bound'] / result['published']:.2%}",
            "",
            "",
        )
    lines.print(table)
    best = result["best"]
    halves = "two sub-batches" if best["sub_batches"] == 2 else "one batch"
    error = best["gain_plus_minus"]
    margin = f" (± {error:.2%}, the model's mean error on both times)" if error else ""
    lines.print(
        f"best: {best['found_by']}, {halves}, gain over the trace as published"
        f" {best['gain']:.2%}{margin}"
    )
    for knob, number in best["knobs"].items():
        lines.print(f"  {knob} = {number:g}")
    if result["exact"]:
        exact = result["exact"]
        lines.print(
            f"layer cycles by the exact path: {exact['published']:,.0f} as published,"
            f" {exact['best']:,.0f} at best"
        )
        lines.print(f"gain by the exact path: {exact['gain']:.2%}")
    for when, loads in result["channel_cycles"].items():
        longest = " and ".join(f"{max(load):,.0f}" for load in loads)
        average = sum(map(sum, loads)) / len(loads[0]) / 2
        lines.print(
            f"attention on the fullest channel {when}: {longest} cycles of the sub-batches; mean"
            f" {average:,.0f}"
        )
    for sentence in (
        result["warning"],
        f"trace written to {result['trace']}" if result["trace"] else None,
    ):
        if sentence:
            lines.print(sentence)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value != value else f"{value:.4g}"


def _write_page(path: Path, result: dict[str, Any]) -> None:
    """Best-so-far curves with their intervals, and the channels before and after."""
    from neupims.pages.report import write_report

    curves = [
        {
            "name": name,
            "x": row["curve"]["evaluations"],
            "y": row["curve"]["best"],
            "low": row["curve"]["low"],
            "high": row["curve"]["high"],
        }
        for name, row in result["strategies"].items()
    ]
    lines = [{"name": "as published", "value": result["published"]}]
    if result["lower_bound"]:
        lines.append({"name": "lower bound", "value": result["lower_bound"]})
    sections: list[dict[str, Any]] = [
        {
            "kind": "curves",
            "title": "Best so far",
            "text": "Mean over seeds with its 95 % interval.",
            "series": curves,
            "x_name": "schedules evaluated",
            "y_name": "layer cycles" if result["measure"] == "time" else result["measure"],
            "lines": lines,
        }
    ]
    for when, title in (("before", "Channels as published"), ("after", "Channels after search")):
        loads = [
            {"name": f"sub-batch {index + 1}", "cycles": load}
            for index, load in enumerate(result["channel_cycles"][when])
        ]
        sections.append(
            {
                "kind": "channels",
                "title": title,
                "text": "Attention on each channel.",
                "loads": loads,
            }
        )
    best = result["best"]
    facts = {
        "model": result["model"],
        "batch": f"{result['batch']} requests",
        "best": (
            f"{_number(best['cost'])}, by {best['found_by']}, {best['sub_batches']} sub-batches"
        ),
        "gain": f"{best['gain']:.2%} over the trace as published",
    }
    write_report(path, sections, title="Schedule search", facts=facts)
