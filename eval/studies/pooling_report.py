"""Writes the report of `eval.studies.pooling` from its results: claims, tables and charts."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.statistics import Interval, mean
from eval.tables import format_interval, make_table
from ggem_jax.files.atomic import replacing, write_text
from ggem_jax.files.pages import render_page

TEMPLATE = Path(__file__).parent / "templates" / "pooling_study.md"

TITLES = {
    "planted": "Planted evidence",
    "imagenette": "Photographs: frozen tokens of EfficientNet-Lite0 on Imagenette",
    "cifar10-frozen": "Frozen tokens of a small ViT on CIFAR-10",
    "cifar10": "Small ViTs trained from scratch on CIFAR-10",
}
SHORT = {
    "planted": "planted evidence",
    "imagenette": "Imagenette, frozen",
    "cifar10-frozen": "CIFAR-10, frozen",
    "cifar10": "CIFAR-10, end to end",
}
RIVALS = (
    "class token",
    "average",
    "max",
    "GeM",
    "positive average",
)  # the poolings that the abstract of the paper names, and the control
PLANTED_RIVALS = (
    "average",
    "positive average",
    "maximum",
    "GeM",
    "GGeM, random groups",
    "GeM, p per channel",
)
WITHOUT_HEADS = ("planted", "imagenette")
ABOUT = {
    "planted": (
        "GGeM is given the two true groups here: it has to win, and what is shown is that it can."
        " Every seed has its own images."
    ),
    "imagenette": (
        "The network has no heads: the groups are 8 by assumption, and neighbouring channels, 192"
        " drawn out of 1,280, mean nothing. It was trained on ImageNet with average pooling, and"
        " these photographs are nearly all from ImageNet's training images, so the average is"
        " favoured and accuracies are close to their ceiling. No token is negative: the average is"
        " that of positive values."
    ),
    "cifar10-frozen": (
        "The network is the one trained with its class token, seed 0, of the end-to-end part."
    ),
    "cifar10": (
        "All arms have one learning rate and the same short training, without standardised"
        " descriptors: arms whose descriptors start small learn their head more slowly."
    ),
}


@dataclass(frozen=True)
class Claim:
    """One claim of the paper on one data set; its interval lies above 0 where the claim holds."""

    claim: str  # in words
    data: str  # short name of the data set
    measured: str  # name of the measure
    interval: Interval  # of the difference
    percent: bool = True  # whether the difference is shown in points, with two decimals

    @property
    def verdict(self) -> str:
        """The word "supported", "not supported" or "undecided", according to the interval."""
        if not np.isfinite([self.interval.low, self.interval.high]).all():
            return "undecided"
        return (
            "supported"
            if self.interval.low > 0
            else "not supported"
            if self.interval.high < 0
            else "undecided"
        )

    def cells(self) -> tuple[str, ...]:
        """Returns the cells of the claim's row in the table of claims."""
        difference = format_interval(
            self.interval, percent=self.percent, digits=2 if self.percent else 4, sign=True
        )
        return self.claim, self.data, self.measured, difference, f"**{self.verdict}**"


def write_report(
    path: Path,
    found: dict[str, Any],
    settings: dict[str, Any],
    machine: dict[str, str],
    retrieval: Path,
) -> str:
    """Writes the page and its charts, and returns the claims as a table in Markdown.

    Args:
        path: File of the page. Its charts go to a folder of the same name without the ending.
        found: Results by part, as `eval.studies.pooling.load_or_run` returns them.
        settings: Settings that the results depend on, for the head of the page.
        machine: Date, device and versions, as `describe_machine` returns them.
        retrieval: CSV file of `eval.studies.metric`. If it does not exist, there are no claims on
            retrieval.

    Raises:
        OSError: The page or a chart cannot be written.
    """
    claims = list(make_claims(found, retrieval))
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    table = make_table(
        ("claim", "on", "measured", "difference [95 %]", "verdict"),
        [claim.cells() for claim in claims],
    )
    sections = "".join(make_section(part, own, folder) for part, own in found.items())
    page = render_page(
        TEMPLATE,
        machine=machine,
        settings=settings,
        claims=len(claims),
        table=table,
        sections=sections,
    )
    write_text(path, "".join(page))
    return table


