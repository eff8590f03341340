"""Files of named arrays, whose ending says how they are read."""

import lzma
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.files.safetensors_files import read_safetensors
from ggem_jax.files.torch_files import read_torch

TORCH = (".pth", ".pt", ".pyth", ".bin", ".ckpt")
# errors over altered zip files and headers
_DAMAGED = (zlib.error, lzma.LZMAError, RuntimeError, MemoryError, OverflowError)
# dictionaries that training scripts put around the parameters
WRAPPERS = ("model", "state_dict", "teacher", "model_state", "params")


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a weights file by their names.

    Dictionaries that training scripts put around the parameters (`WRAPPERS`) are opened. Values
    that are not arrays are left out.

    Args:
        path: A `.safetensors`, `.npz`, `.pth`, `.pt`, `.pyth`, `.bin` or `.ckpt` file.

    Returns:
        The arrays in the shapes and dtypes of the file.

    Raises:
        UnreadableWeights: The file cannot be read, or its ending is none of these.
        MismatchedWeights: The file holds something other than arrays by name.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        return read_safetensors(path)
    if suffix == ".npz":
        return read_npz(path)
    if suffix not in TORCH:
        raise UnreadableWeights(f"{path} must end in .safetensors, .npz or {', '.join(TORCH)}")
    found: Any = read_torch(path)
    while isinstance(found, Mapping) and (
        inner := next((name for name in WRAPPERS if isinstance(found.get(name), Mapping)), None)
    ):
        found = found[inner]
    if not isinstance(found, Mapping):
        raise MismatchedWeights(
            f"{path} holds a {type(found).__name__} where parameters by name are needed"
        )
    return {str(name): value for name, value in found.items() if isinstance(value, np.ndarray)}


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a NumPy file by their names.

    Two-byte arrays without a type, as JAX writes bfloat16, become bfloat16. Nothing is unpickled.

    Args:
        path: A `.npz` file.

    Raises:
        UnreadableWeights: The file cannot be read, or holds something other than plain arrays.
    """
    try:
        with open(path, "rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds one array without a name")
            arrays = {name: file[name] for name in file.files}
            if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"its member {odd[0]} is not an array")
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        NotImplementedError,
        *_DAMAGED,
    ) as error:
        reason = str(error).partition("\n")[0][:200]
        if "pickle" in reason:  # NumPy says so of every file that is neither zip nor npy
            reason = "it holds pickled objects, or is a file of another kind"
        raise UnreadableWeights(f"{path} is not a readable npz file: {reason}") from None
    return {
        name: array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
        for name, array in arrays.items()
    }
