"""The settings of a training run: frozen records whose values are checked when they are made."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from tyro.conf import arg

from ggem_jax.files.normalisation import IMAGENET_MEAN, IMAGENET_STD
from ggem_jax.models.vit import GGeM, ViTConfig, vit_config
from ggem_jax.pooling import Layout, Negatives
from train.cli import require

C = TypeVar("C", bound="Config")

SEPARATORS = {"tab": "\t", "\\t": "\t"}  # of columns, as they are written on a command line


@dataclass(frozen=True)
class Pool:
    """The pooling of the tokens, by name."""

    # relu-avg is gem with p fixed at 1: the average of max(x, 0)
    kind: Literal["cls", "avg", "relu-avg", "max", "lse", "gem", "ggem", "map"] = "ggem"
    groups: int | None = None  # groups of channels of ggem; None: as many as attention heads
    p: float = 3.0  # first value of the learned exponents of gem and ggem
    r: float = 10.0  # sharpness of lse; it is not learned
    layout: Layout = "contiguous"  # which channels share a group of ggem
    negatives: Negatives = "clamp"  # how gem and ggem handle negative tokens

    def __post_init__(self):
        low, high = GGeM.p_range
        require(
            "pool.groups",
            self.groups,
            "a whole number of at least 1",
            self.groups is None or self.groups >= 1,
        )
        require("pool.p", self.p, f"from {low:g} to {high:g}", low <= self.p <= high)
        require("pool.r", self.r, "positive", 0 < self.r < math.inf)


@dataclass(frozen=True)
class Data:
    """Where the images come from and how they are read."""

    # digits, folder:DIR, tfds:NAME or csv:FILE; train.contrastive also takes wds:PATTERN
    source: Annotated[str, arg(aliases=["--data"])] = "digits"
    # folder of the prepared tfds data sets
    data_dir: Annotated[Path, arg(aliases=["--data-dir"])] = Path("~/tensorflow_datasets")
    # let tfds download and prepare a data set that is not in data-dir
    download: Annotated[bool, arg(aliases=["--download"])] = False
    # folder, split, CSV file or shards to evaluate on; None: the first that exists of val,
    # validation and test
    eval_split: str | None = None
    # share of each class that is kept for evaluation where the source has only one split
    holdout: float = 0.2
    # of csv:FILE: text between columns ("tab" for a tab); None: a tab if the first line has one,
    # else a comma
    separator: Annotated[str | None, arg(aliases=["--separator"])] = None
    # of csv:FILE: quotes are those of CSV, or text; auto: those of CSV where the file can be read
    # so, otherwise text if tabs separate its columns
    quoting: Annotated[Literal["auto", "csv", "none"], arg(aliases=["--quoting"])] = "auto"
    # of csv:FILE: column of the paths; None: the first of image, filepath, file_name, image_path
    image_key: Annotated[str | None, arg(aliases=["--image-key"])] = None
    # of csv:FILE a column, of wds:PATTERN a name in the .json, or txt; None: the first of caption,
    # title, text, TEXT, and of wds:PATTERN the .txt before them
    caption_key: Annotated[str | None, arg(aliases=["--caption-key"])] = None
    # of csv:FILE a column, of tfds:NAME a feature; None: the first of label, labels, class, and of
    # tfds:NAME label
    label_key: Annotated[str | None, arg(aliases=["--label-key"])] = None
    # of csv:FILE: text between several labels of an image; None: an image has one label
    label_separator: Annotated[str | None, arg(aliases=["--label-separator"])] = None
    # of train.classify, for classes with few images: weights: the loss of an image is divided by
    # the number of images of its class; sampling: every class is drawn equally often
    balance: Annotated[Literal["none", "weights", "sampling"], arg(aliases=["--balance"])] = "none"
    # what to do about an image that cannot be read: stop, or report it and take the next one
    corrupt: Literal["refuse", "skip"] = "refuse"
    # centre: resize the shorter side to eval-zoom * model.image and cut the centre square; squash:
    # resize both sides to model.image
    eval_crop: Literal["centre", "squash"] = "centre"
    eval_zoom: float = 1.0  # of the centre crop; 1.143 resizes to 256 pixels for a crop of 224
    # mean of the channels in [0, 1]; the default is ImageNet's
    mean: tuple[float, float, float] = IMAGENET_MEAN
    # standard deviation of the channels; the default is ImageNet's
    std: tuple[float, float, float] = IMAGENET_STD
    workers: int = 2  # threads that read and augment images, in each process
    # processes that read training images, where one has too many cores for Python's lock of the
    # interpreter; 0: the process that trains does
    processes: int = 0
    # decode a training JPEG at a half, a quarter or an eighth of its size where that is no less
    # than its crop is resized to; images to evaluate on are always decoded whole
    shrink: bool = True
    # decode training JPEGs with simplejpeg and resize their crops with cykooz-resizer, of the extra
    # `fast`: about 1.6 times as fast, and pixels differ by rounding
    fast: bool = False

    def __post_init__(self):
        require("data.holdout", self.holdout, "between 0 and 1", 0 < self.holdout < 1)
        require("data.eval_zoom", self.eval_zoom, "from 1 to 100", 1 <= self.eval_zoom <= 100)
        single = self.separator is None or len(self.separator) == 1 or self.separator in SEPARATORS
        require("data.separator", self.separator, 'one character, or "tab"', single)
        between = self.label_separator
        require("data.label_separator", between, "some text, or None", between != "")
        require("data.mean", self.mean, "finite", all(map(math.isfinite, self.mean)))
        require("data.std", self.std, "positive", all(0 < x < math.inf for x in self.std))
        require("data.workers", self.workers, "at least 1", self.workers >= 1)
        require("data.processes", self.processes, "at least 0", self.processes >= 0)


@dataclass(frozen=True)
class Augment:
    """Random changes of the training images."""

    # pad: reflect the border and cut at random; resized: cut a random area and shape, and resize it
    crop: Literal["none", "pad", "resized"] = "none"
    pad: int = 4  # pixels of the pad crop
    min_area: float = 0.08  # smallest share of the image that a resized crop takes
    flip: bool = False  # flip left to right with probability 1/2
    randaugment_ops: int = 0  # RandAugment operations on each image
    randaugment_magnitude: float = 9.0  # mean strength, of 10; the standard deviation is 0.5
    erase: float = 0.0  # probability of replacing a random rectangle by noise
    # run RandAugment and erasing on the accelerator, which spares the host their time; the random
    # numbers are others
    on_device: bool = False
    mixup: float = 0.0  # alpha of the beta distribution of mixup; 0 switches it off
    # the same of CutMix; with both on, each batch takes one of the two at random
    cutmix: float = 0.0
    label_smoothing: float = 0.0  # share of each target that is spread over all classes

    def __post_init__(self):
        require("augment.pad", self.pad, "at least 0", self.pad >= 0)
        require("augment.min_area", self.min_area, "above 0 and at most 1", 0 < self.min_area <= 1)
        ops, magnitude = self.randaugment_ops, self.randaugment_magnitude
        require("augment.randaugment_ops", ops, "at least 0", ops >= 0)
        require("augment.randaugment_magnitude", magnitude, "from 0 to 10", 0 <= magnitude <= 10)
        require("augment.erase", self.erase, "a probability", 0 <= self.erase <= 1)
        require("augment.mixup", self.mixup, "at least 0", 0 <= self.mixup < math.inf)
        require("augment.cutmix", self.cutmix, "at least 0", 0 <= self.cutmix < math.inf)
        smoothing = self.label_smoothing
        require("augment.label_smoothing", smoothing, "at least 0 and below 1", 0 <= smoothing < 1)

    def require_no_mixing(self, why: str) -> None:
        """Raises `ValueError` for settings that mix or smooth labels.

        Args:
            why: The reason, which ends the sentence.

        Raises:
            ValueError: `mixup`, `cutmix` or `label_smoothing` is not 0.
        """
        for name in ("mixup", "cutmix", "label_smoothing"):
            require(f"augment.{name}", getattr(self, name), f"0: {why}", getattr(self, name) == 0)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, with a linear warm-up and a cosine decay to zero."""

    # muon: of the matrices in blocks, with the learning rate and decay of adamw, which takes the
    # rest; lion: its authors take a tenth of the learning rate, ten times the decay and beta2 0.99;
    # sgd: with momentum beta1
    name: Literal["adamw", "lion", "muon", "sgd"] = "adamw"
    lr: float = 1e-3  # largest learning rate
    warmup: int = 100  # steps
    # of matrices only: biases, norms, positions, prefix tokens and exponents do not decay
    weight_decay: float = 0.05
    beta1: float = 0.9  # decay of the mean of the gradients
    beta2: float = 0.999  # decay of the mean of their squares
    clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping
    accumulate: int = 1  # parts that a batch is processed in; their gradients are averaged
    # parts of the image tower that do not learn: its embedding and so many blocks after it, or
    # "all" of it but a head (a linear probe)
    freeze: Annotated[int | Literal["all"], arg(aliases=["--freeze"])] = 0
    # learning rate of the exponents p over lr; at 1, Adam hardly moves p in a short run
    exponent_lr: float = 10.0
    layer_decay: float = 1.0  # learning rate of each block over that of the next
    # decay of a moving average of the weights, which evaluations then use; at step t it is at most
    # (1 + t) / (10 + t); None: no average
    ema: float | None = None

    def __post_init__(self):
        require("optimizer.lr", self.lr, "at least 0", 0 <= self.lr < math.inf)
        require("optimizer.warmup", self.warmup, "at least 0", self.warmup >= 0)
        decay = self.weight_decay
        require("optimizer.weight_decay", decay, "at least 0", 0 <= decay < math.inf)
        require("optimizer.beta1", self.beta1, "at least 0 and below 1", 0 <= self.beta1 < 1)
        require("optimizer.beta2", self.beta2, "at least 0 and below 1", 0 <= self.beta2 < 1)
        require("optimizer.clip", self.clip, "positive or None", self.clip is None or self.clip > 0)
        require("optimizer.accumulate", self.accumulate, "at least 1", self.accumulate >= 1)
        frozen = self.freeze == "all" or self.freeze >= 0
        require("optimizer.freeze", self.freeze, 'at least 0, or "all"', frozen)
        exponent_lr, layer_decay = self.exponent_lr, self.layer_decay
        require("optimizer.exponent_lr", exponent_lr, "at least 0", 0 <= exponent_lr < math.inf)
        require("optimizer.layer_decay", layer_decay, "above 0 and at most 1", 0 < layer_decay <= 1)
        require(
            "optimizer.ema",
            self.ema,
            "at least 0 and below 1, or None",
            self.ema is None or 0 <= self.ema < 1,
        )


