"""Images with captions: `csv:FILE`, `wds:PATTERN`, or classes whose names become captions.

- `csv:FILE`: a header and the columns image (a path relative to the file's folder) and caption,
  or those that `--image-key` and `--caption-key` name (`train.tables`). Rows with the same path are
  one image with several captions.
- `wds:PATTERN`: tar files in WebDataset's form, `shard-{000..012}.tar` or a glob. The members of a
  pair share their name up to the ending: that of an image, and .txt (the caption) or .json with
  "caption". They are read where they lie, by an index that is built when the run starts.
- any other source is one of `train.data`.

`--data.eval-split` names another file or pattern to evaluate on; without it, `--data.holdout` of
the images are kept for evaluation. Nothing is unpickled.
"""

import itertools
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ggem_jax.files.images import RGB, Choose, UnreadableImage, read_image
from ggem_jax.retrieval.index.folder import ENDINGS
from train.captions import (
    Captioned,
    Text,
    choose_class_words,
    choose_templates,
    make_captioned,
    of_classes,
)
from train.cli import Refused
from train.config import Data
from train.data import KNOWN as KNOWN_CLASSES
from train.data import draw_held_out, open_data
from train.images import Images, Stored, stored_file
from train.tables import CAPTION_KEYS, IMAGE_KEYS, check_complete, read_table

KNOWN = f"{KNOWN_CLASSES}, wds:PATTERN"
MOST_SHARDS = 1_000_000
IMAGE_ENDINGS = tuple(ending.removeprefix(".") for ending in ENDINGS)


def open_captions(data: Data, text: Text) -> tuple[Captioned, Captioned]:
    """Returns the training and the evaluation images of a source, with their captions.

    Args:
        data: The settings of the source and its splits.
        text: The settings of captions that are made of class names.

    Raises:
        Refused: The source cannot be read, or its settings do not fit it.
    """
    kind, _, name = data.source.partition(":")
    if kind not in ("csv", "wds"):
        try:
            splits = open_data(data)
        except Refused as error:
            raise Refused(
                str(error).replace(f"known are {KNOWN_CLASSES}", f"known are {KNOWN}")
            ) from None
        if splits[0].several:
            raise Refused(
                f"{data.source} gives an image several labels, of which no caption is made"
            )
        words = choose_class_words(splits[0].classes, data, text)
        train, evaluation = (
            of_classes(images, words, choose_templates(data, text)) for images in splits
        )
        return train, evaluation
    if not name:
        raise Refused(f"unknown data source {data.source!r}; known are {KNOWN}")
    if text.templates is not None or text.names is not None:
        raise Refused(
            f"--text.templates and --text.names make captions of class names, but {data.source} has"
            " captions of its own"
        )
    reader = read_csv if kind == "csv" else read_shards
    pairs = reader(name, data)
    if data.eval_split is not None:
        return pairs, reader(data.eval_split, data)
    held = draw_held_out(np.zeros(len(pairs), np.int32), data.holdout)
    return pairs.take(np.flatnonzero(~held)), pairs.take(np.flatnonzero(held))


def read_csv(name: str, data: Data) -> Captioned:
    """Returns the images of a table, in the order in which it first names them.

    Args:
        name: Path of the file.
        data: The settings of its columns, and what to do about rows without an image or a caption:
            "refuse", or "skip" them with a line on standard error.

    Raises:
        Refused: The file cannot be read, has other columns, or holds no image with a caption.
    """
    path = Path(name).expanduser()
    table = read_table(path, data, "the captions")
    named = table.column(data.image_key, IMAGE_KEYS, "--image-key", "paths of images")
    texts = table.column(data.caption_key, CAPTION_KEYS, "--caption-key", "captions")
    found = [
        (os.path.normpath(image) if image else "", text)
        for image, text in zip(named, texts, strict=True)
    ]
    images = {image: path.parent / image for image, _ in found}
    there = {image: bool(image) and os.path.isfile(images[image]) for image in images}
    lacking = {
        (image or f"row {number}"): "no caption" if there[image] else "no image"
        for number, (image, caption) in enumerate(found, 1)
        if not caption or not there[image]
    }
    check_complete(lacking, f"pairs of {path}", data.corrupt)
    captions: dict[str, list[str]] = {}
    for image, caption in found:
        if caption and there[image]:
            captions.setdefault(image, []).append(caption)
    paths = [images[image] for image in captions]
    names = [
        os.path.relpath(each, path.parent) if os.path.isabs(each) else each for each in captions
    ]

    def stored(i: int) -> Stored:
        return stored_file(paths[i], names[i])

    def load(i: int, choose: Choose | None) -> RGB:
        return read_image(paths[i], choose=choose)

    return _of_files(load, stored, captions.values(), f"{path}")


