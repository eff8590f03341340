"""Real images: the packed data sets of the shared folder through both readers."""

import numpy as np
import pytest
from conftest import TINY

from ggem_jax.files.images import read_image
from train import classify, prepare
from train.batches import train_batches
from train.cli import load_config
from train.config import Config
from train.data import open_data
from train.folders import folder
from train.log import read_metrics

pytestmark = pytest.mark.golden

SETS = {"fashion-mnist": 28, "cifar10-jpeg": 32, "imagenette-224-mini": 224}


@pytest.fixture(params=SETS)
def packed(request, shared):
    folder = shared / "data" / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


def test_folder_and_tfds_train_on_the_same_batches_to_the_same_metrics(packed, tmp_path):
    """320 images of each set: bit-identical batches, hence identical losses and accuracies."""
    prepare.main([str(packed), str(tmp_path), "--limit", "320"])
    side = SETS[packed.name]
    name = packed.name.replace("-", "_")
    flags = [*TINY, "--epochs", "0.5", "--model.image", str(side), "--model.patch", str(side // 4),
    "--log-every", "1", "--augment.crop", "resized",
             "--augment.flip", "--augment.randaugment-ops", "2"]  # fmt: skip
    sources = {
        "folder": ["--data", f"folder:{tmp_path}/folder"],
        "tfds": ["--data", f"tfds:{name}", "--data-dir", f"{tmp_path}/tfds"],
    }
    configs = {
        kind: load_config(Config, [*flags, *source, "--out", str(tmp_path / f"run-{kind}")], "test")
        for kind, source in sources.items()
    }
    opened = {kind: open_data(config.data) for kind, config in configs.items()}
    assert opened["folder"][0].classes == opened["tfds"][0].classes
    streams = [train_batches(opened[kind][0], config, start=0) for kind, config in configs.items()]
    for _ in range(3):
        one, other = (next(stream) for stream in streams)
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    for kind, source in sources.items():
        classify.main([*flags, *source, "--out", str(tmp_path / f"run-{kind}")])
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / f"run-{kind}", "train")]
        for kind in sources
    ]
    assert losses[0] == losses[1]
    assert read_metrics(tmp_path / "run-folder", "eval") == read_metrics(
        tmp_path / "run-tfds", "eval"
    )


def test_prepared_cifar_images_are_the_packed_ones(shared, tmp_path):
    """The files in the packed archive, decoded here by hand, are the images of the prepared
    folder, label by label.
    """
    packed = shared / "data" / "cifar10-jpeg"
    if not packed.is_dir():
        pytest.skip(f"{packed} is absent")
    prepare.main([str(packed), str(tmp_path), "--limit", "50", "--format", "folder"])
    (path,) = packed.glob("*test*.npz")
    with np.load(path) as arrays:
        files, offsets, labels, names = (
            arrays[key] for key in ("jpeg_bytes", "offsets", "labels", "class_names")
        )
    images = folder(tmp_path / "folder")["eval"]
    for i, original in enumerate(np.linspace(0, len(labels) - 1, 50).round().astype(int)):
        image, label = images.load(i)
        np.testing.assert_array_equal(
            image, read_image(files[offsets[original] : offsets[original + 1]].tobytes())
        )
        assert images.classes[label].endswith(str(names[labels[original]]))
