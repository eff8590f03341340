"""Measures the model's errors on runs of the public simulator, for the tools to state.

    python -m benchmarks.neupims_expected_error        # writes neupims/expected_error.json

The runs are those of GGEM_SHARED/golden/neupims and neupims_2 (by default ../shared). The errors
are those of runs that no constant was fitted to: of the first set, those whose identifier ends in
an odd hexadecimal digit; all of the second. The envelope has all runs. Errors of gains, that is of
the difference of two schedules of one batch, are points of per cent, predicted less measured.
Rerun this after each change of the model.
"""

import argparse
import datetime
import json
import os
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from neupims.envelope import features, gain_kind
from neupims.machine.case import Case
from neupims.simulator_runs import NotCovered, case_of, read_runs
from neupims.validation import Pair, compare, group_errors

ROOT = Path(__file__).parent.parent
FILE = ROOT / "neupims" / "expected_error.json"
SETS = ("neupims", "neupims_2")
PATHS = ("exact", "closed")
SEARCHED = {"schedule_searched": "searched-", "schedule_heuristic": "greedysnake-"}


class Measured(NamedTuple):
    """A run with its predictions."""

    set: str  # folder of the run
    run: dict[str, str]  # its row
    case: Case
    pairs: dict[str, list[Pair]]  # by path

    @property
    def held_out(self) -> bool:
        """Whether no constant was fitted to it."""
        return self.set != SETS[0] or int(self.run["run_id"][-1], 16) % 2 == 1

    def layer(self, path: str) -> Pair:
        """The pair of the layer."""
        return next(pair for pair in self.pairs[path] if pair.level == "layer")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE, help=f"(default: {FILE.name})")
    options = parser.parse_args(words)
    write(options.out)


def write(out: Path = FILE, golden: Path | None = None) -> None:
    """Writes the table of the measured errors, and prints those of layers and gains."""
    golden = golden or Path(os.environ.get("GGEM_SHARED", "../shared")) / "golden"
    table = tabulate([each for name in SETS for each in measure(golden / name)])
    for path, spelling in product(PATHS, table["runs"]):
        layer = {k: v for k, v in table[path].get(spelling, {}).items() if k.startswith("layer")}
        print(f"{path}, {spelling}: {layer}")
    for path, (kind, found) in product(PATHS, table["gains"].items()):
        for row in found[path].pop("gains"):
            print(path, kind, *row.values())
        print(f"{path}, {kind}: {found[path]}")
    out.write_text(json.dumps(table, indent=1) + "\n")


def measure(folder: Path) -> list[Measured]:
    """Returns the runs of a folder that the model covers, with predictions by both paths."""
    found = []
    runs, listed = read_runs(folder)
    for run in runs:
        if run.get("status", "ok") not in ("", "ok"):
            continue
        try:
            of = (run, listed.get(run["run_id"], []), folder)
            pairs = {path: compare(*of, path=path) for path in PATHS}
            found.append(Measured(folder.name, run, case_of(run, folder), pairs))
        except NotCovered as reason:
            print(f"not covered: {run['run_id']}: {reason}")
    return found


def tabulate(found: list[Measured]) -> dict[str, Any]:
    """Returns the table that the package carries."""
    spellings = sorted({each.run["system"] for each in found})
    rows = {name: [each for each in found if each.run["system"] == name] for name in spellings}
    usual = {name: most_common([features(each.case) for each in rows[name]]) for name in spellings}
    today = datetime.date.today().isoformat()
    return {
        "of": (
            f"runs of the public simulator not used for fitting (half of {SETS[0]}, all of"
            f" {SETS[1]}), {today}"
        ),
        **{path: errors_by_system(found, path) for path in PATHS},
        "gains": gains(found),
        "usual_features": usual,
        "runs": {
            name: [describe_run(each, usual[name]) for each in rows[name]] for name in spellings
        },
    }


def errors_by_system(found: list[Measured], path: str) -> dict[str, dict[str, float]]:
    """Returns mean, 95th percentile and largest errors in per cent, by system and level."""
    held_out = [pair for each in found if each.held_out for pair in each.pairs[path]]
    table: dict[str, dict[str, float]] = {}
    for group in group_errors(held_out):
        level = {"layer": "layer", "stage": "stage"}.get(group.kind, f"{group.kind}_operations")
        if group.system == "all" or group.name not in ("all", "layer") or ">" in level:
            continue
        errors = table.setdefault(group.system, {})
        for number in ("mean", "p95", "max"):
            errors[f"{level}_{number}_percent"] = round(getattr(group, number), 2)
        if level == "layer":
            errors["layer_runs"] = group.n
    return table