@dataclass(frozen=True)
class Member:
    """The place of an image in a shard."""

    shard: Path  # the tar file
    name: str  # in the tar file
    offset: int  # of its first byte in the shard, bytes
    size: int  # bytes

    def read(self) -> bytes:
        """Returns the file of the image.

        Raises:
            OSError: The shard cannot be read.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def decode(self, choose: Choose | None = None) -> RGB:
        """Returns the decoded image, `(height, width, 3)` uint8, or a part of it.

        Args:
            choose: Function from height and width in pixels to the part; None takes the whole.

        Raises:
            UnreadableImage: The image cannot be read or decoded.
        """
        name = f"{self.name} in {self.shard}"
        try:
            return read_image(self.read(), name=name, choose=choose)
        except OSError as error:
            raise UnreadableImage(f"{name} cannot be read: {error.strerror}") from None

    def stored(self) -> Stored:
        """Returns the member as an image is stored in it."""
        return Stored(f"{self.shard.name}/{self.name}", self.size, self.read)


def read_shards(pattern: str, data: Data) -> Captioned:
    """Returns the images of tar shards, shard by shard in the order of their members.

    Args:
        pattern: The shards, as `shards_of` reads it.
        data: The settings of the captions, and what to do about pairs without an image or a
            caption: "refuse", or "skip" them with a line on standard error.

    Raises:
        Refused: A shard cannot be read, a name stands twice, or no image has a caption.
    """
    members: list[Member] = []
    captions: list[list[str]] = []
    lacking: dict[str, str] = {}
    for shard in shards_of(pattern):
        for key, (member, caption) in read_shard(shard, data.caption_key).items():
            if member is None or not caption.texts:
                lacking[f"{key} in {shard}"] = caption.lack if member else "no image"
            else:
                members.append(member)
                captions.append(caption.texts)
    check_complete(lacking, f"pairs of {pattern}", data.corrupt)
    return _of_files(
        lambda i, choose: members[i].decode(choose),
        lambda i: members[i].stored(),
        captions,
        pattern,
    )


class Caption(NamedTuple):
    """The captions of a key in a shard, or why there are none."""

    texts: list[str]
    lack: str = ""  # in words, such as "an empty .txt"


def read_shard(
    shard: Path, caption_key: str | None = None
) -> dict[str, tuple[Member | None, Caption]]:
    """Returns the pairs of one tar file: key -> (place of the image, captions).

    Args:
        shard: The tar file, not compressed.
        caption_key: Name of the captions in the .json, or "txt" for the .txt alone; None takes the
            .txt or, where it is missing or empty, the first of `CAPTION_KEYS` in the .json.

    Returns:
        The pairs in the order of the images, then of keys that have only captions. The place is
        None without an image.

    Raises:
        Refused: The file cannot be read as tar, is cut off, holds links or names that are no pairs,
            or has two images or captions for a key.
    """
    images: dict[str, Member] = {}
    captions: dict[str, dict[str, Caption]] = {}
    wanted = {"txt": ("txt",), None: ("txt", "json")}.get(caption_key, ("json",))
    keys = CAPTION_KEYS if caption_key is None else (caption_key,)
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                key, dot, ending = _key(member.name)
                if member.isreg() and member.offset_data + member.size > shard.stat().st_size:
                    raise tarfile.ReadError(f"{member.name} reaches beyond its end")
                of_a_pair = ending.rpartition(".")[2] in (*IMAGE_ENDINGS, "txt", "json")
                if of_a_pair and (member.islnk() or member.issym() or "." in ending):
                    reason = (
                        "a link"
                        if member.islnk() or member.issym()
                        else "a name with more dots than the one before its ending"
                    )
                    raise Refused(
                        f"{member.name} in {shard} is {reason}: pairs are KEY.jpg and KEY.txt,"
                        " files by themselves"
                    )
                if not member.isreg() or not dot:
                    continue
                if ending in IMAGE_ENDINGS:
                    if key in images:
                        raise Refused(f"{shard} has two images for {key}")
                    images[key] = Member(shard, member.name, member.offset_data, member.size)
                elif ending in ("txt", "json"):
                    if ending in captions.setdefault(key, {}):
                        raise Refused(f"{shard} has two files {key}.{ending}")
                    file = archive.extractfile(member)
                    content = file.read() if file else b""
                    captions[key][ending] = (
                        _read_text(content) if ending == "txt" else _read_json(content, keys)
                    )
            with shard.open("rb") as whole:
                whole.seek(archive.offset)
                if whole.read(512) != bytes(512):
                    raise tarfile.ReadError("its end is missing")
                while rest := whole.read(1 << 20):
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError(
                            "something follows its end, as after files that were joined"
                        )
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:
        raise Refused(
            f"the shard {shard} cannot be read as tar: {getattr(error, 'strerror', None) or error}"
        ) from None
    return {
        key: (images.get(key), _choose(captions.get(key, {}), wanted))
        for key in dict.fromkeys([*images, *captions])
    }


def _choose(found: dict[str, Caption], wanted: tuple[str, ...]) -> Caption:
    """The captions of the first ending that has some, or why none has."""
    lacks = []
    for ending in wanted:
        caption = found.get(ending, Caption([], f"no .{ending}"))
        if caption.texts:
            return caption
        lacks.append(caption.lack)
    return Caption([], " and ".join(lacks))


def shards_of(pattern: str) -> list[Path]:
    """Returns the files of a pattern, whose ranges such as `{000..012}` are filled in.

    A pattern that is no file and has no range is a glob.

    Args:
        pattern: Path of the shards. `~` is the home directory; the numbers of a range get as many
            digits as its first.

    Raises:
        Refused: No file fits, a file of a range is missing, or there are more than `MOST_SHARDS`.
    """
    paths = [Path(each).expanduser() for each in _expand_ranges(pattern)]
    if len(paths) == 1 and not paths[0].is_file():
        paths = sorted(map(Path, glob(str(paths[0]))))
    if not paths:
        raise Refused(f"there are no shards {pattern}")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise Refused(
            f"there is no shard {missing[0]} ({len(missing)} of {len(paths)} that {pattern} names"
            " are missing)"
        )
    return paths


def _expand_ranges(pattern: str) -> Iterator[str]:
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [
        range(int(low), int(high) + 1) for low, high in zip(parts[1::3], parts[2::3], strict=True)
    ]
    if math.prod(map(len, ranges)) > MOST_SHARDS:
        raise Refused(
            f"{pattern} names {math.prod(map(len, ranges)):,} shards, where at most {MOST_SHARDS:,}"
            " are taken"
        )
    for numbers in itertools.product(*ranges):
        filled = [
            f"{number:0{len(low)}d}" for number, low in zip(numbers, parts[1::3], strict=True)
        ]
        yield "".join(itertools.chain(*itertools.zip_longest(parts[::3], filled, fillvalue="")))


def _key(name: str) -> tuple[str, str, str]:
    """The part of the name that members of a pair share, up to the first dot, and the ending."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return f"{folder}{slash}{stem}", dot, ending.lower()


