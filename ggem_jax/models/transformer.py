"""The transformer block, of which the image tower and the text tower are stacks.

Tokens are `(b, n, width)`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from ggem_jax.models.position import rotate

GELU = Literal["exact", "tanh", "quick"]  # quick: x sigmoid(1.702 x), of OpenAI's CLIP
# of an MLP: a GELU of its hidden channels, or silu(a) b of two halves of them
Gate = Literal["gelu", "swiglu"]

xavier = nn.initializers.xavier_uniform()


class BlockConfig(Protocol):
    """The fields of a tower's config that its blocks read."""

    @property
    def width(self) -> int: ...  # channels of a token

    @property
    def heads(self) -> int: ...  # attention heads; width / heads channels each

    @property
    def mlp_width(self) -> int: ...  # hidden channels of the MLP

    @property  # initial LayerScale of the residual branches; None: no LayerScale
    def layer_scale(self) -> float | None: ...

    @property
    def dropout(self) -> float: ...  # probability in every residual branch

    @property
    def gelu(self) -> GELU: ...  # activation of the MLP

    @property
    def mlp(self) -> Gate: ...  # whether the MLP is gated

    @property
    def qkv_bias(self) -> bool: ...  # of the projections to queries, keys and values

    @property
    def key_bias(self) -> bool: ...  # of the keys alone; never without `qkv_bias`

    @property
    def norm_eps(self) -> float: ...  # added to the variance in every norm

    @property
    def dtype(self) -> str: ...  # of the computation

    @property
    def param_dtype(self) -> str: ...  # of the parameters

    @property  # whether blocks are computed again in the backward pass
    def remat(self) -> bool: ...


class Block(nn.Module):
    """Transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: The tower's config.
        drop_path: Probability to skip a residual branch of a sample in training.
        causal: Whether a token attends only to itself and to tokens before it.
        post_norm: Whether the norms come after the branches: x + norm(attention(x)), then
            x + norm(mlp(x)).

    Reference: post_norm is the residual post-norm of Liu et al., "Swin Transformer V2", 2022,
        arXiv:2111.09883, section 3.2.
    """

    config: BlockConfig
    drop_path: float = 0.0
    causal: bool = False
    post_norm: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        train: bool,
        angles: Float[Array, "n half"] | None = None,  # of rotary positions, see `rotate`
    ) -> Float[Array, "b n d"]:
        c = self.config
        norm_1, norm_2 = (nn.LayerNorm(c.norm_eps, name=f"norm_{n}", **dtypes(c)) for n in (1, 2))
        attention = partial(Attention(c, name="attention"), causal=self.causal, angles=angles)
        mlp = MLP(c, name="mlp")
        if self.post_norm:
            tokens = tokens + self._branch(norm_1(attention(tokens, tokens)), "1", train)
            return tokens + self._branch(norm_2(mlp(tokens, train)), "2", train)
        normed = norm_1(tokens)
        tokens = tokens + self._branch(attention(normed, normed), "1", train)
        return tokens + self._branch(mlp(norm_2(tokens), train), "2", train)

    def _branch(self, branch, number, train):
        c = self.config
        if c.layer_scale is not None:
            scale = self.param(
                f"layer_scale_{number}",
                nn.initializers.constant(c.layer_scale),
                (c.width,),
                c.param_dtype,
            )
            branch = branch * scale.astype(branch.dtype)
        branch = nn.Dropout(c.dropout)(branch, deterministic=not train)
        skip = nn.Dropout(self.drop_path, broadcast_dims=(1, 2))  # of whole samples
        return skip(branch, deterministic=not train)


def build_block(config: BlockConfig, **options: Any) -> nn.Module:
    """Returns a `Block`, which is computed again in the backward pass where the config says so.

    Args:
        config: The tower's config.
        **options: The other fields of `Block`, and a name.
    """
    kind = nn.remat(Block, static_argnums=(2,)) if config.remat else Block
    return kind(config, **options)


def run_block(
    block: Any,
    tokens: Float[Array, "b n d"],
    train: bool,
    angles: Float[Array, "n half"] | None = None,
) -> Float[Array, "b n d"]:
    """Returns the tokens after a block of `build_block`.

    Where the block is computed again, all its gradients are made before those of the block below.
    XLA may otherwise leave the gradients of the weights of all blocks to the end, where they are
    summed over devices, and keep for them what was computed again of every block.

    Args:
        block: The block.
        tokens: The tokens before it, `(b, n, d)`.
        train: Whether dropout and drop path are active.
        angles: Of rotary positions, `(n, half)`.

    Returns:
        The tokens after it, `(b, n, d)`.
    """
    if not block.config.remat:
        return block(tokens, train, angles)

    def forward(block, tokens):
        return block(tokens, train, angles)

    def backward(transposed, slope):
        return jax.lax.optimization_barrier(transposed(slope))

    joined = nn.custom_vjp(forward, lambda *inputs: nn.vjp(forward, *inputs), backward)
    return joined(block, tokens)


