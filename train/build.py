"""Builds models and poolings from the settings of a run."""

import functools

from ggem_jax.kernels import launch
from ggem_jax.models.token_pooling import named_pooling
from ggem_jax.models.vit import GGeM, Pooling, ViT
from train.config import Config, Pool


@functools.cache
def build_pooling(pool: Pool) -> Pooling:
    """Returns the pooling function or module that a config names.

    Equal configs give the same object, because compiled steps are cached by it.

    Args:
        pool: The settings of the pooling.
    """
    return named_pooling(
        pool.kind,
        groups=pool.groups,
        p=pool.p,
        r=pool.r,
        layout=pool.layout,
        negatives=pool.negatives,
    )


def build_model(config: Config, num_classes: int) -> ViT:
    """Returns the Vision Transformer that a config describes.

    The final norm and the pooling share one kernel where a kernel runs here and can do that.

    Args:
        config: The settings of a run.
        num_classes: Outputs of the head; 0 leaves the head out.
    """
    pool = build_pooling(config.pool)
    fused_norm = (
        isinstance(pool, GGeM)
        and pool.negatives != "shift"
        and config.model.pool_order == "norm-pool"
        and launch.runs_here()
    )
    return ViT(config.model, pool, num_classes, fused_norm=fused_norm)
