"""Images of any size -> unit descriptors: sizes, batches, SuperGlobal's descriptor, whitening."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float

from ggem_jax.descriptors.compiled import CompiledDescriptor
from ggem_jax.descriptors.scales import SCALES, WINDOW
from ggem_jax.descriptors.settings import MOST_THIN, DescriptorSettings
from ggem_jax.descriptors.whitening import load_whitening, whiten
from ggem_jax.files.images import RGB, UnreadableImage, crop, normalise, resize

if TYPE_CHECKING:
    from ggem_jax.descriptors.backbones import Network

_WINDOW_BATCHES = 4  # batches of images that are searched for equal sizes


class Extractor:
    """Makes descriptors of images.

    `extractor(images)` gives one vector `(d,)` for each image, in the order of the images, and
    `extractor.describe(image)` that of one. The first image of a new size compiles (seconds for
    each scale). Where JAX's compilation cache is on, later processes load what this one compiled,
    unless `network` is given.

    Args:
        settings: How an image becomes a descriptor; None takes the defaults.
        batch: Number of images of equal size that go through the network together. None takes one
            on a CPU, where more are slower, and 16 elsewhere.
        network: A network to use instead of the one that the settings name; None loads that one.

    Raises:
        ValueError: The weights cannot be read or do not fit, or `batch` is below 1.
        ModuleNotFoundError: The weights of EfficientNet-Lite0 are not installed.

    Example:
        >>> import flax.linen as nn, jax, numpy as np
        >>> from ggem_jax.descriptors.backbones import Network
        >>> from ggem_jax.descriptors.extract import DescriptorSettings, Extractor
        >>> conv = nn.Conv(8, (32, 32), (32, 32))
        >>> variables = conv.init(jax.random.key(0), np.zeros((1, 32, 32, 3)))
        >>> network = Network(conv, variables, mean=(0.5,) * 3, std=(0.5,) * 3, stride=32)
        >>> extractor = Extractor(DescriptorSettings(scales=1), network=network)
        >>> extractor.describe(np.zeros((160, 200, 3), np.uint8)).shape
        (8,)
    """

    def __init__(
        self,
        settings: DescriptorSettings | None = None,
        *,
        batch: int | None = None,
        network: "Network | None" = None,
    ):
        self.settings = s = settings or DescriptorSettings()
        if batch is not None and batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self._descriptor = CompiledDescriptor(s, network)
        self.whitening = None if s.whitening is None else load_whitening(s.whitening)
        self.batch = batch or (1 if jax.default_backend() == "cpu" else 16)

    @property
    def network(self) -> "Network":
        """The network, which is loaded when it is first needed."""
        return self._descriptor.network

    def __call__(
        self, images: Iterable[RGB]
    ) -> Iterator[Float[np.ndarray, " d"] | UnreadableImage]:
        """Yields a vector `(d,)` for each image, or `UnreadableImage` where it cannot have one.

        Args:
            images: Images of any sizes, `(height, width, 3)` uint8 each.
        """
        images = iter(images)
        ahead = 1 if self.batch == 1 else _WINDOW_BATCHES * self.batch
        while window := list(itertools.islice(images, ahead)):
            yield from self._describe_window(window)

    def fit(self, height: int, width: int) -> tuple[int, int] | None:
        """Returns the height and width that an image is resized to, pixels.

        Args:
            height, width: Sides of the image, pixels.

        Returns:
            The sides, or None where an image of these sides would be resized once more.

        Raises:
            UnreadableImage: The image is too thin for a descriptor.
        """
        size = self._fitted(height, width)
        try:
            return size if self._fitted(*size) == size else None
        except UnreadableImage:  # by rounding
            return None

    def describe(self, image: RGB, box: Sequence[float] | None = None) -> Float[np.ndarray, " d"]:
        """Returns the descriptor `(d,)` of an image, or of a part of it.

        Args:
            image: The image, `(height, width, 3)` uint8.
            box: The part as x1, y1, x2, y2 in pixels; None takes the whole image.

        Returns:
            A vector of length 1, `(d,)`.

        Raises:
            UnreadableImage: The image or its part is too thin for a descriptor.
            ValueError: The box is not four numbers, or no pixel of the image is inside it.
        """
        (vector,) = self([image if box is None else crop(image, box)])
        if isinstance(vector, UnreadableImage):
            raise vector
        return vector

    def _describe_window(self, images):
        results: list = [None] * len(images)
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            try:
                height, width, _ = image.shape
                groups.setdefault(self._cut_size(self._fitted(height, width)), []).append(i)
            except UnreadableImage as error:
                results[i] = error
        for own in groups.values():
            for start in range(0, len(own), self.batch):
                together = own[start : start + self.batch]
                # the last image is repeated, so that a size has one program
                padded = together + together[-1:] * (self.batch - len(together))
                vectors = self._batch([self._resize(images[i]) for i in padded])
                for i, vector in zip(together, vectors[: len(together)], strict=True):
                    results[i] = vector
        return results

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        """The size that an image is resized to."""
        takes = self._descriptor.takes
        if takes.preprocessing is not None:
            check_not_thin(height, width)
            return takes.preprocessing.size(height, width)
        return fitted_size(height, width, self.settings, takes.stride, pads=takes.pads)

    def _cut_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of what the network sees of an image that is resized."""
        how = self._descriptor.takes.preprocessing
        return size if how is None else (how.side, how.side)

    def _resize(self, image: RGB) -> RGB:
        """What the network sees of an image."""
        how = self._descriptor.takes.preprocessing
        image = resize(image, *self._fitted(*image.shape[:2]))
        return image if how is None else how.cut(image)

    def _batch(self, images):
        takes = self._descriptor.takes
        descriptors = self._descriptor(normalise(np.stack(images), mean=takes.mean, std=takes.std))
        return descriptors if self.whitening is None else whiten(descriptors, self.whitening)