def make_claims(found: dict[str, Any], retrieval: Path) -> Iterator[Claim]:
    """Yields every claim with its measured interval.

    Args:
        found: Results by part, as in `write_report`.
        retrieval: CSV file of `eval.studies.metric`, which may be missing.
    """
    for part, own in found.items():
        rivals = PLANTED_RIVALS if part == "planted" else RIVALS
        for rival in rivals:
            interval = own["differences"].get(f"GGeM less {rival}")
            if interval is not None and not (
                rival == "positive average" and are_same(own, "average", rival)
            ):
                yield Claim(
                    f"GGeM is better than {rival}", SHORT[part], "top-1", Interval(**interval)
                )
    for part, own in found.items():
        if part in WITHOUT_HEADS:  # neighbouring channels mean nothing there
            continue
        for rival, claim in (
            (
                "GGeM, random groups",
                "groups of neighbouring channels are better than three draws of random ones",
            ),
            ("GGeM, interleaved", "contiguous groups are better than interleaved ones"),
        ):
            if (interval := own["differences"].get(f"GGeM less {rival}")) is not None:
                yield Claim(claim, SHORT[part], "top-1", Interval(**interval))
        for name, interval in own["differences"].items():
            if name.endswith(" groups") and "random" not in name:
                count = name.removeprefix("GGeM less GGeM, ").removesuffix(" groups")
                yield Claim(
                    f"as many groups as heads ({own['heads']}) are better than {count}",
                    SHORT[part],
                    "top-1",
                    Interval(**interval),
                )
    if "cifar10" in found:
        yield from make_dependence_claims(found["cifar10"]["dependence"])
    yield from make_retrieval_claims(retrieval)


def make_dependence_claims(dependence: dict[str, Any]) -> Iterator[Claim]:
    """Yields the claims on dependence.

    Each compares the excess of named blocks over random ones: that of a rival less that of GGeM,
    training by training.

    Args:
        dependence: Pooling -> kind of blocks -> score -> a value for each training.
    """
    for kind, null, what in (
        ("heads", "random channels of heads", "heads of the last attention"),
        ("blocks", "random", "blocks of the descriptor"),
    ):
        for score in dependence["GGeM"][kind]:
            excess = {
                name: np.array(kinds[kind][score]) - np.array(kinds[null][score])
                for name, kinds in dependence.items()
            }
            for rival in ("average", "positive average", "GeM"):
                less = mean(excess[rival] - excess["GGeM"])
                yield Claim(
                    f"{what} depend less on each other than with {rival}",
                    SHORT["cifar10"],
                    f"{score} above random blocks",
                    less,
                    percent=False,
                )


def are_same(own: dict[str, Any], one: str, other: str) -> bool:
    """Returns whether two arms have the same accuracies in all seeds.

    Averages of all values and of positive values are the same where no token is negative.

    Args:
        own: Results of a part.
        one: Name of an arm.
        other: Name of another arm.
    """
    return own["arms"][one]["by_seed"] == own["arms"][other]["by_seed"]


def make_retrieval_claims(path: Path) -> Iterator[Claim]:
    """Yields the claims on retrieval from the rows of `eval.studies.metric`.

    Args:
        path: The CSV file; a missing one gives no claims.
    """
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("arm") == "GGeM"]
    for row in rows:
        for rival in ("average", "positive_average", "GeM"):
            values = [
                row.get(f"recall_at_1_less_{rival}{end}") or "" for end in ("", "_low", "_high")
            ]
            if all(values):
                yield Claim(
                    f"GGeM retrieves better than {rival.replace('_', ' ')}",
                    f"{row['set']}, trained",
                    "recall@1",
                    Interval(*map(float, values)),
                )


