"""The settings of a descriptor, by name. Loads neither JAX nor NumPy for the default network."""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from ggem_jax.descriptors.own_heads import OWN_HEADS

if TYPE_CHECKING:
    from ggem_jax.weights.architecture import Given

DEFAULT_BACKBONE = "efficientnet-lite0"
MOST_THIN = 16  # largest aspect ratio of an image that has a descriptor
LEAST_SIDE = 160  # pixels: five strides, a little over what three scales and Regional GeM need


@dataclass(frozen=True)
class DescriptorSettings:
    """How an image becomes a descriptor. Wrong values raise `ValueError` when the record is made.

    `sizes="buckets"` resizes an image so that its longer side is `longest_side` and its shorter
    side a multiple of the network's stride: a folder of a thousand sizes compiles a few programs.
    Proportions change by half a stride at most, and more where the shorter side would be less than
    the method needs (160 of 320 pixels at three scales: images wider than 2:1 are squeezed to 2:1).
    `"exact"` keeps an image's own pixels, shrunk to `longest_side` where it is larger (0: never),
    enlarged where it is too small for the method, and compiles programs for each size.
    SuperGlobal's own setting is `"exact"` with 0.

    Example:
        >>> from ggem_jax.descriptors.settings import DescriptorSettings
        >>> DescriptorSettings(pooling="gem", scales=1).resolve().backbone
        'efficientnet-lite0'
    """

    # a row of `ggem_jax.descriptors.backbones`, or the sizes of a ViT such as vit-S/16; None: found
    # from the weights, and without them efficientnet-lite0
    backbone: str | None = None
    # file of the network's parameters, or the folder of a model.safetensors or pytorch_model.bin,
    # which becomes the file in it, or the folder of a training run, whose newest checkpoint is
    # read; None: those installed with efficientnet-lite0
    weights: str | None = None
    # gem: the network's own exponent, or 3; clip: pooling and projection of CLIP or SigLIP into the
    # space that images share with texts, at the image size of the network, as a square, at one
    # scale and without Regional GeM; own: pooling and projection that a training run has learned,
    # of images that are cut as in its evaluations, also at one scale and without Regional GeM;
    # None: own for the folder of a run, else gem+
    pooling: Literal["gem+", "gem", "average", "max", "clip", "own"] | None = None
    regional: bool = True  # Regional GeM before the pooling
    relup: bool = True  # ReLU-P inside a ResNet
    scales: Literal[1, 3, 5] = 3  # 1; 0.7, 1 and 1.4; or 0.5, 0.7, 1, 1.4 and 2 times the image
    scale_gem: bool = True  # the largest over the scales of each channel; off: the mean
    antialias: bool = False  # when a scale shrinks the image: off as when the paper was written
    sizes: Literal["buckets", "exact"] = "buckets"  # a few sizes for all images, or each its own
    longest_side: int = 320  # pixels after resizing; 0 with exact sizes: never shrunk
    # of large JPEG files: draft decodes them at 1/2, 1/4 or 1/8 of their size if this is at least
    # twice what the image is resized to, full never (how they differ: docs/retrieval.md); None:
    # draft for a new index, and as it was for an existing one
    decoding: Literal["draft", "full"] | None = None
    whitening: str | None = None  # file of `ggem_jax.descriptors.whitening`, applied at the end
    # of red, green and blue in [0, 1], subtracted from them; None: those of the backbone
    mean: tuple[float, float, float] | None = None
    # standard deviation of the same, by which the difference is divided; None: that of the backbone
    std: tuple[float, float, float] | None = None
    # of a published ViT whose file does not say them (see `ggem_jax.weights.vit.read_vit`); None:
    # by a file of settings beside the weights, or a table of published sizes
    heads: int | None = None  # attention heads
    gelu: Literal["exact", "tanh", "quick"] | None = None  # of the MLPs
    norm: Literal["pre", "post"] | None = None  # before or after the branches of a block
    norm_eps: float | None = None  # epsilon of the norms
    architecture: str | None = None  # the name of the model in timm
    which: str | None = None  # the network of a file with several, such as "ema"
    # of any ViT: further fields of its config, `ViTConfig`, that a file of settings beside the
    # weights states, such as '{"rope_base": 50.0}' (a dictionary is taken too); None: read there
    network: str | None = None

    def __post_init__(self):
        if self.weights is not None and Path(self.weights).is_dir():
            object.__setattr__(self, "weights", _file_in(self.weights))
        if isinstance(self.network, dict):
            object.__setattr__(self, "network", json.dumps(self.network, sort_keys=True))
        self.network_fields()
        if self.pooling is None:
            object.__setattr__(self, "pooling", "own" if self.is_run else "gem+")
        if self.pooling in OWN_HEADS:
            object.__setattr__(self, "regional", False)
            object.__setattr__(self, "scales", 1)
            if self.weights is None:
                raise ValueError(
                    f"the pooling {self.pooling} needs a file of weights, of"
                    f" {OWN_HEADS[self.pooling]}"
                )
        self._check_backbone()
        self._check_choices()
        self._check_name()
        self._check_side()
        self._check_normalisation()

    def resolve(self) -> "DescriptorSettings":
        """Returns the settings with the name of the network, which is found in the file of weights.

        Mean and deviation (unless the network is named), heads, GELU, norms and other fields of the
        network are set too where a file beside the weights states them.

        Raises:
            UnreadableWeights: The file of weights cannot be read.
            AmbiguousWeights: The weights fit networks that compute different things.
            MismatchedWeights: The file holds no known network.
        """
        if self.weights is None or self.backbone == DEFAULT_BACKBONE:
            return dataclasses.replace(self, backbone=self.backbone or DEFAULT_BACKBONE)
        from ggem_jax.descriptors.backbones import FAMILIES, OWN, identify

        if not self.leaves_row_to_weights:
            if self.network is not None or self.backbone not in (*FAMILIES, OWN):
                return self
            found = identify(self.weights, self.given())
            if (found.backbone == OWN) != (self.backbone == OWN):
                return self  # of another network, which is said when it is loaded
            network: Any = found.network
            return dataclasses.replace(self, network=network, **found.declared._asdict())
        found = identify(self.weights, self.given(), network=self.network_fields())
        backbone = self.backbone or found.backbone
        mean, std = (self.mean, self.std) if self.mean else (found.normalisation or (None, None))
        network = found.network
        return dataclasses.replace(
            self,
            backbone=backbone,
            mean=mean,
            std=std,
            network=network,
            **found.declared._asdict(),
        )

    def network_fields(self) -> dict[str, Any] | None:
        """Returns the fields of `network` by name, or None.

        Raises:
            ValueError: `network` is no JSON object.
        """
        if self.network is None:
            return None
        try:
            fields = json.loads(self.network)
            if isinstance(fields, dict):
                return fields
        except (TypeError, ValueError, RecursionError):
            pass
        raise ValueError(f"network must be fields of a config by name, not {self.network!r}")

    def given(self) -> "Given":
        """Returns what the settings say of a published ViT."""
        from ggem_jax.weights.architecture import Given

        return Given(self.heads, self.gelu, self.norm_eps, self.norm, self.architecture, self.which)

    @property
    def is_run(self) -> bool:
        """Whether the weights are the folder of a training run, in which there is no file."""
        return self.weights is not None and Path(self.weights).is_dir()

    @property
    def leaves_row_to_weights(self) -> bool:
        """Whether the backbone is unnamed, or named by its sizes alone, such as vit-S/16."""
        return self.backbone is None or "/" in self.backbone

    def record(self) -> dict[str, Any]:
        """Returns the settings as JSON values, which are equal where descriptors are.

        A digest of its contents takes the place of each file. Mean and deviation are left out where
        they are the backbone's; heads, GELU and norms where the weights or a table of published
        sizes state them, as other fields of the network; the decoding unless it is draft, as
        records of earlier versions mean full.

        Raises:
            ValueError: A file cannot be read, or holds no known network.
        """
        settings = self.resolve()
        record = dataclasses.asdict(settings) | {"network": settings.network_fields()}
        for name in ("weights", "whitening"):
            record[name] = None if record[name] is None else digest(record[name])
        for name in ("mean", "std"):
            value = record.pop(name)
            if value is not None:
                record[name] = list(value)
        for name in ("heads", "gelu", "norm", "norm_eps", "architecture", "which"):
            if record[name] is None:
                del record[name]
        if not record["network"]:
            del record["network"]
        if record["decoding"] != "draft":
            del record["decoding"]
        return record

    def _check_backbone(self):
        if self.backbone in (None, DEFAULT_BACKBONE):
            return
        from ggem_jax.descriptors.backbones import check_backbone

        check_backbone(self.backbone)
        if self.weights is None:
            raise ValueError(
                f"{self.backbone} needs a file of weights; only {DEFAULT_BACKBONE} has weights that"
                " can be installed"
            )

    def _check_choices(self):
        for name, hint in get_type_hints(type(self)).items():
            literal = name in ("scales", "sizes")
            optional = ("pooling", "gelu", "norm", "decoding")
            if name in optional and getattr(self, name) is not None:
                literal, (hint, _) = True, get_args(hint)
            choices = get_args(hint) if literal else (False, True) if hint is bool else ()
            value = getattr(self, name)
            if choices and (value not in choices or isinstance(value, bool) != (hint is bool)):
                known = ", ".join(map(str, choices))
                raise ValueError(f"{name} must be one of {known}, not {value!r}")

    def _check_name(self):
        if self.architecture is None:
            return
        from ggem_jax.weights.declared import is_name

        if not is_name(str(self.architecture)):
            raise ValueError(
                "architecture must be the name of a ViT in timm, such as deit3_small_patch16_224,"
                f" not {str(self.architecture)!r}: put a config.json beside the weights instead"
            )

    def _check_side(self):
        side, exact = self.longest_side, self.sizes == "exact"
        whole = isinstance(side, int) and not isinstance(side, bool)
        if not whole or not (side >= LEAST_SIDE or (exact and side == 0)):
            raise ValueError(
                f"longest_side must be a whole number of at least {LEAST_SIDE}"
                f" pixels{', or 0' if exact else ''}, not {side!r}"
            )

    def _check_normalisation(self):
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both, or neither")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is None:
                continue
            if len(value) != 3 or not all(map(math.isfinite, value)):
                raise ValueError(f"{name} must be three numbers, not {value!r}")
            if name == "std" and min(value) <= 0:
                raise ValueError(f"std must be positive, not {value!r}")
            object.__setattr__(self, name, tuple(value))  # of a record in JSON, a list


