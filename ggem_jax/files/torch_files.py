"""PyTorch's `.pth` files without PyTorch.

The zip form of PyTorch 1.6 and later is read and written. The sequence of pickles of earlier
versions, and the tensors of a TorchScript archive, are read. A checkpoint is a pickle in which a
tensor is a storage (a run of numbers of one type), an offset into it, sizes and strides.
`ggem_jax.files.pickles` reads the pickle and runs nothing of it. Arrays share the memory of their
storage, as the tensors did, and cannot be written to.

Reference: the documentation of `torch.save` and "Serialization semantics" on pytorch.org, and the
files that PyTorch 2.13 writes.
"""

import io
import math
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from ggem_jax.files.atomic import replacing
from ggem_jax.files.errors import UnreadableWeights, UnsafePickle
from ggem_jax.files.pickles import DAMAGED, explain, finish_records, read_bytes, run_pickle
from ggem_jax.files.plain_values import PLAIN, Budget, Function, Record, require_shape
from ggem_jax.files.torchscript import PROGRAM, ProgramNames, named_arrays

ZIP = b"PK\x03\x04"
_REMEDY = (
    "save nothing but the weights, torch.save(model.state_dict(), FILE), where the file is trusted"
)
# the first pickle of a file from before PyTorch 1.6; the second is the version of the form
_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001
_ALIGNMENT = 64  # of a storage in the zip file, bytes, as PyTorch's own

# Errors of the zip reader over damaged files, and those of pickles.
_DAMAGED_ZIP = (
    *DAMAGED,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    OSError,
)

# PyTorch's name of a dtype and of its storage -> ours.
_DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64), "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64), "int32": np.dtype(np.int32), "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_), "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}  # fmt: skip
_ONLY_UNTYPED = {
    "uint16": np.dtype(np.uint16), "uint32": np.dtype(np.uint32), "uint64": np.dtype(np.uint64),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_ALIASES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
}


@dataclass(frozen=True)
class _StorageType(Record):
    """A class of storages in a pickle; bytes without a type have none."""

    dtype: np.dtype | None

    def finish(self) -> np.dtype | None:
        return self.dtype


@dataclass
class _Storage(Record):
    """Numbers of a file: as bytes, or still to come."""

    dtype: np.dtype | None
    numbers: int  # of the dtype, or bytes
    swapped: bool = False
    data: bytes | None = None

    @property
    def bytes(self) -> int:
        return self.numbers * (1 if self.dtype is None else self.dtype.itemsize)

    def finish(self) -> Any:
        raise UnsafePickle("it holds a storage without a tensor")


@dataclass
class _Tensor(Record):
    """A tensor whose storage may still be to come; `finish` makes the array."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype
    budget: Budget

    def finish(self) -> np.ndarray:
        if self.storage.data is None:
            raise ValueError("a storage is missing")
        if len(self.storage.data) % self.dtype.itemsize:
            raise ValueError("a storage ends within a number")
        flat = np.frombuffer(self.storage.data, np.uint8).view(self.dtype)
        if self.storage.swapped:
            self.budget.spend(flat.nbytes)
            flat = flat.byteswap()
        if len(self.size) != len(self.stride):
            raise ValueError("a tensor with more or less strides than axes")
        last = self.offset + sum(
            (length - 1) * step for length, step in zip(self.size, self.stride, strict=True)
        )
        if 0 in self.size:
            return np.zeros(self.size, self.dtype)
        if last >= len(flat):
            raise ValueError(
                f"a tensor of the sizes {self.size} reaches beyond its storage of {len(flat)}"
                " numbers"
            )
        strides = [step * flat.itemsize for step in self.stride]
        view = np.ndarray(
            self.size, self.dtype, flat.view(np.uint8), self.offset * flat.itemsize, strides
        )
        if view.flags.c_contiguous:
            return view
        self.budget.spend(view.nbytes)
        return np.array(view, order="C")


def read_torch(path: Path | str) -> Any:
    """Returns the contents of a `.pth` file, with arrays for tensors.

    The contents are nested dictionaries, lists and plain values. The arrays are contiguous and
    cannot be written to; tensors that shared a storage share memory. bfloat16 and float8 are those
    of `ml_dtypes`. Parameters become arrays, a `torch.dtype` a NumPy dtype, a `torch.Size` a tuple,
    a device its name, and an `OrderedDict` a `dict`; other plain data become what `read_pickle`
    makes of them. Of a TorchScript archive the contents are the arrays by the names of its
    `state_dict`; its program is not read.

    Args:
        path: A checkpoint of `torch.save` or an archive of `torch.jit.save`, of any ending.

    Returns:
        The contents.

    Raises:
        UnsafePickle: The checkpoint asks for anything else.
        UnreadableWeights: The file cannot be read.
    """
    data = read_bytes(path)
    budget = Budget.of_file(data)
    try:
        read = _read_zip if data[:4] == ZIP else _read_old
        return read(data, str(path), budget)
    except UnsafePickle as error:
        raise UnsafePickle(f"{error}; {_REMEDY}") from None


def is_torchscript(path: Path | str) -> bool:
    """Returns whether a file that `read_torch` reads is a TorchScript archive.

    Args:
        path: The file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, *_DAMAGED_ZIP):
        return False