def most_common(listed: list[dict[str, float]]) -> dict[str, float]:
    """Returns the most common value of each feature."""
    return {
        name: max({each[name] for each in listed}, key=[each[name] for each in listed].count)
        for name in listed[0]
    }


def describe_run(each: Measured, usual: dict[str, float]) -> dict[str, Any]:
    """Returns one run as the table has it: only the features that are not the usual ones."""
    run = each.run
    changes = " ".join(filter(None, (run["dram_overrides"], run["core_overrides"])))
    name = f"{run['model']}, tp {run['n_tp']}, {run['trace']}{f', {changes}' if changes else ''}"
    return {
        "run": f"{run['run_id']} ({name})",
        "set": each.set,
        "held_out": each.held_out,
        "layer_error_percent": {
            path: round(100 * (each.layer(path).predicted / each.layer(path).measured - 1), 2)
            for path in PATHS
        },
        "features": {
            feature: value
            for feature, value in features(each.case).items()
            if value != usual[feature]
        },
    }


def gains(found: list[Measured]) -> dict[str, dict[str, Any]]:
    """Returns the errors of gains between two schedules of one batch, by kind and path."""
    pairs: dict[str, list[tuple[Measured, Measured]]] = defaultdict(list)
    for before, after in product(found, found):
        if kind := kind_of_gain(before, after):
            pairs[kind].append((before, after))
    return {
        kind: {path: gain_errors(listed, path) for path in PATHS} for kind, listed in pairs.items()
    }


def kind_of_gain(before: Measured, after: Measured) -> str | None:
    """Returns what a gain from one run to the other is of, or None if they do not compare."""
    if before is after or before.case.system != after.case.system:
        return None
    if not is_same_work(before.case, after.case):
        return None
    kind = after.run["kind"]
    counts = (before.case.sub_batches, after.case.sub_batches)
    if kind in SEARCHED:
        published = after.run["trace"].removeprefix(SEARCHED[kind]).removesuffix(".csv")
        is_published = before.run["trace"].startswith(published)
        return gain_kind(*counts) if is_published else None
    if before.run["trace"] == after.run["trace"] and counts[0] != counts[1]:
        return gain_kind(*counts)
    dealt, packed = before.run["trace"].split("-rr-"), after.run["trace"].split("-clb-")
    if len(dealt) == len(packed) == 2 and dealt == packed:
        return "greedy packing over round robin"
    return None


def is_same_work(one: Case, other: Case) -> bool:
    """Returns whether two cases differ in nothing but the schedule."""
    records = ((each.hardware, each.model, each.parallel) for each in (one, other))
    lengths = (np.sort(np.asarray(each.batch.seq_lens)) for each in (one, other))
    return jax.tree.leaves(next(records)) == jax.tree.leaves(next(records)) and np.array_equal(
        *lengths
    )


def gain_errors(listed: list[tuple[Measured, Measured]], path: str) -> dict[str, Any]:
    """Returns the statistics of predicted less measured gains, in points of per cent."""
    rows = []
    for before, after in listed:
        pair = (before.layer(path), after.layer(path))
        measured, predicted = (
            100 * (1 - getattr(pair[1], key) / getattr(pair[0], key))
            for key in ("measured", "predicted")
        )
        rows.append(
            {
                "from": before.run["trace"],
                "to": after.run["trace"],
                "model": before.run["model"],
                "system": before.run["system"],
                "measured_percent": round(measured, 2),
                "predicted_percent": round(predicted, 2),
            }
        )
    errors = np.array([row["predicted_percent"] - row["measured_percent"] for row in rows])
    return {
        "n": len(rows),
        "bias_points": round(float(errors.mean()), 2),
        "spread_points": round(float(errors.std(ddof=1)), 2) if len(rows) > 1 else None,
        "least_points": round(float(errors.min()), 2),
        "most_points": round(float(errors.max()), 2),
        "sets": sorted({each.set for pair in listed for each in pair}),
        "gains": rows,
    }


if __name__ == "__main__":
    main()