def _read_text(content: bytes) -> Caption:
    """The caption of a .txt."""
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return Caption([], "a .txt that is not in UTF-8")
    return Caption([text]) if text else Caption([], "an empty .txt")


def _read_json(content: bytes, keys: Sequence[str]) -> Caption:
    """The captions under the first of the keys that a .json has: a text or a list of texts."""
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return Caption([], "a .json that is not JSON in UTF-8")
    if not isinstance(values, dict):
        return Caption([], "a .json that does not hold values by name")
    key = next((each for each in keys if each in values), None)
    if key is None:
        has = ", ".join(map(ascii, itertools.islice(values, 8))) or "nothing"
        return Caption([], f"a .json without {' or '.join(keys)}, with {has}: --caption-key")
    found = values[key] if isinstance(values[key], list) else [values[key]]
    texts = [each.strip() for each in found if isinstance(each, str) and each.strip()]
    if any(each != each.encode(errors="replace").decode() for each in texts):
        return Caption([], f"half a pair of surrogates under {key} in its .json")
    return Caption(texts) if texts else Caption([], f"no text under {key} in its .json")


def _of_files(
    load: Callable[[int, Choose | None], RGB],
    stored: Callable[[int], Stored],
    captions: Iterable[list[str]],
    name: str,
) -> Captioned:
    kept = [tuple(dict.fromkeys(each)) for each in captions]
    if not kept:
        raise Refused(f"{name} holds no image with a caption")
    numbers = np.arange(len(kept))
    images = Images(
        len(kept),
        ("image",),
        lambda i, choose=None: (load(i, choose), i),
        lambda: numbers,
        stored,
    )
    return make_captioned(images, kept)
