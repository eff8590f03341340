"""The config of a Vision Transformer: one frozen record, and the published sizes by name."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ggem_jax.models.transformer import GELU, Gate, check_config

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ViTConfig:
    """The sizes and options of a `ViT`; the first five fields have no default.

    Two configs with the same fields are equal, so that they share compiled functions.

    Raises:
        ValueError: A field is out of its range, or two fields do not fit together. The record is
            checked when it is made.
    """

    patch: int  # side of a square patch, pixels
    width: int  # channels of a token
    depth: int  # blocks
    heads: int  # attention heads; width / heads channels each
    mlp_width: int  # hidden channels of the MLP in a block
    # side of the square training images, pixels; other sizes resample the position embedding
    image: int = 224
    class_token: bool = True  # a learned class token before the patches and the registers
    registers: int = 0  # learned prefix tokens without a position, after the class token
    # how places are told apart: a learned table, fixed sines and cosines, or queries and keys of
    # patches that are rotated, as in DINOv3
    position: Literal["learned", "sincos", "rope"] = "learned"
    # how positions are resampled: bicubic as PyTorch's interpolate, or antialiased as in timm
    position_filter: Literal["cubic", "antialias"] = "cubic"
    rope_base: float = 100.0  # of the periods of a rope, see `rope_periods`
    rope_dtype: Dtype = "float32"  # those periods are rounded to it
    layer_scale: float | None = None  # initial LayerScale of residual branches; None: no LayerScale
    # probability to skip a residual branch in the last block; grows linearly from 0 in the first
    drop_path: float = 0.0
    dropout: float = 0.0  # after the embedding and in every residual branch
    gelu: GELU = "exact"  # activation of the MLP; quick: x sigmoid(1.702 x), as in OpenAI's CLIP
    # swiglu: the gated MLP of DINOv2-g, without a GELU; mlp_width counts channels after the gate
    mlp: Gate = "gelu"
    patch_bias: bool = True  # of the patch embedding
    pre_norm: bool = False  # a norm of the embedded tokens before the first block, as in CLIP
    post_norm: bool = False  # the norms of a block come after its branches, not before
    # of the projections to queries, keys and values; with a rope, keys have none
    qkv_bias: bool = True
    norm_eps: float = 1e-6  # added to the variance in every norm
    # the final norm before the pooling (of every token), or after it (of the descriptor)
    pool_order: Literal["norm-pool", "pool-norm"] = "norm-pool"
    dtype: Dtype = "float32"  # of the computation
    param_dtype: Dtype = "float32"  # of the parameters
    remat: bool = False  # recompute the blocks in the backward pass: less memory, more time

    def __post_init__(self):
        check_config(
            self,
            ("patch", "width", "depth", "heads", "mlp_width", "image"),
            ("drop_path", "dropout"),
        )
        if not isinstance(self.registers, int | np.integer) or self.registers < 0:
            raise ValueError(
                f"registers must be a whole number of at least 0, not {self.registers!r}"
            )
        if self.image % self.patch:
            raise ValueError(
                f"image must be a multiple of patch, not {self.image} with patches of {self.patch}"
            )
        if self.position == "sincos" and self.width % 4:
            raise ValueError(f"a sincos position needs a width divisible by 4, not {self.width}")
        if self.position == "rope" and self.width // self.heads % 4:
            raise ValueError(
                "a rope needs heads of a multiple of 4 channels, not width"
                f" {self.width} with {self.heads} heads"
            )
        if not (math.isfinite(self.rope_base) and self.rope_base > 0):
            raise ValueError(f"rope_base must be a positive number, not {self.rope_base}")

    @property
    def key_bias(self) -> bool:
        """Whether keys have a bias: with a rope they have none, as in DINOv3."""
        return self.qkv_bias and self.position != "rope"

    @property
    def prefix_tokens(self) -> int:
        """The number of tokens before the patches: the class token and the registers."""
        return int(self.class_token) + self.registers


# width, depth, heads, mlp_width. Ti and S: DeiT, table 1 (arXiv:2012.12877); B, L and H: ViT, table
# 1 (arXiv:2010.11929).
_SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


def vit_config(variant: str, **changes: Any) -> ViTConfig:
    """Returns the config of a published ViT size.

    Args:
        variant: "Ti", "S", "B", "L" or "H", a slash, and the patch size in pixels, such as "S/16".
            Every patch size is allowed.
        **changes: Fields of `ViTConfig` that differ from the published size, such as `image=384`.

    Returns:
        The config, with the defaults of `ViTConfig` for what the size does not fix.

    Raises:
        ValueError: The variant is unknown, or a change is out of its range.

    Reference: Touvron et al., "Training data-efficient image transformers", 2021, arXiv:2012.12877,
        table 1 (Ti, S); Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021,
        arXiv:2010.11929, table 1 (B, L, H).

    Example:
        >>> config = vit_config("S/16", image=384)
        >>> config.width, config.depth, config.heads, config.image
        (384, 12, 6, 384)
    """
    size, _, patch = str(variant).partition("/")
    if size not in _SIZES or not (patch.isascii() and patch.isdigit()):
        raise ValueError(
            f"variant must be one of {', '.join(_SIZES)}, a slash and the patch size, such as"
            f" 'S/16', not {variant!r}"
        )
    width, depth, heads, mlp_width = _SIZES[size]
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width}
    return ViTConfig(**{"patch": int(patch)} | sizes | changes)
