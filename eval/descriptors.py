"""Descriptors for evaluations: one image under several poolings at the cost of one pass."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggem_jax.descriptors.backbones import Network
from ggem_jax.descriptors.compiled import plain_pooling
from ggem_jax.descriptors.extract import Extractor
from ggem_jax.descriptors.scales import SCALES
from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.descriptors.superglobal import (
    compute_map,
    describe_map,
    join_scales,
    rescale_compiled,
)
from ggem_jax.files.images import RGB, UnreadableImage, crop, read_image
from ggem_jax.progress import track
from train.cli import Refused

# Poolings that evaluations compare; scales and Regional GeM go with GeM+, as in SuperGlobal.
POOLINGS: dict[str, dict[str, Any]] = {
    "average": {"pooling": "average", "regional": False, "scales": 1, "scale_gem": False},
    "max": {"pooling": "max", "regional": False, "scales": 1, "scale_gem": False},
    "GeM": {"pooling": "gem", "regional": False, "scales": 1, "scale_gem": False},
    "GeM+": {"pooling": "gem+", "regional": False, "scales": 1, "scale_gem": False},
    "regional": {"pooling": "gem+", "regional": True, "scales": 1, "scale_gem": False},
    "scale": {"pooling": "gem+", "regional": False, "scales": 3, "scale_gem": True},
    "all": {"pooling": "gem+", "regional": True, "scales": 3, "scale_gem": True},
}


def vary_pooling(settings: DescriptorSettings) -> dict[str, DescriptorSettings]:
    """Returns the settings under each pooling of `POOLINGS`, by name.

    Args:
        settings: Settings that the poolings share. Their own pooling, regional, scales and
            scale_gem are replaced.
    """
    return {name: dataclasses.replace(settings, **changes) for name, changes in POOLINGS.items()}


class SharedExtractor(Extractor):
    """Descriptors of several settings, `(settings, d)` for each image.

    The network runs once at each scale. The settings may differ in pooling, regional, scales and
    scale_gem. All of them see an image of the size that the most demanding one needs.

    Args:
        settings: Settings of the descriptors, at least one.
        batch: Images of equal size that go through the network together. None: as in `Extractor`.
        network: The backbone. None loads that of the settings.

    Raises:
        ValueError: The settings differ in something else, or have a whitening.
        ModuleNotFoundError: The weights of EfficientNet-Lite0 are not installed.
    """

    def __init__(
        self,
        settings: Sequence[DescriptorSettings],
        *,
        batch: int | None = None,
        network: Network | None = None,
    ):
        self.each = tuple(settings)
        regional = any(each.regional for each in self.each)
        scales = max(each.scales for each in self.each)
        largest = dataclasses.replace(self.each[0], regional=regional, scales=scales)
        free: dict[str, Any] = {
            name: getattr(largest, name) for name in ("pooling", "regional", "scales", "scale_gem")
        }
        if any(dataclasses.replace(each, **free) != largest for each in self.each):
            raise ValueError(
                "settings that share a network may differ in pooling, regional, scales and"
                " scale_gem only"
            )
        if largest.whitening is not None:
            raise ValueError("a whitening is of one pooling and cannot be shared by several")
        super().__init__(largest, batch=batch, network=network)

    def _batch(self, images):
        model, variables = self.network.model, self.network.variables
        inputs = self.network.normalise(images)
        if not self.settings.relup and hasattr(model, "config") and hasattr(model.config, "relup"):
            model = model.clone(config=dataclasses.replace(model.config, relup=None))
        scales = sorted({scale for each in self.each for scale in SCALES[each.scales]})
        maps = {
            scale: compute_map(
                model, variables, rescale_compiled(inputs, scale, self.settings.antialias)
            )
            for scale in scales
        }
        return np.asarray(_pool_maps(model, variables, maps, self.each))


@partial(jax.jit, static_argnums=(0, 3))
def _pool_maps(model, variables, maps, each):
    """Maps by scale -> descriptors `(b, settings, d)`; shared steps are computed once."""
    made: dict[tuple, Any] = {}
    descriptors = []
    for settings in each:
        options: dict[str, Any] = {
            "gemp": settings.pooling == "gem+",
            "rgem": settings.regional,
            "pooling": plain_pooling(settings),
        }
        for scale in SCALES[settings.scales]:
            key = (scale, *options.values())
            if key not in made:
                made[key] = describe_map(model, variables, maps[scale], **options)
        by_scale = jnp.stack([made[scale, *options.values()] for scale in SCALES[settings.scales]])
        descriptors.append(join_scales(by_scale, sgem=settings.scale_gem)[1])
    return jnp.stack(descriptors, axis=1)


def make_extractor(settings: DescriptorSettings | Sequence[DescriptorSettings]) -> Extractor:
    """Returns an extractor of one or several settings.

    Args:
        settings: One record for vectors `(d,)`, or several for `(settings, d)` as `SharedExtractor`
            takes them.

    Raises:
        Refused: The settings do not fit, or the weights are missing.
    """
    try:
        return (
            Extractor(settings)
            if isinstance(settings, DescriptorSettings)
            else SharedExtractor(settings)
        )
    except (ValueError, ModuleNotFoundError) as error:
        raise Refused(str(error)) from None


def describe_images(
    extractor: Extractor, images: Iterable[RGB], names: Sequence[str], what: str
) -> np.ndarray:
    """Returns the descriptors of images, `(n, d)` or `(n, settings, d)`.

    Args:
        extractor: An extractor, as `make_extractor` returns it.
        images: Images `(h, w, 3)` uint8, one for each name; they are read one after the other.
        names: Names of the images, for errors.
        what: Description of the progress bar.

    Raises:
        Refused: An image cannot be read or described.
    """
    vectors = []
    for name, vector in zip(
        names, track(_refuse_unreadable(extractor(images)), len(names), what), strict=True
    ):
        if isinstance(vector, UnreadableImage):
            raise Refused(f"{name} cannot be described: {vector}")
        vectors.append(vector)
    return np.stack(vectors)


def _refuse_unreadable(vectors: Iterator) -> Iterator:
    try:
        yield from vectors
    except UnreadableImage as error:  # while an image was read
        raise Refused(str(error)) from None


def read_crop(path: Path, box: Sequence[float] | None) -> RGB:
    """Returns an image, or the part of it inside a box, `(h, w, 3)` uint8.

    Args:
        path: File of the image.
        box: Corners (x1, y1, x2, y2) in pixels. None takes the whole image.

    Raises:
        Refused: The image cannot be read, or no part of it is inside the box.
    """
    try:
        image = read_image(path)
        return image if box is None else crop(image, box)
    except UnreadableImage as error:
        raise Refused(str(error)) from None
    except ValueError as error:
        raise Refused(f"{path}: {error}") from None
