"""Vision Transformer in Flax (linen) with the pooling passed in.

Images are `(b, height, width, 3)` and already normalised. Tokens are `(b, prefix + patches,
width)`: the class token first, then the registers, then the patches row by row. A pooling of
patches does not see the prefix tokens.

References: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, arXiv:2010.11929; Darcet et
al., "Vision Transformers Need Registers", 2024, arXiv:2309.16588; Siméoni et al., "DINOv3", 2025,
arXiv:2508.10104 (the rotary positions, without the random shifts and scales of its training).
"""

import inspect
from typing import Any, Literal, cast

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from ggem_jax.models.config import ViTConfig, vit_config
from ggem_jax.models.position import (
    resample_position,
    rope_angles,
    rope_periods,
    sincos_position,
)
from ggem_jax.models.token_pooling import MAP, GGeM, Pooling, used_exponents
from ggem_jax.models.transformer import build_block, dtypes, run_block
from ggem_jax.pooling import cls_pool

__all__ = [
    "MAP",
    "GGeM",
    "Pooling",
    "ViT",
    "ViTConfig",
    "ViTOutput",
    "resample_position",
    "sincos_position",
    "used_exponents",
    "vit_config",
]


@struct.dataclass
class ViTOutput:
    """The outputs of a `ViT`, from its tokens to its logits."""

    tokens_before_norm: Float[Array, "b n d"]  # prefix tokens first
    tokens: Float[Array, "b n d"]  # after the final norm
    descriptor: Float[Array, "b d"]  # the pooled tokens
    logits: Float[Array, "b classes"] | None  # None without a classification head


