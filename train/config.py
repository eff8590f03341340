"""What a training run is made of: frozen records with defaults, a file over them, flags over both."""

import contextlib
import dataclasses
import io
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import tyro
from tyro.conf import arg

from ggem_jax import pooling
from ggem_jax.models.vit import MAP, GGeM, Pooling, ViT, ViTConfig, vit_config

CONFIGS = Path(__file__).parent / "configs"

T = TypeVar("T")


class Refused(Exception):
    """A mistake of the user or a failure of the machine, in one sentence; a tool prints it and exits with a non-zero code."""


@dataclass(frozen=True)
class Pool:
    """The pooling of the tokens, by name."""

    kind: Literal["cls", "avg", "max", "lse", "gem", "ggem", "map"] = "ggem"
    groups: int | None = None  # of ggem; None: as many as attention heads
    p: float = 3.0  # first value of the learned exponents of gem and ggem
    r: float = 10.0  # sharpness of lse, fixed
    layout: pooling.Layout = "contiguous"  # of the groups of ggem
    negatives: pooling.Negatives = "clamp"  # what gem and ggem do with negative tokens


@dataclass(frozen=True)
class Data:
    """Where the pictures come from and how they are read."""

    source: Annotated[str, arg(aliases=["--data"])] = "digits"  # digits, folder:DIR or tfds:NAME
    data_dir: Annotated[Path, arg(aliases=["--data_dir"])] = Path("~/tensorflow_datasets")  # where tfds data sets are prepared
    download: Annotated[bool, arg(aliases=["--download"])] = False  # let tfds download and prepare a data set that is not in data_dir
    holdout: float = 0.2  # share of each class kept for evaluation where the source has only one split
    corrupt: Literal["refuse", "skip"] = "refuse"  # a picture that cannot be read: stop there, or name it and take the next one
    eval_crop: Literal["centre", "squash"] = "centre"  # shorter side to eval_zoom * image, then the centre; or both sides to image
    eval_zoom: float = 1.0  # 1.143 is 256 pixels for a crop of 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of ImageNet, in [0, 1], as with most published ViTs
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    workers: int = 2  # threads that read and augment


