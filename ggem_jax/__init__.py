"""Group generalized-mean pooling for Vision Transformers in JAX: pooling functions and the Flax
models that use them.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

__version__ = "0.1.0"


class _BrokenLink(MetaPathFinder):
    """Says what is wrong when the link to the kernels came out of a zip file, or of git on Windows,
    as a text file.
    """

    def find_spec(self, fullname, path=None, target=None) -> None:
        if fullname == "ggem_jax.kernels":
            raise ImportError(
                "ggem_jax/kernels must be a link to ../kernels but is a text file in this checkout:"
                " clone with git on a system with links (on Windows: git clone -c"
                " core.symlinks=true), or install the package with pip from a built wheel",
                name=fullname,
            )


if (Path(__file__).parent / "kernels").is_file():
    sys.meta_path.append(_BrokenLink())