def make_section(part: str, own: dict[str, Any], folder: Path) -> str:
    """Draws the charts of a part, and returns its section of the page in Markdown.

    Args:
        part: Name of the part, a key of `TITLES`.
        own: Results of the part.
        folder: Existing folder of the charts.
    """
    text = f"\n## {TITLES[part]}\n\n"
    if "tokens" in own:
        tokens, channels = own["tokens"]
        train, test = own["pictures"]
        text += (
            f"{train:,} images to train on (four fifths of them for each seed), {test:,} to test,"
            f" {tokens} tokens of {channels} channels, "
        )
        text += f"{own['heads']} groups for GGeM. "
    text += f"{ABOUT[part]} Measured {own['machine']['date']}.\n\n"
    rows = []
    for name, arm in own["arms"].items():
        difference = own["differences"].get(f"GGeM less {name}")
        accuracy = format_interval(Interval(**arm["accuracy"]))
        rows.append(
            (
                name,
                accuracy,
                "" if difference is None else format_interval(Interval(**difference), sign=True),
                format_exponents(arm["p"]),
            )
        )
    text += make_table(
        (
            "pooling",
            "top-1, % [95 % over seeds]",
            "GGeM less this [95 % over seeds and images]",
            "learned p",
        ),
        rows,
    )
    for draw in (accuracy_chart, group_chart, dependence_chart):
        if (image := draw(part, own, folder)) is not None:
            text += f"\n![{image.stem}]({folder.name}/{image.name})\n"
    if "dependence" in own:
        text += (
            "\nMean dependence of pairs of blocks: 0 none, 1 complete; random blocks of the same"
            " size are the null.\n\n" + make_dependence_table(own)
        )
    if "amplification" in own:
        text += "\n" + make_amplification_table(own["amplification"])
    if "retrieval" in own:
        text += "\nRetrieval among the test images by class, nothing trained:\n\n"
        found = [
            (name, *(f"{100 * value:.1f}" for value in values.values()))
            for name, values in own["retrieval"].items()
        ]
        text += make_table(("pooling", "recall@1, %", "mAP@R, %"), found)
    return text


def make_dependence_table(own: dict[str, Any]) -> str:
    """Returns the scores of dependence as a table in Markdown.

    Args:
        own: Results of a part that has `dependence`.
    """
    rows = []
    for name, kinds in own["dependence"].items():
        for kind, scores in kinds.items():
            rows.append(
                (
                    name,
                    kind,
                    *(
                        format_interval(mean(np.array(values)), percent=False, digits=4)
                        for values in scores.values()
                    ),
                )
            )
    first = next(iter(next(iter(own["dependence"].values())).values()))
    return make_table(("pooling", "between", *first), rows)


def make_amplification_table(found: dict[str, Any]) -> str:
    """Returns rank correlations and Gini coefficients as a table in Markdown, with an introduction.

    Args:
        found: Results of `eval.studies.pooling.measure_amplification`.
    """
    rows = []
    for name in ("GeM", "GGeM"):
        values = [mean(np.array(found[name][score])) for score in ("rank_correlation", "gini")]
        rows.append((name, *(format_interval(value, percent=False, digits=4) for value in values)))
    text = (
        "Amplification: rank correlation of how much larger a channel is than under the average of"
        " positive values with its Fisher score, and\n"
    )
    text += (
        f"how unequally energy is spread over channels (Gini; {found['gini_of_reference']:.3f}"
        " under that average).\n\n"
    )
    return text + make_table(("pooling", "rank correlation", "Gini"), rows)


def accuracy_chart(part: str, own: dict[str, Any], folder: Path) -> Path:
    """Draws the accuracy of every arm with its interval and every seed.

    Args:
        part: Name of the part, a key of `SHORT`.
        own: Results of the part.
        folder: Existing folder of the charts.

    Returns:
        Path of the PNG file.
    """
    figure, axis = make_figure(6.4, 0.26 * len(own["arms"]) + 1.1)
    names = list(own["arms"])[::-1]
    for place, name in enumerate(names):
        arm = own["arms"][name]
        colour = "C1" if name == "GGeM" else "C0"
        axis.plot(
            100 * np.array(arm["by_seed"]),
            np.full(len(arm["by_seed"]), place),
            ".",
            color=colour,
            alpha=0.35,
        )
        axis.errorbar(*error_bar(arm["accuracy"], place), fmt="o", color=colour, capsize=3)
    axis.set(
        yticks=range(len(names)), yticklabels=names, xlabel="top-1 accuracy, %", title=SHORT[part]
    )
    return save(figure, folder / f"{part}-accuracy.png")


