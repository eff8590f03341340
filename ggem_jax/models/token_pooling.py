"""Poolings with parameters of their own, as Flax modules, and all poolings by name.

A pooling takes tokens `(b, n, d)` to descriptors `(b, d)`. A module takes the settings that it
leaves open from the model that it is given to (`for_model`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from ggem_jax.models.config import ViTConfig
from ggem_jax.models.transformer import MLP, Attention, dtypes, xavier
from ggem_jax.pooling import (
    Layout,
    Negatives,
    avg_pool,
    cls_pool,
    gem_pool,
    ggem_pool,
    lse_pool,
    max_pool,
    norm_ggem_pool,
)

Pooling = Callable[[Float[Array, "b n d"]], Float[Array, "b d"]]
PoolingName = Literal["cls", "avg", "relu-avg", "max", "lse", "gem", "ggem", "map"]


class GGeM(nn.Module):
    """Group generalized-mean pooling with learned exponents, the parameter `p`, `(groups,)`.

    The exponents are kept in float32 and used inside `p_range`. An exponent that leaves the range
    still receives its gradient and can come back. Weight decay and the learning rate of the weights
    do not suit exponents: train them with `ggem_jax.adamw`.

    Args:
        groups: Groups of channels, one exponent each; 1 is a learned GeM. None takes the number of
            attention heads of the model that the module is given to.
        p_init: First value of all exponents.
        p_range: Smallest and largest exponent that is used.
        layout: Which channels form a group, see `ggem_pool`.
        negatives: How tokens that are not positive are handled, see `ggem_jax.pooling`.
        eps: Smallest number that is raised to p, see `ggem_jax.pooling`.

    Reference: Ko et al., "Group Generalized Mean Pooling for Vision Transformer", 2022,
        arXiv:2212.04114; p_init as in GeM, arXiv:1711.02512, section 5.1.

    Example:
        >>> pool, tokens = GGeM(groups=2), jnp.ones((4, 9, 6))
        >>> descriptors, variables = pool.init_with_output(jax.random.key(0), tokens)
        >>> descriptors.shape, variables["params"]["p"].tolist()
        ((4, 6), [3.0, 3.0])
    """

    groups: int | None = None
    p_init: float = 3.0
    p_range: tuple[float, float] = (1.0, 1000.0)
    layout: Layout = "contiguous"
    negatives: Negatives = "clamp"
    eps: float = 1e-6

    def for_model(self, config: ViTConfig) -> "GGeM":
        """Returns the module with as many groups as attention heads, where the number is open.

        Args:
            config: The config of the model that the module is given to.
        """
        return self.clone(parent=None, groups=config.heads if self.groups is None else self.groups)

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "*b n d"],
        *,
        mask: Bool[Array, "*b n"] | None = None,
        skip: int = 0,
        norm: tuple[Float[Array, " d"], Float[Array, " d"], float] | None = None,
    ) -> Float[Array, "*b d"]:
        """Returns the pooled tokens.

        Args:
            tokens: The tokens, `(..., n, d)`.
            mask: Which tokens to keep, `(..., n)`, true = keep; None keeps all.
            skip: Number of tokens at the start that are not pooled, see `ggem_pool`.
            norm: Scale `(d,)`, bias `(d,)` and epsilon of a LayerNorm that is applied to the tokens
                first, see `norm_ggem_pool`; None pools the tokens as they are.

        Returns:
            The descriptors, `(..., d)`.

        Raises:
            ValueError: The number of groups is unknown or does not divide d, or `p_init` lies
                outside `p_range`.
        """
        if self.groups is None:
            raise ValueError("GGeM needs its number of groups when it is used outside a ViT")
        if self.groups < 1 or not self.p_range[0] <= self.p_init <= self.p_range[1]:
            raise ValueError(
                f"GGeM needs groups of at least 1 and p_init in {self.p_range}, not {self.groups}"
                f" and {self.p_init}"
            )
        p = self.param("p", nn.initializers.constant(self.p_init), (self.groups,), jnp.float32)
        p = used_exponents(p, self.p_range)
        options: Any = {
            "mask": mask,
            "skip": skip,
            "eps": self.eps,
            "layout": self.layout,
            "negatives": self.negatives,
        }
        if norm is None:
            return ggem_pool(tokens, p, **options)
        scale, bias, norm_eps = norm
        return norm_ggem_pool(tokens, scale, bias, p, norm_eps=norm_eps, **options)


def used_exponents(
    p: Float[Array, " groups"], p_range: tuple[float, float] = GGeM.p_range
) -> Float[Array, " groups"]:
    """Returns the exponents that `GGeM` pools with: the learned ones, clipped to a range.

    The gradient passes as if nothing were clipped (a straight-through estimate), so that exponents
    outside the range can return.

    Args:
        p: The learned exponents, `(groups,)`.
        p_range: Smallest and largest exponent; the default is that of `GGeM`.

    Returns:
        The exponents, `(groups,)`.
    """
    return jax.lax.stop_gradient(jnp.clip(p, *p_range)) + (p - jax.lax.stop_gradient(p))


class MAP(nn.Module):
    """Multi-head attention pooling: one learned query attends to the tokens, then a residual MLP.

    Args:
        config: Width, heads and MLP of the attention; None takes those of the model that the module
            is given to.

    Reference: Zhai et al., "Scaling Vision Transformers", 2022, arXiv:2106.04560, section 3.2; Lee
        et al., "Set Transformer", 2019, arXiv:1810.00825.
    """

    config: ViTConfig | None = None

    def for_model(self, config: ViTConfig) -> "MAP":
        """Returns the module with the config of a model, where its own is None.

        Args:
            config: The config of the model that the module is given to.
        """
        return self.clone(parent=None, config=self.config or config)

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Returns the pooled tokens, `(b, d)`; raises `ValueError` where `config` is still None."""
        c = self.config
        if c is None:
            raise ValueError("MAP needs a config when it is used outside a ViT")
        query = self.param("query", xavier, (1, c.width), c.param_dtype).astype(tokens.dtype)
        queries = jnp.broadcast_to(query, (tokens.shape[0], 1, c.width))
        pooled = Attention(c, name="attention")(queries, tokens)
        normed = nn.LayerNorm(c.norm_eps, name="norm", **dtypes(c))(pooled)
        return (pooled + MLP(c, name="mlp")(normed))[:, 0]


