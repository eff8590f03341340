"""Files that are whole or not there."""

import errno
import os
import tempfile
from pathlib import Path


def check_place(path: str | Path) -> None:
    """Raises OSError if there is no folder that such a file could stand in: before a long run, not
    after it.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def write_text(path: str | Path, text: str) -> None:
    """Writes a file under a temporary name and renames it, so that it is never half there.

    Raises:
        OSError: the folder is missing or cannot be written to; the error names `path`.
    """
    path = Path(path)
    if (
        path.exists() and not path.is_file()
    ):  # a pipe or a device, which nothing may take the place of; or a folder, which says so
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    temporary, given, path = None, path, Path(os.path.realpath(path))
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # a temporary file is for its owner alone
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(given)) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
