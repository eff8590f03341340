"""Images with captions: `csv:FILE`, `wds:PATTERN`, or classes whose names become captions.

- `csv:FILE`: a header and the columns image (a path relative to the file's folder) and caption,
  separated by commas or tabs. Rows with the same path are one image with several captions.
- `wds:PATTERN`: tar files in WebDataset's form, `shard-{000..012}.tar` or a glob. The members of a
  pair share their name up to the ending: .jpg, .png or .webp, and .txt (the caption) or .json with
  "caption". They are read where they lie, by an index that is built when the run starts.
- any other source is one of `train.data`.

`--data.eval-split` names another file or pattern to evaluate on; without it, `--data.holdout` of
the images are kept for evaluation. Nothing is unpickled.
"""

import csv
import io
import itertools
import json
import math
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from ggem_jax.files.images import RGB, UnreadableImage, read_image
from train.captions import (
    Captioned,
    Text,
    choose_class_words,
    choose_templates,
    make_captioned,
    of_classes,
    read_caption_file,
)
from train.cli import Refused
from train.config import Data
from train.data import KNOWN as KNOWN_CLASSES
from train.data import Images, Stored, draw_held_out, open_data, stored_file

KNOWN = f"{KNOWN_CLASSES}, csv:FILE, wds:PATTERN"
MOST_SHARDS = 1_000_000
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")


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
    pairs = reader(name, data.corrupt)
    if data.eval_split is not None:
        return pairs, reader(data.eval_split, data.corrupt)
    held = draw_held_out(np.zeros(len(pairs), np.int32), data.holdout)
    return pairs.take(np.flatnonzero(~held)), pairs.take(np.flatnonzero(held))


def read_csv(name: str, corrupt: str) -> Captioned:
    """Returns the images of a CSV file, in the order in which it first names them.

    Args:
        name: Path of the file.
        corrupt: What to do about rows without an image or a caption: "refuse", or "skip" them with
            a line on standard error.

    Raises:
        Refused: The file cannot be read, has other columns, or holds no image with a caption.
    """
    path = Path(name).expanduser()
    text = read_caption_file(path, "the captions")
    try:
        rows = csv.DictReader(
            io.StringIO(text),
            delimiter="\t" if "\t" in text.partition("\n")[0] else ",",
            strict=True,
        )
        columns = rows.fieldnames or []
        if not {"image", "caption"} <= set(columns):
            raise Refused(
                f"{path} must have the columns image and caption in its first line, not"
                f" {', '.join(columns) or 'nothing'}"
            )
        if len(set(columns)) < len(columns):
            raise Refused(f"{path} names a column twice in its first line: {', '.join(columns)}")
        found = []
        for row in rows:
            if None in row:
                raise Refused(
                    f"line {rows.line_num} of {path} has more columns than the first: a caption"
                    " with a comma needs quotes"
                )
            image = (row["image"] or "").strip()
            found.append((os.path.normpath(image) if image else "", (row["caption"] or "").strip()))
    except csv.Error as error:
        raise Refused(f"{path} cannot be read as CSV after line {rows.line_num}: {error}") from None
    images = {image: path.parent / image for image, _ in found}
    there = {image: bool(image) and images[image].is_file() for image in images}
    lacking = {
        (image or f"row {number}"): "caption" if there[image] else "image"
        for number, (image, caption) in enumerate(found, 1)
        if not caption or not there[image]
    }
    _check_complete(lacking, f"{path}", corrupt)
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

    return _of_files(lambda i: read_image(paths[i]), stored, captions.values(), f"{path}")


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

    def decode(self) -> RGB:
        """Returns the decoded image, `(height, width, 3)` uint8.

        Raises:
            UnreadableImage: The image cannot be read or decoded.
        """
        name = f"{self.name} in {self.shard}"
        try:
            return read_image(self.read(), name=name)
        except OSError as error:
            raise UnreadableImage(f"{name} cannot be read: {error.strerror}") from None

    def stored(self) -> Stored:
        """Returns the member as an image is stored in it."""
        return Stored(f"{self.shard.name}/{self.name}", self.size, self.read)


def read_shards(pattern: str, corrupt: str) -> Captioned:
    """Returns the images of tar shards, shard by shard in the order of their members.

    Args:
        pattern: The shards, as `shards_of` reads it.
        corrupt: What to do about pairs without an image or a caption: "refuse", or "skip" them with
            a line on standard error.

    Raises:
        Refused: A shard cannot be read, a name stands twice, or no image has a caption.
    """
    members: list[Member] = []
    captions: list[list[str]] = []
    lacking: dict[str, str] = {}
    for shard in shards_of(pattern):
        for key, (member, found) in read_shard(shard).items():
            if member is None or not found:
                lacking[f"{key} in {shard}"] = "caption in UTF-8" if member else "image"
            else:
                members.append(member)
                captions.append(found)
    _check_complete(lacking, pattern, corrupt)
    return _of_files(
        lambda i: members[i].decode(), lambda i: members[i].stored(), captions, pattern
    )


def read_shard(shard: Path) -> dict[str, tuple[Member | None, list[str]]]:
    """Returns the pairs of one tar file: key -> (place of the image, captions).

    Args:
        shard: The tar file, not compressed.

    Returns:
        The pairs in the order of the images, then of keys that have only captions. The place is
        None without an image, the list empty without a caption.

    Raises:
        Refused: The file cannot be read as tar, is cut off, holds links or names that are no pairs,
            or has two images or captions for a key.
    """
    images: dict[str, Member] = {}
    captions: dict[str, list[str]] = {}
    seen: set[tuple[str, str]] = set()
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
                    file = archive.extractfile(member)
                    found = _caption(file.read() if file else b"", ending)
                    if (key, ending) in seen:
                        raise Refused(f"{shard} has two files {key}.{ending}")
                    seen.add((key, ending))
                    if ending == "txt" or key not in captions:  # the text where both exist
                        captions[key] = found
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
        key: (images.get(key), captions.get(key, [])) for key in dict.fromkeys([*images, *captions])
    }


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


def _caption(content: bytes, ending: str) -> list[str]:
    """The captions of a .txt or .json member, none where it has none."""
    try:
        text = content.decode("utf-8-sig")
        value = text if ending == "txt" else json.loads(text)["caption"]
        values = value if isinstance(value, list) else [value]
        found = [each.strip() for each in values if isinstance(each, str) and each.strip()]
        for each in found:
            each.encode()  # half of a pair of surrogates is not text
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return found


def _of_files(
    load: Callable[[int], RGB],
    stored: Callable[[int], Stored],
    captions: Iterable[list[str]],
    name: str,
) -> Captioned:
    kept = [tuple(dict.fromkeys(each)) for each in captions]
    if not kept:
        raise Refused(f"{name} holds no image with a caption")
    numbers = np.arange(len(kept))
    images = Images(len(kept), ("image",), lambda i: (load(i), i), lambda: numbers, stored)
    return make_captioned(images, kept)


def _check_complete(lacking: dict[str, str], source: str, corrupt: str) -> None:
    """Reports pairs without an image or a caption in one line, and refuses them by default."""
    if not lacking:
        return
    first = ", ".join(f"{name} (no {what})" for name, what in itertools.islice(lacking.items(), 3))
    said = (
        f"{len(lacking)} of the pairs of {source} are not complete:"
        f" {first}{', ...' if len(lacking) > 3 else ''}"
    )
    if corrupt == "refuse":
        raise Refused(f"{said} (--data.corrupt skip leaves them out)")
    print(f"skipped: {said}", file=sys.stderr, flush=True)