@dataclass(frozen=True)
class Config:
    """One training run."""

    tool: ClassVar[str] = "train.classify"

    # folder of the run: config.json, metrics.jsonl, checkpoints/ and curves.png
    out: Path = Path("runs/classify")
    seed: int = 0  # of weights, data order and augmentation
    batch: int = 128  # images in a step, over all devices
    epochs: float = 10.0  # passes over the training images
    eval_every: float = 1.0  # epochs between evaluations
    # epochs between checkpoints; one more is written at the end, and when the run is stopped
    checkpoint_every: float = 1.0
    log_every: int = 20  # steps between lines of the log
    # file of a published ViT to start from, as ggem_jax.weights reads it; it sets the sizes of the
    # model
    init: Path | None = None
    # folder of a run whose last checkpoint a new run starts from, with its settings unless others
    # are given; epochs counts those before as well
    resume_from: Path | None = None
    # checkpoints that are kept: "last", the newest two, or best:MEASURE, also the best by a measure
    # of the evaluations, such as best:top1
    keep: str = "last"
    # stop after so many evaluations in a row that are not the best by --keep; None: never
    patience: int | None = None
    # devices that the weights are split over; the remaining factor of the devices repeats them
    fsdp: int = 1
    stop_after: int | None = None  # stop after this step, as if asked to; the schedule stays
    pool: Pool = field(default_factory=Pool)
    model: ViTConfig = field(default_factory=lambda: vit_config("Ti/16"))
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)

    @property
    def kept_measure(self) -> str | None:
        """The measure of `keep`, or None."""
        return self.keep.partition(":")[2] or None

    def __post_init__(self):
        known = self.keep == "last" or bool(re.fullmatch("best:.+", self.keep))
        require("keep", self.keep, "last or best:MEASURE, such as best:top1", known)
        least = self.patience is None or self.patience >= 1
        require("patience", self.patience, "at least 1, or None", least)
        named = self.patience is None or self.kept_measure is not None
        require("patience", self.patience, "with --keep best:MEASURE", named)
        blocks = self.optimizer.freeze
        require(
            "optimizer.freeze",
            blocks,
            f"at most the {self.model.depth} blocks of the model",
            blocks == "all" or blocks <= self.model.depth,
        )
        require(
            "data.balance",
            self.data.balance,
            f"none in {self.tool}",
            self.data.balance == "none" or self.tool == "train.classify",
        )
        require("seed", self.seed, "from 0 to 2147483647", 0 <= self.seed < 2**31)
        for name in ("batch", "log_every", "fsdp"):
            require(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        for name in ("epochs", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            require(name, value, "from 1e-6 to 1e9", 1e-6 <= value <= 1e9)
        require(
            "stop_after",
            self.stop_after,
            "at least 1, or None",
            self.stop_after is None or self.stop_after >= 1,
        )
        require(
            "model.dtype",
            self.model.dtype,
            "float32 or bfloat16: losses are not scaled for float16",
            self.model.dtype != "float16",
        )
        require(
            "model.param_dtype",
            self.model.param_dtype,
            "float32: so small are the steps of an optimizer",
            self.model.param_dtype == "float32",
        )