def write_torch(path: Path | str, arrays: Mapping[str, ArrayLike]) -> None:
    """Writes arrays as a state dictionary that `torch.load` reads, also with `weights_only=True`.

    The file appears when it is complete.

    Args:
        path: The file to write; a file of this name is replaced.
        arrays: The arrays by the names of their parameters.

    Raises:
        ValueError: An array has a dtype that such files do not hold.
    """
    contents = {}
    for name, value in arrays.items():
        array = np.asarray(value, order="C")
        if array.dtype.newbyteorder("=") not in _DTYPES.values():
            raise ValueError(
                f"{name!r} is of dtype {array.dtype}; a .pth file takes {', '.join(_DTYPES)}"
            )
        little = sys.byteorder == "little" if array.dtype.isnative else array.dtype.byteorder == "<"
        contents[str(name)] = array if little else array.byteswap()
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        entries: dict[str, Any] = {"data.pkl": _state_dictionary(contents), "byteorder": b"little"}
        entries |= {
            f"data/{i}": array.reshape(-1).view(np.uint8).data
            for i, array in enumerate(contents.values())
        }
        entries["version"] = b"3\n"
        for name, data in entries.items():
            info = zipfile.ZipInfo(f"archive/{name}")
            start = archive.fp.tell() + 30 + len(info.filename) + 4  # type: ignore[union-attr]  # 30: fixed part of a local header
            padding = -start % _ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, data)


