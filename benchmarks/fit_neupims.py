"""Fits the constants of the accelerator model to the public simulator, and reports held-out errors.

    python -m benchmarks.fit_neupims          # errors of the present constants; writes the tables
    python -m benchmarks.fit_neupims --fit    # finds new constants and prints them

New constants go into neupims/machine/calibration.py by hand. The fitting part is the runs whose
identifier ends in an even hexadecimal digit. The runs are read from GGEM_SHARED/golden/neupims (by
default ../shared). The table is benchmarks/results/neupims_validation.csv (errors of the held-out
runs, and of all runs). Rerun `python -m benchmarks.neupims_expected_error` too: it writes what the
tools state.
"""

import argparse
import csv
import dataclasses
import os
from pathlib import Path

import numpy as np

from neupims.machine.calibration import DEFAULT, Calibration
from neupims.simulator_runs import case_of, most_channels, pad_case, read_measured, read_runs
from neupims.timing.attention import exact_attention
from neupims.validation import Pair, group_errors, predict

ROOT = Path(__file__).parent.parent
STEP = 0.1  # relative step of each constant in the first simplex
# Constants that `fit` keeps: the first one does not matter in "simulator" fidelity, the shares are
# counted, and the last one changes the recurrence.
KEPT = (
    "queued_efficiency",
    "stuck_after_norm",
    "stuck_after_activation",
    "reopen_cycles",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true")
    parser.add_argument(
        "--reopen",
        type=float,
        help=(
            "another value of reopen_cycles, which changes the recurrence and is found by trying a"
            " few values"
        ),
    )
    parser.add_argument("--evaluations", type=int, default=160)
    options = parser.parse_args()
    folder = Path(os.environ.get("GGEM_SHARED", "../shared")) / "golden" / "neupims"
    runs, listed = read_runs(folder)
    calibration = (
        DEFAULT
        if options.reopen is None
        else dataclasses.replace(DEFAULT, reopen_cycles=options.reopen)
    )
    cases = [(run, listed[run["run_id"]], *follow(run, folder, calibration)) for run in runs]
    fitting = [case for case in cases if int(case[0]["run_id"][-1], 16) % 2 == 0]
    held_out = [case for case in cases if int(case[0]["run_id"][-1], 16) % 2]
    if options.fit:
        calibration = fit(fitting, count_stuck(fitting, calibration), options.evaluations)
    print(calibration)
    parts = {"fitting": fitting, "held out": held_out, "all": cases}
    tables = {
        (path, name): group_errors(rows_of(part, calibration, path))
        for path in ("exact", "closed")
        for name, part in parts.items()
    }
    for (path, name), groups in tables.items():
        for group in groups:
            if group.name in ("all", "layer"):
                numbers = (f"{getattr(group, key):.2f}" for key in ("mean", "median", "p95", "max"))
                print(
                    path, name, *(getattr(group, key) for key in ("system", "kind", "n")), *numbers
                )
    if not options.fit and options.reopen is None:
        write(tables)


def follow(run, folder, calibration: Calibration):
    """Returns the records of a run, and the PIM work of its channels by the recurrence.

    The work is None for a system without PIM.
    """
    case = case_of(run, folder)
    if case.system == "npu-only":
        return case, None
    known = pad_case(case)
    options = {
        "system": case.system,
        "sub_batches": case.sub_batches,
        "fidelity": "simulator",
        "channels": most_channels(case),
    }
    return case, exact_attention(
        known.hardware, known.model, known.batch, known.parallel, calibration=calibration, **options
    )


def rows_of(cases, calibration: Calibration, path: str = "exact") -> list[Pair]:
    """Returns measured and predicted cycles of every operation, stage and layer of the cases.

    Args:
        cases: Runs with their operations, records and PIM work, the last two as `follow` returns
            them.
        calibration: Constants of the model.
        path: "exact" takes the PIM work of the recurrence, "closed" the closed form.
    """
    rows = []
    for run, listed, case, attention in cases:
        predicted = predict(
            case,
            calibration=calibration,
            path=path,
            attention=attention if path == "exact" else None,
        )
        for key, value in read_measured(run, listed).items():
            rows.append(Pair(run["run_id"], run["system"], *key, value, predicted[key]))
    return rows


def count_stuck(cases, calibration: Calibration) -> Calibration:
    """Returns the constants with the observed shares of products that a write holds up.

    A product was held up if its measured time is nearer to the one with a stuck write. Only
    products after few writes depend on the two shares. (A fit of the least mean error would call
    an event certain that happens in more than half of the runs.)

    Args:
        cases: The runs to fit, as in `rows_of`.
        calibration: The other constants.
    """
    never, always = (
        rows_of(
            cases,
            dataclasses.replace(
                calibration, stuck_after_norm=chance, stuck_after_activation=chance
            ),
        )
        for chance in (0.0, 1.0)
    )
    shares = {}
    for name, product in (("stuck_after_norm", "ffn.fc1"), ("stuck_after_activation", "ffn.fc2")):
        held_up = [
            abs(late.predicted - late.measured) < abs(usual.predicted - usual.measured)
            for usual, late in zip(never, always, strict=True)
            if usual.name == product and usual.predicted != late.predicted
        ]
        shares[name] = float(np.mean(held_up))
    return dataclasses.replace(calibration, **shares)


def fit(cases, start_from: Calibration, evaluations: int) -> Calibration:
    """Returns the constants with the least mean error, by the method of Nelder and Mead.

    The error is the mean over PIM operations, products, stages and layers, each system alike.

    Args:
        cases: The runs to fit, as in `rows_of`.
        start_from: Constants to start from; those of `KEPT` are kept.
        evaluations: Evaluations of the error, at most.
    """
    from scipy.optimize import minimize

    names = [field.name for field in dataclasses.fields(Calibration) if field.name not in KEPT]
    start = np.array([getattr(start_from, name) for name in names])

    def constants(factors) -> Calibration:
        values = dict(zip(names, (start * factors).tolist(), strict=True))
        for share in (
            "streaming_efficiency",
            "shallow_efficiency",
        ):
            values[share] = float(np.clip(values[share], 0, 1))
        return dataclasses.replace(start_from, **values)

    def loss(factors) -> float:
        groups = group_errors(rows_of(cases, constants(factors)))
        wanted = [
            group.mean
            for group in groups
            if group.system != "all" and group.name in ("all", "layer") and group.kind in KINDS
        ]
        return float(np.mean(wanted))

    simplex = np.vstack(
        [np.ones(len(names)), np.ones((len(names), len(names))) - STEP * np.eye(len(names))]
    )
    found = minimize(
        loss,
        simplex[0],
        method="Nelder-Mead",
        options={"maxfev": evaluations, "initial_simplex": simplex},
    )
    print(f"loss {loss(simplex[0]):.3f} -> {found.fun:.3f} after {found.nfev} evaluations")
    return constants(found.x)


KINDS = ("pim", "gemm", "stage", "layer")


def write(tables) -> None:
    """Writes the committed table of errors."""
    with open(ROOT / "benchmarks" / "results" / "neupims_validation.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            [
                "path",
                "part",
                "level",
                "system",
                "kind",
                "name",
                "n",
                "mean_percent",
                "median_percent",
                "p95_percent",
                "max_percent",
            ]
        )
        for (path, part), groups in tables.items():
            if part == "fitting":
                continue
            for group in groups:
                numbers = [f"{getattr(group, key):.2f}" for key in ("mean", "median", "p95", "max")]
                table.writerow(
                    [
                        path,
                        part,
                        *(getattr(group, key) for key in ("level", "system", "kind", "name", "n")),
                        *numbers,
                    ]
                )


if __name__ == "__main__":
    main()
