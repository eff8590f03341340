"""What a compiled program sends between devices, by kind of transfer.

A device of n that take part sends, of an array of B bytes, 2 (n - 1) / n B to sum it over all of
them (all-reduce), (n - 1) / n B to collect it or to sum it in parts (all-gather, reduce-scatter),
and B to pass it on (collective-permute): Thakur et al., "Optimization of Collective Communication
Operations in MPICH", 2005, sections 4.1 to 4.5, the algorithms for long messages.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}


@dataclass(frozen=True)
class Transfer:
    """One instruction that moves arrays between devices."""

    kind: str  # one of KINDS
    shapes: tuple[tuple[int, ...], ...]  # of its results
    result_bytes: int  # of all results on a device
    devices: int  # that take part together
    times: int  # how often it runs, more than once in a loop

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in all its runs."""
        others = (self.devices - 1) / self.devices
        factor = {
            "all-reduce": 2 * others,
            "all-gather": others,
            "reduce-scatter": self.devices - 1.0,  # the result is one part of n
            "all-to-all": others,
            "collective-permute": 1.0,
        }[self.kind]
        return factor * self.result_bytes * self.times


def find_transfers(program: str, devices: int) -> list[Transfer]:
    """Returns the transfers of a compiled program.

    Args:
        program: Its text, as `jax.stages.Compiled.as_text` gives it.
        devices: Devices that the program runs on.
    """
    bodies = dict(_computations(program))
    (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", program, re.MULTILINE)
    found: list[Transfer] = []
    chains: set[str] = set()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, "").splitlines():
            if _is_new(line, chains):
                found.extend(_transfers_of(line, devices, times))
            for called in re.findall(r"(?:calls|body|to_apply)=%?([\w.\-]+)", line):
                visit(called, times * _runs(line, bodies))

    visit(entry, 1)
    return found


def expected_bytes(params: Any, layout: Any, gradient: int) -> float:
    """Returns what each device sends for its parameters in a step, by the formulas above.

    Those that are split are collected in their own dtype, once, and their gradients summed in
    parts; the gradients of all others are summed whole. XLA may do more.

    Args:
        params: Shapes of the parameters.
        layout: Their shardings over a mesh `(data, fsdp)`.
        gradient: Bytes of a number of the gradients.
    """

    def sent(leaf, sharding) -> float:
        data, fsdp = (sharding.mesh.shape[axis] for axis in ("data", "fsdp"))
        if sharding.is_fully_replicated:
            devices = data * fsdp
            return 2 * (devices - 1) / devices * leaf.size * gradient
        part = leaf.size / fsdp
        collected = (fsdp - 1) * part * (leaf.dtype.itemsize + gradient)
        return collected + 2 * (data - 1) / data * part * gradient

    return sum(jax.tree.leaves(jax.tree.map(sent, params, layout)))


def _computations(program: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(
        r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL
    ):
        yield match[1], match[2]


def _transfers_of(line: str, devices: int, times: int) -> Iterator[Transfer]:
    match = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if match is None:
        return
    arrays = [
        (dtype, tuple(map(int, re.findall(r"\d+", dims))))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
    ]
    if match[3] and match[2] != "all-reduce":  # (operands, results), and places for flags
        arrays = [each for each in arrays if each != ("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    yield Transfer(
        match[2],
        tuple(shape for _, shape in arrays),
        sum(math.prod(shape) * _bits(dtype) // 8 for dtype, shape in arrays),
        _group(line, devices),
        times,
    )


def _runs(line: str, bodies: dict[str, str]) -> int:
    """How often a line runs what it calls.

    XLA for TPUs does not say how often a loop runs: it is counted where a number that starts at 0
    grows by a constant while it is less than another constant.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if loop is None:
        return 1
    condition, body = (_instructions(bodies.get(name, "")) for name in loop.groups())
    for compare in condition.values():
        if compare.kind != "compare" or "direction=LT" not in compare.rest:
            continue
        counter, end = compare.operands
        place = re.search(r"index=(\d+)", condition[counter].rest)
        if place is None or (last := _constant(condition, end)) is None:
            continue
        results = next(each.operands for each in body.values() if each.root)
        steps = [_constant(body, name) for name in body[results[int(place[1])]].operands]
        if step := next((step for step in steps if step), None):
            return -(-last // step)
    return 1


class _Instruction(NamedTuple):
    kind: str
    operands: list[str]
    rest: str  # the text from its operands on
    root: bool  # whether it is the result of its computation


def _instructions(body: str) -> dict[str, _Instruction]:
    found = {}
    for line in body.splitlines():
        match = re.match(r"\s*(ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if match is not None:
            root, name, kind, rest = match.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
            found[name] = _Instruction(kind, operands, rest, root is not None)
    return found


def _constant(instructions: dict[str, _Instruction], name: str) -> int | None:
    instruction = instructions[name]
    number = re.match(r"(\d+)\)", instruction.rest)
    return int(number[1]) if instruction.kind == "constant" and number else None


def _is_new(line: str, chains: set[str]) -> bool:
    """Whether the line is not the continuation of a transfer that was counted.

    XLA for TPUs carries one transfer through a chain of fusions, and each names it again.
    """
    match = re.search(r'channel_id=(\d+),.*chain_id="(\w+)"', line)
    if match is None:
        return True
    chain = f"{match[1]} {match[2]}"
    new = chain not in chains
    chains.add(chain)
    return new


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def _group(line: str, devices: int) -> int:
    """Devices that a transfer joins; without groups, all of them.

    The groups are listed, `{{0,1},{2,3}}`, counted, `[2,2]<=[4]`, or axes of a mesh,
    `mesh['a'=2,'b'=2] {'b'}`: 2 in each case.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return devices
