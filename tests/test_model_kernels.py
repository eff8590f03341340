"""The timing model of the kernels: cases with their arithmetic, a copy, and the committed rows."""

import csv

import pytest

from benchmarks import model_kernels, multiprocessor, sass
from benchmarks.gpus import A100, GPUS, H200
from benchmarks.model_kernels import modelled_us
from benchmarks.multiprocessor import Program, simulate
from benchmarks.record import RESULTS


def line(address, text, stall=1, sets=7, frees=7, waits=0):
    control = stall << 41 | sets << 46 | frees << 49 | waits << 52
    return f"        /*{address:04x}*/    {text} ;    /* 0x{0:016x} */\n  /* 0x{control:016x} */\n"


def code(*instructions):
    """A program of texts, or of texts with control fields, one after the other."""
    pairs = [(text, {}) if isinstance(text, str) else text for text in instructions]
    return sass.parse("".join(line(16 * i, text, **c) for i, (text, c) in enumerate(pairs)))


def cycles(timing, gpu=H200):
    """The cycles from the first instruction of the first program to the last of the last."""
    hz = multiprocessor.SUSTAINED * gpu.boost_hz
    return (timing.seconds - multiprocessor.LAUNCH_SECONDS) * hz - multiprocessor.PROGRAM_CYCLES


def run(instructions, programs=1, warps=4, resident=1, gpu=H200, memory=0.0):
    path = range(len(instructions))
    moved = {i: memory for i in path if instructions[i].name in ("LDG", "STG")}
    program = Program(instructions, path, moved)
    return simulate(gpu, lambda i: program, programs, warps, resident)


def test_control_fields_are_read():
    (load,) = code(
        ("@!P0 LDG.E.128 R4, desc[UR4][R2.64+0x10]", {"stall": 2, "sets": 3, "waits": 5})
    )
    assert (load.guard, load.name, load.width, load.pipe) == ("@!P0", "LDG", 16, "load/store")
    assert (load.stall, load.sets, load.frees, load.waits) == (2, 3, sass.NO_SCOREBOARD, 5)


def test_a_line_as_cuobjdump_prints_it():
    (read,) = sass.parse(
        "        /*0020*/                   S2R R12, SR_TID.X ;      /* 0x00000000000c7919 */\n"
        "                                                          /* 0x000ea20000002100 */\n"
    )
    assert (read.address, read.opcode, read.operands) == (0x20, "S2R", "R12, SR_TID.X")
    assert (read.stall, read.sets, read.waits) == (1, 2, 0)


LOOP = code(
    "MOV R1, 0x0",
    "@P0 BRA 0x0040",  # over the loop
    "FADD R1, R1, 1",
    "@P1 BRA 0x0020",
    "@P2 BRA 0x0060",  # over the rest
    "LDG.E R4, [R2.64]",
    "EXIT",
)


@pytest.mark.parametrize(
    ("trips", "rest", "taken"),
    [
        (2, True, [0, 1, 2, 3, 2, 3, 4, 5, 6]),
        (1, False, [0, 1, 2, 3, 4, 6]),
        (0, True, [0, 1, 4, 5, 6]),
    ],
)
def test_the_path_goes_through_loops_as_often_as_said(trips, rest, taken):
    assert sass.loops(LOOP) == [(2, 3)]
    assert sass.path(LOOP, [trips], rest) == taken


def test_other_loops_than_expected_are_refused():
    with pytest.raises(ValueError, match="1 loops, not 2"):
        sass.path(LOOP, [1, 2], True)


def test_addresses_are_followed_to_the_parameters():
    followed = code(
        "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE R2, R9, 0x4, R2",
        "LDG.E R4, desc[UR4][R2.64]",
        "ULDC.64 UR6, c[0x0][0x220]",
        "IADD3 R6, P0, R4, UR6, RZ",
        "STG.E desc[UR4][R6.64+0x8], R4",
    )
    assert sass.pointers(followed, 90) == {2: 0, 5: 2}
    with pytest.raises(ValueError, match=r"parameters \[\]"):
        sass.pointers(code("LDG.E R4, desc[UR4][R2.64]"), 90)


def test_special_functions_take_eight_cycles_of_a_scheduler():
    """Four warps on four schedulers: 100 instructions, of which each blocks its pipe 8 cycles."""
    timing = run(code(*["MUFU.EX2 R1, R2"] * 100))
    assert cycles(timing) == pytest.approx(99 * 8 + 1, abs=1)
    assert run(code(*["FMUL R1, R2, R3"] * 100)).seconds < timing.seconds


