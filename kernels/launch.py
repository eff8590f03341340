"""The one place that touches jax-triton, which is imported when a kernel is asked for and not before."""

import os
from types import ModuleType


def load_jax_triton() -> ModuleType:
    """Imports jax-triton; `NotImplementedError` says what is missing and what to do where it cannot be had."""
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(
            f"Triton kernels need jax-triton and a JAX with CUDA ({error}): pip install '.[gpu]' in a checkout on a machine with an NVIDIA GPU, "
            "or pass implementation=None"
        ) from error
    if os.environ.get("TRITON_CACHE_DIR") == "":  # set so by jax-triton 0.3; a later triton.compile in this process would find no folder
        del os.environ["TRITON_CACHE_DIR"]
    return jax_triton
