"""Compiles with XLA's own GPU compiler for NVIDIA H200s that are not there (`train.topologies`)."""

from train.topologies import available, compile_for_h200
from train.topologies import h200s as devices

__all__ = ["available", "compiled", "devices"]


def compiled(function, *arguments) -> str:
    """Returns the program that XLA makes of a jitted function, as text.

    Args:
        function: The jitted function; `implementation=None` takes the kernels.
        *arguments: Shapes with shardings over `devices`.
    """
    return compile_for_h200(function, *arguments).as_text()
