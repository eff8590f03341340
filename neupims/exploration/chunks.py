"""A folder of results in numbered files, each whole or not there, so that a run that is killed goes
on from its last file.

`manifest.json` says of what the results are. A run that would compute something else is refused, as
is a second process beside the first.
"""

import fcntl
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PARTIAL = ".part"


class Chunks:
    """Named arrays by number, in `folder`/points; kept nowhere where `folder` is None."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def load(self, number: int, rows: int) -> dict[str, np.ndarray] | None:
        """The arrays of a number, or None where they must be computed: there is no file, it is
        damaged, or it holds another number of rows.
        """
        if self.folder is None or not (path := self._path(number)).exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, EOFError, zipfile.BadZipFile):
            return None
        return arrays if arrays and all(len(array) == rows for array in arrays.values()) else None

    def save(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        if self.folder is not None:
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            write_whole(self._path(number), buffer.getvalue())

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / "points" / f"{number:06d}.npz"


@contextmanager
def chunks(folder: Path | None, identity: Mapping[str, Any]) -> Iterator[Chunks]:
    """The results in a folder, which is made where it is not there. `identity` is what they are
    results of, part by part.

    Raises:
        ValueError: the folder holds something else, results of something else, or another process
            is at work in it.
        OSError: it cannot be written to.
    """
    if folder is None:
        yield Chunks(None)
        return
    manifest = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if (
        not manifest.exists()
        and folder.exists()
        and any(each.name != "lock" for each in folder.iterdir())
    ):
        raise ValueError(f"{folder} is not empty and holds no exploration")
    (folder / "points").mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is at work in {folder}") from None
        for left in (*folder.glob(f"*{PARTIAL}"), *(folder / "points").glob(f"*{PARTIAL}")):
            left.unlink()
        wanted = json.loads(json.dumps(identity))  # as it reads from a file
        if manifest.exists():
            _compare(folder, manifest, wanted)
        else:
            write_whole(manifest, json.dumps(wanted, indent=1).encode())
        yield Chunks(folder)


def _compare(folder: Path, manifest: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(manifest.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{manifest} is damaged: {error}") from None
    for part, value in wanted.items():
        other = found.get(part) if isinstance(found, dict) else None
        if other != value:
            detail = ""
            if isinstance(other, dict) and isinstance(value, dict):
                changed = [
                    name for name in sorted({*other, *value}) if other.get(name) != value.get(name)
                ]
                detail = f" ({', '.join(changed)})"
            raise ValueError(
                f"{folder} holds an exploration with another {part}{detail}: give another folder,"
                " or delete it"
            )


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is never half there.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    temporary = path.with_name(f"{path.name}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def code_digest() -> str:
    """Of all source and data files of this package: results of two versions do not mix."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".toml", ".csv", ".json"):
            digest.update(
                path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
            )
    return digest.hexdigest()
