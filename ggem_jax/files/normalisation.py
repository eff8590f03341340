"""How channels are normalised, and the mean and deviation that published networks do it with.

The numbers are for channels in [0, 1], in the order red, green, blue. Nothing here needs an image
library.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Channels = tuple[float, float, float]
Normalisation = tuple[Channels, Channels]  # mean, which is subtracted; deviation, which divides

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)  # as torchvision and timm normalise ImageNet
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
IMAGENET: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)
HALF: Normalisation = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # Inception's; Google's ViTs and SigLIP
SAT493M: Normalisation = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # DINOv3's README
OPENAI: Normalisation = (  # github.com/openai/CLIP, clip.py
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


def normalise_pixels(pixels: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Returns (pixel / 255 - mean) / std of each channel, in float32.

    Args:
        pixels: Images, `(..., 3)` uint8, of NumPy or JAX.
        mean: Mean of red, green and blue in [0, 1].
        std: Standard deviation of red, green and blue.
    """
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
