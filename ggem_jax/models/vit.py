"""Vision Transformer in Flax (linen) with the pooling passed in.

Images are `(b, height, width, 3)` and already normalised; tokens are `(b, prefix + patches,
width)`, the class token first, then the registers, then the patches row by row. Prefix tokens never
enter a pooling of patches.

References: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, arXiv:2010.11929 (the model
and B, L, H); Touvron et al., "Training data-efficient image transformers", 2021, arXiv:2012.12877
(Ti, S); Darcet et al., "Vision Transformers Need Registers", 2024, arXiv:2309.16588.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from ggem_jax.models.transformer import GELU, MLP, Attention, Block, check_config, dtypes, xavier
from ggem_jax.pooling import Layout, Negatives, cls_pool, ggem_pool, norm_ggem_pool

Pooling = Callable[[Float[Array, "b n d"]], Float[Array, "b d"]]


@dataclass(frozen=True)
class ViTConfig:
    """What a ViT is made of. Wrong combinations raise `ValueError` when the record is made."""

    patch: int  # side of a square patch, pixels
    width: int  # channels of a token
    depth: int  # blocks
    heads: int  # attention heads; width / heads channels each
    mlp_width: int  # hidden channels of the MLP in a block
    # side of the square training images, pixels; other sizes resample the position embedding
    image: int = 224
    class_token: bool = True
    registers: int = 0  # learned prefix tokens without a position, after the class token
    position: Literal["learned", "sincos"] = "learned"
    position_filter: Literal["cubic", "antialias"] = (
        "cubic"  # of resampled positions: PyTorch's bicubic, plain or antialiased as timm's
    )
    layer_scale: float | None = (
        None  # initial LayerScale of the residual branches; None: no LayerScale
    )
    # probability to skip a residual branch in the last block; grows linearly from 0 in the first
    drop_path: float = 0.0
    dropout: float = 0.0  # after the embedding and in every residual branch
    gelu: GELU = "exact"
    mlp: Literal["gelu", "swiglu"] = (
        # swiglu: the gated MLP of DINOv2-g, which has no GELU; mlp_width counts its channels after
        # the gate
        "gelu"
    )
    patch_bias: bool = True  # of the patch embedding
    pre_norm: bool = False  # a norm of the embedded tokens before the first block, as in CLIP
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    pool_order: Literal["norm-pool", "pool-norm"] = (
        "norm-pool"  # the final norm before the pooling (of every token) or after it
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the computation
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: bool = False  # recompute the blocks in the backward pass: memory for time

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

    @property
    def prefix_tokens(self) -> int:
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
    """The published sizes by name, such as "S/16" (any patch size); `changes` are fields of
    `ViTConfig`.
    """
    size, _, patch = str(variant).partition("/")
    if size not in _SIZES or not (patch.isascii() and patch.isdigit()):
        raise ValueError(
            f"variant must be one of {', '.join(_SIZES)}, a slash and the patch size, such as"
            f" 'S/16', not {variant!r}"
        )
    width, depth, heads, mlp_width = _SIZES[size]
    return ViTConfig(
        **{
            "patch": int(patch),
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_width": mlp_width,
        }
        | changes
    )


@struct.dataclass
class ViTOutput:
    """What a ViT computes on the way from an image to its logits."""

    tokens_before_norm: Float[Array, "b n d"]  # prefix tokens first
    tokens: Float[Array, "b n d"]  # after the final norm
    descriptor: Float[Array, "b d"]
    logits: Float[Array, "b classes"] | None  # None without a classification head


class ViT(nn.Module):
    """Image -> tokens -> descriptor -> logits.

    `pooling` is a function from `ggem_jax.pooling`, a module such as `GGeM()` or `MAP()`, which
    take what they leave open from the model, or anything else from tokens `(b, n, d)` to
    descriptors `(b, d)`. It gets the patch tokens; `cls_pool` gets the prefix tokens before them
    too, as does every pooling with `pooled="all"`: a function of one's own that wants the class
    token. `num_classes=0` leaves out the classification head.

    `fused_norm` joins the final norm to a `GGeM` after it, `norm_ggem_pool`: on an NVIDIA GPU one
    kernel. The parameters are the same either way.

    Training with dropout or drop path needs `rngs={"dropout": key}`. On a mesh with explicit axis
    types use `jax.sharding.auto_axes`.
    """

    config: ViTConfig
    pooling: Pooling
    num_classes: int = 0
    pooled: Literal["patches", "all"] | None = (
        None  # the tokens that are pooled; None: all for `cls_pool`, otherwise patches
    )
    fused_norm: bool = False

    def setup(self):
        c = self.config
        wants_class_token = (
            inspect.unwrap(getattr(self.pooling, "func", self.pooling)) is cls_pool
        )  # inside a functools.partial or a jax.jit
        if wants_class_token and (not c.class_token or self.pooled == "patches"):
            raise ValueError(
                "cls_pool needs a model with class_token=True, and pooled='all' or None"
            )
        if self.pooled not in (None, "patches", "all"):
            raise ValueError(f"pooled must be None, patches or all, not {self.pooled!r}")
        if self.fused_norm and not (isinstance(self.pooling, GGeM) and c.pool_order == "norm-pool"):
            raise ValueError("fused_norm needs GGeM as the pooling and pool_order='norm-pool'")
        self.pool_prefix = wants_class_token if self.pooled is None else self.pooled == "all"
        self.patch_embedding = nn.Conv(
            c.width,
            (c.patch, c.patch),
            (c.patch, c.patch),
            padding="VALID",
            use_bias=c.patch_bias,
            **dtypes(c),
        )
        side = c.image // c.patch
        if c.class_token:
            self.class_token = self.param(
                "class_token", nn.initializers.zeros, (1, c.width), c.param_dtype
            )
        if c.registers:
            self.registers = self.param(
                "registers", nn.initializers.normal(0.02), (c.registers, c.width), c.param_dtype
            )
        if (
            c.position == "learned"
        ):  # the class token has a position of its own, as in the published models
            init = nn.initializers.normal(c.width**-0.5)
            self.position = self.param(
                "position", init, (int(c.class_token) + side * side, c.width), c.param_dtype
            )
        self.dropout = nn.Dropout(c.dropout)
        if c.pre_norm:
            self.norm_pre = nn.LayerNorm(c.norm_eps, **dtypes(c))
        block = nn.remat(Block, static_argnums=(2,)) if c.remat else Block
        self.blocks = [block(c, c.drop_path * i / max(c.depth - 1, 1)) for i in range(c.depth)]
        self.norm = nn.LayerNorm(c.norm_eps, **dtypes(c))
        self.pool = (
            self.pooling.for_model(c) if isinstance(self.pooling, (GGeM, MAP)) else self.pooling
        )
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, **dtypes(c))

    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool = False) -> ViTOutput:
        tokens = self.dropout(self.embed(images), deterministic=not train)
        if self.config.pre_norm:
            tokens = self.norm_pre(tokens)
        for block in self.blocks:
            tokens = block(tokens, train)
        normed = self.norm(tokens)
        if self.fused_norm:
            norm: Any = (
                self.norm.get_variable("params", "scale"),
                self.norm.get_variable("params", "bias"),
                self.config.norm_eps,
            )
            descriptor = self.pool(tokens, mask=self._pooled_mask(tokens), norm=norm)  # type: ignore[call-arg]
        elif self.config.pool_order == "norm-pool":
            descriptor = self.pool(self._pooled_tokens(normed))
        else:
            descriptor = self.norm(self.pool(self._pooled_tokens(tokens)))
        return ViTOutput(
            tokens, normed, descriptor, self.head(descriptor) if self.num_classes else None
        )

    def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Cuts the images into patches, embeds them, adds positions and puts the prefix tokens in
        front.
        """
        c = self.config
        if (
            images.ndim != 4
            or images.shape[-1] != 3
            or any(length % c.patch or not length for length in images.shape[1:3])
        ):
            raise ValueError(
                f"images must be (b, h, w, 3) with h and w positive multiples of {c.patch}, not of"
                f" shape {images.shape}"
            )
        patches = self.patch_embedding(images)
        b, rows, columns, width = patches.shape
        side = c.image // c.patch
        table = self.position if c.position == "learned" else sincos_position(side, width)
        own, grid = table[: len(table) - side * side], table[len(table) - side * side :]
        tokens = patches.reshape(b, rows * columns, width) + self._positions(
            grid, (rows, columns)
        ).astype(patches.dtype)
        prefix = []
        if c.class_token:
            prefix.append(self.class_token + own.sum(0) if len(own) else self.class_token)
        if c.registers:
            prefix.append(self.registers)
        prefix = [
            jnp.broadcast_to(tokens_.astype(tokens.dtype), (b, *tokens_.shape))
            for tokens_ in prefix
        ]
        return jnp.concatenate([*prefix, tokens], axis=1)

    def _positions(self, grid, size):
        side = self.config.image // self.config.patch
        return resample_position(
            grid, (side, side), size, antialias=self.config.position_filter == "antialias"
        )

    def _pooled_tokens(self, tokens):
        return tokens if self.pool_prefix else tokens[:, self.config.prefix_tokens :]

    def _pooled_mask(self, tokens):
        """The same choice as a mask: a slice would be copied for a kernel."""
        if self.pool_prefix or self.config.prefix_tokens == 0:
            return None
        return jnp.broadcast_to(
            jnp.arange(tokens.shape[1]) >= self.config.prefix_tokens, tokens.shape[:2]
        )


