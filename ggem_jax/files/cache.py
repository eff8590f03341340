"""Files of a cache that only its user can write, which are checked before they are used.

A file may hold compiled programs, and whoever can write such a file can make its reader run any
code. So a file is read only if it and its folder belong to the user of the process, and nobody else
can write them. A file that is damaged, or that was made from other facts, counts as missing.

A file is one line, which names the format and the SHA-256 of the rest, a line of facts in JSON, and
the contents.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import stat
from pathlib import Path
from typing import Any

from ggem_jax.files.atomic import replacing

_FORMAT = "ggem-jax cache 1"


def read_cached(folder: Path, name: str, facts: dict[str, Any]) -> memoryview | None:
    """Returns the contents of a file of a cache, or None where there is none to be trusted.

    Args:
        folder: Folder of the cache.
        name: Name of the file in it.
        facts: JSON values that the contents were made from; those in the file must be the same.

    Returns:
        The contents; None if the file is missing, damaged or made from other facts, or if somebody
        else could have written it.
    """
    try:
        whole = _read_private(folder, name)
    except OSError:
        return None
    line = whole.find(b"\n") + 1
    rest, start = memoryview(whole)[line:], _as_json(facts) + b"\n"
    if whole[:line] != _first_line(rest) or rest[: len(start)] != start:
        return None
    with contextlib.suppress(OSError):  # the oldest files are dropped first
        os.utime(folder / name)
    return rest[len(start) :]


def write_cached(
    folder: Path, name: str, facts: dict[str, Any], contents: bytes, *, most_bytes: int
) -> None:
    """Writes a file of a cache, which appears when it is complete, and drops the oldest ones.

    Nothing is raised where the file cannot be written: the next process then works without it.

    Args:
        folder: Folder of the cache, as `make_private` makes it.
        name: Name of the file in it.
        facts: JSON values that the contents are made from.
        contents: The contents.
        most_bytes: Size of the newest files that are kept, bytes.
    """
    rest = _as_json(facts) + b"\n" + contents
    if not make_private(folder):
        return
    with contextlib.suppress(OSError):
        with replacing(folder / name, private=True) as temporary, temporary.open("wb") as file:
            file.writelines((_first_line(rest), rest))
        drop_oldest(folder, most_bytes)


def make_private(folder: Path) -> bool:
    """Makes a folder for this user alone, and returns whether it can be written by nobody else.

    Args:
        folder: Folder of a cache; one that exists is not changed.

    Returns:
        False where the folder cannot be made or written, or somebody else could write it.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return is_private(folder) and os.access(folder, os.W_OK | os.X_OK)


def is_private(path: Path | str | int) -> bool:
    """Returns whether a file or folder belongs to this user, and nobody else can write it.

    The folders above need no check: whoever may move things there can put another folder in the
    place, but not one that belongs to this user with files that belong to this user.

    Args:
        path: The path, or a descriptor of the open file or folder.

    Returns:
        False also where it does not exist, and on systems without POSIX owners.
    """
    if not hasattr(os, "geteuid"):
        return False
    try:
        found = os.stat(path) if isinstance(path, int) else os.lstat(path)
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def drop_oldest(folder: Path, most_bytes: int) -> None:
    """Deletes the oldest files of a folder until the others are at most `most_bytes`.

    Args:
        folder: Folder of the cache. Folders inside it stay.
        most_bytes: Size of the newest files that are kept, bytes.
    """
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may drop it too
            if entry.is_file():
                found.append((entry.stat(), entry.path))
    kept = 0
    for status, path in sorted(found, key=lambda each: -each[0].st_mtime_ns):
        kept += status.st_size
        if kept > most_bytes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@functools.cache
def processor() -> str:
    """Returns a digest of the kind of processor: programs for one may not run on another."""
    kind = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        kind += "".join(
            sorted({line for line in file if line.startswith(("flags", "Features", "model name"))})
        )
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


def _read_private(folder: Path, name: str) -> bytes:
    """The contents of a file; what is checked is what is read, whatever is renamed meanwhile."""
    if not hasattr(os, "geteuid"):
        raise PermissionError("this system has no owners of files")
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=inside)
        with open(handle, "rb") as file:
            regular = stat.S_ISREG(os.fstat(handle).st_mode)
            if not (regular and is_private(inside) and is_private(handle)):
                raise PermissionError(f"{folder / name} could have been written by somebody else")
            return file.read()
    finally:
        os.close(inside)


def _first_line(rest: bytes | memoryview) -> bytes:
    return f"{_FORMAT} {hashlib.sha256(rest).hexdigest()}\n".encode()


def _as_json(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()
