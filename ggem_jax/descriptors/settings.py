"""What a descriptor is made of, by name. Loads no JAX."""

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

BACKBONES = ("efficientnet-lite0", "resnet50", "resnet101")
_VIT = re.compile(r"vit-(Ti|S|B|L|H)/[1-9][0-9]?")

MOST_THIN = 16  # the longer side of a picture over the shorter: what is thinner has no descriptor


@dataclass(frozen=True)
class DescriptorSettings:
    """How a picture becomes a descriptor. Wrong values raise `ValueError` when the record is made.

    `sizes="buckets"` resizes every picture so that its longer side is `longest_side` and its
    shorter side a multiple of the network's stride: a folder of a thousand sizes compiles a few
    programs. Proportions change by half a stride at most, and more where the shorter side would be
    less than the method needs (160 of 320 pixels at three scales: what is over twice as long as
    wide is squeezed). `"exact"` keeps a picture's own pixels, shrunk to `longest_side` where it is
    larger (0: never), enlarged where it is too small for the method, and compiles programs for each
    size. SuperGlobal's own setting is `"exact"` with 0.
    """

    # or resnet50, resnet101 (CVNet's), vit-S/16 and the like (the embedded one has weights of its
    # own)
    backbone: str = "efficientnet-lite0"
    weights: str | None = (
        # file of the network's parameters; None: those that are installed with efficientnet-lite0
        None
    )
    pooling: Literal["gem+", "gem", "average", "max"] = (
        "gem+"  # gem: the network's own exponent, or 3
    )
    regional: bool = True  # Regional GeM before the pooling
    relup: bool = True  # ReLU-P inside a ResNet
    scales: Literal[1, 3, 5] = 3  # 1; 0.7, 1 and 1.4; or 0.5, 0.7, 1, 1.4 and 2 times the picture
    scale_gem: bool = True  # the largest over the scales of each channel; off: the mean
    antialias: bool = False  # when a scale shrinks the picture: off as in the paper's time
    sizes: Literal["buckets", "exact"] = "buckets"
    longest_side: int = 320  # pixels
    whitening: str | None = None  # file of `ggem_jax.descriptors.whitening`, applied at the end

    def __post_init__(self):
        if self.backbone not in BACKBONES and not _VIT.fullmatch(self.backbone):
            raise ValueError(
                f"backbone must be one of {', '.join(BACKBONES)} or a ViT such as vit-S/16, not"
                f" {self.backbone!r}"
            )
        for name, hint in get_type_hints(type(self)).items():
            choices = (
                get_args(hint)
                if name in ("pooling", "scales", "sizes")
                else (False, True)
                if hint is bool
                else ()
            )
            if choices and (
                getattr(self, name) not in choices
                or isinstance(getattr(self, name), bool) != (hint is bool)
            ):
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, choices))}, not"
                    f" {getattr(self, name)!r}"
                )
        if self.backbone != "efficientnet-lite0" and self.weights is None:
            raise ValueError(
                f"{self.backbone} needs a file of weights; only efficientnet-lite0 has weights that"
                " can be installed"
            )
        if self.backbone == "efficientnet-lite0" and self.weights is not None:
            raise ValueError(
                "efficientnet-lite0 takes the weights that are installed with it, not a file"
            )
        least = (
            0 if self.sizes == "exact" else 160
        )  # five strides: what three scales and Regional GeM need, and some
        side = self.longest_side
        if (
            not isinstance(side, int)
            or isinstance(side, bool)
            or not (side == least or side >= 160)
        ):
            raise ValueError(
                "longest_side must be a whole number of at least 160"
                f" pixels{', or 0' if not least else ''}, not {side!r}"
            )

    def record(self) -> dict[str, Any]:
        """JSON values that are equal where descriptors are: files are told apart by their
        contents.
        """
        record = dataclasses.asdict(self)
        for name in ("weights", "whitening"):
            record[name] = None if record[name] is None else digest(record[name])
        return record


def digest(path: str | Path) -> str:
    """The start of a file's SHA-256. Raises `ValueError` where the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
