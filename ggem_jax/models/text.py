"""Text transformer in Flax (linen), the second tower of image-text learning: ids -> tokens -> one
descriptor.

Ids are whole numbers `(b, n)`, n up to the context; tokens are `(b, n, width)`.

References: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(CLIP), 2021, arXiv:2103.00020, section 2.4, and its code; Zhai et al., "Sigmoid Loss for Language
Image Pre-Training" (SigLIP), 2023, arXiv:2303.15343.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from ggem_jax.models.transformer import GELU, Gate, build_block, check_config, dtypes, run_block


@dataclass(frozen=True)
class TextConfig:
    """The sizes and options of a `TextTransformer`.

    Raises:
        ValueError: A field is out of its range. The record is checked when it is made.
    """

    vocabulary: int  # ids are 0 ... vocabulary - 1
    width: int = 512  # channels of a token
    depth: int = 12  # blocks
    heads: int = 8  # attention heads; width / heads channels each
    mlp_width: int = 2048  # hidden channels of the MLP in a block
    context: int = 77  # positions: the most ids of a text
    causal: bool = True  # a token attends to itself and those before it (CLIP), or all (SigLIP)
    # the descriptor: the token of the first `end_id` (CLIP), or that at the last place (SigLIP)
    pooled: Literal["end", "last"] = "end"
    end_id: int | None = None  # id that ends a text; None: the largest of the vocabulary, as CLIP's
    dropout: float = 0.0  # in every residual branch
    gelu: GELU = "exact"  # activation of the MLP; quick: x sigmoid(1.702 x), as in OpenAI's CLIP
    mlp: Gate = "gelu"  # swiglu: a gated MLP without a GELU
    layer_scale: float | None = None  # initial LayerScale of residual branches; None: no LayerScale
    qkv_bias: bool = True  # of the projections to queries, keys and values
    norm_eps: float = 1e-5  # added to the variance in every norm
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the computation
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the parameters
    remat: bool = False  # recompute the blocks in the backward pass: less memory, more time

    @property
    def key_bias(self) -> bool:
        """Whether keys have a bias: wherever queries and values have one."""
        return self.qkv_bias

    def __post_init__(self):
        check_config(
            self, ("vocabulary", "width", "depth", "heads", "mlp_width", "context"), ("dropout",)
        )
        if self.end_id is not None and not 0 <= self.end_id < self.vocabulary:
            raise ValueError(
                f"end_id must be an id of a vocabulary of {self.vocabulary}, not {self.end_id}"
            )


@struct.dataclass
class TextOutput:
    """The outputs of a `TextTransformer`, from its tokens to the shared space."""

    tokens: Float[Array, "b n d"]  # after the final norm
    descriptor: Float[Array, "b d"]  # the token at the end of each text, see `TextConfig.pooled`
    # the descriptor in the space shared with images; None without a projection
    projected: Float[Array, "b outputs"] | None


class TextTransformer(nn.Module):
    """Ids -> tokens -> descriptor -> its projection into the space shared with images.

    `model.apply(variables, ids)` returns a `TextOutput`. Training with dropout needs `train=True`
    and `rngs={"dropout": key}`.

    Args:
        config: The sizes.
        outputs: Channels of the projection; 0 leaves it out.
        project_bias: Whether the projection has a bias, as in SigLIP.
    """

    config: TextConfig
    outputs: int = 0
    project_bias: bool = False

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"], *, train: bool = False) -> TextOutput:
        """Returns tokens, descriptor and projection of ids `(b, n)`; raises `ValueError` for ids of
        another shape or dtype.
        """
        c = self.config
        if (
            ids.ndim != 2
            or not 1 <= ids.shape[1] <= c.context
            or not jnp.issubdtype(ids.dtype, jnp.integer)
        ):
            raise ValueError(
                f"ids must be whole numbers (b, n) with n from 1 to {c.context}, not {ids.dtype} of"
                f" shape {ids.shape}"
            )
        embedding = nn.Embed(
            c.vocabulary,
            c.width,
            embedding_init=nn.initializers.normal(0.02),
            name="token_embedding",
            **dtypes(c),
        )
        position = self.param(
            "position", nn.initializers.normal(0.01), (c.context, c.width), c.param_dtype
        )
        tokens = embedding(ids) + position[: ids.shape[1]].astype(c.dtype)
        for i in range(c.depth):
            block = build_block(c, causal=c.causal, name=f"blocks_{i}")
            tokens = run_block(block, tokens, train)
        tokens = nn.LayerNorm(c.norm_eps, name="norm", **dtypes(c))(tokens)
        descriptor = (
            tokens[:, -1]
            if c.pooled == "last"
            else jnp.take_along_axis(tokens, end_of(ids, c)[:, None, None], axis=1)[:, 0]
        )
        if not self.outputs:
            return TextOutput(tokens, descriptor, None)
        head = nn.Dense(
            self.outputs,
            use_bias=self.project_bias,
            kernel_init=nn.initializers.normal(c.width**-0.5),
            name="head",
            **dtypes(c),
        )
        return TextOutput(tokens, descriptor, head(descriptor))


def end_of(ids: Int[Array, "b n"], config: TextConfig) -> Int[Array, " b"]:
    """Returns the place of the first id that ends each text, the last place where none does.

    Args:
        ids: The ids, `(b, n)`.
        config: The config, with the id that ends a text.

    Returns:
        The places, `(b,)`, from 0.
    """
    ends = ids == (config.vocabulary - 1 if config.end_id is None else config.end_id)
    return jnp.where(ends.any(axis=1), ends.argmax(axis=1), ids.shape[1] - 1)
