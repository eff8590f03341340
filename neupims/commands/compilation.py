"""Compiled programs that the next process finds again: JAX's persistent compilation cache.

Most of the time of a short command goes into compiling the same programs as the time before. JAX
finds a program by its instructions, its flags and the versions of its libraries, so another version
of JAX or of this package never loads a program that is not its own.
"""

import contextlib
import hashlib
import os
import platform
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 2**20  # of the programs that are kept; a command makes 1 to 5 MB of them
OFF = ("0", "false", "f", "no", "n", "off")


def keep_programs() -> None:
    """Makes JAX keep its compiled programs in the user's cache folder, without loading JAX.

    The folder is `cache_folder()`, unless `JAX_COMPILATION_CACHE_DIR` names another.
    `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. If the folder cannot be written, or
    somebody else could write it, nothing is kept. Nothing is raised, and a damaged program is
    compiled again.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    loaded: Any = sys.modules.get("jax")
    if (
        os.environ.get("JAX_COMPILATION_CACHE_DIR")
        or os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() in OFF
        or (loaded and loaded.config.jax_compilation_cache_dir)
    ):
        return
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(folder):
            return
        _drop_oldest(folder, MOST_BYTES)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return
    if loaded:
        loaded.config.update("jax_compilation_cache_dir", str(folder))
        loaded.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    else:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def cache_folder() -> Path:
    """Returns the folder of the cache, `ggem-jax/neupims-...` in `XDG_CACHE_HOME` or `~/.cache`.

    Each kind of processor has its own: programs for one may not run on another, and several
    machines may share a home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    kind = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        known = ("flags", "Features", "model name")
        kind += "".join(sorted({line for line in file if line.startswith(known)}))
    return root / "ggem-jax" / f"neupims-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"


def _is_private(folder: Path) -> bool:
    """Whether nobody but this user can write the folder: whoever can may run code as this user."""
    if not hasattr(os, "geteuid"):  # no POSIX owners: the home folder is the user's own
        return True
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return own and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _drop_oldest(folder: Path, most_bytes: int) -> None:
    """Deletes the oldest files until the others are at most `most_bytes`."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may drop it too
            found.append((entry.stat(), entry.path))
    kept = 0
    for status, path in sorted(found, key=lambda each: -each[0].st_mtime_ns):
        kept += status.st_size
        if kept > most_bytes:
            with contextlib.suppress(OSError):
                os.unlink(path)
