"""Files that are complete or absent, and numbers that JSON can hold."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

PARTIAL = ".part"  # ending of a file that is being written


def check_place(path: str | Path) -> None:
    """Raises OSError if the folder of a file does not exist, so that a long run fails early."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, complete or not at all.

    Raises:
        OSError: the folder is missing or cannot be written to; the error names `path`.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is complete or absent.

    Raises:
        OSError: the folder is missing or cannot be written to; the error names `path`, and nothing
            is left behind.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device, or a folder, which refuses
        path.write_bytes(content)
        return
    temporary, given, path = None, path, Path(os.path.realpath(path))
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # a temporary file is readable by its owner only
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(given)) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """Returns the same value with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