def named_pooling(
    name: PoolingName,
    *,
    groups: int | None = None,
    p: float = 3.0,
    r: float = 10.0,
    layout: Layout = "contiguous",
    negatives: Negatives = "clamp",
) -> Pooling:
    """Returns the pooling of a name, as settings of training runs give it.

    Args:
        name: "cls", "avg", "max", "lse" and "map" are the functions and module of that name; "gem"
            and "ggem" learn their exponents; "relu-avg" is `gem_pool` with p fixed at 1.
        groups: Groups of "ggem"; None takes the number of attention heads.
        p: First value of the exponents of "gem" and "ggem".
        r: Sharpness of "lse", which is not learned.
        layout: Layout of the groups of "ggem".
        negatives: How "gem", "ggem" and "relu-avg" handle tokens that are not positive.

    Returns:
        A function or a Flax module for `ViT`.

    Raises:
        ValueError: The name is unknown.
    """
    known: dict[str, Callable[[], Pooling]] = {
        "cls": lambda: cls_pool,
        "avg": lambda: avg_pool,
        "relu-avg": lambda: partial(gem_pool, p=1.0, negatives=negatives),
        "max": lambda: max_pool,
        "lse": lambda: partial(lse_pool, r=r),
        "gem": lambda: GGeM(groups=1, p_init=p, negatives=negatives),
        "ggem": lambda: GGeM(groups=groups, p_init=p, layout=layout, negatives=negatives),
        "map": lambda: MAP(),
    }
    if name not in known:
        raise ValueError(f"pooling must be one of {', '.join(get_args(PoolingName))}, not {name!r}")
    return known[name]()
