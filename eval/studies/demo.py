"""Trains one small ViT per pooling and seed, on handwritten digits or other images; compares them.

    python -m eval.studies.demo [--config NAME] [--poolings NAME ...] [--out DIR]

The trainings are those of `python -m train.classify --config NAME`, each in its own folder under
`--out`; an interrupted demo resumes. It prints a table and writes `report.html`, one page that
needs no other file.
"""

import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eval import statistics
from eval.studies.report import Arm, write_report
from ggem_jax.progress import progress_bar
from train.classify import train
from train.cli import Refused, load_config, one_sentence, parse
from train.config import Config
from train.data import open_data
from train.log import read_metrics

# relu-avg is the control: what GeM and GGeM owe to clamping negative values, not to their exponents
POOLINGS = {
    "cls": "class token",
    "avg": "average",
    "relu-avg": "positive average",
    "gem": "GeM",
    "ggem": "GGeM",
}


@dataclass(frozen=True)
class Demo:
    """Trains one small ViT per pooling and seed and compares them."""

    config: str = "digits"  # settings of the trainings: --config of train.classify
    poolings: tuple[str, ...] = tuple(POOLINGS)  # which to compare; the last one with all others
    out: Path = Path("runs/demo")  # folder of the trainings and the report
    seeds: int = 5  # trainings of each pooling
    epochs: float | None = None  # epochs of each training; None: those of the config


def main(argv: list[str] | None = None) -> None:
    """Runs the demo."""
    with one_sentence("eval.studies.demo"):
        demo = parse(Demo, argv, "eval.studies.demo", default=Demo())
        if demo.seeds < 2:
            raise Refused(f"--seeds must be at least 2 to give intervals, it is {demo.seeds}")
        check_poolings(demo.poolings)
        started = time.perf_counter()
        arms = compare(demo)
        seconds = time.perf_counter() - started
        show(arms)
        config = make_config(demo, demo.poolings[-1], 0)
        facts = {
            "trained": (
                f"{len(arms)} poolings x {demo.seeds} seeds, {config.epochs:g} epochs each, in"
                f" {seconds:.0f} s"
            ),
            "model": (
                f"ViT of width {config.model.width}, depth {config.model.depth},"
                f" {config.model.heads} heads, patches of {config.model.patch} px"
            ),
            "machine": (
                f"{platform.processor() or platform.machine()}, {platform.system()}, Python"
                f" {platform.python_version()}"
            ),
            "versions": ", ".join(
                f"{name} {version(name)}" for name in ("jax", "flax", "optax", "numpy")
            ),
            "date": time.strftime("%Y-%m-%d"),
        }
        _, images = open_data(config.data)
        report = write_report(
            demo.out / "report.html", arms, images, {"settings": demo.config} | facts
        )
        print(
            f"\n{seconds:.0f} s. Report with curves, learned exponents and sample predictions:"
            f" {report}"
        )
        print(say_next_steps(demo))


def check_poolings(poolings: tuple[str, ...]) -> None:
    """Raises `Refused` for poolings that cannot be compared.

    Args:
        poolings: Their flags.

    Raises:
        Refused: A pooling is unknown or there twice, or there are fewer than two.
    """
    unknown = [each for each in poolings if each not in POOLINGS]
    if unknown:
        raise Refused(f"--poolings must be among {', '.join(POOLINGS)}, not {', '.join(unknown)}")
    if len(set(poolings)) < max(len(poolings), 2):
        raise Refused(f"--poolings must be two or more different ones, not {' '.join(poolings)}")


def make_config(demo: Demo, pool: str, seed: int) -> Config:
    """Returns the settings of one training.

    Args:
        demo: Settings of the demo.
        pool: Flag of the pooling, a key of `POOLINGS`.
        seed: Seed of the training.
    """
    folder = demo.out / f"{pool}-{seed}"
    flags = [
        "--config", demo.config, "--pool.kind", pool, "--seed", str(seed), "--out", str(folder),
    ]  # fmt: skip
    if demo.epochs is not None:
        flags += ["--epochs", str(demo.epochs)]
    return load_config(Config, flags, "eval.studies.demo")


def compare(demo: Demo) -> list[Arm]:
    """Trains every pooling and seed, or resumes their runs.

    Args:
        demo: Settings of the demo.

    Returns:
        The poolings in the order of `demo.poolings`, with the answers of all seeds.

    Raises:
        Refused: A training is refused.
        KeyboardInterrupt: A signal stopped a training.
    """
    console = Console(stderr=True)
    arms = []
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=len(demo.poolings) * demo.seeds)
        for pool in demo.poolings:
            name = POOLINGS[pool]
            correct, histories, predictions = [], [], None
            for seed in range(demo.seeds):
                bar.update(task, description=f"training {name}, seed {seed}")
                config = make_config(demo, pool, seed)
                trained = train(config, quiet=True)
                if trained.signal is not None:
                    raise KeyboardInterrupt
                assert trained.result is not None
                correct.append(trained.result.top(1))
                histories.append(read_metrics(config.out, "eval"))
                predictions = predictions or trained.result
                bar.advance(task)
                if not console.is_terminal:
                    console.print(
                        f"{name}, seed {seed}: top-1 {correct[-1].mean():.2%}", highlight=False
                    )
            assert predictions is not None
            arms.append(Arm(name, np.array(correct), histories, predictions))
    return arms


def show(arms: list[Arm]) -> None:
    """Prints accuracies, differences to the last arm, and learned exponents as a table.

    Args:
        arms: The poolings; the last one is compared with the others.
    """
    table = Table(
        "pooling",
        title=f"Top-1 accuracy, mean over {len(arms[0].correct)} seeds [95 % interval]",
        title_justify="left",
    )
    for column in ("accuracy", f"{arms[-1].name} less this, same seeds", "learned p"):
        table.add_column(column, justify="right")
    for arm in arms:
        difference = (
            "" if arm is arms[-1] else str(statistics.mean(arms[-1].accuracy - arm.accuracy))
        )
        table.add_row(arm.name, str(statistics.mean(arm.accuracy)), difference, arm.exponents())
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def say_next_steps(demo: Demo) -> str:
    """Returns commands to try next, a line for each.

    Args:
        demo: Settings of the demo, whose folder the commands name.
    """
    first, last = (f"{demo.out}/{demo.poolings[which]}-0" for which in (0, -1))
    steps = {
        f"python -m eval.classify {last} {first}": (
            "accuracy by class, and a paired test on the same images"
        ),
        "python -m eval.studies.planted": "where one exponent per group has to win, by how much",
        "python -m train.classify --config digits --pool.kind lse": (
            "another pooling; --help lists all settings"
        ),
        "python -m train.classify --data folder:DIR --variant Ti/16": (
            "your own images, in one sub-folder per class"
        ),
    }
    width = max(map(len, steps))
    return "\nWhat to try next:\n" + "\n".join(
        f"  {command:<{width}}  {what}" for command, what in steps.items()
    )


if __name__ == "__main__":
    main()