class ViT(nn.Module):
    """Vision Transformer: image -> tokens -> descriptor -> logits.

    `model.apply(variables, images)` returns a `ViTOutput`. Training with dropout or drop path needs
    `train=True` and `rngs={"dropout": key}`. On a mesh with explicit axis types use
    `jax.sharding.auto_axes`.

    Args:
        config: The sizes, see `vit_config`.
        pooling: A function of `ggem_jax.pooling`, a module such as `GGeM()` or `MAP()`, or any
            other function from tokens `(b, n, d)` to descriptors `(b, d)`.
        num_classes: Channels of the classification head; 0 leaves it out.
        pooled: The tokens that are pooled: "patches", or "all", prefix tokens included, for a
            pooling of one's own that reads the class token. None is "all" for `cls_pool` and
            "patches" for every other pooling.
        fused_norm: Whether to join the final norm and the `GGeM` after it (`norm_ggem_pool`), one
            kernel on an NVIDIA GPU. The parameters are the same either way.

    Raises:
        ValueError: At the first use, for options that do not fit together and images of a wrong
            shape.

    Example:
        >>> model = ViT(vit_config("Ti/16", image=32, depth=1), GGeM(), num_classes=10)
        >>> output, variables = model.init_with_output(jax.random.key(0), jnp.ones((2, 32, 32, 3)))
        >>> output.descriptor.shape, output.logits.shape, variables["params"]["pool"]["p"].shape
        ((2, 192), (2, 10), (3,))
    """

    config: ViTConfig
    pooling: Pooling
    num_classes: int = 0
    pooled: Literal["patches", "all"] | None = None
    fused_norm: bool = False

    def setup(self):
        c = self.config
        # cls_pool may come inside a functools.partial, a jax.jit or a checker of shapes
        pooling = inspect.unwrap(getattr(self.pooling, "func", self.pooling))
        takes_class = pooling is inspect.unwrap(cls_pool)
        if takes_class and (not c.class_token or self.pooled == "patches"):
            raise ValueError(
                "cls_pool needs a model with class_token=True, and pooled='all' or None"
            )
        if self.pooled not in (None, "patches", "all"):
            raise ValueError(f"pooled must be None, patches or all, not {self.pooled!r}")
        if self.fused_norm and not (isinstance(self.pooling, GGeM) and c.pool_order == "norm-pool"):
            raise ValueError("fused_norm needs GGeM as the pooling and pool_order='norm-pool'")
        self.pool_prefix = takes_class if self.pooled is None else self.pooled == "all"
        patch = (c.patch, c.patch)
        self.patch_embedding = nn.Conv(
            c.width, patch, patch, padding="VALID", use_bias=c.patch_bias, **dtypes(c)
        )
        if c.class_token:
            zeros = nn.initializers.zeros
            self.class_token = self.param("class_token", zeros, (1, c.width), c.param_dtype)
        if c.registers:
            normal = nn.initializers.normal(0.02)
            shape = (c.registers, c.width)
            self.registers = self.param("registers", normal, shape, c.param_dtype)
        if c.position == "learned":
            # the class token has a position of its own, as in the published models
            shape = (int(c.class_token) + (c.image // c.patch) ** 2, c.width)
            normal = nn.initializers.normal(c.width**-0.5)
            self.position = self.param("position", normal, shape, c.param_dtype)
        self.dropout = nn.Dropout(c.dropout)
        if c.pre_norm:
            self.norm_pre = nn.LayerNorm(c.norm_eps, **dtypes(c))
        self.blocks = [
            build_block(c, drop_path=c.drop_path * i / max(c.depth - 1, 1), post_norm=c.post_norm)
            for i in range(c.depth)
        ]
        self.norm = nn.LayerNorm(c.norm_eps, **dtypes(c))
        own = isinstance(self.pooling, (GGeM, MAP))
        self.pool = self.pooling.for_model(c) if own else self.pooling  # type: ignore[attr-defined]
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, **dtypes(c))

    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool = False) -> ViTOutput:
        """Returns tokens, descriptor and logits of images `(b, h, w, 3)`.

        Args:
            images: Normalised images; h and w are multiples of the patch. For another size than
                `config.image` the position embedding is resampled.
            train: Whether dropout and drop path are active.

        Returns:
            The tokens, descriptors and logits.
        """
        tokens = self.dropout(self.embed(images), deterministic=not train)
        if self.config.pre_norm:
            tokens = self.norm_pre(tokens)
        angles = self._angles(images) if self.config.position == "rope" else None
        for block in self.blocks:
            tokens = run_block(block, tokens, train, angles)
        normed = self.norm(tokens)
        if self.fused_norm:
            pool, norm_of = cast(Any, self.pool), self.norm.get_variable
            norm: Any = (
                norm_of("params", "scale"),
                norm_of("params", "bias"),
                self.config.norm_eps,
            )
            descriptor = pool(tokens, skip=self._skipped_tokens(), norm=norm)
        elif self.config.pool_order == "norm-pool":
            descriptor = self._pool(normed)
        else:
            descriptor = self.norm(self._pool(tokens))
        logits = self.head(descriptor) if self.num_classes else None
        return ViTOutput(tokens, normed, descriptor, logits)

    def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Returns the tokens before the first block.

        The images are cut into patches, embedded, given their positions, and preceded by the prefix
        tokens.

        Args:
            images: Normalised images, `(b, h, w, 3)`.

        Returns:
            The tokens, `(b, prefix + patches, width)`.

        Raises:
            ValueError: The images have another shape.
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
        tokens = patches.reshape(b, rows * columns, width)
        own: Any = ()  # the position of the class token
        if c.position != "rope":  # whose places are told in the attention
            side = c.image // c.patch
            table = self.position if c.position == "learned" else sincos_position(side, width)
            own, grid = table[: len(table) - side * side], table[len(table) - side * side :]
            position = resample_position(
                grid, (side, side), (rows, columns), antialias=c.position_filter == "antialias"
            )
            tokens = tokens + position.astype(tokens.dtype)
        prefix = []
        if c.class_token:
            prefix.append(self.class_token + own.sum(0) if len(own) else self.class_token)
        if c.registers:
            prefix.append(self.registers)
        repeated = [jnp.broadcast_to(x.astype(tokens.dtype), (b, *x.shape)) for x in prefix]
        return jnp.concatenate([*repeated, tokens], axis=1)

    def _angles(self, images: Float[Array, "b h w 3"]) -> Float[Array, "n half"]:
        """The angles of rotary positions of all tokens; those of prefix tokens are 0."""
        c = self.config
        rows, columns = (length // c.patch for length in images.shape[1:3])
        periods = rope_periods(c.width // c.heads, c.rope_base, c.rope_dtype)
        return jnp.asarray(rope_angles(rows, columns, periods, prefix=c.prefix_tokens))

    def _pool(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        if isinstance(self.pooling, GGeM):  # whose kernel would need a copy of a slice
            return cast(Any, self.pool)(tokens, skip=self._skipped_tokens())
        return self.pool(tokens[:, self._skipped_tokens() :])

    def _skipped_tokens(self) -> int:
        return 0 if self.pool_prefix else self.config.prefix_tokens
