"""Trains descriptors for retrieval: python -m train.metric --config NAME [flags].

A Vision Transformer with any pooling, a projection and L2 normalisation, trained with ArcFace, the
normalised softmax or Proxy-Anchor. The classes that are evaluated on are not trained on; an
evaluation uses every image of these classes as a query for all others. `--init FILE` starts from a
published ViT (`ggem_jax.weights.vit`). `train.loop` describes the run's folder, and how a run stops
and resumes.

A new loss is a function of `ggem_jax.losses.metric_learning`, with its name in `LossName` and
`LOSSES` there.
"""

import functools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ggem_jax.losses import metric_learning as metric
from ggem_jax.models.embedder import Embedder
from ggem_jax.models.vit import ViT
from ggem_jax.retrieval import search
from ggem_jax.retrieval.metrics import LabelScores, label_scores
from train import dry_run
from train.batches import train_batches
from train.build import build_model
from train.cli import Refused, load_config, one_sentence, require
from train.config import Config, Data, Optimizer
from train.data import open_disjoint
from train.digest import describe_data
from train.evaluate import compute_outputs
from train.images import Images
from train.loop import Evaluation, Task, TrainedRun, check_batch, check_devices, run, run_tool
from train.run import join_processes
from train.samplers import draw_balanced, measure_coverage, steps_to_cover
from train.step import Batch, Problem, Steps, compile_steps
from train.stopping import check_keep
from train.throughput import training_flops

KAPPAS = (1, 5, 10)


@dataclass(frozen=True)
class Metric:
    """The loss, and how its batches are drawn."""

    loss: metric.LossName = "normalised-softmax"
    # channels of the descriptor after a projection; 0: no projection of the pooled tokens
    dim: int = 128
    temperature: float = 0.05  # of normalised-softmax
    scale: float | None = None  # of arcface and proxy-anchor; None: 64 and 32, as published
    margin: float | None = None  # of the same; None: 0.5 radians and 0.1, as published
    proxy_lr: float = 10.0  # learning rate of the proxies over lr; Proxy-Anchor's authors take 100
    per_class: int | None = 4  # images of each class in a batch; None: batches ignore classes
    # share of the classes that are trained on; splits that share no class are kept as they are
    train_classes: float = 0.5

    def __post_init__(self):
        require("metric.dim", self.dim, "at least 0", self.dim >= 0)
        require("metric.temperature", self.temperature, "positive", 0 < self.temperature < math.inf)
        require(
            "metric.scale",
            self.scale,
            "positive or None",
            self.scale is None or 0 < self.scale < math.inf,
        )
        require(
            "metric.margin",
            self.margin,
            "from 0 to 1.5 or None",
            self.margin is None or 0 <= self.margin <= 1.5,
        )
        softmax = self.loss == "normalised-softmax"
        for name in ("scale", "margin"):
            value = getattr(self, name)
            require(
                f"metric.{name}",
                value,
                "None with normalised-softmax, which has a temperature instead",
                value is None or not softmax,
            )
        require(
            "metric.temperature",
            self.temperature,
            f"0.05 with {self.loss}, which has a scale instead",
            softmax or self.temperature == 0.05,
        )
        require("metric.proxy_lr", self.proxy_lr, "at least 0", 0 <= self.proxy_lr < math.inf)
        require(
            "metric.per_class",
            self.per_class,
            "at least 1, or None",
            self.per_class is None or self.per_class >= 1,
        )
        require(
            "metric.train_classes",
            self.train_classes,
            "between 0 and 1",
            0 < self.train_classes < 1,
        )

    def options(self) -> dict[str, float]:
        """Returns the keyword arguments of the loss; those left out keep their published values."""
        if self.loss == "normalised-softmax":
            return {"temperature": self.temperature}
        return {
            name: value
            for name in ("scale", "margin")
            if (value := getattr(self, name)) is not None
        }


@dataclass(frozen=True)
class MetricConfig(Config):
    """One training of descriptors."""

    tool: ClassVar[str] = "train.metric"

    out: Path = Path("runs/metric")
    metric: Metric = field(default_factory=Metric)

    def __post_init__(self):
        super().__post_init__()
        self.augment.require_no_mixing("the labels of descriptors are not mixed")
        parts, alone = self.optimizer.accumulate, self.metric.loss != "proxy-anchor"
        require(
            "optimizer.accumulate",
            parts,
            "1 with proxy-anchor, whose loss is that of a whole batch",
            alone or parts == 1,
        )


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    flags = sys.argv[1:] if argv is None else argv
    if dry_run.is_asked(flags):
        with one_sentence(MetricConfig.tool):
            dry_run.main(flags, MetricConfig, plan, open_sizes)
    else:
        run_tool(MetricConfig.tool, lambda flags: train(load_config(MetricConfig, flags)), flags)


