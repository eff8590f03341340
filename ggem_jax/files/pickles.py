"""Pickles of plain data, read without running them.

A pickle is a program for a small stack machine that may call anything that can be imported. Here
the standard library's `pickletools` yields its operations one by one, and a machine of our own
carries them out. It imports nothing and calls only the few functions of the table it is given; a
pickle that asks for anything else is refused, and the error names it. Copies that functions make
are charged to a budget, text is made of plain values only, and keys that were chosen to collide are
refused, so that a small file takes neither much memory nor much time.

Reference: Python's documentation of `pickle` and `pickletools`, and PEP 574 for the buffers of
protocol 5.
"""

import io
import pickletools
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggem_jax.files.errors import UnreadableWeights, UnsafePickle
from ggem_jax.files.plain_values import (
    PLAIN,
    Bag,
    Budget,
    Class,
    Function,
    Hashes,
    Record,
    check_keys,
    count_bytes,
    pair_items,
)

# Errors of our machine and of `pickletools` over damaged bytes.
DAMAGED = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, struct.error,
    ArithmeticError, MemoryError, RecursionError, SyntaxError,
)  # fmt: skip


def read_pickle(source: Path | str | bytes) -> Any:
    """Returns the value of a pickle of plain data.

    Plain data are numbers, text, bytes, lists, tuples, dictionaries, sets, and NumPy arrays and
    scalars of numbers and text. An `OrderedDict`, a `defaultdict`, a `Counter`, an
    `argparse.Namespace` and a `types.SimpleNamespace` become a `dict`, a path its text, and a plain
    type such as `int` its name. Text of Python 2 is read as Latin-1.

    Args:
        source: Path of a pickle, or its bytes.

    Returns:
        The value.

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
    except IsADirectoryError:
        raise UnreadableWeights(f"{path} is a folder: give a file in it") from None
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
_OBJECT = "it makes objects in a way that plain data does not need ({})"


@dataclass
class _Machine:
    """The stack machine of the format."""

    known: Mapping[str, Any]
    persistent: Callable[[Any], Any] | None
    budget: Budget
    stack: list = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    hashes: Hashes = field(default_factory=dict)
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
                self.stack.append(frozenset(check_keys(self.pop_to_mark(), self.hashes)))
            case "DICT":
                self.stack.append(dict(pair_items(self.pop_to_mark(), self.hashes)))
            case "APPEND":
                item = self.pop()
                self.top(list).append(item)
            case "APPENDS":
                items = self.pop_to_mark()
                self.top(list).extend(items)
            case "ADDITEMS":
                items = self.pop_to_mark()
                self.top(set).update(check_keys(items, self.hashes))
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.top(dict).update(pair_items([key, value], self.hashes))
            case "SETITEMS":
                pairs = pair_items(self.pop_to_mark(), self.hashes)
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
                self.budget.spend(count_bytes(arguments))
                self.stack.append(function.call(*arguments))
            case "NEWOBJ":
                arguments, kind = self.pop(), self.pop()
                if not isinstance(kind, Class) or type(arguments) is not tuple or arguments:
                    raise UnsafePickle(_OBJECT.format(operation))
                self.stack.append(kind.call())
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
                # OBJ, NEWOBJ_EX: objects of classes; EXT: of a registry; NEXT_BUFFER,
                # READONLY_BUFFER: memory outside of the file
                raise UnsafePickle(_OBJECT.format(operation))

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
        if isinstance(target, Record | Bag):
            self.budget.spend(count_bytes([state] if isinstance(target, Bag) else state))
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
