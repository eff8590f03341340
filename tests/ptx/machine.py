"""Runs a kernel's PTX: all threads of many programs at once, on arrays of their registers.

Threads take the instruction with the lowest index that any of them has reached, so those that skip
a branch wait for the others behind it. Nothing here knows about time.
"""

from collections import Counter

import numpy as np
from ptx.arithmetic import PAIRS, TYPES, Error, compute, no_error
from ptx.code import Instruction, Kernel, PtxError
from ptx.memory import GlobalMemory, SharedMemory

# Bits of a register by the letters of its name.
_WIDTHS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64, "%f": np.uint32}
# A register that nothing was written to has this: not a number, so that its use shows.
_POISON = {np.bool_: True, np.uint16: 0x7FC1, np.uint32: 0x7FC0DEAD, np.uint64: 0x7FC0DEAD7FC0DEAD}
_ELEMENTS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Machine:
    """Some programs of a kernel call.

    Args:
        kernel: The kernel.
        memory: The arrays of the call, which its other programs share.
        programs: Numbers of the programs to run.
        shared_bytes: Shared memory of a program.
        error: Errors of the approximate instructions.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        programs: np.ndarray,
        shared_bytes: int,
        error: Error = no_error,
    ):
        self.kernel, self.memory, self.error = kernel, memory, error
        self.shared = SharedMemory(len(programs), shared_bytes)
        self.count = len(programs) * kernel.threads
        thread = np.tile(np.arange(kernel.threads, dtype=np.uint32), len(programs))
        self.program = np.repeat(np.arange(len(programs)), kernel.threads)
        self.warp = thread.astype(np.int64) // 32
        self.registers = {"%tid.x": thread, "%ctaid.x": programs.astype(np.uint32)[self.program]}
        # after the arrays, Triton passes two pointers to scratch memory, which nothing here uses
        pointers = [*memory.pointers, 0, 0]
        if len(kernel.parameters) != len(pointers):
            raise PtxError(f"{len(kernel.parameters)} parameters for {len(memory.pointers)} arrays")
        self.parameters = dict(zip(kernel.parameters, pointers, strict=True))
        self.executed: Counter[str] = Counter()  # instructions by name, once for all threads

    def run(self) -> None:
        """Runs the programs to their end."""
        code, labels = self.kernel.instructions, self.kernel.labels
        end = len(code)
        place = np.zeros(self.count, np.int64)  # next instruction of each thread
        while (now := int(place.min())) < end:
            one = code[now]
            here = place == now
            active = here
            if one.guard:
                active = here & (self.read(one.guard, "pred") != one.negated)
            place[here] = now + 1
            if one.opcode[0] == "bra":
                place[active] = labels[one.operands[0]]
            elif one.opcode[0] in ("ret", "exit"):
                place[active] = end
            elif active.any():
                self.executed[".".join(one.opcode)] += 1
                try:
                    self.step(one, None if active.all() else active)
                except PtxError as error:
                    raise PtxError(
                        f"{self.kernel.name}, instruction {now}, {one}: {error}"
                    ) from None

    def step(self, one: Instruction, active: np.ndarray | None) -> None:
        """Runs an instruction that does not branch; None: in all threads."""
        match one.opcode:
            case ("bar", "sync"):
                self.barrier(active)
            case ("bar", "warp", "sync"):
                self.whole_warps(active)
            case ("ld", "param", *_):
                self.write(
                    one.operands[0], np.uint64(self.parameters[one.operands[1][1:-1]]), active
                )
            case ("ld" | "st", "global" | "shared", *_):
                self.move_memory(one, active)
            case ("ldmatrix" | "stmatrix", *_):
                self.move_matrices(one, active)
            case ("mov", kind):
                self.move(kind, *one.operands, active)
            case ("shfl", "sync", kind, "b32"):
                self.whole_warps(active)
                self.shuffle(kind, one.operands, active)
            case ("redux", "sync", "max", *rest) if rest[-1] == "f32" and "abs" not in rest:
                self.whole_warps(active)
                self.largest_of_warp(one.operands, "NaN" in rest, active)
            case ("setp", *_) if one.opcode[-1] in PAIRS:
                both = compute(
                    one.opcode, 3, lambda i, kind: self.read(one.operands[i], kind), self.error
                )
                for half, name in enumerate(one.operands[0].split("|")):
                    self.write(name, both[..., half], active)
            case _:
                result = compute(
                    one.opcode,
                    len(one.operands),
                    lambda i, kind: self.read(one.operands[i], kind),
                    self.error,
                )
                self.write(one.operands[0], result, active)

    # Registers

    def read(self, name: str, kind: str) -> np.ndarray:
        """Returns an operand in all threads, as its type says; pairs have a last axis of 2."""
        dtype = TYPES[PAIRS.get(kind, kind)]
        if name.startswith("%"):
            bits = self.registers.get(name)
            if bits is None:
                width = _width(name)
                bits = np.full(self.count, _POISON[width], width)
        elif name == "global_smem":
            bits = np.full(self.count, 0, np.uint32)
        elif dtype is np.bool_:
            return np.full(self.count, int(name, 0) != 0)
        else:
            size = 8 * np.dtype(dtype).itemsize * (2 if kind in PAIRS else 1)
            value = int(name[2:], 16) if name.startswith("0f") else int(name.rstrip("U"), 0)
            bits = np.full(self.count, value % 2**size, _ELEMENTS[size])
        if kind in PAIRS:
            return bits.view(dtype).reshape(self.count, 2)
        if bits.dtype.itemsize > np.dtype(dtype).itemsize:  # a byte of a wider register
            bits = bits.astype(_ELEMENTS[8 * np.dtype(dtype).itemsize])
        return bits.view(dtype)

    def write(self, name: str, value: np.ndarray, active: np.ndarray | None) -> None:
        """Sets a register where threads are active; narrower numbers are extended by zeros."""
        width = _width(name)
        if value.dtype != np.bool_:
            value = np.ascontiguousarray(value)
            value = value.view(width if value.ndim == 2 else _ELEMENTS[8 * value.dtype.itemsize])
        bits = np.broadcast_to(value.reshape(-1).astype(width), self.count)
        if active is not None:
            before = self.registers.get(name)
            bits = np.where(active, bits, _POISON[width] if before is None else before)
        self.registers[name] = np.ascontiguousarray(bits.astype(width))

    def move(self, kind: str, target: str, source: str, active: np.ndarray | None) -> None:
        """Copies a register, or packs two halves in one, or takes it apart, the low half first."""
        half = {"b32": "b16", "b64": "b32"}.get(kind, "")
        if source.startswith("{"):
            halves = [self.read(name, half) for name in _names(source)]
            self.write(target, np.stack(halves, axis=-1), active)
        elif target.startswith("{"):
            halves = self.read(source, kind).view(TYPES[half]).reshape(self.count, 2)
            for k, name in enumerate(_names(target)):
                if name != "_":
                    self.write(name, halves[:, k], active)
        else:
            self.write(target, self.read(source, kind), active)

    # Memory

    def address(self, text: str, kind: str) -> np.ndarray:
        """Returns the addresses that an operand such as `[%rd1 + 8]` names."""
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return self.read(base, kind).astype(np.int64) + int(offset or 0)

    def move_memory(self, one: Instruction, active: np.ndarray | None) -> None:
        """Loads or stores one register, or a vector of them."""
        load, space, dtype = one.opcode[0] == "ld", one.opcode[1], TYPES[one.opcode[-1]]
        where, names = one.operands[1 if load else 0], _names(one.operands[0 if load else 1])
        threads = slice(None) if active is None else active
        address = self.address(where, "b64" if space == "global" else "b32")[threads]
        owner = () if space == "global" else (self.program[threads], self.warp[threads])
        memory = self.memory if space == "global" else self.shared
        if load:
            for name, value in zip(
                names, memory.load(*owner, address, dtype, len(names)), strict=True
            ):
                self.write(name, _spread(value, active), active)
        else:
            memory.store(*owner, address, [self.read(n, one.opcode[-1])[threads] for n in names])

    def move_matrices(self, one: Instruction, active: np.ndarray | None) -> None:
        """Loads or stores 8 x 8 matrices of 16 bits, whose rows are anywhere in shared memory.

        Threads 8 k to 8 k + 7 of a warp have the addresses of the rows of matrix k. Thread t holds
        elements 2 (t % 4) and 2 (t % 4) + 1 of row t // 4 of each matrix.
        """
        if "trans" in one.opcode:
            raise PtxError("transposed matrices are not known here")
        self.whole_warps(active)
        load = one.opcode[0] == "ldmatrix"
        where, names = one.operands[1 if load else 0], _names(one.operands[0 if load else 1])
        rows = self.address(where, "b32").reshape(-1, 32)
        lane = np.arange(32)
        threads = slice(None) if active is None else active
        owner = self.program[threads], self.warp[threads]
        warps = slice(None) if active is None else active.reshape(-1, 32)[:, 0]
        if np.any(rows[warps, : 8 * len(names)] % 16):
            raise PtxError("a row of a matrix is not aligned to 16 bytes")
        for k, name in enumerate(names):
            at = (rows[:, 8 * k + lane // 4] + 4 * (lane % 4)).ravel()[threads]
            if load:
                (value,) = self.shared.load(*owner, at, np.uint32, 1)
                self.write(name, _spread(value, active), active)
            else:
                self.shared.store(*owner, at, [self.read(name, "b32")[threads]])

    # Threads together

    def barrier(self, active: np.ndarray | None) -> None:
        """All threads of a program wait for each other."""
        arrived = np.ones(self.count, bool) if active is None else active
        arrived = arrived.reshape(-1, self.kernel.threads)
        if np.any(arrived.any(1) != arrived.all(1)):
            raise PtxError("some threads of a program miss a barrier")
        self.shared.barrier(arrived.all(1))

    @staticmethod
    def whole_warps(active: np.ndarray | None) -> None:
        """Raises if a part of a warp is active."""
        if active is not None:
            warps = active.reshape(-1, 32)
            if np.any(warps.any(1) != warps.all(1)):
                raise PtxError("some threads of a warp do not take part")

    def shuffle(self, kind: str, operands: tuple[str, ...], active: np.ndarray | None) -> None:
        """Gives every thread the register of another one of its warp."""
        target, source, by, clamp, mask = operands
        if "|" in target or int(clamp, 0) != 31 or int(mask, 0) != -1:
            raise PtxError("only shuffles of whole warps are known here")
        lane, by = np.arange(32), self.read(by, "b32").reshape(-1, 32).astype(np.int64)
        other = {"bfly": lane ^ (by & 31), "idx": by & 31}[kind]
        values = self.read(source, "b32").reshape(-1, 32)
        self.write(target, np.take_along_axis(values, other, axis=1).ravel(), active)

    def largest_of_warp(
        self, operands: tuple[str, ...], propagates: bool, active: np.ndarray | None
    ) -> None:
        """Gives every thread the largest number of those threads that its mask names."""
        target, source, mask = operands
        values = self.read(source, "f32").reshape(-1, 1, 32)
        masks = self.read(mask, "b32").reshape(-1, 32, 1)
        named = (masks >> np.arange(32, dtype=np.uint32)) & 1 != 0
        choose = np.maximum if propagates else np.fmax
        result = choose.reduce(np.where(named, values, np.float32(-np.inf)), axis=2)
        self.write(target, result.ravel(), active)


def _width(name: str) -> type:
    return _WIDTHS[name.rstrip("0123456789")]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def _spread(values: np.ndarray, active: np.ndarray | None) -> np.ndarray:
    """Values of the active threads, in an array of all threads."""
    if active is None:
        return values
    result = np.zeros(active.size, values.dtype)
    result[active] = values
    return result
