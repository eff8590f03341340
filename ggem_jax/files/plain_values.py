"""Plain values of pickles: what is read, what stands in for functions, and what bounds both.

`PLAIN` is the table of names that a pickle of plain data may ask for. A `Record` is something in a
pickle that is not a plain value yet, a `Bag` the attributes of an object that is a bag of values.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np

from ggem_jax.files.errors import UnsafePickle


@dataclass
class Budget:
    """Bytes that copies of a file's contents may still take.

    A pickle can ask for a copy of the same object again and again.
    """

    left: int  # bytes

    @classmethod
    def of_file(cls, data: bytes) -> "Budget":
        """Returns the budget of a file: 8 times its size, and 1 MiB.

        Args:
            data: The contents of the file.
        """
        return cls(8 * len(data) + 2**20)

    def spend(self, count: int) -> None:
        """Charges the budget for a copy.

        Args:
            count: Size of the copy, bytes.

        Raises:
            ValueError: The budget is exceeded.
        """
        self.left -= count
        if self.left < 0:
            raise ValueError("its values would take many times the size of the file")


@dataclass(frozen=True)
class Function:
    """A function that a pickle may call, and the replacement that is called for it."""

    name: str  # in the pickle, as `module.name`
    call: Callable[..., Any]  # our replacement


@dataclass(frozen=True)
class Class(Function):
    """A class whose objects are nothing but bags of values: `call()` makes an empty one."""


class Bag(dict):
    """The attributes of an object that is a bag of values, such as an `argparse.Namespace`."""

    def build(self, state: Any) -> None:
        """Takes attributes by their names.

        Args:
            state: The argument of the operation BUILD.

        Raises:
            ValueError: It is no dictionary of attributes by name.
        """
        if type(state) is not dict or not all(isinstance(name, str) for name in state):
            raise ValueError("attributes that do not come by name")
        self.update(state)


class Record:
    """A value of a pickle that is still being read and is no plain value yet."""

    def build(self, state: Any) -> None:
        """Takes the state that a pickle gives to the value; a plain record refuses it.

        Args:
            state: The argument of the operation BUILD, of any type.

        Raises:
            UnsafePickle: The value has no state in plain data.
        """
        raise UnsafePickle(
            f"it sets the state of a {type(self).__name__.strip('_')}, which has none in plain data"
        )

    def finish(self) -> Any:
        """Returns the plain value that the record stands for."""
        raise NotImplementedError


@dataclass
class DTypeRecord(Record):
    """A NumPy dtype that is being read: numbers and fixed-length text only."""

    text: str  # kind and bytes, such as f4
    order: Literal["<", ">", "|", "="] = "="  # of the bytes, as NumPy writes it

    def build(self, state: tuple) -> None:
        """Takes the byte order of the dtype.

        Args:
            state: The state that NumPy writes: version, byte order, base of a sub-array, names of
                fields, and more.

        Raises:
            UnsafePickle: The dtype has fields or sub-arrays, or an unknown byte order.
        """
        order, inner, names = state[1:4]
        if order not in ("<", ">", "|", "=") or inner is not None or names is not None:
            raise UnsafePickle("it holds a NumPy array of records")
        self.order = order

    def finish(self) -> np.dtype:
        """Returns the dtype; raises `UnsafePickle` for any other kind."""
        if re.fullmatch("b1|[iufc](1|2|4|8|16)|[SU][0-9]{1,6}", self.text) is None:
            raise UnsafePickle(f"it holds a NumPy array of dtype {self.text[:20]!r}")
        return np.dtype(self.text).newbyteorder(self.order)


@dataclass
class ArrayRecord(Record):
    """A NumPy array that is being read."""

    array: np.ndarray | None = None  # None until its state is read

    def build(self, state: tuple) -> None:
        """Takes the contents of the array.

        Args:
            state: The state that NumPy writes: version, shape, dtype, whether the order is
                Fortran's, and the bytes of the numbers.

        Raises:
            UnsafePickle: The array holds Python objects or records.
            ValueError: Shape, dtype and bytes do not fit together.
        """
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")

    def finish(self) -> np.ndarray:
        """Returns the array."""
        if self.array is None:
            raise ValueError("an array without its numbers")
        return self.array


@dataclass(frozen=True)
class TypeName(Record):
    """A plain type of Python that is a value: it becomes its name."""

    name: str

    def finish(self) -> str:
        """Returns the name."""
        return self.name


def _dtype(text, *_):
    return DTypeRecord(text)


def _reconstruct(kind, *_):
    if kind != _NDARRAY:
        raise ValueError("an array of an unknown class")
    return ArrayRecord()


def _array(data, dtype, shape, order):
    if not isinstance(dtype, DTypeRecord) or order not in ("C", "F"):
        raise ValueError("an array without a dtype")
    dtype, shape, data = dtype.finish(), require_shape(shape), _bytes(data)
    if len(data) != dtype.itemsize * math.prod(shape):
        raise ValueError("an array with more or less bytes than its shape asks for")
    array = np.frombuffer(data, dtype).reshape(shape, order=order)
    return array.astype(dtype.newbyteorder("=")) if not dtype.isnative else array


def require_shape(lengths: Any) -> tuple[int, ...]:
    """Returns lengths of axes, or strides, as a tuple that NumPy can take.

    Without the limits, a small file could name numbers whose product takes forever to compute.

    Args:
        lengths: A value of a pickle that should be a list or tuple of whole numbers.

    Raises:
        ValueError: The value is not a list of at most 64 whole numbers from 0 to 2^63 - 1.
    """
    if not isinstance(lengths, list | tuple) or len(lengths) > 64:
        raise ValueError("a shape that is not a list of at most 64 lengths")
    if not all(isinstance(length, int) and 0 <= length < 2**63 for length in lengths):
        raise ValueError(
            "a shape of a negative size, of more than 64 bits, or of something else than whole"
            " numbers"
        )
    return tuple(lengths)


def _scalar(dtype, data):
    return _array(data, dtype, (), "C")[()]


def _bytes(data):
    """Bytes, which Python 2 wrote as text."""
    if isinstance(data, str):
        return data.encode("latin-1")
    if not isinstance(data, bytes | bytearray):
        raise UnsafePickle("it holds a NumPy array of objects")
    return bytes(data)


def _complex(real=0.0, imaginary=0.0):
    if not isinstance(real, int | float) or not isinstance(imaginary, int | float):
        raise ValueError("a complex number of something else than numbers")
    return complex(real, imaginary)


def _default_dict(factory=None):
    if factory is not None and not isinstance(factory, TypeName):
        raise UnsafePickle("it holds a defaultdict whose values are made by a function")
    return {}


def _counter(counts):
    if type(counts) is not dict:
        raise ValueError("a Counter of something else than counts by their names")
    return dict(counts)


def _path(kind: type[PurePath], *parts):
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a path of something else than text")
    return str(kind(*parts))


def _encode(text, encoding="latin-1"):
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError("bytes in an unknown encoding")
    return text.encode(encoding)


# hash -> tokens of the different keys that have it
Hashes = dict[int, set[str]]


def pair_items(items: list, hashes: Hashes) -> Iterator[tuple[Hashable, Any]]:
    """Returns keys with their values.

    Args:
        items: Keys and values in turn.
        hashes: As in `check_keys`.

    Raises:
        ValueError: A value is missing, or a key is none for `check_keys`.
    """
    if len(items) % 2:
        raise ValueError("a key without its value")
    return zip(check_keys(items[::2], hashes), items[1::2], strict=True)


def count_bytes(arguments: Any) -> int:
    """Returns the bytes of a copy: 16 for each item, whose reference takes at least 2.

    Args:
        arguments: The values that are copied.
    """
    sizes: dict[type, int] = dict.fromkeys((str, bytes, bytearray), 1)
    sizes |= dict.fromkeys((list, tuple, dict, set, frozenset), 16)
    return sum(len(value) * sizes[type(value)] for value in arguments if type(value) in sizes)


def _is_key(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return len(value) <= 2**16
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None or isinstance(value, float | np.bool_ | np.integer | np.floating)


def check_keys(items: Iterable, hashes: Hashes) -> list:
    """Returns keys, or items of a set: plain values, and tuples of at most 16 of them.

    A small file could hold larger ones, which take forever to hash or to compare, or many of one
    hash. Text is hashed with a secret of the process, and few whole numbers of 64 bits share a
    hash, but tuples and numbers of NumPy can be chosen to.

    Args:
        items: The keys or items.
        hashes: Keys of this pickle so far, by their hashes; the new ones are added.

    Raises:
        ValueError: One of them is something else, or more than 64 share a hash.
    """
    items = list(items)
    for item in items:
        if not (
            len(item) <= 16 and all(map(_is_key, item)) if type(item) is tuple else _is_key(item)
        ):
            raise ValueError("a key, or an item of a set, that is not a plain value")
        if isinstance(item, tuple | float | np.generic):
            same = hashes.setdefault(hash(item), set())
            same.add(_token(item))
            if len(same) > 64:
                raise ValueError("its keys have been chosen to take for ever to compare")
    return items


def _token(key: Any) -> str:
    """A short text that differs where keys do: text within it stands as its own, secret, hash."""
    parts = key if isinstance(key, tuple) else (key,)
    return repr([hash(part) if isinstance(part, str | bytes) else part for part in parts])


_NDARRAY = Function("numpy.ndarray", _reconstruct)

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): dict(
        pair_items([part for key, value in pairs for part in (key, value)], {})
    ),
    "collections.defaultdict": _default_dict,
    "collections.Counter": _counter,
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
}
for _module in ("builtins", "__builtin__"):
    _FUNCTIONS |= {
        f"{_module}.set": lambda items=(): set(check_keys(items, {})),
        f"{_module}.frozenset": lambda items=(): frozenset(check_keys(items, {})),
        f"{_module}.bytearray": lambda data=b"", *encoding: bytearray(
            _encode(data, *encoding) if isinstance(data, str) else _bytes(data)
        ),
        f"{_module}.bytes": lambda data=b"": _bytes(data),
        f"{_module}.complex": _complex,
    }
for _module in ("pathlib", "pathlib._local"):
    for _kind in ("PosixPath", "PurePosixPath", "Path", "PurePath"):
        _FUNCTIONS[f"{_module}.{_kind}"] = partial(_path, PurePosixPath)
    for _kind in ("WindowsPath", "PureWindowsPath"):
        _FUNCTIONS[f"{_module}.{_kind}"] = partial(_path, PureWindowsPath)

PLAIN: dict[str, Any] = {name: Function(name, call) for name, call in _FUNCTIONS.items()}
PLAIN |= {
    name.replace("numpy.core.", "numpy._core."): value
    for name, value in PLAIN.items()
    if name.startswith("numpy.core.")
}
PLAIN["numpy.ndarray"] = _NDARRAY
_TYPES = {name: name for name in ("bool", "int", "float", "str", "list", "tuple", "dict")}
_TYPES |= {"long": "int", "unicode": "str"}  # of Python 2
PLAIN |= {
    f"{module}.{name}": TypeName(ours)
    for module in ("builtins", "__builtin__")
    for name, ours in _TYPES.items()
}
PLAIN |= {
    name: Class(name, lambda: Bag()) for name in ("argparse.Namespace", "types.SimpleNamespace")
}