class GGeM(nn.Module):
    """`ggem_pool` with learned exponents: the parameter `p`, `(groups,)` in float32.

    `groups=None` takes the number of attention heads of the model it is given to; `groups=1` is a
    learned GeM. The exponents are used inside `p_range`; one that was pushed out still gets its
    gradient and can come back. Neither weight decay nor the learning rate of the weights suits
    exponents: see `ggem_jax.optimizer`.
    """

    groups: int | None = None
    p_init: float = (
        3.0  # as in the public re-implementations, and in GeM (arXiv:1711.02512, section 5.1)
    )
    p_range: tuple[float, float] = (1.0, 1000.0)
    layout: Layout = "contiguous"
    negatives: Negatives = "clamp"
    eps: float = 1e-6

    def for_model(self, config: ViTConfig) -> "GGeM":
        return self.clone(parent=None, groups=config.heads if self.groups is None else self.groups)

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "*b n d"],
        *,
        mask: Bool[Array, "*b n"] | None = None,
        norm: tuple[Float[Array, " d"], Float[Array, " d"], float] | None = None,
    ) -> Float[Array, "*b d"]:
        """Pools tokens, or with `norm=(scale, bias, eps)` the layer-normalised tokens, by
        `norm_ggem_pool`.
        """
        if self.groups is None:
            raise ValueError("GGeM needs its number of groups when it is used outside a ViT")
        if self.groups < 1 or not self.p_range[0] <= self.p_init <= self.p_range[1]:
            raise ValueError(
                f"GGeM needs groups of at least 1 and p_init in {self.p_range}, not {self.groups}"
                f" and {self.p_init}"
            )
        p = self.param("p", nn.initializers.constant(self.p_init), (self.groups,), jnp.float32)
        options: Any = {
            "mask": mask,
            "eps": self.eps,
            "layout": self.layout,
            "negatives": self.negatives,
        }
        if norm is None:
            return ggem_pool(tokens, used_exponents(p, self.p_range), **options)
        scale, bias, norm_eps = norm
        return norm_ggem_pool(
            tokens, scale, bias, used_exponents(p, self.p_range), norm_eps=norm_eps, **options
        )


