"""The persistent compilation cache of a tool that is started often."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ggem_jax.files.cache import drop_oldest, is_private, processor

MOST_BYTES = 256 * 2**20  # size of the programs that are kept; an image size takes 0.5 MB


def keep_compiled_programs() -> None:
    """Makes JAX keep its compiled programs in the user's cache folder, without loading JAX.

    The folder is `ggem-jax` in `XDG_CACHE_HOME`, unless `JAX_COMPILATION_CACHE_DIR` names another.
    `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. If the folder cannot be written, or
    somebody else could write it, nothing is kept and no error is raised.
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
        if hasattr(os, "geteuid") and not is_private(folder):
            return
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
    return root / "ggem-jax" / f"compiled-{processor()}"
