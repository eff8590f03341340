"""Files that appear under their name only when they are complete."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path | str, *, private: bool = False) -> Iterator[Path]:
    """Yields a temporary file beside `path` that takes its name when the block ends.

    The file is flushed to the disk first. After an error it is deleted and `path` is unchanged.

    Args:
        path: The file to write; its folder must exist, and a file of this name is replaced.
        private: Whether only this user can read the file; if not, its mode follows the umask.

    Yields:
        The path of the temporary file, which is empty.

    Raises:
        OSError: There is no such folder, or the file cannot be written.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if not private:
            temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file in UTF-8 that appears under its name only when it is complete.

    Args:
        path: The file to write; a file of this name is replaced.
        text: The contents.

    Raises:
        OSError: The file cannot be written; the error names `path`, not the temporary file.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