def used_exponents(
    p: Float[Array, " groups"], p_range: tuple[float, float] = GGeM.p_range
) -> Float[Array, " groups"]:
    """The exponents that `GGeM` pools with: the learned ones kept inside `p_range`, with the
    gradient of those that are not as if they were.
    """
    return jax.lax.stop_gradient(jnp.clip(p, *p_range)) + (p - jax.lax.stop_gradient(p))


class MAP(nn.Module):
    """Multi-head attention pooling: one learned query attends to the tokens, then a residual MLP.

    Reference: Zhai et al., "Scaling Vision Transformers", 2022, arXiv:2106.04560, section 3.2; Lee
        et al., "Set Transformer", 2019, arXiv:1810.00825.
    """

    config: ViTConfig | None = None  # None: that of the model it is given to

    def for_model(self, config: ViTConfig) -> "MAP":
        return self.clone(parent=None, config=self.config or config)

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        c = self.config
        if c is None:
            raise ValueError("MAP needs a config when it is used outside a ViT")
        query = self.param("query", xavier, (1, c.width), c.param_dtype).astype(tokens.dtype)
        pooled = Attention(c, name="attention")(
            jnp.broadcast_to(query, (len(tokens), 1, c.width)), tokens
        )
        normed = nn.LayerNorm(c.norm_eps, name="norm", **dtypes(c))(pooled)
        return (pooled + MLP(c, name="mlp")(normed))[:, 0]


def sincos_position(side: int, width: int) -> Float[np.ndarray, "n d"]:
    """Fixed two-dimensional position embedding of a `side` x `side` grid, row by row: sines and
    cosines of the column, then of the row.

    Reference: Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers",
        2021, arXiv:2104.02057; the order is MAE's.
    """
    frequency = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [np.outer(column, frequency), np.outer(row, frequency)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(
        np.float32
    )


def resample_position(
    grid: ArrayLike, old: tuple[int, int], new: tuple[int, int], *, antialias: bool = False
) -> Float[Array, "m d"]:
    """Resamples a position embedding `(n, d)` from `old` to `new` (rows, columns), bicubic as
    PyTorch's `interpolate`, by default without its `antialias`, which changes the kernel also where
    the grid grows.
    """
    if old == new:
        return jnp.asarray(grid)
    rows, columns = (
        (_antialiased_matrix if antialias else _bicubic_matrix)(n_old, n_new)
        for n_old, n_new in zip(old, new, strict=True)
    )
    table = jnp.einsum(
        "ri,cj,ijd->rcd", rows, columns, jnp.reshape(grid, (*old, -1)), precision="highest"
    )
    return table.reshape(new[0] * new[1], -1)


def _bicubic_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of cubic convolution with a = -0.75 between pixel centres; positions outside repeat
    the border.
    """
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += _cubic_convolution(abs(centre - tap))
    return matrix.astype(np.float32)


def _antialiased_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The same with a = -0.5, a kernel as wide as the grid shrinks, and weights outside the border
    left out: Pillow's filter.
    """
    shrink = max(old / new, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * old / new
    places = np.arange(old)[None] + 0.5
    near = np.abs(places - centres) / shrink
    weights = np.vectorize(lambda x: _cubic_convolution(x, a=-0.5))(near)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic_convolution(x: float, a: float = -0.75) -> float:
    """Keys, "Cubic convolution interpolation for digital image processing", 1981; a = -0.75 is
    PyTorch's choice.
    """
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0