def test_an_a100_has_half_the_multipliers():
    h200, a100 = (
        cycles(run(code(*["FMUL R1, R2, R3"] * 100), 1, 16, 1, g), g) for g in (H200, A100)
    )
    assert h200 == pytest.approx(400, abs=4)  # 4 warps of a scheduler, one instruction a cycle
    assert a100 == pytest.approx(800, abs=4)


def test_an_instruction_waits_for_its_scoreboard():
    waits = ("FADD R1, R2, R3", {"waits": 1})
    timing = run(code(("LDG.E R2, [R4.64]", {"sets": 0}), waits), memory=0)
    assert cycles(timing) == pytest.approx(multiprocessor.L2_CYCLES + 4, abs=5)
    timing = run(code(("LDG.E R2, [R4.64]", {"sets": 0}), waits), warps=1, memory=128)
    assert cycles(timing) >= multiprocessor.MEMORY_CYCLES


def test_a_barrier_waits_for_the_slowest_warp():
    """Eight warps share four schedulers: the second of each comes 8 cycles later."""
    alone = run(code("MUFU.EX2 R1, R2", "BAR.SYNC 0x0", "EXIT"), warps=4)
    both = run(code("MUFU.EX2 R1, R2", "BAR.SYNC 0x0", "EXIT"), warps=8)
    assert cycles(both) - cycles(alone) == pytest.approx(9, abs=1)


def test_programs_that_fit_a_multiprocessor():
    """65536 registers: 128 threads of 96 take 12288, of 97 as many as of 104."""
    assert multiprocessor.resident_programs(H200, 96, 4, 0) == 5
    assert multiprocessor.resident_programs(H200, 97, 4, 0) == 65536 // (104 * 128)
    assert multiprocessor.resident_programs(H200, 16, 1, 0) == 32
    assert multiprocessor.resident_programs(A100, 32, 4, 40 * 1024) == 164 // 41


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_many_loads_take_as_long_as_a_copy(gpu):
    """Each warp loads 8 x 512 bytes and waits once; all places are taken."""
    loads = [("LDG.E.128 R2, [R4.64]", {"sets": 0})] * 8
    programs = 40 * gpu.multiprocessors
    timing = run(
        code(*loads, ("FADD R1, R2, R3", {"waits": 1})), programs, 4, gpu.warps // 4, gpu, 512
    )
    moved = programs * 4 * 8 * 512
    assert timing.seconds == pytest.approx(multiprocessor.copy_seconds(gpu, moved), rel=0.15)
    assert timing.seconds > multiprocessor.copy_seconds(gpu, moved)


def test_a_last_program_alone_costs_a_wave():
    work = code(*["MUFU.EX2 R1, R2"] * 200)
    full, one_more = (run(work, programs, 4, 1) for programs in (132, 133))
    assert cycles(one_more) == pytest.approx(2 * cycles(full) + 350, rel=0.01)


def test_committed_rows_are_found_by_the_name_of_the_device():
    stages = [
        modelled_us("1 x NVIDIA H200", "B/16 at 224 px", 256, "bfloat16", "ggem", stage)
        for stage in ("forward", "backward", "both")
    ]
    assert stages[2] == pytest.approx(stages[0] + stages[1])
    assert modelled_us("1 x NVIDIA H200", "S/16 at 224 px", 256, "bfloat16", "ggem", "both") is None
    assert modelled_us("2 cores", "B/16 at 224 px", 256, "bfloat16", "ggem", "both") is None


def test_committed_rows_are_complete():
    with (RESULTS / "kernel_model.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {(r["modelled_for"], r["model"], r["images"], r["kernel"]) for r in rows}
    kernels = [kernel for kernels in model_kernels.KERNELS_OF.values() for kernel in kernels]
    assert kinds == {
        (gpu.name, model, str(shape[0]), kernel)
        for gpu in GPUS
        for model, function, shape in model_kernels.cases()
        for kernel in kernels
        if kernel.startswith("norm") == function.startswith("norm")
    }


@pytest.mark.compiled
def test_committed_rows_are_what_the_model_says_today():
    """One kernel of one GPU, compiled by the Triton of the row."""
    import triton

    (row,) = [
        row
        for row in reversed(model_kernels._committed())
        if (row["modelled_for"], row["model"], row["images"], row["kernel"])
        == ("H200", "B/16 at 224 px", "256", "gradient_kernel")
    ][:1]
    if row["triton"] != triton.__version__:
        pytest.skip(f"the rows are of Triton {row['triton']}, and this is {triton.__version__}")
    launch = model_kernels._launches("ggem", (256, 196, 768), 90)[1]
    said = model_kernels.model(launch, model_kernels.compile_kernel(launch, 90), H200)
    assert {name: str(cell) for name, cell in said.items()}.items() <= row.items()