def group_chart(part: str, own: dict[str, Any], folder: Path) -> Path | None:
    """Draws the accuracy over the number of groups, for neighbouring channels and for random ones.

    Args:
        part: Name of the part, a key of `SHORT`.
        own: Results of the part.
        folder: Existing folder of the charts.

    Returns:
        Path of the PNG file, or None where the part does not vary the number of groups.
    """
    if "heads" not in own:
        return None
    heads, channels = own["heads"], own["tokens"][1]
    counts = {"GeM": 1, "GGeM": heads, "GGeM, one p per channel": channels}
    counts |= {
        name: int(name.split()[1])
        for name in own["arms"]
        if name.endswith(" groups") and "random" not in name
    }
    random = {"GGeM, random groups 1": heads} | {
        name: int(name.split()[1]) for name in own["arms"] if name.endswith(" random groups")
    }
    figure, axis = make_figure(5.2, 3.4)
    for label, which in (("neighbouring channels", counts), ("random channels", random)):
        points = sorted((count, own["arms"][name]["accuracy"]) for name, count in which.items())
        x = [count for count, _ in points]
        y = np.array(
            [[100 * accuracy[end] for end in ("value", "low", "high")] for _, accuracy in points]
        )
        (line,) = axis.plot(x, y[:, 0], marker="o", label=label)
        axis.fill_between(x, y[:, 1], y[:, 2], alpha=0.15, color=line.get_color())
    axis.axvline(heads, color="grey", linewidth=1, linestyle=":")
    axis.set(
        xscale="log",
        xlabel=f"groups (dotted: {heads} heads)",
        ylabel="top-1 accuracy, %",
        title=f"{SHORT[part]}: number of groups",
    )
    axis.legend()
    return save(figure, folder / f"{part}-groups.png")


def dependence_chart(part: str, own: dict[str, Any], folder: Path) -> Path | None:
    """Draws every score of dependence by pooling, blocks beside their null.

    Args:
        part: Name of the part, a key of `SHORT`.
        own: Results of the part.
        folder: Existing folder of the charts.

    Returns:
        Path of the PNG file, or None where the part has no scores of dependence.
    """
    if "dependence" not in own:
        return None
    kinds = list(next(iter(own["dependence"].values())))
    scores = list(own["dependence"]["GGeM"][kinds[0]])
    figure, axes = make_figure(3.2 * len(scores), 3.2, columns=len(scores))
    for axis, score in zip(axes, scores, strict=True):
        for shift, kind in enumerate(kinds):
            values = [np.mean(own["dependence"][name][kind][score]) for name in own["dependence"]]
            axis.bar(
                np.arange(len(values)) + 0.8 * shift / len(kinds),
                values,
                width=0.8 / len(kinds),
                label=kind,
            )
        axis.set(title=score, xticks=np.arange(len(own["dependence"])) + 0.3)
        axis.set_xticklabels(list(own["dependence"]), rotation=40, ha="right")
    axes[0].legend(fontsize=7)
    return save(figure, folder / f"{part}-dependence.png")


def make_figure(width: float, height: float, *, columns: int = 1) -> Any:
    """Returns a matplotlib figure and its axes, without a display.

    Args:
        width: Width in inches.
        height: Height in inches.
        columns: Number of axes side by side. One gives the axes themselves, more give an array.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def save(figure: Any, path: Path) -> Path:
    """Writes a chart as a PNG file and returns its path.

    Args:
        figure: The matplotlib figure.
        path: The file; it is replaced.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None})
    return path


def error_bar(accuracy: dict[str, float], place: int) -> tuple[Any, ...]:
    """Returns x, y, y error and x error of an accuracy in percent, as `Axes.errorbar` takes them.

    Args:
        accuracy: "value", "low" and "high", from 0 to 1.
        place: The y coordinate.
    """
    value, low, high = (100 * accuracy[end] for end in ("value", "low", "high"))
    return value, place, None, [[value - low], [high - value]]


def format_exponents(p: list[list[float]]) -> str:
    """Returns the learned exponents as text, each the mean over seeds; of more than 8 the range.

    Args:
        p: Exponents `(seeds, exponents)`. Where nothing is learned, the text is empty.
    """
    values = np.array(p)
    if not values.size:
        return ""
    means = values.mean(axis=0)
    if len(means) <= 8:
        return " ".join(f"{value:.2f}" for value in means)
    return f"{means.min():.2f} to {means.max():.2f}, {len(means)} of them"
