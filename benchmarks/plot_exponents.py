"""Draws the exponents that GGeM learns on planted evidence.

    python -m benchmarks.plot_exponents

Reads the part `planted` of benchmarks/results/pooling_study.json, which `eval.studies.pooling`
writes, and draws docs/images/exponents-light.svg and exponents-dark.svg.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS

IMAGES = RESULTS.parent.parent / "docs" / "images"
ROWS = {
    "average": "average",
    "maximum": "maximum",
    "GeM": "GeM: one p",
    "GGeM, random groups": "GGeM: 2 random groups",
    "GGeM": "GGeM: 1 p per half",
    "GeM, p per channel": "GeM: 32 exponents",
}
SPARSE, DENSE, BOTH = "#e8710a", "#1a73c9", "#8a8f98"
THEMES = {"light": ("#ffffff", "#24292f", "#d0d7de"), "dark": ("#14161d", "#e2e4e9", "#3a3f4b")}


def draw(part: dict[str, Any], theme: str, target: Path) -> None:
    """Draws learned exponents (left, a dot for each seed) and accuracies (right) as an SVG file.

    Args:
        part: Results of the part `planted` of the study; `arms` has accuracies and exponents by
            seed.
        theme: Name of the colours, a key of `THEMES`.
        target: The file to write.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    paper, ink, line = THEMES[theme]
    settings = {"svg.hashsalt": "exponents", "text.color": ink, "axes.labelcolor": ink}
    settings |= {"xtick.color": ink, "ytick.color": ink, "axes.edgecolor": line, "font.size": 9.5}
    with plt.rc_context(settings):
        figure, (exponents, accuracies) = plt.subplots(
            1, 2, figsize=(8.4, 3.0), sharey=True, width_ratios=(3, 2), facecolor=paper
        )
        for row, name in enumerate(reversed(ROWS)):
            arm = part["arms"][name]
            _draw_exponents(exponents, row, name, np.array(arm["p"]))
            low, percent, high = (100 * arm["accuracy"][key] for key in ("low", "value", "high"))
            error = [[percent - low], [high - percent]]
            bold = {"fontweight": "bold"} if name == "GGeM" else {}
            accuracies.barh(row, percent, 0.6, color=ink if bold else BOTH, xerr=error, ecolor=line)
            accuracies.text(high + 2, row, f"{percent:.1f} %", va="center", **bold)
        exponents.set_yticks(range(len(ROWS)), reversed(ROWS.values()))
        exponents.set_xscale("log")
        exponents.set_xticks([1, 1.5, 2, 3, 5, 8], ["1\naverage", "1.5", "2", "3", "5", "8\n→ max"])
        exponents.minorticks_off()
        exponents.set_xlim(0.9, 11)
        exponents.set_title("learned exponents p, a dot per seed", fontsize=9.5)
        exponents.grid(axis="x", color=line, linewidth=0.6)
        handles = [plt.Line2D([], [], marker="o", ls="", color=c) for c in (SPARSE, DENSE, BOTH)]
        labels = ("evidence in one token", "weak evidence in all tokens", "mixed channels")
        figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
        accuracies.set_xlim(0, 118)
        accuracies.set_xticks([])
        accuracies.set_title("accuracy, 64 classes", fontsize=9.5)
        for panel in (exponents, accuracies):
            panel.set_facecolor(paper)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(length=0)
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        figure.savefig(target, metadata={"Date": None})
        plt.close(figure)


def _draw_exponents(panel: Any, row: int, name: str, p: np.ndarray) -> None:
    """Dots of one arm; `p` is (seeds, groups), and exponents per channel become means by half."""
    if name == "GeM, p per channel":
        p = p.reshape(len(p), 2, -1).mean(axis=2)
    colours = (SPARSE, DENSE) if name in ("GGeM", "GeM, p per channel") else (BOTH, BOTH)
    for group, colour in zip(p.T, colours, strict=False):
        heights = row + np.linspace(-0.22, 0.22, len(group))
        panel.scatter(group, heights, s=14, color=colour, linewidths=0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=RESULTS / "pooling_study.json")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the two images")
    options = parser.parse_args(argv)
    try:
        part = json.loads(options.study.read_text())["parts"]["planted"]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{options.study} has no part planted of eval.studies.pooling: {error!r}")
    options.out.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        draw(part, theme, options.out / f"exponents-{theme}.svg")
        print(options.out / f"exponents-{theme}.svg")


if __name__ == "__main__":
    main()
