"""Converts packed images to class sub-folders and to a TensorFlow Datasets data set.

    python -m train.prepare PACKED OUT

PACKED is a folder with one of

- `*train*.npz` and `*test*.npz` with `jpeg_bytes`, `offsets`, `labels` and `class_names` (joined
  JPEG files, as for CIFAR-10);
- one `.npz` with `train_images`, `train_labels`, `test_images`, `test_labels` (as for
  Fashion-MNIST);
- one `.zip` with image files `SPLIT/CLASS/*`, SPLIT being train and val or test (as for
  Imagenette).

It writes `OUT/folder/SPLIT/CLASS/INDEX.png` and `OUT/tfds/NAME/1.0.0/`. Both are lossless and keep
the order of the images in their split, so that `--data folder:OUT/folder` and `--data tfds:NAME
--data-dir OUT/tfds` train on the same batches.
"""

import contextlib
import io
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from tyro.conf import Positional, arg

from ggem_jax.files.images import EXTENSIONS, RGB, UnreadableImage, read_image
from train.cli import Refused, first_line, one_sentence, parse

# Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017, arXiv:1708.07747, table 2; the packed file holds
# the numbers only.
FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

MARK = ".made_by_train_prepare"  # in the folders that may be replaced

Split = list[tuple[Callable[[], RGB], int]]  # how to get each image, and its label


@dataclass(frozen=True)
class Prepare:
    """Converts packed images to class sub-folders and to a TensorFlow Datasets data set."""

    packed: Positional[Path]  # folder with the packed files
    out: Positional[Path]  # folder to write to
    # name of the TFDS data set; None: that of the packed folder, with _ for -
    name: str | None = None
    # what to write
    formats: Annotated[Literal["both", "folder", "tfds"], arg(aliases=["--format"])] = "both"
    limit: int | None = None  # most images of each split, evenly spaced; None: all


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    with one_sentence("train.prepare"):
        for line in prepare(parse(Prepare, argv, "train.prepare")):
            print(line)


def prepare(config: Prepare) -> list[str]:
    """Writes the data set and returns the lines that say how to train on it.

    Args:
        config: The packed folder, the folder to write to, and the formats.

    Raises:
        Refused: The packed files cannot be read, or the data set cannot be written.
    """
    classes, splits = read_packed(config.packed.expanduser())
    if config.limit is not None:
        splits = {split: evenly_spaced(images, config.limit) for split, images in splits.items()}
    classes = folder_names(classes)
    check(classes, splits)
    name = config.name or re.sub("[^a-z0-9]+", "_", config.packed.resolve().name.lower()).strip("_")
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise Refused(
            f"the name of a data set must be letters a to z, digits and _, not {name!r}: choose one"
            " with --name"
        )
    out, said = config.out.expanduser(), []
    try:
        if config.formats in ("both", "folder"):
            write_folder(out / "folder", classes, splits)
            said.append(f"--data folder:{out / 'folder'}")
        if config.formats in ("both", "tfds"):
            write_tfds(out / "tfds", name, classes, splits)
            said.append(f"--data tfds:{name} --data-dir {out / 'tfds'}")
    except UnreadableImage as error:
        raise Refused(str(error)) from None
    except RuntimeError as error:  # of the record writer, on a full disk
        raise Refused(
            f"the data set could not be written to {out}: {first_line(error, 'no reason given')}"
        ) from None
    counts = ", ".join(f"{split} {len(images):,}" for split, images in splits.items())
    return [
        f"{len(classes)} classes; {counts} images",
        *(f"train on it with  python -m train.classify {flags}" for flags in said),
    ]


def check(classes: tuple[str, ...], splits: dict[str, Split]) -> None:
    """Raises `Refused` for labels without a class, and classes without images.

    Args:
        classes: Names of the classes, by label.
        splits: The images of each split with their labels.

    Raises:
        Refused: A split is empty, has an unknown label, or lacks a class.
    """
    for split, images in splits.items():
        wrong = next(
            ((i, label) for i, (_, label) in enumerate(images) if not 0 <= label < len(classes)),
            None,
        )
        if wrong is not None or not images:
            reason = (
                "is empty"
                if wrong is None
                else (
                    f"has the label {wrong[1]} for image {wrong[0]}, where 0 to"
                    f" {len(classes) - 1} are classes"
                )
            )
            raise Refused(f"the split {split} {reason}")
        missing = set(range(len(classes))) - {label for _, label in images}
        if missing:
            names = ", ".join(classes[label] for label in sorted(missing))
            raise Refused(
                f"the split {split} holds no images of {names}: every class needs some (a larger"
                " --limit keeps more)"
            )


