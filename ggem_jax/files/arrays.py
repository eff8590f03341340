"""Files of named arrays: what a checkpoint holds, and which of its networks is read."""

import lzma
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.files.kinds import find_kind
from ggem_jax.files.networks import Arrays, arrays_of, choose_network
from ggem_jax.files.safetensors_files import explain_float8, read_safetensors
from ggem_jax.files.shards import find_shards, read_shards
from ggem_jax.files.torch_files import is_torchscript, read_torch

# errors over altered zip files and headers
_DAMAGED = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, SyntaxError,
    RuntimeError, MemoryError, OverflowError, struct.error, tokenize.TokenError, zlib.error,
    lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip
MOST_LETTERS = 500  # of a parameter's name
_DENSEST = 100  # largest ratio of contents to file size of a compressed file that is read


@dataclass(frozen=True)
class Checkpoint:
    """The parameters of one network of a file, and what else the file holds."""

    arrays: Arrays = field(repr=False)
    # where they stand in the file, such as "state_dict_ema" or "model.teacher"; "": at the top
    chosen: str = ""
    others: tuple[str, ...] = ()  # other networks in the file, each a value of `which`
    about: tuple[str, ...] = ()  # facts for people, such as "TorchScript" or "float16"


def read_arrays(path: str | Path, which: str | None = None) -> Arrays:
    """Returns the arrays of a weights file by their names.

    Values that are not arrays are left out.

    Args:
        path: The file; see `read_checkpoint`.
        which: The network of a file with several; see `read_checkpoint`.

    Returns:
        The arrays in the shapes and dtypes of the file.

    Raises:
        UnreadableWeights: The file cannot be read, or is of no known kind.
        MismatchedWeights: The file holds something other than arrays by name, or not the network
            `which`.
    """
    return read_checkpoint(path, which).arrays


def read_checkpoint(path: str | Path, which: str | None = None) -> Checkpoint:
    """Returns the parameters of one network of a weights file, and what else the file holds.

    Args:
        path: A safetensors, npz or PyTorch file, TorchScript archives among them. The ending says
            which (`.safetensors`, `.npz`; `.pth`, `.pt`, `.pyth`, `.bin`, `.ckpt`); files of other
            endings, such as `.pth.tar`, are known by their first bytes. One of several shards, or
            their `.index.json`, stands for all of them.
        which: The network of a file with several: the name that a training script gave it, such as
            "state_dict_ema", "student" or "base_encoder". "ema" is the moving average under any of
            its usual names, "model" the network itself. None: the usual one, which is the
            network itself, and the teacher where there is a student too.

    Returns:
        The arrays and where they stand in the file.

    Raises:
        UnreadableWeights: The file cannot be read, or is of no known kind.
        MismatchedWeights: The file holds something other than arrays by name, several networks of
            which none is the usual one, or not the network `which`.
    """
    path = Path(path)
    contents, about = _read(path)
    if not isinstance(contents, Mapping):
        raise MismatchedWeights(
            f"{path} holds a {type(contents).__name__} where parameters by name are needed"
        )
    try:
        place, arrays, others = choose_network(contents, which)
    except MismatchedWeights as error:
        raise MismatchedWeights(f"{path} {error}") from None
    if long := next((name for name in arrays if len(name) > MOST_LETTERS), None):
        raise MismatchedWeights(
            f"{path} has names of over {MOST_LETTERS} letters, such as {long[:40]}...: it is no"
            " file of weights"
        )
    for name, array in arrays.items():
        if array.dtype.itemsize == 1 and array.dtype.name.startswith("float"):
            raise UnreadableWeights(explain_float8(path, name, array.dtype.name))
    halves = {array.dtype.name for array in arrays.values()} & {"float16", "bfloat16"}
    return Checkpoint(arrays, place, others, (*about, *sorted(halves)))


def _read(path: Path) -> tuple[Any, list[str]]:
    """The contents of a file, or the arrays of all shards, and facts about them."""
    if shards := find_shards(path):
        return read_shards(path, shards, lambda each: arrays_of(_read_file(each))), [
            f"{len(shards)} shards"
        ]
    contents = _read_file(path)
    return contents, ["TorchScript"] if is_torchscript(path) else []


def _read_file(path: Path) -> Any:
    kind = find_kind(path)
    if kind == "torch":
        return read_torch(path)
    return read_safetensors(path) if kind == "safetensors" else read_npz(path)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a NumPy file by their names.

    Two-byte arrays without a type, as JAX writes bfloat16, become bfloat16. Nothing is unpickled.

    Args:
        path: A `.npz` file.

    Returns:
        The arrays in the shapes and dtypes of the file.

    Raises:
        UnreadableWeights: The file cannot be read, or holds something other than plain arrays.
    """
    try:
        with open(path, "rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of headers that Python 2 wrote
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds one array without a name")
            _check_sizes(file.zip, os.fstat(opened.fileno()).st_size)
            arrays = {name: file[name] for name in file.files}
            if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"its member {odd[0]} is not an array")
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0][:200]
        if "pickle" in reason:  # NumPy says so of every file that is neither zip nor npy
            reason = "it holds pickled objects, or is a file of another kind"
        raise UnreadableWeights(f"{path} is not a readable npz file: {reason}") from None
    return {
        name: array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
        for name, array in arrays.items()
    }


def _check_sizes(archive: zipfile.ZipFile, total: int) -> None:
    """Refuses members whose headers ask for more memory than the file has for them."""
    infos = archive.infolist()
    if sum(info.file_size for info in infos) > _DENSEST * total + 2**20:
        raise ValueError(f"its parts are more than {_DENSEST} times as large as the file")
    for info in infos:
        with archive.open(info) as member:
            if member.read(6) != np.lib.format.MAGIC_PREFIX:
                continue
            header = {
                1: np.lib.format.read_array_header_1_0,
                2: np.lib.format.read_array_header_2_0,
            }
            version = member.read(2)[0]
            if version not in header:
                raise ValueError(f"its member {info.filename} is an array of records")
            shape, _, dtype = header[version](member)
            if math.prod(shape) * dtype.itemsize > info.file_size and not dtype.hasobject:
                raise ValueError(f"its member {info.filename} ends before its array does")
