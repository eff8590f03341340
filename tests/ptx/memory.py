"""Memory that checks who reads and writes it."""

from collections.abc import Sequence

import numpy as np
from ptx.code import PtxError

_GUARD = 4096  # bytes around every array, which nobody may touch
_BASE = 1 << 40  # address of the first one
_INPUT, _OUTPUT = 1, 2
_TWO_VALUES = "two threads write different values to one place"  # a GPU keeps either of them


class GlobalMemory:
    """The arrays of a call: inputs can be read, outputs written, and nothing else.

    Args:
        inputs: The arrays that the kernel reads.
        outputs: Arrays of the shapes and dtypes that it writes.
    """

    def __init__(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]):
        self._outputs = outputs
        self._places, end = [], _GUARD
        for array in (*inputs, *outputs):
            self._places.append(end)
            end += -(-array.nbytes // 256) * 256 + _GUARD
        self._bytes = np.zeros(end, np.uint8)
        self._kind, self._written = np.zeros(end, np.uint8), np.zeros(end, np.uint8)
        for array, place in zip((*inputs, *outputs), self._places, strict=True):
            self._kind[place : place + array.nbytes] = _OUTPUT
        for array, place in zip(inputs, self._places, strict=False):
            self._bytes[place : place + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
            self._kind[place : place + array.nbytes] = _INPUT
        self.pointers = [_BASE + place for place in self._places]

    def results(self) -> list[np.ndarray]:
        """Returns the outputs; raises if a byte of them was never written."""
        found = []
        for array, place in zip(self._outputs, self._places[-len(self._outputs) :], strict=True):
            here = slice(place, place + array.nbytes)
            if lost := int(np.sum(self._written[here] == 0)):
                raise PtxError(f"{lost} bytes of an output {array.shape} are never written")
            found.append(
                np.frombuffer(self._bytes[here].tobytes(), array.dtype).reshape(array.shape)
            )
        return found

    def load(self, address: np.ndarray, dtype: type, count: int) -> list[np.ndarray]:
        """Returns `count` numbers from each address on."""
        size = np.dtype(dtype).itemsize
        first = self._offsets(address, size * count, _INPUT) // size
        return [self._bytes.view(dtype)[first + k] for k in range(count)]

    def store(self, address: np.ndarray, values: Sequence[np.ndarray]) -> None:
        """Writes one number of each of `values` from each address on."""
        dtype = values[0].dtype
        first = self._offsets(address, dtype.itemsize * len(values), _OUTPUT) // dtype.itemsize
        memory, done = self._bytes.view(dtype), self._written.view(dtype)
        for k, value in enumerate(values):
            if np.any((done[first + k] != 0) & (memory[first + k] != value)):
                raise PtxError("an output is written twice, with different values")
            memory[first + k] = value
            if np.any(memory[first + k] != value):
                raise PtxError(_TWO_VALUES)
            done[first + k] = np.frombuffer(b"\1" * dtype.itemsize, dtype)[0]

    def _offsets(self, address, size, kind):
        offset = address.astype(np.int64) - _BASE
        if np.any(offset % size):
            raise PtxError(f"an address is not a multiple of {size}")
        verb = "read outside of the inputs" if kind == _INPUT else "written outside of the outputs"
        if np.any((offset < 0) | (offset + size > self._bytes.size)):
            raise PtxError(f"far away memory is {verb}")
        if np.any(self._kind[offset] != kind) or np.any(self._kind[offset + size - 1] != kind):
            raise PtxError(f"memory is {verb}")
        return offset


_NOBODY, _SEVERAL = -1, -2  # in place of a warp


class SharedMemory:
    """The memory that the threads of a program share, and which warps used it since a barrier.

    Args:
        programs: Number of programs; each has its own.
        size: Bytes of each.
    """

    def __init__(self, programs: int, size: int):
        words = -(-size // 16) * 4
        self._size = size
        self._bytes = np.zeros((programs, 4 * words), np.uint8)
        self._writer = np.full((programs, words), _NOBODY)
        self._reader = np.full((programs, words), _NOBODY)

    def barrier(self, programs: np.ndarray) -> None:
        """Lets the threads of these programs see what the others have written."""
        self._writer[programs] = self._reader[programs] = _NOBODY

    def load(self, programs, warps, address, dtype: type, count: int) -> list[np.ndarray]:
        """Returns `count` numbers from each address on, which the warps read."""
        size = np.dtype(dtype).itemsize
        self._check(address, size * count)
        for word in self._words(address, size * count):
            writer = self._writer[programs, word]
            if np.any((writer != _NOBODY) & (writer != warps)):
                raise PtxError("race: shared memory is read that another warp wrote, no barrier")
            self._mark(self._reader, programs, word, warps)
        memory = self._bytes.view(dtype)
        return [memory[programs, address // size + k] for k in range(count)]

    def store(self, programs, warps, address, values: Sequence[np.ndarray]) -> None:
        """Writes one number of each of `values` from each address on, from the warps."""
        size = values[0].dtype.itemsize
        self._check(address, size * len(values))
        for word in self._words(address, size * len(values)):
            for others, verb in ((self._reader, "reads"), (self._writer, "wrote")):
                other = others[programs, word]
                if np.any((other != _NOBODY) & (other != warps)):
                    raise PtxError(
                        f"race: shared memory is written that another warp {verb}, no barrier"
                    )
        for word in self._words(address, size * len(values)):
            self._mark(self._writer, programs, word, warps)
        memory = self._bytes.view(values[0].dtype)
        for k, value in enumerate(values):
            memory[programs, address // size + k] = value
            if np.any(memory[programs, address // size + k] != value):
                raise PtxError(_TWO_VALUES)

    def _check(self, address, size):
        if np.any(address % size):
            raise PtxError(f"a shared address is not a multiple of {size}")
        if np.any((address < 0) | (address + size > self._size)):
            raise PtxError(f"an address is outside of {self._size} bytes of shared memory")

    @staticmethod
    def _words(address, size):
        return [address // 4 + k for k in range(max(size // 4, 1))]

    @staticmethod
    def _mark(users, programs, word, warps):
        before = users[programs, word]
        users[programs, word] = warps
        alone = (users[programs, word] == warps) & ((before == _NOBODY) | (before == warps))
        users[programs[~alone], word[~alone]] = _SEVERAL