def fitted_size(
    height: int, width: int, settings: DescriptorSettings, stride: int, *, pads: bool = False
) -> tuple[int, int]:
    """Returns the size (height, width) in pixels that an image is resized to.

    Args:
        height, width: Sides of the image, pixels.
        settings: The settings of a descriptor; `sizes` and `longest_side` are described in
            `DescriptorSettings`.
        stride: Pixels along one side of a place of the map, as in `Network`.
        pads: Whether the network pads at the border, as in `Network`; such networks take smaller
            images as they are.

    Raises:
        UnreadableImage: The aspect ratio is too large for a descriptor.
    """
    check_not_thin(height, width)
    if settings.pooling == "clip":
        return stride, stride  # the one place of the map is the square that the network takes
    places = WINDOW // 2 + 1 if settings.regional else 1
    least = math.ceil(places * stride / min(SCALES[settings.scales]))
    if settings.sizes == "exact":
        if pads:
            least = math.ceil(((places - 1) * stride + 1) / min(SCALES[settings.scales]))
        longest = settings.longest_side
        zoom = min(longest / max(height, width), 1.0) if longest else 1.0
        zoom = max(zoom, least / min(height, width))
        return max(round(height * zoom), least), max(round(width * zoom), least)
    least_strides = math.ceil(least / stride)
    zoom = max(settings.longest_side // stride, least_strides) * stride / max(height, width)
    rows, columns = (max(round(side * zoom / stride), least_strides) for side in (height, width))
    return rows * stride, columns * stride


def check_not_thin(height: int, width: int) -> None:
    """Raises `UnreadableImage` for an image that is too thin for a descriptor.

    Args:
        height, width: Sides of the image, pixels.

    Raises:
        UnreadableImage: The aspect ratio is above 16:1.
    """
    if max(height, width) > MOST_THIN * min(height, width):
        raise UnreadableImage(
            f"an image of {width} x {height} pixels is too thin for a descriptor: its aspect ratio"
            f" is above {MOST_THIN}:1"
        )