def plan(config: MetricConfig, classes: int, total: int, devices: dry_run.Devices) -> dry_run.Plan:
    """Returns what a dry run needs to know.

    Args:
        config: The settings of the run.
        classes: Classes that are trained on.
        total: Steps of the run.
        devices: The devices; None: all.
    """
    steps = make_metric_steps(config, classes, total, devices=devices)
    return dry_run.Plan(steps, training_flops(config.model, config.metric.dim))


def open_sizes(config: MetricConfig) -> dry_run.Sizes:
    """Returns the numbers of classes and of images that are trained on.

    Args:
        config: The settings of the run.
    """
    images, _ = open_disjoint(config.data, config.metric.train_classes)
    return len(images.classes), len(images)


def train(
    config: MetricConfig, *, data: tuple[Images, Images] | None = None, quiet: bool = False
) -> TrainedRun:
    """Trains the descriptors that a config describes, or resumes their run.

    Args:
        config: The settings of the run.
        data: Training and evaluation images to use instead of the config's source; None reads the
            source.
        quiet: Whether nothing is printed.

    Returns:
        The run; its result is the `LabelledDescriptors` of the last evaluation.

    Raises:
        Refused: The settings, the data or the run's folder do not fit.
    """
    join_processes()
    train_set, eval_set = (
        open_disjoint(config.data, config.metric.train_classes) if data is None else data
    )
    check_devices(config)
    check_batch(config, len(train_set))
    check_findable(eval_set.labels())
    check_keep(config, (*(f"recall@{kappa}" for kappa in KAPPAS), "r_precision", "map@r"))
    labels = train_set.labels()
    draw, covered = None, ""
    if config.metric.per_class is not None:
        each = check_balance(config, labels)
        draw = draw_balanced(labels, config.batch, each, config.seed)
        epoch = max(round(len(train_set) / config.batch), 1)
        share = measure_coverage(draw, len(train_set), epoch)
        whole = steps_to_cover(labels, config.batch, each) / epoch
        covered = f"; the first epoch shows {share:.1%} of the images, {whole:.3g} epochs show all"
    total = max(round(config.epochs * len(train_set) / config.batch), 1)
    classes = len(train_set.classes)
    facts = describe_data(config, train_set, eval_set) | {"eval_classes": list(eval_set.classes)}

    def task() -> Task:
        steps = make_metric_steps(config, classes, total)

        def evaluation(state) -> Evaluation:
            retrieved = retrieve(steps, state.evaluated, eval_set, config)
            values: dict[str, Any] = retrieved.scores().means()
            said = (
                f"recall@1 {values['recall@1']:.2%}  mAP@R {values['map@r']:.2%}  R-precision"
                f" {values['r_precision']:.2%}"
            )
            return Evaluation(retrieved, values | {"images": len(retrieved.label)}, said)

        places = {"process": jax.process_index(), "processes": jax.process_count()}
        counts = (
            f"{len(train_set):,} images of {classes} classes to train, {len(eval_set):,} of"
            f" {len(eval_set.classes)} others to evaluate"
        )
        return Task(
            about=counts + covered,
            total=total,
            steps=steps,
            flops=training_flops(config.model, config.metric.dim),
            batches=lambda start: train_batches(
                train_set, config, start=start, draw=draw, **places
            ),
            evaluate=evaluation,
            curves=("recall@1", "map@r"),
        )

    return run(config, task, facts, quiet=quiet)


def check_balance(config: MetricConfig, labels: np.ndarray) -> int:
    """Returns the number of images of each class in a batch.

    Args:
        config: The settings of the run; a `per_class` of None counts as 1.
        labels: Labels of the training images, `(n,)`.

    Raises:
        Refused: The batch is no multiple of this number, or needs more classes than there are.
    """
    each, classes = config.metric.per_class or 1, len(np.unique(labels))
    if config.batch % each or config.batch // each > classes:
        raise Refused(
            f"a batch of {config.batch} images cannot hold --metric.per-class {each} of each"
            f" class: it must be a multiple of it, and at most {each * classes} with {classes}"
            " classes"
        )
    return each


