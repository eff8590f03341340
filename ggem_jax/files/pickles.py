"""Pickles of plain data, read without running them.

A pickle is a program for a small stack machine that may call anything that can be imported. Here
the standard library's `pickletools` yields its operations one by one, and a machine of our own
carries them out. It imports nothing and calls only the few functions of the table it is given; a
pickle that asks for anything else is refused, and the error names it. Copies that functions
make are charged to a budget, and text is made of plain values only, so that a small file takes
neither much memory nor much time.

Reference: Python's documentation of `pickle` and `pickletools`, and PEP 574 for the buffers of
protocol 5.
"""

import io
import math
import pickletools
import re
import struct
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ggem_jax.files.errors import UnreadableWeights, UnsafePickle

# Errors of our machine and of `pickletools` over damaged bytes.
DAMAGED = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, struct.error,
    ArithmeticError, MemoryError, RecursionError, SyntaxError,
)  # fmt: skip


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


def _encode(text, encoding="latin-1"):
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError("bytes in an unknown encoding")
    return text.encode(encoding)


_NDARRAY = Function("numpy.ndarray", _reconstruct)

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): dict(
        _pairs([part for key, value in pairs for part in (key, value)])
    ),
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
}
for _module in ("builtins", "__builtin__"):
    _FUNCTIONS |= {
        f"{_module}.set": lambda items=(): set(_keys(items)),
        f"{_module}.frozenset": lambda items=(): frozenset(_keys(items)),
        f"{_module}.bytearray": lambda data=b"", *encoding: bytearray(
            _encode(data, *encoding) if isinstance(data, str) else _bytes(data)
        ),
        f"{_module}.bytes": lambda data=b"": _bytes(data),
        f"{_module}.complex": _complex,
    }

PLAIN: dict[str, Any] = {name: Function(name, call) for name, call in _FUNCTIONS.items()}
PLAIN |= {
    name.replace("numpy.core.", "numpy._core."): value
    for name, value in PLAIN.items()
    if name.startswith("numpy.core.")
}
PLAIN["numpy.ndarray"] = _NDARRAY


def read_pickle(source: Path | str | bytes) -> Any:
    """Returns the value of a pickle of plain data.

    Plain data are numbers, text, bytes, lists, tuples, dictionaries, sets, and NumPy arrays and
    scalars of numbers and text. An `OrderedDict` becomes a `dict`. Text of Python 2 is read as
    Latin-1.

    Args:
        source: Path of a pickle, or its bytes.

    Raises:
        UnsafePickle: The pickle asks for anything other than plain data.
        UnreadableWeights: The file cannot be read, its bytes are damaged, or something follows the
            end of the pickle.
    """
    name = "the pickle" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_bytes(source)
    file = io.BytesIO(data)
    value = run_pickle(file, PLAIN, name=name, budget=Budget.of_file(data))
    if file.read(1):
        raise UnreadableWeights(f"{name} is not a readable pickle: something follows its end")
    return value