class Attention(nn.Module):
    """Multi-head attention of queries `(b, q, d)` over tokens `(b, n, d)`.

    Head h owns the channels h d/heads ... (h+1) d/heads before the projection `out`. The outputs of
    the heads, `(b, q, heads, channels)`, are sown as `heads` for callers that pass
    `mutable=["intermediates"]`.

    Args:
        config: The tower's config.
    """

    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b q d"],
        tokens: Float[Array, "b n d"],
        *,
        causal: bool = False,
        angles: Float[Array, "n half"] | None = None,  # of queries that are the tokens
    ) -> Float[Array, "b q d"]:
        c = self.config
        heads = (c.heads, c.width // c.heads)

        def project(name, use_bias=c.qkv_bias):
            return nn.DenseGeneral(
                heads, use_bias=use_bias, kernel_init=xavier, name=name, **dtypes(c)
            )

        query, key = project("query")(queries), project("key", c.key_bias)(tokens)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        mixed = jax.nn.dot_product_attention(query, key, project("value")(tokens), is_causal=causal)
        self.sow("intermediates", "heads", mixed)
        out = nn.DenseGeneral(c.width, axis=(-2, -1), kernel_init=xavier, name="out", **dtypes(c))
        return out(mixed)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x sigmoid(1.702 x), an approximation of the GELU.

    Args:
        x: Numbers of any shape.

    Returns:
        An array of the shape of x.

    Reference: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, arXiv:1606.08415, section
        2.
    """
    return x * jax.nn.sigmoid(1.702 * x)


_GELUS: dict[str, Callable] = {
    "exact": partial(nn.gelu, approximate=False),
    "tanh": partial(nn.gelu, approximate=True),
    "quick": quick_gelu,
}


@jax.checkpoint
def _gated(hidden):
    gate, value = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * value


class MLP(nn.Module):
    """Two dense layers with a GELU, or with a gate (SwiGLU), between them.

    With the gate it is out(silu(a) b), where a and b are the halves of the channels of `in`.

    Args:
        config: The tower's config.

    Reference: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, eq. 6 (SwiGLU);
        fused and with biases as in DINOv2-g.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"], train: bool = False) -> Float[Array, "b n d"]:
        c = self.config
        gated = c.mlp == "swiglu"
        hidden = nn.Dense((1 + gated) * c.mlp_width, kernel_init=xavier, name="in", **dtypes(c))(
            tokens
        )
        if gated:
            hidden = _gated(hidden)
        else:  # the backward pass needs no more of an activation than its input
            hidden = jax.checkpoint(_GELUS[c.gelu])(hidden)
        hidden = nn.Dropout(c.dropout)(hidden, deterministic=not train)
        return nn.Dense(c.width, kernel_init=xavier, name="out", **dtypes(c))(hidden)


def check_config(config: Any, counts: tuple[str, ...], probabilities: tuple[str, ...]) -> None:
    """Checks the fields of a tower's config.

    Args:
        config: The config, a dataclass. Its bools and literals are checked by their types.
        counts: Fields that must be whole numbers of at least 1.
        probabilities: Fields that must be from 0 to 1.

    Raises:
        ValueError: A field is out of its range; the message names it.
    """
    for name in counts:
        if not isinstance(getattr(config, name), int | np.integer) or getattr(config, name) < 1:
            raise ValueError(
                f"{name} must be a whole number of at least 1, not {getattr(config, name)!r}"
            )
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if hint is bool:
            choices = (False, True)
        if choices and (value not in choices or (hint is bool and not isinstance(value, bool))):
            known = ", ".join(map(str, choices))
            raise ValueError(f"{name} must be one of {known}, not {value!r}")
    for name in probabilities:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be a probability, not {getattr(config, name)}")
    if not config.norm_eps > 0:
        raise ValueError(f"norm_eps must be positive, not {config.norm_eps}")
    if config.width % config.heads:
        raise ValueError(
            f"width must be a multiple of heads, not {config.width} with {config.heads} heads"
        )


def dtypes(config: BlockConfig) -> dict[str, Any]:
    """Returns the dtypes of a config as keyword arguments of Flax modules.

    Args:
        config: The config of a tower; its `dtype` and `param_dtype` are names of dtypes.

    Returns:
        "dtype" and "param_dtype" as JAX dtypes.
    """
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