def _state_dictionary(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The pickle, protocol 2: an `OrderedDict` of calls of `torch._utils._rebuild_tensor_v2`.

    The tensors are on the storages 0, 1, ...
    """
    storages = {_DTYPES[dtype]: storage for storage, dtype in _STORAGES.items()}
    ordered = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", ordered, b"("]
    for i, (name, array) in enumerate(arrays.items()):
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        storage = f"ctorch\n{storages[array.dtype.newbyteorder('=')]}\n".encode()
        reference = (
            b"("
            + _plain("storage")
            + storage
            + _plain(str(i))
            + _plain("cpu")
            + _plain(array.size)
            + b"tQ"
        )
        tensor = (
            reference + _plain(0) + _plain(array.shape) + _plain(tuple(strides)) + b"\x89" + ordered
        )
        parts.append(_plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + tensor + b"tR")
    return b"".join([*parts, b"u."])


def _plain(value: Any) -> bytes:
    """The operations of a pickle that put a plain value on the stack.

    They have no memo entries, so that they can stand anywhere.
    """
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_plain, value)) + b"t"
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data
    return pickle.dumps(value, protocol=2)[2:-1]


def _read_zip(data: bytes, name: str, budget: Budget) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = _entries(archive, len(data))
            order = (
                archive.read(entries["byteorder"]).decode("ascii")
                if "byteorder" in entries
                else "little"
            )
            if order not in ("little", "big"):
                raise ValueError("its byte order is neither little nor big")
            storages: dict[str, _Storage] = {}

            def storage(identity: Any) -> _Storage:
                kind, key, numbers, _ = _require_identity(identity)
                if key not in storages:
                    storages[key] = _Storage(
                        kind.dtype,
                        numbers,
                        order != sys.byteorder,
                        archive.read(entries[f"data/{key}"]),
                    )
                    _check_bytes(storages[key])
                return storages[key]

            pickled, known = archive.read(entries["data.pkl"]), _known(budget)
            is_program = "constants.pkl" in entries
            contents = run_pickle(
                io.BytesIO(pickled),
                ProgramNames(known | PROGRAM) if is_program else known,
                name=name,
                budget=budget,
                persistent=storage,
            )
            if not is_program:
                return contents
            arrays = named_arrays(contents, Budget.of_file(pickled))
            if not arrays:
                raise UnreadableWeights(
                    f"{name} is a TorchScript program without parameters by name, as"
                    " torch.jit.freeze leaves it; save its state_dict before that"
                )
            return arrays
    except UnreadableWeights:
        raise
    except _DAMAGED_ZIP as error:
        raise UnreadableWeights(f"{name} is not a readable checkpoint: {explain(error)}") from None


def _entries(archive: zipfile.ZipFile, total: int) -> dict[str, zipfile.ZipInfo]:
    """The files of the archive by their names below its one folder, whatever that is called.

    Programs, which TorchScript compresses, are left out.
    """
    infos = archive.infolist()
    (pickled,) = [
        info.filename
        for info in infos
        if info.filename.endswith("/data.pkl") and info.filename.count("/") == 1
    ]
    folder = pickled.removesuffix("data.pkl")
    infos = [info for info in infos if not info.filename.startswith(f"{folder}code/")]
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise ValueError("it is compressed, as PyTorch never does")
    if sum(info.file_size for info in infos) > total:
        raise ValueError("its parts are larger than the file")
    return {info.filename.removeprefix(folder): info for info in infos}


def _read_old(data: bytes, name: str, budget: Budget) -> Any:
    """The object of a file from before PyTorch 1.6.

    Such a file is pickles of a magic number, a version, facts of the machine, the object and the
    names of the storages, then each storage: length and numbers.
    """
    file = io.BytesIO(data)
    if run_pickle(file, {}, name=name, budget=budget) != _MAGIC:
        raise UnreadableWeights(f"{name} is not a checkpoint of PyTorch")
    version, machine = (run_pickle(file, {}, name=name, budget=budget) for _ in range(2))
    storages: dict[str, _Storage] = {}

    def storage(identity: Any) -> _Storage:
        kind, key, numbers, view = _require_identity(identity)
        if view is not None:
            raise ValueError("its storages are views of others, as in PyTorch before 0.4")
        return storages.setdefault(
            key,
            _Storage(
                kind.dtype,
                numbers,
                machine.get("little_endian", True) != (sys.byteorder == "little"),
            ),
        )

    try:
        if version != _OLD_VERSION or not isinstance(machine, dict):
            found = version if isinstance(version, int) else type(version).__name__
            raise ValueError(f"its version is {found}, not {_OLD_VERSION}")
        value = run_pickle(
            file, _known(budget), name=name, budget=budget, persistent=storage, finish=False
        )
        for key in run_pickle(file, {}, name=name, budget=budget):
            if not isinstance(key, str):
                raise ValueError("a storage without a name")
            each = storages[key]
            (numbers,) = struct.unpack("<q", file.read(8))
            if numbers != each.numbers:
                raise ValueError(f"a storage of {numbers} numbers where {each.numbers} are needed")
            start, end = file.tell(), file.tell() + each.bytes
            if each.data is None:
                each.data = data[start:end]
            file.seek(end)
            _check_bytes(each)
        return finish_records(value)
    except UnsafePickle as error:
        raise UnsafePickle(
            str(error) if str(error).startswith(name) else f"{name} is refused: {error}"
        ) from None
    except UnreadableWeights:
        raise
    except DAMAGED as error:
        raise UnreadableWeights(f"{name} is not a readable checkpoint: {explain(error)}") from None


def _require_identity(identity: Any) -> tuple[_StorageType, str, int, Any]:
    """A persistent id: the word storage, its class, name, device and how many numbers it has.

    In old files a sixth part says of which storage it is a view.
    """
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        kind = identity[0] if isinstance(identity, tuple) and identity else identity
        found = repr(kind[:50]) if isinstance(kind, str) else f"of the type {type(kind).__name__}"
        raise UnsafePickle(f"it holds the persistent object {found}, which is not a storage")
    _, kind, key, _, numbers, *view = identity
    if (
        not isinstance(kind, _StorageType)
        or not isinstance(key, str)
        or not isinstance(numbers, int)
        or not 0 <= numbers < 2**63
    ):
        raise ValueError("a storage without a type, a name or a size")
    return kind, key, numbers, view[0] if view else None


def _check_bytes(storage: _Storage) -> None:
    found = len(storage.data or b"")
    if found != storage.bytes:
        raise ValueError(f"a storage has {found} bytes where {storage.bytes} are needed")


def _known(budget: Budget) -> dict[str, Any]:
    """PyTorch's globals that plain checkpoints name."""

    def tensor(storage, offset, size, stride, *_):
        if not isinstance(storage, _Storage) or storage.dtype is None:
            raise ValueError("a tensor without a typed storage")
        return tensor_of_dtype(storage, offset, size, stride, False, None, storage.dtype)

    def tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, *_):
        if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype):
            raise ValueError("a tensor without a storage or a dtype")
        (first,) = require_shape((offset,))
        return _Tensor(storage, first, require_shape(size), require_shape(stride), dtype, budget)

    dtypes = _DTYPES | _ONLY_UNTYPED | {alias: _DTYPES[name] for alias, name in _ALIASES.items()}
    known: dict[str, Any] = PLAIN | {f"torch.{name}": dtype for name, dtype in dtypes.items()}
    known |= {
        f"torch.{storage}": _StorageType(_DTYPES[name]) for storage, name in _STORAGES.items()
    }
    known |= {
        name: _StorageType(None)
        for name in ("torch.UntypedStorage", "torch.storage.UntypedStorage")
    }
    functions: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": tensor_of_dtype,
        "torch._utils._rebuild_parameter": _first_of,
        "torch._utils._rebuild_parameter_with_state": _first_of,
        "torch.Size": tuple,
        "torch.device": _device,
    }
    return known | {name: Function(name, call) for name, call in functions.items()}


def _device(kind, *index):
    if (
        not isinstance(kind, str)
        or len(index) > 1
        or not all(isinstance(number, int) for number in index)
    ):
        raise ValueError("a device without a name, or with something else than a number")
    return ":".join(map(str, (kind, *index)))


def _first_of(tensor, *_):
    """The tensor of a parameter, without whether it is trained and without its hooks."""
    return tensor
