"""What a training run is made of: frozen records with defaults, a file over them, flags over
both.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import tyro
from tyro.conf import arg

from ggem_jax import pooling
from ggem_jax.descriptors.backbones import read_any_vit
from ggem_jax.kernels import launch
from ggem_jax.models.vit import MAP, GGeM, Pooling, ViT, ViTConfig, vit_config
from ggem_jax.weights.vit import PublishedViT

CONFIGS = Path(__file__).parent / "configs"

T = TypeVar("T")
C = TypeVar("C", bound="Config")


class Refused(Exception):
    """A mistake of the user or a failure of the machine, in one sentence; a tool prints it and
    exits with a non-zero code.
    """


@dataclass(frozen=True)
class Pool:
    """The pooling of the tokens, by name."""

    kind: Literal["cls", "avg", "relu-avg", "max", "lse", "gem", "ggem", "map"] = (
        "ggem"  # relu-avg: gem with p fixed at 1
    )
    groups: int | None = None  # of ggem; None: as many as attention heads
    p: float = 3.0  # first value of the learned exponents of gem and ggem
    r: float = 10.0  # sharpness of lse, fixed
    layout: pooling.Layout = "contiguous"  # of the groups of ggem
    negatives: pooling.Negatives = "clamp"  # what gem and ggem do with negative tokens

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
    """Where the pictures come from and how they are read."""

    source: Annotated[str, arg(aliases=["--data"])] = (
        # digits, folder:DIR or tfds:NAME; of train.contrastive also csv:FILE or wds:PATTERN
        "digits"
    )
    data_dir: Annotated[Path, arg(aliases=["--data_dir"])] = Path(
        "~/tensorflow_datasets"
    )  # where tfds data sets are prepared
    download: Annotated[bool, arg(aliases=["--download"])] = (
        False  # let tfds download and prepare a data set that is not in data_dir
    )
    eval_split: str | None = (
        # folder, split, CSV file or shards to evaluate on; None: the first there is of val,
        # validation, test
        None
    )
    holdout: float = (
        0.2  # share of each class kept for evaluation where the source has only one split
    )
    corrupt: Literal["refuse", "skip"] = (
        "refuse"  # a picture that cannot be read: stop there, or name it and take the next one
    )
    eval_crop: Literal["centre", "squash"] = (
        "centre"  # shorter side to eval_zoom * image, then the centre; or both sides to image
    )
    eval_zoom: float = 1.0  # 1.143 is 256 pixels for a crop of 224
    mean: tuple[float, float, float] = (
        0.485,
        0.456,
        0.406,
    )  # of ImageNet's channels, in [0, 1], as in torchvision and timm; and their deviation
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    workers: int = 2  # threads that read and augment

    def __post_init__(self):
        require("data.holdout", self.holdout, "between 0 and 1", 0 < self.holdout < 1)
        require("data.eval_zoom", self.eval_zoom, "from 1 to 100", 1 <= self.eval_zoom <= 100)
        require("data.mean", self.mean, "finite", all(map(math.isfinite, self.mean)))
        require("data.std", self.std, "positive", all(0 < x < math.inf for x in self.std))
        require("data.workers", self.workers, "at least 1", self.workers >= 1)


@dataclass(frozen=True)
class Augment:
    """What is done to the training pictures only."""

    crop: Literal["none", "pad", "resized"] = (
        "none"  # pad: reflect the border, cut at random; resized: random area and shape, resized
    )
    pad: int = 4  # pixels, of the pad crop
    min_area: float = 0.08  # smallest share of the picture that a resized crop takes
    flip: bool = False  # left to right, every other picture
    randaugment_ops: int = 0  # RandAugment operations on each picture
    randaugment_magnitude: float = 9.0  # of 10, with a standard deviation of 0.5
    erase: float = 0.0  # probability to replace a random rectangle by noise
    mixup: float = 0.0  # alpha of its beta distribution; 0: off
    cutmix: float = 0.0  # likewise; with both on, a coin decides for each batch
    label_smoothing: float = 0.0

    def __post_init__(self):
        require("augment.pad", self.pad, "at least 0", self.pad >= 0)
        require("augment.min_area", self.min_area, "above 0 and at most 1", 0 < self.min_area <= 1)
        require(
            "augment.randaugment_ops", self.randaugment_ops, "at least 0", self.randaugment_ops >= 0
        )
        require(
            "augment.randaugment_magnitude",
            self.randaugment_magnitude,
            "from 0 to 10",
            0 <= self.randaugment_magnitude <= 10,
        )
        require("augment.erase", self.erase, "a probability", 0 <= self.erase <= 1)
        require("augment.mixup", self.mixup, "at least 0", 0 <= self.mixup < math.inf)
        require("augment.cutmix", self.cutmix, "at least 0", 0 <= self.cutmix < math.inf)
        require(
            "augment.label_smoothing",
            self.label_smoothing,
            "at least 0 and below 1",
            0 <= self.label_smoothing < 1,
        )

    def require_no_mixing(self, why: str) -> None:
        """Raises `ValueError` for what mixes labels."""
        for name in ("mixup", "cutmix", "label_smoothing"):
            require(f"augment.{name}", getattr(self, name), f"0: {why}", getattr(self, name) == 0)


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine to zero."""

    lr: float = 1e-3
    warmup: int = 100  # steps
    weight_decay: float = (
        0.05  # of matrices only: none for biases, norms, positions, prefix tokens and exponents
    )
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float | None = 1.0  # largest global norm of the gradient
    accumulate: int = 1  # parts that a batch is taken in; their gradients are averaged
    exponent_lr: float = (
        10.0  # learning rate of the exponents p over lr: at 1, Adam hardly moves p in a short run
    )
    layer_decay: float = 1.0  # learning rate of each block over that of the next
    ema: float | None = (
        # decay of a moving average of the weights, which is then what is evaluated; at step t at
        # most (1 + t) / (10 + t)
        None
    )

    def __post_init__(self):
        require("optimizer.lr", self.lr, "at least 0", 0 <= self.lr < math.inf)
        require("optimizer.warmup", self.warmup, "at least 0", self.warmup >= 0)
        require(
            "optimizer.weight_decay",
            self.weight_decay,
            "at least 0",
            0 <= self.weight_decay < math.inf,
        )
        require("optimizer.beta1", self.beta1, "at least 0 and below 1", 0 <= self.beta1 < 1)
        require("optimizer.beta2", self.beta2, "at least 0 and below 1", 0 <= self.beta2 < 1)
        require("optimizer.clip", self.clip, "positive or None", self.clip is None or self.clip > 0)
        require("optimizer.accumulate", self.accumulate, "at least 1", self.accumulate >= 1)
        require(
            "optimizer.exponent_lr",
            self.exponent_lr,
            "at least 0",
            0 <= self.exponent_lr < math.inf,
        )
        require(
            "optimizer.layer_decay",
            self.layer_decay,
            "above 0 and at most 1",
            0 < self.layer_decay <= 1,
        )
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

    out: Path = Path(
        "runs/classify"
    )  # its folder: config.json, metrics.jsonl, checkpoints/, curves.png
    seed: int = 0
    batch: int = 128  # pictures in a step, over all devices
    epochs: float = 10.0
    eval_every: float = 1.0  # epochs
    checkpoint_every: float = (
        1.0  # epochs; one more is written at the end, and when the run is told to stop
    )
    log_every: int = 20  # steps
    init: Path | None = (
        # file of a published ViT to start from, as ggem_jax.weights reads it; its sizes are then
        # those of the model
        None
    )
    # devices that the weights are split over; the remaining factor of the devices repeats them
    fsdp: int = 1
    stop_after: int | None = (
        None  # stop after this step as if told to; the schedule does not change
    )
    pool: Pool = field(default_factory=Pool)
    model: ViTConfig = field(default_factory=lambda: vit_config("Ti/16"))
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self):
        require("seed", self.seed, "from 0 to 2147483647", 0 <= self.seed < 2**31)
        for name in ("batch", "log_every", "fsdp"):
            require(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        for name in ("epochs", "eval_every", "checkpoint_every"):
            require(
                name, getattr(self, name), "from 1e-6 to 1e9", 1e-6 <= getattr(self, name) <= 1e9
            )
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


def require(name: str, value: Any, what: str, fulfilled: bool) -> None:
    """Raises `ValueError` that names a flag, what it must be and what it is."""
    if not fulfilled:
        raise ValueError(f"--{name} must be {what}, it is {value}")


@functools.cache
def build_pooling(pool: Pool) -> Pooling:
    """The pooling function or module that a config names; the same object for the same config, as
    compiled steps are found by it.
    """
    known: dict[str, Callable[[], Pooling]] = {
        "cls": lambda: pooling.cls_pool,
        "avg": lambda: pooling.avg_pool,
        "relu-avg": lambda: lambda tokens: pooling.gem_pool(tokens, 1.0, negatives=pool.negatives),
        "max": lambda: pooling.max_pool,
        "lse": lambda: lambda tokens: pooling.lse_pool(tokens, pool.r),
        "gem": lambda: GGeM(groups=1, p_init=pool.p, negatives=pool.negatives),
        "ggem": lambda: GGeM(
            groups=pool.groups, p_init=pool.p, layout=pool.layout, negatives=pool.negatives
        ),
        "map": lambda: MAP(),
    }
    return known[pool.kind]()


def build_model(config: Config, num_classes: int) -> ViT:
    """The model that a config describes."""
    pool = build_pooling(config.pool)
    fused_norm = (
        isinstance(pool, GGeM)
        and pool.negatives != "shift"
        and config.model.pool_order == "norm-pool"
        and launch.runs_here()
    )
    return ViT(config.model, pool, num_classes, fused_norm=fused_norm)


@functools.lru_cache(maxsize=1)  # for the settings, then for the weights
def published_vit(path: Path) -> PublishedViT:
    """A published network to start from; what is wrong with its file is `Refused`."""
    try:
        return read_any_vit(path.expanduser())
    except (
        ValueError,
        OSError,
        ModuleNotFoundError,
    ) as error:  # of weights that cannot be read or do not fit, too
        raise Refused(f"--init: {error}") from None


def configs_of(record: type[Config]) -> Path:
    """The folder of a tool's configs."""
    return CONFIGS / record.tool.rpartition(".")[2]


def known_configs(record: type[Config] = Config) -> list[str]:
    """What `--config` takes: the names of the files in the tool's folder of train/configs."""
    return sorted(path.stem for path in configs_of(record).glob("*.toml"))


def load_config(argv: list[str], prog: str, record: type[C] = Config) -> C:  # type: ignore[assignment]
    """The defaults; over them `--config NAME`, `--config-file FILE`, `--init FILE` (a published
    network), `--variant NAME` (such as S/16) and flags.

    Without a config, a file and a source of data the config is `digits`.
    """
    argv = list(argv)
    settings: dict[str, Any] = {}
    name, file, start, variant = (
        _take(argv, flag) for flag in ("--config", "--config-file", "--init", "--variant")
    )
    if (
        name is None
        and file is None
        and not any(re.match(r"--data(\.source)?(=|$)", flag) for flag in argv)
    ):
        name = "digits"
    if name is not None:
        if name not in known_configs(record):
            raise Refused(f"--config must be one of {', '.join(known_configs(record))}, not {name}")
        settings = _over(settings, _read(configs_of(record) / f"{name}.toml"))
    if file is not None:
        settings = _over(settings, _read(Path(file)))
    if start is not None:
        settings = _over(settings, _settings_of_published(Path(start)))
    if variant is not None:
        settings = _over(settings, {"variant": variant})
    try:  # all layers together: what one sets may only fit what a later one does
        return parse(
            record,
            [*_flags(settings), *argv],
            prog,
            default=record(),
            description=_before_flags(record),
        )
    except Refused:
        if file is not None:
            try:
                parse(record, _flags(settings), prog, default=record())
            except Refused as error:
                raise Refused(f"in the config file {file}: {error}") from None
        raise


def parse(
    record: type[T],
    argv: list[str],
    prog: str,
    *,
    default: T | None = None,
    description: str | None = None,
) -> T:
    """Flags over a record; a wrong flag is `Refused` with what the parser says about it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return cast(
                T,
                tyro.cli(
                    record,
                    default=default,
                    args=argv,
                    prog=f"python -m {prog}",
                    description=description,
                    use_underscores=True,
                ),
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise Refused(
            f"{_one_sentence(said.getvalue())} (python -m {prog} --help lists the flags)"
        ) from None
    except ValueError as error:
        raise Refused(str(error)) from None


def to_dict(record: Any) -> dict[str, Any]:
    """A config as JSON can hold it; `from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(record), default=str))


def from_dict(values: dict[str, Any], record: type[C] = Config) -> C:  # type: ignore[assignment]
    """A config from what `to_dict` made of it."""
    return parse(record, _flags(values), record.tool, default=record())


def _settings_of_published(path: Path) -> dict[str, Any]:
    """The sizes of the network, and mean and deviation of the pictures where they are known."""
    published = published_vit(path)
    settings: dict[str, Any] = {"init": str(path), "model": dataclasses.asdict(published.config)}
    if published.normalised is not None:
        settings["data"] = dict(zip(("mean", "std"), map(list, published.normalised), strict=True))
    return settings


def _before_flags(record: type[Config]) -> str:
    folder = configs_of(record).relative_to(CONFIGS.parent.parent).as_posix()
    return (
        "Defaults < --config NAME < --config-file FILE (TOML or JSON) < --init FILE < --variant"
        " NAME < the flags below. Without a config, a file and --data the config is digits. NAME"
        f" of --config: {', '.join(known_configs(record))}; each file in {folder} says what it is"
        " and what to expect. NAME of --variant: Ti, S, B, L or H, a slash, and the patch size; it"
        " sets the sizes of the model."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"settings by name are needed, not a {type(values).__name__}")
    except OSError as error:
        raise Refused(f"the config file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"the config file {path} is not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}"
        ) from None
    for name in ("data_found", "tool"):  # of the config.json of a run
        values.pop(name, None)
    return values


def _over(settings: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of a layer over them; its `variant` stands for the sizes of a model."""
    layer = dict(layer)
    if "variant" in layer:
        try:
            sizes = vit_config(layer.pop("variant"))
        except ValueError as error:
            raise Refused(str(error)) from None
        settings = _merge(
            settings,
            {
                "model": {
                    name: getattr(sizes, name)
                    for name in ("patch", "width", "depth", "heads", "mlp_width")
                }
            },
        )
    return _merge(settings, layer)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merge(below[name], value)
        for name, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(name), dict)
    }
    return below | above | both


def _flags(values: dict[str, Any], prefix: str = "") -> list[str]:
    flags = []
    for name, value in values.items():
        if isinstance(value, dict):
            flags += _flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            flags.append(f"--{prefix}{'' if value else 'no_'}{name}")
        else:
            flags += [f"--{prefix}{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _take(argv: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` and `flag=VALUE` from argv; gives the last value."""
    value = None
    for i in reversed(range(len(argv))):
        if argv[i] == flag and i + 1 == len(argv):
            raise Refused(f"{flag} needs a value")
        if argv[i] == flag or argv[i].startswith(f"{flag}="):
            found = argv[i + 1] if argv[i] == flag else argv[i].partition("=")[2]
            del argv[i : i + (2 if argv[i] == flag else 1)]
            value = found if value is None else value
    return value


def _one_sentence(box: str) -> str:
    """What stands in the parser's box: its first paragraph, then the flags that the later ones
    suggest.
    """
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # after the title
        text = line.strip(" │|")
        if text and not text.strip("─-╭╮╰╯+"):
            paragraphs.append([])
        elif text:
            paragraphs[-1].append(text)
    filled = [lines for lines in paragraphs if lines]
    suggestions = [
        line.split()[0].rstrip(",")
        for lines in filled[1:]
        for line in lines
        if line.startswith("--")
    ]
    sentence = " ".join(filled[0]) if filled else "the flags are wrong"
    return f"{sentence}; perhaps {' or '.join(suggestions)}" if suggestions else sentence
