"""The demo's report: one HTML page with everything inside."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval import statistics
from train.config import Pool
from train.data import Pictures
from train.evaluate import Predictions
from train.log import write_text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem } dt { opacity: .7 } dd { margin: 0 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem }
.charts svg { background: #fff; border-radius: 8px; width: 100%; height: auto }
.digits { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem }
.digit { background: var(--soft); border-radius: 8px; padding: .6rem; font-size: .8rem; line-height: 1.35 }
.digit img { width: 100%; image-rendering: pixelated; border-radius: 4px } .wrong { color: #d33 } .right { color: #2a8 }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 4px }
"""


@dataclass(frozen=True)
class Arm:
    """One pooling over all seeds."""

    name: str
    correct: np.ndarray  # (seeds, pictures) bool
    histories: list[list[dict[str, Any]]]  # evaluations of each seed, as in metrics.jsonl
    predictions: Predictions  # of the first seed

    @property
    def accuracy(self) -> np.ndarray:
        return self.correct.mean(axis=1)

    def p_over_steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps `(evaluations,)` and learned exponents `(seeds, evaluations, groups)`; no groups
        where nothing is learned.
        """
        steps = np.array([line["step"] for line in self.histories[0]])
        return steps, np.array(
            [
                [[p for values in line["p"].values() for p in values] for line in history]
                for history in self.histories
            ]
        )

    def exponents(self) -> str:
        """The learned exponents, mean over seeds."""
        return " ".join(f"{p:.2f}" for p in self.p_over_steps()[1][:, -1].mean(axis=0))


def write_report(path: Path, arms: list[Arm], pictures: Pictures, facts: dict[str, str]) -> Path:
    """Writes the page and gives its path."""
    body = f"""<h1>Poolings of a small Vision Transformer</h1>
<p>Handwritten digits of 8 &times; 8 pixels: {len(arms[0].predictions.label)} pictures that no training saw. Every number and curve on this page comes
from the trainings listed here.</p>
<dl>{"".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(fact)}</dd>" for name, fact in facts.items())}</dl>
<h2>Accuracy</h2>{_table(arms)}
<p>Means over seeds with 95 % intervals (Student's t): how far another seed would move them on these same pictures; other pictures would move a single
accuracy by about {100 * _sampling(arms):.1f} points more. Differences are taken seed by seed: same initial weights, same batches. An interval that
holds 0 decides nothing.</p>
<h2>Curves and learned exponents</h2><div class="charts">{_accuracy_chart(arms)}{_exponent_chart(arms)}</div>
<p>Both GeM and GGeM start at p = {Pool().p:g}; p = 1 averages what is positive in a channel, a large p approaches its maximum.</p>
<h2>The pictures the models are least sure of</h2><div class="digits">{_hardest(arms, pictures)}</div>
<h2>What to try next</h2>
<p>On your own pictures, one sub-folder per class: <code>python -m train.classify --data folder:DIR --variant Ti/16</code>. Where one exponent per
group has to win, and by how much: <code>python -m eval.studies.planted</code>.</p>"""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width"><title>GGeM demo</title>'
    )
    write_text(path, f"{page}<style>{STYLE}</style></head><body>{body}</body></html>\n")
    return path


def _table(arms: list[Arm]) -> str:
    rows = []
    for arm in arms:
        difference = (
            ""
            if arm is arms[-1]
            else html.escape(str(statistics.mean(arms[-1].accuracy - arm.accuracy)))
        )
        accuracy = statistics.mean(arm.accuracy)
        rows.append(
            f"<tr><td>{html.escape(arm.name)}</td><td>{accuracy}</td><td>{difference}</td><td>{arm.exponents()}</td></tr>"
        )
    head = (
        f"<tr><th>pooling</th><th>top-1</th><th>{html.escape(arms[-1].name)} less"
        " this</th><th>learned p</th></tr>"
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _sampling(arms: list[Arm]) -> float:
    """Half the 95 % interval of one model's accuracy over the draw of the pictures."""
    interval = statistics.proportion(arms[-1].correct[0])
    return (interval.high - interval.low) / 2


def _accuracy_chart(arms: list[Arm]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for arm in arms:
        steps = [line["step"] for line in arm.histories[0]]
        accuracy = 100 * np.array([[line["top1"] for line in history] for history in arm.histories])
        (line,) = axis.plot(steps, accuracy.mean(0), marker=".", label=arm.name)
        axis.fill_between(
            steps, accuracy.min(0), accuracy.max(0), color=line.get_color(), alpha=0.12, linewidth=0
        )
    axis.set(title="top-1 accuracy, %: mean and range of the seeds", xlabel="step")
    axis.legend()
    axis.grid(alpha=0.3)
    return _svg(figure)


def _exponent_chart(arms: list[Arm]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for i, arm in reversed(list(enumerate(arms))):
        steps, p = arm.p_over_steps()
        for group in range(p.shape[-1]):
            for seed in range(len(p)):
                label = arm.name if group == seed == 0 else None
                axis.plot(
                    [0, *steps],
                    [Pool().p, *p[seed, :, group]],
                    color=f"C{i}",
                    alpha=0.6,
                    linewidth=1,
                    label=label,
                )
    axis.set(title="learned p: one line per group and seed", xlabel="step")
    axis.legend()
    axis.grid(alpha=0.3)
    return _svg(figure)


def _svg(figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()[file.getvalue().index("<svg") :]


def _hardest(arms: list[Arm], pictures: Pictures, count: int = 12) -> str:
    """The pictures whose label the first seeds find least probable, with each model's answer."""
    label, index = arms[0].predictions.label, arms[0].predictions.index
    own = np.mean(
        [arm.predictions.probability[np.arange(len(label)), label] for arm in arms], axis=0
    )
    cards = []
    for i in np.argsort(own, kind="stable")[:count]:
        image, _ = pictures.load(int(index[i]))
        answers = []
        for arm in arms:
            answer = int(arm.predictions.probability[i].argmax())
            verdict = "right" if answer == label[i] else "wrong"
            probability = arm.predictions.probability[i, answer]
            answers.append(
                f"{html.escape(arm.name)}: <b"
                f' class="{verdict}">{html.escape(pictures.classes[answer])}</b>'
                f" {100 * probability:.0f} %"
            )
        cards.append(
            f'<div class="digit"><img alt="a digit" src="{_png(image)}">is a'
            f" {pictures.classes[label[i]]}<br>{'<br>'.join(answers)}</div>"
        )
    return "".join(cards)


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
