"""The persistent compilation cache of a tool that is started often."""

import contextlib
import hashlib
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 2**20  # size of the programs that are kept; an image size takes 0.5 MB


def keep_compiled_programs() -> None:
    """Makes JAX keep its compiled programs in the user's cache folder, without loading JAX.

    The folder is `ggem-jax` in `XDG_CACHE_HOME`, unless `JAX_COMPILATION_CACHE_DIR` names another.
    `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. If the folder cannot be written,
    nothing is kept and no error is raised.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    off = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower()
    if chosen or off in ("0", "false", "f", "no", "n", "off"):
        return
    loaded: Any = sys.modules.get("jax")
    if loaded and loaded.config.jax_compilation_cache_dir:
        return
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        drop_oldest(folder, MOST_BYTES)
    except OSError:
        return
    if loaded:
        loaded.config.update("jax_compilation_cache_dir", str(folder))
        loaded.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    else:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def cache_folder() -> Path:
    """Returns the folder of the cache.

    Each kind of processor has its own: programs for one may not run on another, and several
    machines may share a home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    kind = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        kind += "".join(
            sorted({line for line in file if line.startswith(("flags", "Features", "model name"))})
        )
    return root / "ggem-jax" / f"compiled-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"


def drop_oldest(folder: Path, most_bytes: int) -> None:
    """Deletes the oldest files of a folder until the others are at most `most_bytes`.

    Args:
        folder: Folder of the cache. Folders inside it stay.
        most_bytes: Size of the newest files that are kept, bytes.
    """
    files = sorted(
        ((entry.stat(), entry.path) for entry in os.scandir(folder) if entry.is_file()),
        key=lambda each: -each[0].st_mtime_ns,
    )
    kept = 0
    for status, path in files:
        kept += status.st_size
        if kept > most_bytes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
