"""Poolings: tokens `(..., n, d)` or feature maps `(..., h, w, d)` -> one descriptor `(..., d)`."""

from ggem_jax.pooling.dispatch import Implementation
from ggem_jax.pooling.maps import l2_normalize, regional_gem, relup, scale_gem, superglobal_pool
from ggem_jax.pooling.sign_rules import Negatives
from ggem_jax.pooling.tokens import (
    Layout,
    avg_pool,
    cls_pool,
    gem_pool,
    ggem_pool,
    lse_pool,
    max_pool,
    norm_ggem_pool,
    spread_over_channels,
)

__all__ = [
    "Implementation",
    "Layout",
    "Negatives",
    "avg_pool",
    "cls_pool",
    "gem_pool",
    "ggem_pool",
    "l2_normalize",
    "lse_pool",
    "max_pool",
    "norm_ggem_pool",
    "regional_gem",
    "relup",
    "scale_gem",
    "spread_over_channels",
    "superglobal_pool",
]
