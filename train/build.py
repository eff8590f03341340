"""Models and poolings from a config."""

import functools
from collections.abc import Callable

from ggem_jax import pooling
from ggem_jax.kernels import launch
from ggem_jax.models.vit import MAP, GGeM, Pooling, ViT
from train.config import Config, Pool


@functools.cache
def build_pooling(pool: Pool) -> Pooling:
    """Returns the pooling function or module that a config names.

    Equal configs give the same object, because compiled steps are found by it.
    """
    known: dict[str, Callable[[], Pooling]] = {
        "cls": lambda: pooling.cls_pool,
        "avg": lambda: pooling.avg_pool,
        "relu-avg": lambda: lambda tokens: pooling.gem_pool(tokens, 1.0, negatives=pool.negatives),
        "max": lambda: pooling.max_pool,
        "lse": lambda: lambda tokens: pooling.lse_pool(tokens, pool.r),
        "gem": lambda: GGeM(groups=1, p_init=pool.p, negatives=pool.negatives),
        "ggem": lambda: GGeM(
            groups=pool.groups, p_init=pool.p, layout=pool.layout, negatives=pool.negatives
        ),
        "map": lambda: MAP(),
    }
    return known[pool.kind]()


def build_model(config: Config, num_classes: int) -> ViT:
    """Returns the Vision Transformer that a config describes.

    The final norm and the pooling share one kernel where a kernel runs here and can do that.

    Args:
        config: the settings of a run.
        num_classes: outputs of the head; 0 leaves the head out.
    """
    pool = build_pooling(config.pool)
    fused_norm = (
        isinstance(pool, GGeM)
        and pool.negatives != "shift"
        and config.model.pool_order == "norm-pool"
        and launch.runs_here()
    )
    return ViT(config.model, pool, num_classes, fused_norm=fused_norm)