@dataclass(frozen=True)
class Augment:
    """What is done to the training pictures only."""

    crop: Literal["none", "pad", "resized"] = "none"  # pad: reflect the border, cut at random; resized: random area and shape, resized
    pad: int = 4  # pixels, of the pad crop
    min_area: float = 0.08  # smallest share of the picture that a resized crop takes
    flip: bool = False  # left to right, every other picture
    randaugment_ops: int = 0  # RandAugment operations on each picture
    randaugment_magnitude: float = 9.0  # of 10, with a standard deviation of 0.5
    erase: float = 0.0  # probability to replace a random rectangle by noise
    mixup: float = 0.0  # alpha of its beta distribution; 0: off
    cutmix: float = 0.0  # likewise; with both on, a coin decides for each batch
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine to zero."""

    lr: float = 1e-3
    warmup: int = 100  # steps
    weight_decay: float = 0.05  # of matrices only: none for biases, norms, positions, prefix tokens and exponents
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float | None = 1.0  # largest global norm of the gradient
    accumulate: int = 1  # parts that a batch is taken in; their gradients are averaged
    exponent_lr: float = 10.0  # learning rate of the exponents p over lr: at 1, Adam hardly moves p in a short run
    layer_decay: float = 1.0  # learning rate of each block over that of the next
    ema: float | None = None  # decay of a moving average of the weights, which is then what is evaluated


@dataclass(frozen=True)
class Config:
    """One training run."""

    out: Path = Path("runs/classify")  # its folder: config.json, metrics.jsonl, checkpoints/, curves.png
    seed: int = 0
    batch: int = 128  # pictures in a step, over all devices
    epochs: float = 10.0
    eval_every: float = 1.0  # epochs
    checkpoint_every: float = 1.0  # epochs; one more is written at the end, and when the run is told to stop
    log_every: int = 20  # steps
    fsdp: int = 1  # devices that the weights are split over; the remaining factor of the devices repeats them
    stop_after: int | None = None  # stop after this step as if told to; the schedule does not change
    pool: Pool = field(default_factory=Pool)
    model: ViTConfig = field(default_factory=lambda: vit_config("Ti/16"))
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)


def build_pooling(pool: Pool) -> Pooling:
    """The pooling function or module that a config names."""
    known: dict[str, Callable[[], Pooling]] = {
        "cls": lambda: pooling.cls_pool,
        "avg": lambda: pooling.avg_pool,
        "max": lambda: pooling.max_pool,
        "lse": lambda: lambda tokens: pooling.lse_pool(tokens, pool.r),
        "gem": lambda: GGeM(groups=1, p_init=pool.p, negatives=pool.negatives),
        "ggem": lambda: GGeM(groups=pool.groups, p_init=pool.p, layout=pool.layout, negatives=pool.negatives),
        "map": lambda: MAP(),
    }
    return known[pool.kind]()


def build_model(config: Config, num_classes: int) -> ViT:
    return ViT(config.model, build_pooling(config.pool), num_classes)


def known_configs() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def load_config(argv: list[str], prog: str) -> Config:
    """The defaults; over them `--config NAME`, `--config-file FILE`, `--variant NAME` (sizes of the model, such as S/16) and the other flags."""
    argv = list(argv)
    name, file, variant = (_take(argv, flag) for flag in ("--config", "--config-file", "--variant"))
    config = Config()
    if name is not None:
        if name not in known_configs():
            raise Refused(f"--config must be one of {', '.join(known_configs())}, not {name}")
        config = _over(config, CONFIGS / f"{name}.toml", prog)
    if file is not None:
        config = _over(config, Path(file), prog)
    if variant is not None:
        config = _with_variant(config, variant)
    return parse(Config, argv, prog, default=config, description=_before_flags())


def parse(record: type[T], argv: list[str], prog: str, *, default: T | None = None, description: str | None = None) -> T:
    """Flags over a record; a wrong flag is `Refused` with what the parser says about it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return cast(T, tyro.cli(record, default=default, args=argv, prog=f"python -m {prog}", description=description, use_underscores=True))
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise Refused(f"{_one_sentence(said.getvalue())} (python -m {prog} --help lists the flags)") from None
    except ValueError as error:
        raise Refused(str(error)) from None


def to_dict(record: Any) -> dict[str, Any]:
    """A config as JSON can hold it; `from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(record), default=str))


def from_dict(values: dict[str, Any]) -> Config:
    return parse(Config, _flags(values), "train.classify", default=Config())


def _before_flags() -> str:
    return (
        "Defaults < --config NAME < --config-file FILE (TOML or JSON) < --variant NAME < the flags below. "
        f"NAME of --config: {', '.join(known_configs())}; each file in {CONFIGS.parent.name}/{CONFIGS.name} says what it is and what to expect. "
        "NAME of --variant: Ti, S, B, L or H, a slash, and the patch size; it sets the sizes of the model."
    )


def _over(config: Config, path: Path, prog: str) -> Config:
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise Refused(f"the config file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Refused(f"the config file {path} is not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    values.pop("classes", None)  # of the config.json of a run
    variant = values.pop("variant", None)
    if variant is not None:
        config = _with_variant(config, variant)
    try:
        return parse(Config, _flags(values), prog, default=config)
    except Refused as error:
        raise Refused(f"in the config file {path}: {error}") from None


def _with_variant(config: Config, variant: str) -> Config:
    try:
        sizes = vit_config(variant)
    except ValueError as error:
        raise Refused(str(error)) from None
    names = ("patch", "width", "depth", "heads", "mlp_width")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **{name: getattr(sizes, name) for name in names}))


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
    """What stands in the parser's box: its first paragraph, then the flags that the later ones suggest."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # after the title
        text = line.strip(" │|")
        if text and not text.strip("─-╭╮╰╯+"):
            paragraphs.append([])
        elif text:
            paragraphs[-1].append(text)
    filled = [lines for lines in paragraphs if lines]
    suggestions = [line.split()[0].rstrip(",") for lines in filled[1:] for line in lines if line.startswith("--")]
    sentence = " ".join(filled[0]) if filled else "the flags are wrong"
    return f"{sentence}; perhaps {' or '.join(suggestions)}" if suggestions else sentence
