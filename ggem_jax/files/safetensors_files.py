"""Files of the format safetensors, through its package (of the extra `retrieval`)."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import ml_dtypes  # noqa: F401  # makes bfloat16 known to NumPy by its name
import numpy as np
from numpy.typing import ArrayLike

from ggem_jax.files.atomic import replacing
from ggem_jax.files.errors import UnreadableWeights

# dtypes in such files that are read
_READ = {
    "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64", "C64"
}  # fmt: skip


def read_safetensors(path: Path | str) -> dict[str, np.ndarray]:
    """Returns all arrays of a file by their names; bfloat16 is that of `ml_dtypes`.

    Args:
        path: A `.safetensors` file.

    Returns:
        The arrays in the dtypes of the file.

    Raises:
        UnreadableWeights: The file cannot be read, or holds arrays of fewer than 16 bits a number.
        ModuleNotFoundError: The package safetensors is not installed.
    """
    package = _package()
    if Path(path).is_dir():
        raise UnreadableWeights(f"{path} is a folder: give a file in it")
    try:
        with package.safe_open(path, framework="numpy") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # no mapping
            if short := [name for name, dtype in dtypes.items() if dtype not in _READ]:
                raise UnreadableWeights(explain_float8(path, short[0], dtypes[short[0]]))
            return {name: file.get_tensor(name) for name in dtypes}
    except UnreadableWeights:
        raise
    except (
        package.SafetensorError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        MemoryError,
    ) as error:
        raise UnreadableWeights(
            f"{path} is not a readable safetensors file: {str(error).partition(chr(10))[0][:200]}"
        ) from None


def explain_float8(path: Path | str, name: str, dtype: str) -> str:
    """Returns the sentence that refuses an array of less than 16 bits a number.

    Args:
        path: The file.
        name: Of the array.
        dtype: As the file calls it.

    Returns:
        The sentence.
    """
    return (
        f"{path} holds {name} in {dtype}, whose scale lies elsewhere: bring the weights in"
        " float32, float16 or bfloat16"
    )


def read_metadata(path: Path | str) -> dict[str, str]:
    """Returns the text by names in the header of a file, empty where there is none.

    Args:
        path: A `.safetensors` file.

    Raises:
        UnreadableWeights: The file cannot be read.
        ModuleNotFoundError: The package safetensors is not installed.
    """
    package = _package()
    try:
        with package.safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (package.SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise UnreadableWeights(
            f"{path} is not a readable safetensors file: {str(error).partition(chr(10))[0][:200]}"
        ) from None


def write_safetensors(
    path: Path | str,
    arrays: Mapping[str, ArrayLike],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays by their names; the file appears when it is complete.

    Args:
        path: The file to write; a file of this name is replaced.
        arrays: The arrays by name, of any dtype that the format knows.
        metadata: Text by names for the header; None writes none.

    Raises:
        ValueError: The package cannot write an array.
        ModuleNotFoundError: The package safetensors is not installed.
    """
    package = _package()
    contents = {str(name): np.array(value, order="C", copy=None) for name, value in arrays.items()}
    try:
        with replacing(path) as temporary:
            package.numpy.save_file(contents, temporary, metadata and dict(metadata))
    except package.SafetensorError as error:
        raise ValueError(f"{path} cannot be written: {error}") from None


def _package() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError:
        raise ModuleNotFoundError(
            "reading safetensors files needs the package safetensors: pip install"
            " 'ggem-jax[retrieval]'"
        ) from None
    return safetensors