def make_metric_steps(
    config: MetricConfig,
    classes: int,
    total_steps: int,
    *,
    devices: tuple[jax.Device, ...] | None = None,
) -> Steps:
    """Returns the compiled steps of a config.

    Configs that differ only in seed, folder or logging share one compilation.

    Args:
        config: The settings of the run.
        classes: Number of classes that are trained on, each with a proxy.
        total_steps: Steps of the run.
        devices: The devices, which may be described ones (`train.topologies`); None: all.
    """
    vit = build_model(config, 0)
    return _metric_steps(
        vit,
        config.metric,
        classes,
        config.data,
        config.optimizer,
        config.fsdp,
        total_steps,
        devices,
    )


@functools.cache
def _metric_steps(
    vit: ViT,
    how: Metric,
    classes: int,
    data: Data,
    optimizer: Optimizer,
    fsdp: int,
    total_steps: int,
    devices: tuple[jax.Device, ...] | None,
) -> Steps:
    side, width = vit.config.image, vit.config.width
    network = Embedder(vit, how.dim)

    def init(key) -> Any:
        network_key, proxy_key = jax.random.split(key)
        proxies = jax.random.normal(proxy_key, (classes, how.dim or width))
        return {
            "network": network.init(network_key, jnp.zeros((1, side, side, 3)))["params"],
            "proxies": proxies,
        }

    def loss(params, batch: Batch, key) -> Array:
        descriptors: Any = network.apply(
            {"params": params["network"]}, batch["image"], train=True, rngs={"dropout": key}
        )
        return metric.LOSSES[how.loss](
            descriptors, batch["label"], params["proxies"], **how.options()
        )

    def scales(params) -> Any:
        return {"network": jax.tree.map(lambda _: 1.0, params["network"]), "proxies": how.proxy_lr}

    def outputs(params, images) -> Batch:
        descriptors: Any = network.apply({"params": params["network"]}, images)
        return {"descriptor": descriptors}

    problem = Problem(
        init=init,
        prepare=lambda batch, key: batch,
        loss=loss,
        outputs=outputs,
        scales=scales,
    )
    return compile_steps(problem, data, optimizer, fsdp, total_steps, devices)


@dataclass(frozen=True)
class LabelledDescriptors:
    """Descriptors of the readable evaluation images, in the order of their split."""

    index: np.ndarray  # (n,) number of the image in its split
    label: np.ndarray  # (n,) class of the image, from 0
    digest: np.ndarray  # (n,) CRC-32 of the image as it was read
    descriptor: np.ndarray  # (n, dim) float32, unit vectors

    def scores(self) -> LabelScores:
        """Returns the measures of retrieval, every image a query for all others."""
        return score_descriptors(self.descriptor, self.label)


def retrieve(steps: Steps, params, images: Images, config: MetricConfig) -> LabelledDescriptors:
    """Returns the descriptors of every readable image of a split.

    Args:
        steps: The compiled steps of the run.
        params: The parameters to evaluate.
        images: The evaluation images.
        config: The settings of the run.

    Raises:
        Refused: No image can be read.
    """
    whole = compute_outputs(steps, params, images, config)
    return LabelledDescriptors(
        *(whole[name] for name in ("index", "label", "digest", "descriptor"))
    )


def check_findable(labels: np.ndarray) -> None:
    """Raises `Refused` if no two images have the same label.

    Args:
        labels: Labels of the images, `(n,)`, from 0.

    Raises:
        Refused: Every label occurs at most once.
    """
    if np.bincount(labels).max(initial=0) < 2:
        raise Refused("no class to evaluate on has two images: nothing can be found")


def score_descriptors(descriptors: Any, labels: np.ndarray) -> LabelScores:
    """Returns the measures of retrieval, each descriptor a query for all others.

    Args:
        descriptors: Unit vectors, `(n, d)`.
        labels: Labels of the vectors, `(n,)`; at least one must occur twice.

    Raises:
        Refused: No label occurs twice.
    """
    check_findable(labels)
    reach = min(max(int(np.bincount(labels).max()), max(KAPPAS) + 1), len(labels))
    ids = np.asarray(search(descriptors, descriptors, k=reach).ids)
    return label_scores(ids, labels, labels, own=np.arange(len(labels)), kappas=KAPPAS)


if __name__ == "__main__":
    main()
