"""Checks that arrays have the shapes and dtypes of their jaxtyping annotations, in every test.

Other annotations are mypy's. Arguments are checked once the function has returned: what it refuses
itself keeps its own message.
"""

import collections.abc
import functools
import operator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

# Its warnings name the line of the caller, which they find by counting frames.
UNCHECKED = {"ggem_jax.retrieval.index.index", "ggem_jax.retrieval.index.search"}


def install(root: Path, packages: tuple[str, ...]) -> list[str]:
    """Checks the modules of the packages that annotate arrays, and returns their names.

    Args:
        root: the folder of the packages.
        packages: names of folders. `kernels` in them is left out: Triton reads its source.
    """
    modules = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for package in packages
        for path in sorted((root / package).rglob("*.py"))
        if "kernels" not in path.parts and "from jaxtyping import" in path.read_text()
    ]
    modules = [name for name in modules if name not in UNCHECKED]
    install_import_hook(modules, f"{__name__}.check_arrays")
    return modules


def check_arrays(function):
    """Returns the function with checks of its annotated arrays, the type checker of jaxtyping's
    hook.

    The hook passes two signatures of a function: the arguments, whose result is `Any`, and the
    arguments with the result. Records may hold other things than arrays, such as shardings.
    """
    annotations = function.__annotations__
    if annotations.get("return", Any) is Any or function.__name__ == "__init__":
        return function
    arrays = {name: of_any_library(hint) for name, hint in annotations.items() if has_array(hint)}
    function.__annotations__ = dict.fromkeys(annotations, Any) | arrays
    return beartype(function) if arrays else function


def is_array(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def has_array(hint: object) -> bool:
    """Returns whether an annotation contains an array with a shape."""
    return is_array(hint) or any(has_array(part) for part in get_args(hint))


def of_any_library(hint: Any) -> Any:
    """Returns the annotation with arrays of NumPy, numbers and lists beside those of JAX."""
    if is_array(hint):
        return hint.dtype[Any, hint.dim_str] | int | float | list
    parts = tuple(of_any_library(part) for part in get_args(hint))
    if not has_array(hint) or get_origin(hint) is collections.abc.Callable:
        return hint
    if get_origin(hint) in (Union, UnionType):
        return functools.reduce(operator.or_, parts)
    return get_origin(hint)[parts]