def evenly_spaced(images: Split, limit: int) -> Split:
    """Returns at most `limit` evenly spaced images.

    Of images that are sorted by class it takes some of every class.

    Args:
        images: A split.
        limit: The most images that are taken, at least 1.

    Raises:
        Refused: The limit is below 1.
    """
    if limit < 1:
        raise Refused(f"--limit must be at least 1, it is {limit}")
    return [
        images[i]
        for i in np.unique(
            np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int)
        )
    ]


def read_packed(packed: Path) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Returns the classes and the splits of a folder with packed images, whatever its form.

    Args:
        packed: The folder, in one of the forms of the module's docstring.

    Returns:
        Names of the classes by label, and images with their labels by the name of the split.

    Raises:
        Refused: The folder has none of the forms, or its files are damaged.
    """
    if not packed.is_dir():
        raise Refused(f"there is no folder {packed}")
    archives, zips = sorted(packed.glob("*.npz")), sorted(packed.glob("*.zip"))
    if len(archives) == 1:
        return _array_splits(archives[0])
    if archives:
        return _jpeg_splits(archives)
    if len(zips) == 1:
        return _zip_splits(zips[0])
    raise Refused(
        f"{packed} holds neither .npz files nor one .zip file (there:"
        f" {', '.join(sorted(p.name for p in packed.iterdir())) or 'nothing'})"
    )


def _array_splits(path: Path) -> tuple[tuple[str, ...], dict[str, Split]]:
    arrays = _load(path, "train_images", "train_labels", "test_images", "test_labels")
    for which in ("train", "test"):
        images, labels = arrays[f"{which}_images"], arrays[f"{which}_labels"]
        grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
        if (
            images.dtype != np.uint8
            or not grey_or_rgb
            or labels.dtype.kind not in "iu"
            or labels.shape != images.shape[:1]
            or not len(labels)
        ):
            raise Refused(
                f"{path}: {which}_images must be uint8 (n, h, w) or (n, h, w, 3) and {which}_labels"
                f" whole numbers (n,), not {images.dtype} {images.shape} and {labels.dtype}"
                f" {labels.shape}"
            )
    count = 1 + max(int(arrays[f"{split}_labels"].max()) for split in ("train", "test"))
    numbers = tuple(f"{i:0{len(str(count - 1))}d}" for i in range(count))
    names = FASHION_MNIST if "fashion" in path.name and count == len(FASHION_MNIST) else numbers

    def split(which: str) -> Split:
        images = arrays[f"{which}_images"]
        if images.ndim == 3:
            images = np.repeat(images[..., None], 3, axis=-1)
        return [
            (partial(images.__getitem__, i), int(label))
            for i, label in enumerate(arrays[f"{which}_labels"])
        ]

    return names, {which: split(which) for which in ("train", "test")}


def _jpeg_splits(paths: list[Path]) -> tuple[tuple[str, ...], dict[str, Split]]:
    splits: dict[str, Split] = {}
    classes: set[tuple[str, ...]] = set()
    for which in ("train", "test"):
        found = [path for path in paths if which in path.name]
        if len(found) != 1:
            raise Refused(
                f"of {', '.join(path.name for path in paths)} exactly one must have '{which}' in"
                " its name"
            )
        arrays = _load(found[0], "jpeg_bytes", "offsets", "labels", "class_names")
        kinds, labels, offsets = arrays["class_names"], arrays["labels"], arrays["offsets"]
        if (
            kinds.ndim != 1
            or any(a.ndim != 1 or a.dtype.kind not in "iu" for a in (labels, offsets))
            or len(offsets) != len(labels) + 1
        ):
            raise Refused(
                f"{found[0]} must hold class_names (classes,), whole labels (n,) and whole offsets"
                f" (n + 1,), not {kinds.shape}, {labels.dtype} {labels.shape} and {offsets.dtype}"
                f" {offsets.shape}"
            )
        classes.add(tuple(map(str, kinds)))
        files = arrays["jpeg_bytes"].tobytes()

        names = [f"image {i} of {found[0].name}" for i in range(len(offsets) - 1)]
        cuts = [files[start:end] for start, end in pairwise(offsets)]
        splits[which] = [
            (partial(read_image, file, name=name), int(label))
            for file, name, label in zip(cuts, names, labels, strict=True)
        ]
    if len(classes) != 1:
        raise Refused(f"{' and '.join(path.name for path in paths)} have different classes")
    return classes.pop(), splits


def _zip_splits(path: Path) -> tuple[tuple[str, ...], dict[str, Split]]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise Refused(f"{path} cannot be read as .zip: {error}") from None
    members: dict[str, list[tuple[str, str]]] = {}  # split -> (class, name in the archive)
    for name in sorted(archive.namelist()):
        parts = Path(name).parts
        if len(parts) >= 3 and parts[0] != "__MACOSX" and Path(name).suffix.lower() in EXTENSIONS:
            members.setdefault(parts[-3], []).append((parts[-2], name))
    if "train" not in members or not members.keys() & {"val", "test"}:
        raise Refused(f"{path} holds no images under train/CLASS and val/CLASS or test/CLASS")
    classes = tuple(sorted({kind for split in members.values() for kind, _ in split}))

    def image(name: str) -> RGB:
        try:
            file = archive.read(name)
        except (
            OSError,
            RuntimeError,
            NotImplementedError,
            EOFError,
            zlib.error,
            zipfile.BadZipFile,
        ) as error:
            raise UnreadableImage(f"{name} in {path} cannot be read: {error}") from None
        return read_image(file, name=name)

    return classes, {
        split: [(partial(image, name), classes.index(kind)) for kind, name in found]
        for split, found in members.items()
    }


def _load(path: Path, *keys: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return {key: arrays[key] for key in keys}
    except KeyError:
        with np.load(path) as arrays:
            raise Refused(
                f"{path} must hold {', '.join(keys)}, not {', '.join(arrays.files)}"
            ) from None
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise Refused(f"{path} cannot be read as .npz: {error}") from None


def folder_names(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns class names that a file system takes and that sort in the order of the labels.

    They are numbered where the names themselves do not sort so.

    Args:
        classes: Names of the classes, by label.
    """
    safe = tuple(re.sub(r"[^\w.-]+", "-", name).strip("-.") for name in classes)
    if sorted(safe) == list(safe) and len(set(safe)) == len(safe):
        return safe
    return tuple(f"{i:0{len(str(len(safe) - 1))}d}-{name}" for i, name in enumerate(safe))


