"""The kernels compiled ahead of time for GPUs that this machine lacks: registers, spills, wide
loads, the fast logarithm.
"""

import os
import re

import jax
import pytest

from benchmarks.kernel_code import KERNELS, SHAPES, compile_kernel, record_launches

pytestmark = pytest.mark.compiled

CAPABILITIES = [80, 90, 100]
# Registers of a thread, of which a multiprocessor has 65536. On Hopper, for which the tiles were
# chosen: 4 programs of 128 threads or 2 of 256.
BUDGET = {80: 168, 90: 128, 100: 168}
REGIONAL_BUDGET = 200  # 2 programs of 128 threads and room; a map gives few programs


def test_kernels_are_not_interpreted_here():
    assert os.environ.get("TRITON_INTERPRET", "0") != "1"


def check(launch, capability):
    code = compile_kernel(launch, capability)
    assert code.spilled_bytes == 0
    assert code.registers <= (
        REGIONAL_BUDGET if launch.name == "regional_kernel" else BUDGET[capability]
    )
    assert any("MUFU.LG2" in op for op in code.opcodes)
    assert not any(op.startswith(("LDL", "STL")) for op in code.opcodes)
    assert not any(
        "U16" in op and op.startswith(("LDG", "STG")) for op in code.opcodes
    )  # no half-precision token by itself
    # Where a thread takes two channels, a warp still reads whole lines of 128 bytes.
    if launch.name.startswith("norm") and launch.constants["PIECES"] == 1:
        assert any(op.startswith("LDG.E") and ".128" in op for op in code.opcodes)
        if "gradient" in launch.name:
            assert any(op.startswith("STG.E") and ".128" in op for op in code.opcodes)


@pytest.mark.sampled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("function", ["ggem", "norm_ggem"])
def test_machine_code_for_vision_transformers(function, shape, capability):
    launches = record_launches(KERNELS[function], jax.ShapeDtypeStruct(shape, "bfloat16"))
    assert len(launches) == 2  # forward and backward
    for launch in launches:
        check(launch, capability)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("function", ["ggem", "norm_ggem"])
def test_machine_code_for_other_dtypes(function, dtype):
    for launch in record_launches(KERNELS[function], jax.ShapeDtypeStruct((256, 196, 768), dtype)):
        check(launch, 90)


@pytest.mark.parametrize("d", [192, 768, 1024])
def test_machine_code_for_the_end_of_a_vision_transformer(d):
    """The class token is masked."""
    for launch in record_launches(
        KERNELS["norm_ggem masked"], jax.ShapeDtypeStruct((256, 197, d), "bfloat16")
    ):
        check(launch, 90)


@pytest.mark.sampled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 32, 22, 2048), (8, 45, 64, 2048)], ids=str)
def test_machine_code_for_superglobal(shape, dtype, capability):
    (launch,) = record_launches(KERNELS["superglobal"], jax.ShapeDtypeStruct(shape, dtype))
    check(launch, capability)


@pytest.mark.parametrize(
    "function", ["ggem masked", "ggem shift", "ggem signed", "norm_ggem masked", "norm_ggem signed"]
)
def test_machine_code_of_the_other_rules(function):
    for launch in record_launches(
        KERNELS[function], jax.ShapeDtypeStruct((256, 196, 768), "bfloat16")
    ):
        assert compile_kernel(launch, 90).spilled_bytes == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_mean_that_is_subtracted_is_the_one_that_the_gradient_reads(capability):
    """A fused multiply-add would subtract the sum over channels times 1 / D without rounding."""
    forward, _ = record_launches(
        KERNELS["norm_ggem"], jax.ShapeDtypeStruct((256, 196, 768), "bfloat16")
    )
    fused = re.findall(r"FFMA [^;]*-0\.0013020[^;]*;", compile_kernel(forward, capability).sass)
    assert fused == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d", [4, 8, 32])
def test_all_lanes_have_the_same_deviation(d, dtype):
    """No lane adds its own square, not rounded, to a rounded one of another lane."""
    forward, _ = record_launches(KERNELS["norm_ggem"], jax.ShapeDtypeStruct((2, 33, d), dtype))
    lines = compile_kernel(forward, 90).sass.replace(".reuse", "")
    shuffled = set(re.findall(r"SHFL\.BFLY PT, (R\d+)", lines))
    squares = re.findall(r"FFMA R\d+, (R\d+), \1, (R\d+)", lines)
    assert not any(added in shuffled for _, added in squares)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5), (1, 16384, 1), (1, 1, 4096), (2**20, 8, 512)], ids=str
)
def test_odd_and_large_shapes_compile(shape):
    for function in ("ggem", "norm_ggem"):
        for launch in record_launches(KERNELS[function], jax.ShapeDtypeStruct(shape, "bfloat16")):
            compile_kernel(launch, 90)


@pytest.mark.parametrize("function", ["ggem", "norm_ggem", "superglobal"])
def test_rows_are_reached_by_64_bit_offsets(function):
    """More than 2^31 elements can lie before a row: its number is multiplied by the row's length,
    196 x 768 or 7 x 28 x 768, in 64 bits.
    """
    shape = (2**15, 7, 28, 768) if function == "superglobal" else (2**15, 196, 768)
    for launch in record_launches(KERNELS[function], jax.ShapeDtypeStruct(shape, "bfloat16")):
        assert "arith.constant 150528 : i64" in compile_kernel(launch, 90).ttir
