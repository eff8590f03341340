"""Machine code of NVIDIA GPUs, as cuobjdump prints it, with what the compiler tells the hardware.

From Volta on, an instruction carries in bits 41 to 58 of its second word how many cycles its warp
waits before the next one, which of six scoreboards it sets while it runs, and for which it waits
(Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018,
arXiv:1804.06826, section 2.1).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

NO_SCOREBOARD = 7
_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,5})\*/\s+(?:(?P<guard>@!?U?P\w+)\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)"
    r"(?P<operands>[^;]*);[^\n]*\n\s*/\* 0x(?P<control>[0-9a-f]{16}) \*/"
)
# Which part of a multiprocessor executes an instruction, by its name up to the first dot.
_PIPES = {
    "special": "MUFU I2F F2I F2F FRND",
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FHADD FHFMA",
    "fma heavy": "IMAD HFMA2 HADD2 HMUL2",
    "load/store": "LDG STG LDS STS LDSM STSM SHFL ATOMG RED LDC",
    "control": "BAR BRA EXIT NOP BSSY BSYNC WARPSYNC CALL RET DEPBAR MEMBAR S2R CS2R YIELD",
    "uniform": "R2UR S2UR",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
# Where the parameters of a kernel begin in its constant bank.
_FIRST_PARAMETER = {8: 0x160, 9: 0x210, 10: 0x380, 12: 0x380}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp."""

    address: int
    guard: str  # the predicate under which it executes, or ""
    opcode: str
    operands: str
    stall: int  # cycles before the next instruction of the warp
    sets: int  # scoreboard that it frees when its result is there, or NO_SCOREBOARD
    frees: int  # scoreboard that it frees when its operands are read, or NO_SCOREBOARD
    waits: int  # scoreboards for which it waits, one bit each

    @cached_property
    def name(self) -> str:
        """The opcode without its options."""
        return self.opcode.split(".")[0]

    @cached_property
    def pipe(self) -> str:
        """The pipe that executes it: a key of `PIPES`; all that is not listed is "alu"."""
        if self.name.startswith("U"):
            return "uniform"
        return _PIPE_OF.get(self.name, "alu")

    @cached_property
    def width(self) -> int:
        """Bytes of each thread that a memory instruction moves."""
        if self.name in ("SHFL", "LDC"):
            return 4
        options = self.opcode.split(".")[1:]
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        if self.name in ("LDSM", "STSM"):
            return 4 * next((int(option) for option in options if option in ("2", "4")), 1)
        return next((sizes[option] for option in options if option in sizes), 4)

    @cached_property
    def target(self) -> int | None:
        """The address to which a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


def parse(sass: str) -> list[Instruction]:
    """Returns the instructions of the text of `cuobjdump -sass`, in order.

    Args:
        sass: Output for a file with one kernel.
    """
    instructions = []
    for found in _LINE.finditer(sass):
        control = int(found["control"], 16)
        instructions.append(
            Instruction(
                int(found["address"], 16),
                found["guard"] or "",
                found["opcode"],
                found["operands"].strip(),
                stall=control >> 41 & 15,
                sets=control >> 46 & 7,
                frees=control >> 49 & 7,
                waits=control >> 52 & 63,
            )
        )
    return instructions


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Returns first and last index of each loop, in order of the last.

    Args:
        code: The instructions of a kernel.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    return [
        (index[instruction.target], i)
        for i, instruction in enumerate(code)
        if instruction.target is not None and instruction.target < instruction.address
    ]


def path(code: Sequence[Instruction], trips: Sequence[int], rest: bool) -> list[int]:
    """Returns the indices of the instructions that a warp executes, in order.

    A conditional branch forward is taken where it skips a loop without trips, or global loads
    behind the loops that are not to be executed, and nowhere else. A loop ends by its last branch.

    Args:
        code: The instructions of a kernel.
        trips: How often the warp goes through each of `loops(code)`.
        rest: Whether the warp loads more behind the loops, where that is conditional.

    Raises:
        ValueError: The kernel has another number of loops.
    """
    found = loops(code)
    if len(found) != len(trips):
        raise ValueError(f"the code has {len(found)} loops, not {len(trips)}: {trips} trips")
    back = {last: (first, trip) for (first, last), trip in zip(found, trips, strict=True)}
    skipped = [first for (first, _), trip in zip(found, trips, strict=True) if trip == 0]
    last_loop = max(back, default=0)
    index = {instruction.address: i for i, instruction in enumerate(code)}
    taken, i, left = [], 0, {last: trip for last, (_, trip) in back.items()}
    while i < len(code):
        taken.append(i)
        instruction = code[i]
        if instruction.name == "EXIT" and not instruction.guard:
            break
        if i in back:
            left[i] -= 1
            i = back[i][0] if left[i] > 0 else i + 1
            continue
        forward = instruction.target is not None and instruction.target > instruction.address
        if forward:
            end = index[instruction.target]
            conditional = instruction.guard or instruction.opcode.endswith(".U")
            skips_rest = i > last_loop and any(c.name == "LDG" for c in code[i + 1 : end])
            without = any(i < first < end for first in skipped) or (skips_rest and not rest)
            if not conditional or without:
                i = end
                continue
        i += 1
    return taken


def pointers(code: Sequence[Instruction], capability: int) -> dict[int, int]:
    """Returns for each global load or store which parameter of the kernel its address comes from.

    The registers are followed in the order of the code: an instruction gives what it writes the
    parameters of what it reads.

    Args:
        code: The instructions of a kernel whose first parameters are pointers.
        capability: Compute capability, such as 90.

    Returns:
        Position of the parameter by index of the instruction.

    Raises:
        ValueError: An address comes from no parameter, or from several.
    """
    first = _FIRST_PARAMETER[capability // 10]
    origin: dict[str, frozenset[int]] = {}
    found: dict[int, int] = {}
    for i, instruction in enumerate(code):
        operands = re.sub(r"desc\[UR\d+\]", "", instruction.operands)
        if instruction.name in ("LDG", "STG"):
            address = re.findall(r"\[([^\]]*)\]", operands)[-1]
            which = _origins(address, origin)
            if len(which) != 1:
                raise ValueError(f"{instruction.opcode} {operands}: parameters {sorted(which)}")
            found[i] = next(iter(which))
        _follow(instruction, operands, origin, first)
    return found


_REGISTER = re.compile(r"\bU?R\d+\b")


def _origins(text: str, origin: dict[str, frozenset[int]]) -> frozenset[int]:
    registers = (origin.get(register, frozenset()) for register in _REGISTER.findall(text))
    return frozenset().union(*registers)


def _follow(instruction, operands, origin, first) -> None:
    """Updates the parameters that registers hold after an instruction."""
    parts = [part.strip() for part in operands.split(",")]
    written = next((part.split(".")[0] for part in parts if _REGISTER.fullmatch(part)), None)
    if instruction.name in ("STG", "STS", "STSM") or written is None:
        return
    held = frozenset()
    if instruction.name not in ("LDG", "LDS", "LDSM", "SHFL"):
        position = parts.index(written)
        held = _origins(",".join(parts[position + 1 :]), origin)
        for offset in re.findall(r"c\[0x0\]\[0x([0-9a-f]+)\]", operands):
            if int(offset, 16) >= first:
                held |= {(int(offset, 16) - first) // 8}
    kind, number = re.fullmatch(r"(U?R)(\d+)", written).groups()
    wide = {"128": 4, "64": 2, "WIDE": 2}
    count = max((wide.get(option, 1) for option in instruction.opcode.split(".")), default=1)
    for k in range(count):
        register = f"{kind}{int(number) + k}"
        here = held
        if instruction.name in ("LDC", "ULDC", "LDCU") and k >= 2:  # the next pointers of a vector
            here = frozenset(which + k // 2 for which in held)
        before = origin.get(register, frozenset()) if instruction.guard else frozenset()
        origin[register] = here | before


def count_by_pipe(code: Iterable[Instruction]) -> dict[str, int]:
    """Returns the number of instructions for each pipe.

    Args:
        code: Instructions, each as often as it is executed.
    """
    counts: dict[str, int] = {}
    for instruction in code:
        counts[instruction.pipe] = counts.get(instruction.pipe, 0) + 1
    return counts
