"""Draws the share of the copy bandwidth that each contestant of bench_kernels reaches, by shape.

    python -m benchmarks.plot_kernels

It reads the rows of the last day and device in benchmarks/results/kernels.csv, and writes
benchmarks/results/kernels.png.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

from benchmarks.record import RESULTS

STAGES = ("forward", "backward", "both")
COLUMNS = {
    "date",
    "device",
    "driver",
    "jax",
    "triton",
    "torch",
    "operation",
    "name",
    "shape",
    "dtype",
    "stage",
    "contestant",
    "fraction_of_copy",
}


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows of the last day and device.

    Args:
        path: The CSV file of `benchmarks.bench_kernels`.

    Raises:
        ValueError: The file has no rows, or lacks columns.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    if missing := COLUMNS - rows[0].keys():
        raise ValueError(
            f"{path} has no columns {', '.join(sorted(missing))}: benchmarks.bench_kernels writes"
            " them to kernels.csv"
        )
    return [
        row
        for row in rows
        if (row["date"], row["device"]) == (rows[-1]["date"], rows[-1]["device"])
    ]


def draw(rows: list[dict[str, str]], target: Path) -> None:
    """Draws a panel for each operation and stage, with a bar for each shape and contestant.

    Args:
        rows: Rows of one device, as `read` returns them.
        target: The PNG file; it is replaced.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["contestant"] != "negated copy"]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure, panels = plt.subplots(
        len(operations),
        len(STAGES),
        figsize=(18, 4.5 * len(operations)),
        sharey=True,
        squeeze=False,
    )
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    for operation, line in zip(operations, panels, strict=True):
        for stage, panel in zip(STAGES, line, strict=True):
            here = [row for row in rows if (row["operation"], row["stage"]) == (operation, stage)]
            shapes = list(dict.fromkeys(_shape(row) for row in here))
            for row in here:
                k = contestants.index(row["contestant"])
                place = shapes.index(_shape(row)) + 0.8 * (k + 0.5) / len(contestants) - 0.4
                panel.bar(
                    place, float(row["fraction_of_copy"]), 0.8 / len(contestants), color=f"C{k}"
                )
            panel.set_xticks(range(len(shapes)), shapes, fontsize=8)
            panel.set_title(f"{operation}, {stage}")
            panel.axhline(1, color="grey", linewidth=0.8)
        line[0].set_ylabel("share of the copy bandwidth")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{k}") for k in range(len(contestants))]
    figure.legend(handles, contestants, loc="upper center", ncols=len(contestants))
    versions = ", ".join(
        f"{name} {rows[0][name]}" for name in ("jax", "triton", "torch") if rows[0][name]
    )
    figure.text(
        0.5,
        0.005,
        f"{rows[0]['device']}, driver {rows[0]['driver']}, {versions}, {rows[0]['date']}",
        ha="center",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.02, 1, 0.95))
    figure.savefig(target.with_suffix(".part.png"), dpi=110)
    plt.close(figure)
    os.replace(target.with_suffix(".part.png"), target)


def _shape(row: dict[str, str]) -> str:
    return f"{row['name']}\n{row['shape']}\n{row['dtype']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS / "kernels.csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.png")
    options = parser.parse_args()
    if not options.rows.exists():
        sys.exit(
            f"{options.rows} does not exist: python -m benchmarks.bench_kernels writes it on a"
            " machine with an NVIDIA GPU"
        )
    if options.out.suffix != ".png":
        sys.exit(f"--out must be a .png file, not {options.out}")
    try:
        draw(read(options.rows), options.out)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(options.out)


if __name__ == "__main__":
    main()
