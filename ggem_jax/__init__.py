"""Group generalized-mean pooling for Vision Transformers, image retrieval and their training, in
JAX.

`import ggem_jax` gives the names below. Each is loaded when it is first used, so that the import
itself is fast and starts no device:

- Poolings of tokens: `cls_pool`, `avg_pool`, `max_pool`, `lse_pool`, `gem_pool`, `ggem_pool`,
  `norm_ggem_pool`; of feature maps: `relup`, `regional_gem`, `superglobal_pool`; of descriptors:
  `scale_gem`, `l2_normalize`.
- Models: `ViT`, `ViTConfig`, `vit_config`, `load_vit`, and the poolings with parameters, `GGeM` and
  `MAP`.
- Training: `adamw`, with a learning rate of its own for exponents; the losses `arcface_loss`,
  `normalised_softmax_loss`, `proxy_anchor_loss`, `clip_loss`, `siglip_loss`, `sharded_clip_loss`,
  `sharded_siglip_loss`.
- Retrieval: `search`, `superglobal_rerank`, `alpha_query_expansion`, `average_query_expansion`,
  `augment_database`, `database_augmentation`, `Ranking`; `Extractor` and `DescriptorSettings`, for
  descriptors of images; `build_index` and `Index`, a searchable folder of images.

The subpackages `pooling`, `models`, `losses`, `weights`, `descriptors` and `retrieval`, and the
module `optimizer`, have the rest.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggem_jax import descriptors, losses, models, optimizer, pooling, retrieval, weights
    from ggem_jax.descriptors.extract import Extractor
    from ggem_jax.descriptors.settings import DescriptorSettings
    from ggem_jax.losses.contrastive import (
        clip_loss,
        sharded_clip_loss,
        sharded_siglip_loss,
        siglip_loss,
    )
    from ggem_jax.losses.metric_learning import (
        arcface_loss,
        normalised_softmax_loss,
        proxy_anchor_loss,
    )
    from ggem_jax.models.config import ViTConfig, vit_config
    from ggem_jax.models.token_pooling import MAP, GGeM
    from ggem_jax.models.vit import ViT
    from ggem_jax.optimizer import adamw
    from ggem_jax.pooling import (
        avg_pool,
        cls_pool,
        gem_pool,
        ggem_pool,
        l2_normalize,
        lse_pool,
        max_pool,
        norm_ggem_pool,
        regional_gem,
        relup,
        scale_gem,
        superglobal_pool,
    )
    from ggem_jax.retrieval import (
        Ranking,
        alpha_query_expansion,
        augment_database,
        average_query_expansion,
        database_augmentation,
        search,
        superglobal_rerank,
    )
    from ggem_jax.retrieval.index import Index, build_index
    from ggem_jax.weights.load import load_vit

__version__ = "0.1.0"

__all__ = [
    "MAP",
    "DescriptorSettings",
    "Extractor",
    "GGeM",
    "Index",
    "Ranking",
    "ViT",
    "ViTConfig",
    "adamw",
    "alpha_query_expansion",
    "arcface_loss",
    "augment_database",
    "average_query_expansion",
    "avg_pool",
    "build_index",
    "clip_loss",
    "cls_pool",
    "database_augmentation",
    "descriptors",
    "gem_pool",
    "ggem_pool",
    "l2_normalize",
    "load_vit",
    "losses",
    "lse_pool",
    "max_pool",
    "models",
    "norm_ggem_pool",
    "normalised_softmax_loss",
    "optimizer",
    "pooling",
    "proxy_anchor_loss",
    "regional_gem",
    "relup",
    "retrieval",
    "scale_gem",
    "search",
    "sharded_clip_loss",
    "sharded_siglip_loss",
    "siglip_loss",
    "superglobal_pool",
    "superglobal_rerank",
    "vit_config",
    "weights",
]

# module -> the public names that it defines; the other names are modules
_MODULES = {
    "descriptors.extract": ("Extractor",),
    "descriptors.settings": ("DescriptorSettings",),
    "losses.contrastive": ("clip_loss", "sharded_clip_loss", "sharded_siglip_loss", "siglip_loss"),
    "losses.metric_learning": ("arcface_loss", "normalised_softmax_loss", "proxy_anchor_loss"),
    "models.config": ("ViTConfig", "vit_config"),
    "models.token_pooling": ("MAP", "GGeM"),
    "models.vit": ("ViT",),
    "optimizer": ("adamw",),
    "pooling": (
        "avg_pool", "cls_pool", "gem_pool", "ggem_pool", "l2_normalize", "lse_pool", "max_pool",
        "norm_ggem_pool", "regional_gem", "relup", "scale_gem", "superglobal_pool",
    ),
    "retrieval": (
        "Ranking", "alpha_query_expansion", "augment_database", "average_query_expansion",
        "database_augmentation", "search", "superglobal_rerank",
    ),
    "retrieval.index": ("Index", "build_index"),
    "weights.load": ("load_vit",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # type checkers would take it to give every name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _MODULE_OF:
            try:
                value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            except ModuleNotFoundError as error:  # the rest of the library does without
                raise ModuleNotFoundError(
                    f"{__name__}.{name} needs {error.name}: pip install 'ggem-jax[retrieval]'",
                    name=error.name,
                ) from error
        else:
            value = importlib.import_module(f"{__name__}.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _BrokenLink(MetaPathFinder):
    """Explains the error where the link to the kernels is a text file: in a checkout from a zip
    file, or from git on Windows.
    """

    def find_spec(self, fullname, path=None, target=None) -> None:
        if fullname == "ggem_jax.kernels":
            raise ImportError(
                "ggem_jax/kernels must be a link to ../kernels but is a text file in this checkout:"
                " clone with git on a system with links (on Windows: git clone -c"
                " core.symlinks=true), or install the package with pip from a built wheel",
                name=fullname,
            )


if (Path(__file__).parent / "kernels").is_file():
    sys.meta_path.append(_BrokenLink())
