"""A folder of results in several files, so that an interrupted run resumes after its last file.

`manifest.json` records the inputs of the results. A run with other inputs is refused, and so is a
second process in the same folder.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from neupims.files import PARTIAL, write_bytes

# Designs of the method by number, and others (the base design, rows of Sobol indices) by a digest.
POINTS, BESIDE = FOLDERS = ("points", "beside")
OWN_FILES = ("front.csv", "map.csv", "summary.json", "manifest.json", "lock")


class Chunks:
    """Named arrays in files of `FOLDERS`; stores nothing if `folder` is None."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def load(self, name: str, rows: int, needed: Collection[str]) -> dict[str, np.ndarray] | None:
        """Returns the arrays of a file, or None if they must be computed.

        They must be computed if the file is missing or damaged, lacks an array, or has another
        number of rows.

        Args:
            name: The file, such as points/000001, without its ending.
            rows: Length that every array must have.
            needed: Names of arrays that it must have.
        """
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        try:
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
                arrays = {each: file[each] for each in file.files}
        except (ValueError, EOFError, zipfile.BadZipFile):
            return None
        whole = all(each.shape[:1] == (rows,) for each in arrays.values())
        return arrays if whole and set(needed) <= arrays.keys() else None

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the arrays of a file; the file appears when it is complete.

        Args:
            name: The file, such as points/000001, without its ending.
            arrays: Arrays by name, all with the same number of rows.

        Raises:
            OSError: The file cannot be written.
        """
        if self.folder is not None:
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            write_bytes(self._path(name), buffer.getvalue())

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.npz"


@contextmanager
def open_chunks(folder: Path | None, identity: Mapping[str, Any]) -> Iterator[Chunks]:
    """Yields the results in a folder, which is created if it does not exist, and locks it.

    Args:
        folder: Where the results are kept; None keeps nothing.
        identity: What the results depend on, part by part, as values that JSON can hold.

    Raises:
        ValueError: The folder holds other files or an exploration with another identity, or another
            process uses it.
        OSError: The folder cannot be written to.
        ImportError: filelock is not installed.
    """
    if folder is None:
        yield Chunks(None)
        return
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        raise ImportError(
            "a folder of results needs filelock: pip install 'ggem-jax[neupims]'"
        ) from None
    _check_folder(folder)
    for part in FOLDERS:
        (folder / part).mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / "lock", fallback_to_soft=False).acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is at work in {folder}") from None
    with lock:
        for left in folder.rglob(f"*{PARTIAL}"):
            left.unlink()
        _check_manifest(folder, json.loads(json.dumps(identity)))  # as it reads from a file
        yield Chunks(folder)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    manifest = folder / "manifest.json"
    if manifest.exists() or not folder.exists():
        return
    if any(each.name != "lock" for each in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no exploration")


def _check_manifest(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Writes the manifest if there is none; raises ValueError if it differs from `wanted`."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        write_bytes(manifest, json.dumps(wanted, indent=1).encode())
        return
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


def digest_code() -> str:
    """Returns a digest of all source and data files of this package.

    It is part of the identity of results, so results of two versions do not mix.
    """
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".toml", ".csv", ".json"):
            digest.update(
                path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
            )
    return digest.hexdigest()