def write_folder(root: Path, classes: tuple[str, ...], splits: dict[str, Split]) -> None:
    """Writes `root/SPLIT/CLASS/INDEX.png`; files of an earlier call are replaced at the end.

    Args:
        root: The folder; one that exists must be empty or made by this script.
        classes: Names of the sub-folders, by label.
        splits: The images with their labels, by the name of the split.

    Raises:
        Refused: The folder holds other files.
        UnreadableImage: A packed image cannot be decoded.
    """
    with _in_place_of(root, made_if=MARK) as new:
        for split, images in splits.items():
            for name in classes:
                (new / split / name).mkdir(parents=True)
            for index, (image, label) in enumerate(images):
                (new / split / classes[label] / f"{index:08d}.png").write_bytes(png(image()))
        (new / MARK).touch()


def write_tfds(
    data_dir: Path, name: str, classes: tuple[str, ...], splits: dict[str, Split]
) -> None:
    """Writes `data_dir/name/1.0.0` with the features image, label and index.

    A data set that this script made before is replaced.

    Args:
        data_dir: Folder of TFDS data sets.
        name: Name of the data set.
        classes: Names of the classes, by label.
        splits: The images with their labels, by the name of the split.

    Raises:
        Refused: The folder holds other files.
        UnreadableImage: A packed image cannot be decoded.
    """
    import tensorflow_datasets as tfds

    class PackedImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=classes),
                "index": tfds.features.Scalar(dtype=np.int64),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(images) for split, images in splits.items()}

        def _generate_examples(self, images):
            for index, (image, label) in enumerate(images):
                yield index, {"image": io.BytesIO(png(image())), "label": label, "index": index}

    PackedImages.name = name
    tfds.disable_progress_bar()
    with _in_place_of(data_dir / name, made_if="1.0.0/dataset_info.json") as new:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports a download, and there is none
            PackedImages(
                data_dir=str(new / "there"), file_format="array_record"
            ).download_and_prepare()
        (new / "there" / name / "1.0.0").rename(new / "1.0.0")
        shutil.rmtree(new / "there")


@contextlib.contextmanager
def _in_place_of(folder: Path, *, made_if: str) -> Iterator[Path]:
    """Gives a new folder that takes the place of `folder` when the block ends.

    A folder that exists must be empty or hold the file `made_if`, which shows that this script made
    it.
    """
    if (
        folder.exists()
        and not (folder / made_if).exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise Refused(f"{folder} holds files that this script did not make: choose another OUT")
    new, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def png(image: RGB) -> bytes:
    """Returns an image as a PNG file.

    Args:
        image: The image, `(height, width, 3)` uint8.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


if __name__ == "__main__":
    main()