def read_bytes(path: Path | str) -> bytes:
    """Returns the contents of a file.

    Args:
        path: The file.

    Raises:
        UnreadableWeights: The file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableWeights(f"{path} cannot be read: {error.strerror or error}") from None


def run_pickle(
    file: io.BytesIO,
    known: Mapping[str, Any],
    *,
    name: str,
    budget: Budget,
    persistent: Callable[[Any], Any] | None = None,
    finish: bool = True,
) -> Any:
    """Returns the value of one pickle; `file` is left behind its end.

    Args:
        file: The bytes, at the start of the pickle.
        known: Globals that the pickle may name, by `module.name`. A `Function` may be called;
            anything else is a value.
        name: How errors name the file.
        budget: Charged for the copies that functions make.
        persistent: Function from a persistent id to its object; None refuses persistent ids.
        finish: Whether records become plain values; if not, call `finish_records` later.

    Raises:
        UnsafePickle: The pickle asks for anything that is not known.
        UnreadableWeights: The bytes are damaged.
    """
    try:
        machine = _Machine(known, persistent, budget)
        with warnings.catch_warnings():
            # of the standard library over wrong escapes in text
            warnings.simplefilter("ignore", DeprecationWarning)
            for operation, argument, _ in pickletools.genops(file):
                machine.step(operation.name, argument)
        return finish_records(machine.result) if finish else machine.result
    except UnsafePickle as error:
        raise UnsafePickle(f"{name} is refused: {error}") from None
    except DAMAGED as error:
        raise UnreadableWeights(f"{name} is not a readable pickle: {explain(error)}") from None


def explain(error: BaseException) -> str:
    """Returns the reason that a message gives for an error over damaged bytes.

    Args:
        error: The error. The first line of a `ValueError` is the reason; other kinds give only
            their type.
    """
    text = str(error).partition("\n")[0][:200]
    return (
        text
        if isinstance(error, ValueError) and text
        else f"its bytes make no sense ({type(error).__name__})"
    )


_MARK = object()  # on the stack: where the items of a container begin

# Operations whose argument is a value.
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class _Machine:
    """The stack machine of the format."""

    known: Mapping[str, Any]
    persistent: Callable[[Any], Any] | None
    budget: Budget
    stack: list = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    result: Any = None

    def step(self, operation: str, argument: Any) -> None:
        """Carries out one operation."""
        if operation in _VALUES:
            self.stack.append(argument)
        elif operation in _CONSTANTS:
            self.stack.append(_CONSTANTS[operation]())
        elif operation in _FIXED_TUPLES:
            items = [self.pop() for _ in range(_FIXED_TUPLES[operation])]
            self.stack.append(tuple(reversed(items)))
        else:
            self._other(operation, argument)

    def _other(self, operation: str, argument: Any) -> None:
        match operation:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                self.result = self.pop()
            case "MARK":
                self.stack.append(_MARK)
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                self.stack.append(self.top())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[int(argument)])
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "LIST":
                self.stack.append(self.pop_to_mark())
            case "FROZENSET":
                self.stack.append(frozenset(_keys(self.pop_to_mark())))
            case "DICT":
                self.stack.append(dict(_pairs(self.pop_to_mark())))
            case "APPEND":
                item = self.pop()
                self.top(list).append(item)
            case "APPENDS":
                items = self.pop_to_mark()
                self.top(list).extend(items)
            case "ADDITEMS":
                items = self.pop_to_mark()
                self.top(set).update(_keys(items))
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.top(dict).update(_pairs([key, value]))
            case "SETITEMS":
                pairs = _pairs(self.pop_to_mark())
                self.top(dict).update(pairs)
            case "GLOBAL":
                self.stack.append(self.named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                self.stack.append(self.named(module, name))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                if not isinstance(function, Function) or not isinstance(arguments, tuple):
                    raise UnsafePickle(
                        f"it calls {type(function).__name__}, which is not a function that plain"
                        " data needs"
                    )
                self.budget.spend(_copied_bytes(arguments))
                self.stack.append(function.call(*arguments))
            case "BUILD":
                state = self.pop()
                self.build(self.top(), state)
            case "PERSID" | "BINPERSID":
                identity = argument if operation == "PERSID" else self.pop()
                if self.persistent is None:
                    raise UnsafePickle("it refers to objects outside of it (persistent ids)")
                self.stack.append(self.persistent(identity))
            case "INST":
                self.named(*argument.split(" ", 1))
                raise UnsafePickle(
                    f"it makes an object of the class {argument.replace(' ', '.', 1)!r}"
                )
            case _:
                # OBJ, NEWOBJ, NEWOBJ_EX: objects of classes; EXT: of a registry; NEXT_BUFFER,
                # READONLY_BUFFER: memory outside of the file
                raise UnsafePickle(
                    f"it makes objects in a way that plain data does not need ({operation})"
                )

    def named(self, module: Any, name: Any) -> Any:
        """Returns the global of this name; raises `UnsafePickle` for an unknown one."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError(
                f"a name of the types {type(module).__name__} and {type(name).__name__}"
            )
        full = f"{module}.{name}"
        if full not in self.known:
            raise UnsafePickle(f"it asks for {full[:200]!r}, which is not plain data")
        return self.known[full]

    def build(self, target: Any, state: Any) -> None:
        """Gives an object its state.

        Attributes of an `OrderedDict`, such as PyTorch's `_metadata`, are dropped.
        """
        if isinstance(target, Record):
            self.budget.spend(_copied_bytes(state))
            target.build(state)
        elif not isinstance(target, dict):
            raise UnsafePickle(
                f"it sets the state of {type(target).__name__}, which has none in plain data"
            )

    def pop(self) -> Any:
        """Removes and returns the top of the stack."""
        self.top()
        return self.stack.pop()

    def top(self, kind: type | None = None) -> Any:
        """Returns the top of the stack, which must be of the type `kind`, if that is given."""
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("a value is missing")
        if kind is not None and type(self.stack[-1]) is not kind:
            raise ValueError(f"{kind.__name__} items for a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def pop_to_mark(self) -> list:
        """Removes the topmost mark and the values above it, and returns these values."""
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise ValueError("a mark is missing")


def _pairs(items: list) -> Iterator[tuple[Hashable, Any]]:
    if len(items) % 2:
        raise ValueError("a key without its value")
    return zip(_keys(items[::2]), items[1::2], strict=True)


def _copied_bytes(arguments: Any) -> int:
    """Bytes of a copy of the arguments: 16 for each item, whose reference takes at least 2."""
    sizes: dict[type, int] = dict.fromkeys((str, bytes, bytearray), 1)
    sizes |= dict.fromkeys((list, tuple, dict, set, frozenset), 16)
    return sum(len(value) * sizes[type(value)] for value in arguments if type(value) in sizes)


def _is_key(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return len(value) <= 2**16
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None or isinstance(value, float | np.bool_ | np.integer | np.floating)


def _keys(items: Iterable) -> list:
    """Keys and items of sets: plain values, and tuples of at most 16 of them.

    A small file could hold larger ones, which take forever to hash or to compare.
    """
    items = list(items)
    if not all(
        len(item) <= 16 and all(map(_is_key, item)) if type(item) is tuple else _is_key(item)
        for item in items
    ):
        raise ValueError("a key, or an item of a set, that is not a plain value")
    return items


def finish_records(value: Any) -> Any:
    """Returns the value with its records made into plain values.

    Lists and dictionaries are changed in place. A value that occurs in several places is visited
    once.

    Args:
        value: The result of `run_pickle` with `finish=False`.

    Raises:
        UnsafePickle: The value holds a function, or a record that stands for no plain data.
        ValueError: A record is incomplete.
    """
    # by id: the value, which must live on to keep its id, and its plain form
    done: dict[int, tuple[Any, Any]] = {}

    def visit(value: Any) -> Any:
        if id(value) in done:
            return done[id(value)][1]
        if isinstance(value, Function):
            raise UnsafePickle(f"it holds the function {value.name!r}")
        if isinstance(value, list | dict):
            done[id(value)] = value, value
            for place, item in list(enumerate(value) if isinstance(value, list) else value.items()):
                value[place] = visit(item)
        elif isinstance(value, Record | tuple):
            result = (
                value.finish()
                if isinstance(value, Record)
                else tuple(visit(item) for item in value)
            )
            done[id(value)] = value, result
            return result
        return value

    return visit(value)
