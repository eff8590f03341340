"""Pictures of any size -> unit descriptors: sizes, batches, `ggem_jax.descriptors.superglobal`,
whitening.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ggem_jax.descriptors.backbones import Network, load_network
from ggem_jax.descriptors.scales import SCALES
from ggem_jax.descriptors.settings import MOST_THIN, DescriptorSettings
from ggem_jax.descriptors.superglobal import WINDOW, superglobal_descriptors
from ggem_jax.descriptors.whitening import load_whitening, whiten
from ggem_jax.files.images import RGB, UnreadableImage, crop, normalise, resize

_WINDOW_BATCHES = 4  # batches of pictures that are looked through for equal sizes


class Extractor:
    """Makes descriptors: `extractor(pictures)` gives vectors in the order of the pictures,
    `extractor.describe(picture)` that of one.

    A call of a new size compiles (seconds for each scale), one of a known size does not. `batch`
    pictures of equal size go through the network together; by default one on a CPU, where more are
    slower, and 16 elsewhere.
    """

    def __init__(
        self,
        settings: DescriptorSettings | None = None,
        *,
        batch: int | None = None,
        network: Network | None = None,
    ):
        self.settings = settings or DescriptorSettings()
        if batch is not None and batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self.network = network or load_network(self.settings.backbone, self.settings.weights)
        self.whitening = (
            None if self.settings.whitening is None else load_whitening(self.settings.whitening)
        )
        self.batch = batch or (1 if jax.default_backend() == "cpu" else 16)

    def __call__(
        self, pictures: Iterable[RGB]
    ) -> Iterator[Float[np.ndarray, " d"] | UnreadableImage]:
        """A vector for each picture, or `UnreadableImage` in its place where it cannot have one."""
        pictures = iter(pictures)
        while window := list(
            itertools.islice(pictures, 1 if self.batch == 1 else _WINDOW_BATCHES * self.batch)
        ):
            yield from self._window(window)

    def describe(self, picture: RGB, box: Sequence[float] | None = None) -> Float[np.ndarray, " d"]:
        """The descriptor of a picture, or of the part in the box (x1, y1, x2, y2). Raises
        `UnreadableImage` where it cannot have one.
        """
        (vector,) = self([picture if box is None else crop(picture, box)])
        if isinstance(vector, UnreadableImage):
            raise vector
        return vector

    def _window(self, pictures):
        results: list = [None] * len(pictures)
        groups: dict[tuple[int, int], list[int]] = {}
        for i, picture in enumerate(pictures):
            try:
                size = fitted_size(
                    picture.shape[0],
                    picture.shape[1],
                    self.settings,
                    self.network.stride,
                    pads=self.network.pads,
                )
                groups.setdefault(size, []).append(i)
            except UnreadableImage as error:
                results[i] = error
        for size, own in groups.items():
            for start in range(0, len(own), self.batch):
                together = own[start : start + self.batch]
                padded = together + together[-1:] * (
                    self.batch - len(together)
                )  # so that a size has one program
                vectors = self._batch([resize(pictures[i], *size) for i in padded])
                for i, vector in zip(together, vectors[: len(together)], strict=True):
                    results[i] = vector
        return results

    def _batch(self, pictures):
        s, network = self.settings, self.network
        images = normalise(np.stack(pictures), mean=network.mean, std=network.std)
        output = superglobal_descriptors(
            network.model,
            network.variables,
            jnp.asarray(images),
            scales=SCALES[s.scales],
            gemp=s.pooling == "gem+",
            rgem=s.regional,
            sgem=s.scale_gem,
            relup=s.relup,
            antialias=s.antialias,
            pooling=s.pooling if s.pooling in ("average", "max") else None,
        )
        descriptors = np.asarray(output.descriptor)
        return descriptors if self.whitening is None else whiten(descriptors, self.whitening)


def fitted_size(
    height: int, width: int, settings: DescriptorSettings, stride: int, *, pads: bool = False
) -> tuple[int, int]:
    """The size (height, width) in pixels that a picture is resized to, as `DescriptorSettings`
    tells. `UnreadableImage` for one that is too thin.

    `stride` and `pads` as in `Network`: what pads can take smaller pictures as they are.
    """
    if max(height, width) > MOST_THIN * min(height, width):
        raise UnreadableImage(
            f"a picture of {width} x {height} pixels is too thin for a descriptor: one side is over"
            f" {MOST_THIN} times the other"
        )
    places = WINDOW // 2 + 1 if settings.regional else 1
    least = math.ceil(places * stride / min(SCALES[settings.scales]))
    if settings.sizes == "exact":
        if pads:
            least = math.ceil(((places - 1) * stride + 1) / min(SCALES[settings.scales]))
        zoom = (
            min(settings.longest_side / max(height, width), 1.0) if settings.longest_side else 1.0
        )
        zoom = max(zoom, least / min(height, width))
        return max(round(height * zoom), least), max(round(width * zoom), least)
    longest = max(settings.longest_side // stride, math.ceil(least / stride)) * stride
    zoom = longest / max(height, width)
    return tuple(
        max(round(side * zoom / stride), math.ceil(least / stride)) * stride
        for side in (height, width)
    )  # type: ignore[return-value]
