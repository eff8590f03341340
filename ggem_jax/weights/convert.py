"""Published parameters <-> Flax variables: one table for both directions.

One error lists everything that does not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ggem_jax.files.errors import MismatchedWeights

Layout = Literal["same", "conv", "dense"]

# Published axes -> ours. PyTorch's convolutions are (out, in, h, w) and its dense layers (out, in);
# those of Flax are (h, w, in, out) and (in, out).
_AXES: dict[Layout, tuple[int, ...]] = {"conv": (2, 3, 1, 0), "dense": (1, 0)}


@dataclass(frozen=True)
class Parameter:
    """Where a published parameter goes."""

    path: tuple[str, ...]  # in the Flax variables, the collection first
    shape: tuple[int, ...]  # as published
    layout: Layout = "same"
    # of a convolution: the input channels stand in the opposite order, such as BGR for RGB
    reverse_inputs: bool = False
    # our shape, where it is not that of the published axes in our order
    ours: tuple[int, ...] | None = None


def to_variables(
    published: Mapping[str, np.ndarray],
    table: Mapping[str, Parameter],
    *,
    source: str = "the checkpoint",
) -> dict[str, Any]:
    """Returns Flax variables of published parameters, in float32.

    Args:
        published: Arrays by their published names.
        table: Where each of them goes.
        source: The file, for messages.

    Raises:
        MismatchedWeights: Names or shapes are not exactly those of the table, or numbers are not
            finite.
    """
    check_parameters(published, table, source=source)
    odd: list[str] = []
    variables: dict[str, Any] = {}
    for name, parameter in table.items():
        with np.errstate(over="ignore"):
            array = np.asarray(published[name]).astype(np.float32)
        if not np.isfinite(array).all():
            odd.append(name)
        array = np.transpose(array, _AXES[parameter.layout]) if parameter.layout in _AXES else array
        array = array[..., ::-1, :] if parameter.reverse_inputs else array
        *folders, last = parameter.path
        place = variables
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = np.array(
            array if parameter.ours is None else array.reshape(parameter.ours), order="C"
        )
    if odd:
        raise MismatchedWeights(
            f"{source} has NaN or infinite numbers in float32 in {len(odd)} parameters, as of a"
            f" training that diverged: {', '.join(odd)}"
        )
    return variables


def to_published(
    variables: Mapping[str, Any], table: Mapping[str, Parameter], *, source: str = "the variables"
) -> dict[str, np.ndarray]:
    """Returns published parameters of Flax variables, in the dtypes of the variables.

    Args:
        variables: Nested dictionaries, the collection first.
        table: As in `to_variables`.
        source: Of the variables, for messages.

    Raises:
        MismatchedWeights: The variables are not exactly those of the table.
    """
    found = _leaves(variables)
    named = {parameter.path: name for name, parameter in table.items()}
    arrays = {}
    for path, value in found.items():
        name = named.get(path, "/".join(path))
        array, parameter = np.asarray(value), table.get(name)
        if parameter is not None and parameter.reverse_inputs and array.ndim > 1:
            array = array[..., ::-1, :]
        axes = () if parameter is None else _AXES.get(parameter.layout, ())
        if parameter is not None and parameter.ours is not None and array.shape == parameter.ours:
            array = array.reshape(
                [parameter.shape[axis] for axis in axes or range(len(parameter.shape))]
            )
        arrays[name] = np.array(
            np.transpose(array, np.argsort(axes)) if axes and array.ndim == len(axes) else array,
            order="C",
        )
    check_parameters(arrays, table, source=source)
    return {name: arrays[name] for name in table}


def check_parameters(
    found: Mapping[str, Any], table: Mapping[str, Parameter], *, source: str
) -> None:
    """Raises `MismatchedWeights`, which lists everything that does not fit the table.

    That is every missing, surplus and wrongly shaped parameter, and those that are not arrays of
    real numbers.

    Args:
        found: Arrays by their published names.
        table: The names and shapes that are needed.
        source: The file, for messages.

    Raises:
        MismatchedWeights: Something does not fit.
    """
    arrays = {name: value for name, value in found.items() if _is_array(value)}
    shapes = {name: np.shape(value) for name, value in arrays.items()}
    faults = {
        "missing": [f"{name} {table[name].shape}" for name in table if name not in found],
        "surplus": [f"{name} {shapes[name]}" for name in arrays if name not in table],
        "wrongly shaped": [
            f"{name} {shapes[name]} where {table[name].shape} is needed"
            for name in table
            if name in arrays and shapes[name] != table[name].shape
        ],
        "not floating point": [
            f"{name} {_dtype(found[name])}"
            for name in table
            if name in arrays and not _is_real(found[name])
        ],
        "no array": [
            f"{name} {type(value).__name__}" for name, value in found.items() if name not in arrays
        ],
    }
    listed = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in faults.items() if names]
    if listed:
        raise MismatchedWeights(f"{source} does not fit the network: {'; '.join(listed)}")


def _is_array(value: Any) -> bool:
    """Whether a value is an array or a number.

    NumPy would turn nested lists into arrays too, and a small file can hold some that take forever.
    """
    return isinstance(value, int | float | complex) or (
        hasattr(value, "shape") and hasattr(value, "dtype")
    )


def _is_real(value: Any) -> bool:
    return np.can_cast(_dtype(value), np.float64, "same_kind") and _dtype(value).kind not in "biu"


def _dtype(value: Any) -> np.dtype:
    return np.asarray(value).dtype


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    leaves: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        leaves |= (
            _leaves(value, (*path, name)) if isinstance(value, Mapping) else {(*path, name): value}
        )
    return leaves
