"""Runs the machine code of a kernel through a timing model of one multiprocessor, warp by warp.

Warps issue in order, at most one instruction a cycle from each of four schedulers. An instruction
waits for the scoreboards and stall counts that the compiler gave it (`benchmarks.sass`), and for
its pipe. All multiprocessors do the same at the same time, so one has its share of the memory's
bandwidth; where in the end only some have work left, those have more. Nothing is computed: numbers,
bank conflicts, instruction caches and the layout of DRAM play no part.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpus import GPU
from benchmarks.sass import NO_SCOREBOARD, Instruction

# What we assume, for every GPU alike.
SUSTAINED = 0.9  # of the published boost clock, and of the published bandwidth in a copy
MEMORY_CYCLES = 720  # latency of a load from the memory under load
L2_CYCLES = 270  # and of one from the L2 cache
LAUNCH_SECONDS = 1e-6  # between the end of one kernel and the first program of the next
PROGRAM_CYCLES = 350  # from a free place to the first instruction of a program
_FILL_BYTES = 64  # that one multiprocessor takes from the L2 cache in a cycle
_SHARED_BYTES = 128  # that its shared memory and registers exchange in a cycle
# Cycles until a result of variable latency is there.
_LATENCY = {"special": 24, "SHFL": 26, "shared": 30, "S2R": 25, "LDC": 40, "uniform": 20}
_BARRIER = 20
_SPECIAL, _HALF_RATE, _SLOW_FMA = 8, 2, 2  # cycles of a warp instruction on 4 or 16 lanes


@dataclass(frozen=True)
class Program:
    """What a kind of program executes: the code, the path through it, and its memory traffic."""

    code: Sequence[Instruction]
    path: Sequence[int]  # indices of the instructions that a warp executes
    memory_bytes: Mapping[int, float]  # that a warp moves, by index of a load or store; 0 is cached


@dataclass(frozen=True)
class Timing:
    """What the model says about a kernel."""

    seconds: float
    busy: dict[str, float]  # share of the time, by resource


def copy_bandwidth(gpu: GPU) -> float:
    """Returns the bytes a second that a copy is assumed to move."""
    return SUSTAINED * gpu.peak_bandwidth


def copy_seconds(gpu: GPU, moved: float) -> float:
    """Returns the time of a copy that reads and writes `moved` bytes together."""
    return LAUNCH_SECONDS + moved / copy_bandwidth(gpu)


def resident_programs(gpu: GPU, registers: int, warps: int, shared_bytes: int) -> int:
    """Returns how many programs a multiprocessor holds at a time.

    Registers are given to warps in units of 256, and each program takes 1 KiB of shared memory
    beside its own (CUDA C++ programming guide, compute capability 8.x and later).

    Args:
        gpu: The GPU.
        registers: Registers of a thread.
        warps: Warps of a program.
        shared_bytes: Shared memory of a program.
    """
    by_registers = 65536 // (math.ceil(32 * registers / 256) * 256 * warps)
    by_shared = gpu.shared_bytes // (1024 + math.ceil(shared_bytes / 128) * 128)
    return min(by_registers, by_shared, gpu.warps // warps, gpu.programs)


class _Warp:
    __slots__ = ("order", "position", "program", "scheduler", "scoreboards")

    def __init__(self, program, scheduler, order):
        self.program, self.scheduler, self.order = program, scheduler, order
        self.position, self.scoreboards = 0, [0.0] * 6


class _Running:
    __slots__ = ("at_barrier", "kind", "left", "number")

    def __init__(self, number, kind, left):
        self.number, self.kind, self.left, self.at_barrier = number, kind, left, []


def simulate(
    gpu: GPU, kind_of: Callable[[int], Program], programs: int, warps: int, resident: int
) -> Timing:
    """Returns the modelled time of a kernel.

    Args:
        gpu: The GPU.
        kind_of: Function that returns what a program executes, by its number in the grid.
        programs: Programs of the grid.
        warps: Warps of a program.
        resident: Programs that a multiprocessor holds at a time.
    """
    return _Simulation(gpu, kind_of, programs, warps, resident).run()


class _Simulation:
    def __init__(self, gpu, kind_of, programs, warps, resident):
        self.gpu, self.kind_of, self.warps, self.resident = gpu, kind_of, warps, resident
        self.hz = SUSTAINED * gpu.boost_hz
        everywhere, self.extra = divmod(programs, gpu.multiprocessors)
        self.everywhere, self.mine = everywhere, everywhere + (self.extra > 0)
        self.bytes_per_cycle = copy_bandwidth(gpu) / self.hz / gpu.multiprocessors
        last = copy_bandwidth(gpu) / self.hz / max(self.extra, 1)
        self.bytes_per_cycle_at_last = min(last, _FILL_BYTES)
        # each scheduler has two halves of multipliers, or one of 16 lanes with 64 in all
        self.halves = gpu.lanes // 64
        self.free = [
            {"issue": 0.0, "alu": 0.0, "special": 0.0, "uniform": 0.0, "heavy": 0.0, "light": 0.0}
            for _ in range(4)
        ]
        self.load_store_free = self.memory_free = 0.0
        self.used = dict.fromkeys(("issue", "alu", "fma", "special", "load/store", "memory"), 0.0)
        self.heap: list[tuple[float, int, _Warp]] = []
        self.running: list[_Running] = []
        self.started = self.orders = 0
        self.resident_warps = [0] * 4  # by scheduler

    def run(self) -> Timing:
        for _ in range(min(self.resident, self.mine)):
            self.start(PROGRAM_CYCLES)
        end = 0.0
        while self.heap:
            now, order, warp = heapq.heappop(self.heap)
            code, path = warp.program.kind.code, warp.program.kind.path
            instruction = code[path[warp.position]]
            ready = self.ready(instruction, warp, now)
            if ready > now:
                heapq.heappush(self.heap, (ready, order, warp))
                continue
            done = self.issue(instruction, warp, now)
            if instruction.sets != NO_SCOREBOARD:
                warp.scoreboards[instruction.sets] = max(warp.scoreboards[instruction.sets], done)
            if instruction.frees != NO_SCOREBOARD:
                read = now + (12 if instruction.pipe == "load/store" else 6)
                warp.scoreboards[instruction.frees] = max(warp.scoreboards[instruction.frees], read)
            after = now + max(instruction.stall, 1)
            warp.position += 1
            if instruction.name == "BAR":
                self.wait_at_barrier(warp, after)
            elif warp.position < len(path):
                heapq.heappush(self.heap, (after, order, warp))
            else:
                end = max(end, after)
                self.finish(warp, after)
        shares = {name: used / end for name, used in self.used.items()}
        return Timing(LAUNCH_SECONDS + end / self.hz, shares)

    def start(self, now):
        """Starts the next program of this multiprocessor, the first one of the GPU."""
        number = self.started * self.gpu.multiprocessors
        program = _Running(self.started, self.kind_of(number), self.warps)
        self.started += 1
        self.running.append(program)
        for _ in range(self.warps):
            scheduler = self.resident_warps.index(min(self.resident_warps))
            self.resident_warps[scheduler] += 1
            warp = _Warp(program, scheduler, self.orders)
            heapq.heappush(self.heap, (float(now), self.orders, warp))
            self.orders += 1

    def finish(self, warp, now):
        self.resident_warps[warp.scheduler] -= 1
        program = warp.program
        program.left -= 1
        if program.left == 0:
            self.running.remove(program)
            if self.started < self.mine:
                self.start(now + PROGRAM_CYCLES)

    def wait_at_barrier(self, warp, now):
        waiting = warp.program.at_barrier
        waiting.append((now, warp))
        if len(waiting) == self.warps:
            go = max(time for time, _ in waiting) + _BARRIER
            for _, other in waiting:
                heapq.heappush(self.heap, (go, other.order, other))
            waiting.clear()

    def ready(self, instruction, warp, now):
        """When the instruction can issue, as far as is known."""
        ready, waits, k = now, instruction.waits, 0
        while waits:
            if waits & 1 and warp.scoreboards[k] > ready:
                ready = warp.scoreboards[k]
            waits, k = waits >> 1, k + 1
        free, pipe = self.free[warp.scheduler], instruction.pipe
        ready = max(ready, free["issue"])
        if pipe in ("alu", "special", "uniform"):
            return max(ready, free[pipe])
        if pipe == "fma" and self.halves == 2 and not instruction.name.endswith("2"):
            return max(ready, min(free["heavy"], free["light"]))
        if pipe in ("fma", "fma heavy"):
            both = pipe == "fma" and self.halves == 2
            return max(ready, free["heavy"], free["light"] if both else 0.0)
        if pipe == "load/store":
            return max(ready, self.load_store_free)
        return ready

    def issue(self, instruction, warp, now):
        """Occupies what the instruction needs and returns when its result is there."""
        free, pipe = self.free[warp.scheduler], instruction.pipe
        free["issue"] = now + 1
        self.used["issue"] += 1 / 4
        if pipe in ("alu", "uniform"):
            free[pipe] = now + _HALF_RATE
            if pipe == "alu":
                self.used["alu"] += _HALF_RATE / 4
                return now
            return now + _LATENCY["uniform"]
        if pipe == "special":
            free[pipe] = now + _SPECIAL
            self.used["special"] += _SPECIAL / 4
            return now + _LATENCY["special"]
        if pipe in ("fma", "fma heavy"):
            self.multiply(instruction, free, now)
            return now
        if pipe == "load/store":
            return self.access(instruction, warp, now)
        return now + (_LATENCY["S2R"] if instruction.name == "S2R" else 4)

    def multiply(self, instruction, free, now):
        pair = instruction.pipe == "fma" and instruction.name.endswith("2")
        if pair:
            free["heavy"] = free["light"] = now + _SLOW_FMA
            self.used["fma"] += _SLOW_FMA / 4
            return
        light = (
            instruction.pipe == "fma" and self.halves == 2 and free["light"] <= now
        )  # leaves the other half to those that need it
        free["light" if light else "heavy"] = now + _SLOW_FMA
        self.used["fma"] += _SLOW_FMA / self.halves / 4

    def access(self, instruction, warp, now):
        """Moves bytes through the load/store unit and, for global memory, the memory."""
        if instruction.name == "LDC":
            return now + _LATENCY["LDC"]
        cycles = max(1.0, 32 * instruction.width / _SHARED_BYTES)
        self.load_store_free = now + cycles
        self.used["load/store"] += cycles
        if instruction.name == "SHFL":
            return now + _LATENCY["SHFL"]
        if instruction.name not in ("LDG", "STG"):
            return now + cycles + _LATENCY["shared"]
        moved = warp.program.kind.memory_bytes[warp.program.kind.path[warp.position]]
        if moved == 0:
            return now + L2_CYCLES
        alone = all(program.number >= self.everywhere for program in self.running)
        rate = self.bytes_per_cycle_at_last if alone else self.bytes_per_cycle
        self.memory_free = max(self.memory_free, now) + moved / rate
        self.used["memory"] += moved / self.bytes_per_cycle
        return now + 20 if instruction.name == "STG" else self.memory_free + MEMORY_CYCLES
