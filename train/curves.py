"""Draws the curves of a run."""

from collections.abc import Sequence
from pathlib import Path

from ggem_jax.files.atomic import replacing
from train.log import read_metrics


def draw_curves(run: Path, measures: Sequence[str]) -> Path:
    """Draws loss, measures and learned exponents over the steps into `RUN/curves.png`.

    Args:
        run: Folder of the run, with its `metrics.jsonl`.
        measures: Names of the values of its evaluations that are drawn, each in [0, 1].

    Returns:
        The path of the image.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    train, evals = read_metrics(run, "train"), read_metrics(run, "eval")
    names = sorted({name for line in evals for name in line["p"]})
    figure = Figure(figsize=(4.5 * (2 + bool(names)), 3.4), layout="constrained")
    axes = figure.subplots(1, 2 + bool(names))
    axes[0].plot([line["step"] for line in train], [line["loss"] for line in train], linewidth=1)
    axes[0].set(title="training loss", xlabel="step", yscale="log")
    for metric in measures:
        axes[1].plot(
            [line["step"] for line in evals],
            [100 * line[metric] for line in evals],
            marker=".",
            label=metric,
        )
    axes[1].set(title="evaluations, %", xlabel="step")
    axes[1].legend()
    for name in names:
        p = [line["p"][name] for line in evals]
        for group in range(len(p[0])):
            axes[2].plot(
                [line["step"] for line in evals],
                [values[group] for values in p],
                marker=".",
                linewidth=1,
            )
        axes[2].set(title=f"learned p of {len(p[0])} group(s)", xlabel="step")
    for axis in axes:
        axis.grid(alpha=0.3)
    path = run / "curves.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
