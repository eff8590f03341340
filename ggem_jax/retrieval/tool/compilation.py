"""JAX for a tool that is started often: what it compiles stays on disk for the next time, and it
says nothing of its own.
"""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 2**20  # of compiled programs that are kept; a size of picture takes some 0.5 MB


def keep_compiled_programs() -> None:
    """Uses the user's cache folder, `ggem-jax` in `XDG_CACHE_HOME`, where the user has not told JAX
    of another by `JAX_COMPILATION_CACHE_DIR`.

    `JAX_ENABLE_COMPILATION_CACHE=false` does without. A folder that cannot be written is no error:
    then everything is compiled again.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    import jax

    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        drop_oldest(folder, MOST_BYTES)
    except OSError:
        return
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cache_folder() -> Path:
    """One for each kind of processor, as programs for one may not run on another and a home may be
    shared by many.
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
    """Deletes the oldest files of a folder until the others are at most `most_bytes`."""
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
