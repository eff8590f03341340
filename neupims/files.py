"""Files: tables of TOML and JSON, results that are complete or absent, numbers of JSON."""

import errno
import json
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any

SUFFIXES = (".toml", ".json")
PARTIAL = ".part"  # ending of a file that is being written


def read_table(path: str | Path) -> dict[str, Any]:
    """Returns the values of a TOML or JSON file by name.

    Args:
        path: The file; its name ends in .toml or .json.

    Raises:
        ValueError: The name has another ending, or the file does not hold such a table; the
            sentence names the file.
        OSError: The file cannot be read.
    """
    path = os.fspath(path)
    if not path.lower().endswith(SUFFIXES):
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
    return parse_table(text, path)


def parse_table(text: str, file: str) -> dict[str, Any]:
    """Returns the values of a TOML or JSON text by name.

    Args:
        text: The text.
        file: The name of its file: one that ends in .json is read as JSON, others as TOML.

    Raises:
        ValueError: The text is not such a table; the sentence names the file.
    """
    json_file = file.lower().endswith(".json")
    try:
        values = json.loads(text) if json_file else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not {'JSON' if json_file else 'TOML'}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold fields by name, not {values!r}")
    return values


def check_place(path: str | Path) -> None:
    """Raises before a long run, not after it, if a file cannot be written to its place.

    Args:
        path: The file that will be written.

    Raises:
        OSError: The folder does not exist, or the file is a folder itself.
    """
    if Path(path).is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = Path(path).parent
    if not folder.is_dir():
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, complete or not at all; see `write_bytes`.

    Args:
        path: The file.
        text: Its content, written as UTF-8.

    Raises:
        OSError: The folder is missing or cannot be written to; the error names `path`.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is complete or absent.

    Args:
        path: The file; a pipe or a device is written to directly.
        content: Its bytes.

    Raises:
        OSError: The folder is missing or cannot be written to; the error names `path`, and nothing
            is left behind.
    """
    path = Path(path)
    temporary, given, path = None, path, Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_file():  # a pipe or a device; a folder raises
            path.write_bytes(content)
            return
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
    """Returns the same value with None for numbers that are not finite, which JSON cannot hold.

    Args:
        value: A value for JSON; dictionaries, lists and tuples are searched, and tuples become
            lists.
    """
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
