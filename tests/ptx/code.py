"""PTX as Triton writes it: one kernel, its parameters and its instructions."""

import re
from dataclasses import dataclass


class PtxError(Exception):
    """What a kernel does that no kernel may do, or an instruction that nobody has written here."""


@dataclass(frozen=True)
class Instruction:
    """One line, such as `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1 + 8];`."""

    guard: str  # predicate register, or ""
    negated: bool  # whether it is executed where the guard is false
    opcode: tuple[str, ...]  # "ld", "global", "v2", "b32"
    operands: tuple[str, ...]  # "{%r1, %r2}", "[%rd1 + 8]"

    def __str__(self) -> str:
        return f"{'.'.join(self.opcode)} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Kernel:
    """The instructions of one entry point."""

    name: str
    parameters: tuple[str, ...]
    threads: int  # of a program
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # index of the instruction that follows


_STATEMENT = re.compile(r"(\$\w+):|([^;:]+);")
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+) )?([a-z][\w.]*)\s*(.*)$")
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")


def parse(text: str) -> Kernel:
    """Returns the kernel of a PTX file with one entry point."""
    entry = re.search(
        r"\.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)[^{]*\{(.*?)(?:\$L__func_end|\n\})", text, re.S
    )
    if entry is None:
        raise PtxError("no entry point with .reqntid")
    body = re.sub(r"//.*|^\s*\.(?:loc|reg|pragma)\b.*", "", entry[4], flags=re.M)
    instructions, labels = [], {}
    for statement in _STATEMENT.finditer(body):
        if statement[1]:
            labels[statement[1]] = len(instructions)
            continue
        line = " ".join(statement[2].split())
        found = _INSTRUCTION.match(line)
        if found is None:
            raise PtxError(f"no instruction: {line}")
        negated, guard, opcode, operands = found.groups()
        parts = tuple(operand.strip() for operand in _OPERAND.findall(operands))
        instructions.append(
            Instruction(guard or "", bool(negated), tuple(opcode.split(".")), parts)
        )
    parameters = tuple(re.findall(r"(\w+_param_\d+)", entry[2]))
    return Kernel(entry[1], parameters, int(entry[3]), tuple(instructions), labels)
