"""The demo's report: one HTML page that holds everything it shows."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval import statistics
from ggem_jax.files.atomic import write_text
from ggem_jax.files.pages import render_page
from train.config import Pool
from train.evaluate import Predictions
from train.images import Images

TEMPLATE = Path(__file__).parent / "templates" / "demo.html"


@dataclass(frozen=True)
class Arm:
    """One pooling over all seeds."""

    name: str  # of the pooling
    correct: np.ndarray  # (seeds, images) bool: whether the first answer is right
    histories: list[list[dict[str, Any]]]  # evaluations of each seed, as in metrics.jsonl
    predictions: Predictions  # of the first seed

    @property
    def accuracy(self) -> np.ndarray:
        """Top-1 accuracy of each seed, `(seeds,)`."""
        return self.correct.mean(axis=1)

    def p_over_steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps of the evaluations and the exponents at each.

        Returns:
            Steps `(evaluations,)` and exponents `(seeds, evaluations, groups)`; there are no groups
            where no exponent is learned.
        """
        steps = np.array([line["step"] for line in self.histories[0]])
        p = [
            [[p for values in line["p"].values() for p in values] for line in history]
            for history in self.histories
        ]
        return steps, np.array(p)

    def exponents(self) -> str:
        """Returns the learned exponents after training, each the mean over seeds, as text."""
        return " ".join(f"{p:.2f}" for p in self.p_over_steps()[1][:, -1].mean(axis=0))


@dataclass(frozen=True)
class Example:
    """An image of the page with the answers of all poolings."""

    source: str  # data URI
    label: str  # name of its class
    # pooling, the class that it answers, whether that is right, its probability in percent
    answers: list[tuple[str, str, bool, str]]


def write_report(path: Path, arms: list[Arm], images: Images, facts: dict[str, str]) -> Path:
    """Writes the page and returns its path.

    Args:
        path: File of the page; it is replaced.
        arms: The poolings, all with the same images and seeds. The last one is compared with the
            others.
        images: The evaluation images.
        facts: Facts at the head of the page, by name.

    Raises:
        OSError: The page cannot be written.
    """
    one_model = statistics.proportion(arms[-1].correct[0])  # over the draw of the images
    pieces = render_page(
        TEMPLATE,
        title="Poolings of a small Vision Transformer",
        facts=facts,
        arms=arms,
        images=len(arms[0].predictions.label),
        mean=statistics.mean,
        sampling=100 * (one_model.high - one_model.low) / 2,
        accuracy_chart=_draw_accuracy(arms),
        exponent_chart=_draw_exponents(arms),
        first_p=Pool().p,
        examples=_find_hardest(arms, images),
    )
    write_text(path, "".join(pieces))
    return path


def _draw_accuracy(arms: list[Arm]) -> str:
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


def _draw_exponents(arms: list[Arm]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for i, arm in reversed(list(enumerate(arms))):
        steps, p = arm.p_over_steps()
        for group in range(p.shape[-1]):
            for seed in range(len(p)):
                axis.plot(
                    [0, *steps],
                    [Pool().p, *p[seed, :, group]],
                    color=f"C{i}",
                    alpha=0.6,
                    linewidth=1,
                    label=arm.name if group == seed == 0 else None,
                )
    axis.set(title="learned p: one line per group and seed", xlabel="step")
    axis.legend()
    axis.grid(alpha=0.3)
    return _svg(figure)


def _svg(figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()[file.getvalue().index("<svg") :]


def _find_hardest(arms: list[Arm], images: Images, count: int = 12) -> list[Example]:
    """The images whose label the first seeds find least probable."""
    label, index = arms[0].predictions.label, arms[0].predictions.index
    rows = np.arange(len(label))
    own = np.mean([arm.predictions.probability[rows, label] for arm in arms], axis=0)
    examples = []
    for i in np.argsort(own, kind="stable")[:count]:
        image, _ = images.load(int(index[i]))
        answers = []
        for arm in arms:
            answer = int(arm.predictions.probability[i].argmax())
            percent = f"{100 * arm.predictions.probability[i, answer]:.0f}"
            answers.append((arm.name, images.classes[answer], answer == label[i], percent))
        examples.append(Example(_encode_png(image), images.classes[label[i]], answers))
    return examples


def _encode_png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