def digest(path: str | Path) -> str:
    """Returns the first 16 hexadecimal digits of a file's SHA-256.

    Args:
        path: The file, or the folder of a file of weights; or the folder of a training run, which
            counts as the file that `weights_as_file` makes of it.

    Raises:
        ValueError: The file cannot be read.
    """
    if Path(path).is_dir():
        with weights_as_file(DescriptorSettings(weights=str(path))) as settings:
            return digest(str(settings.weights))
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def weights_as_file(settings: DescriptorSettings) -> Iterator[DescriptorSettings]:
    """Yields settings whose weights are a file: that of a training run is removed at the end.

    Args:
        settings: The settings, which are yielded as they are where the weights are no run.

    Yields:
        The settings.

    Raises:
        UnreadableWeights: The run cannot be read.
        MismatchedWeights: Its checkpoint does not fit its settings.
        ModuleNotFoundError: orbax is not installed.
    """
    if not settings.is_run:
        yield settings
        return
    from ggem_jax.weights.export import run_as_file

    with run_as_file(str(settings.weights)) as file:
        yield dataclasses.replace(settings, weights=str(file))


def _file_in(folder: str | Path) -> str:
    """The file of weights in a folder; the folder itself if it is that of a training run."""
    from ggem_jax.files.errors import UnreadableWeights
    from ggem_jax.weights.folders import CHECKPOINTS, find_checkpoint, is_run

    file = find_checkpoint(folder)
    if file.is_dir() and not is_run(folder):
        raise UnreadableWeights(
            f"{folder} holds none of {', '.join(CHECKPOINTS)}, and is not the folder of a training"
            " run"
        )
    return str(file)
