"""The kernels compiled for AMD GPUs. Nothing runs them."""

import jax
import pytest

from benchmarks.kernel_code import KERNELS, record_launches
from benchmarks.kernel_code_amd import WAVES, compile_for_amd

pytestmark = pytest.mark.compiled


@pytest.mark.sampled
@pytest.mark.parametrize("architecture", WAVES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("function", KERNELS)
def test_machine_code_keeps_its_numbers_in_registers(function, dtype, architecture):
    shape = (2, 9, 7, 64) if function == "superglobal" else (2, 33, 192)
    launches = record_launches(KERNELS[function], jax.ShapeDtypeStruct(shape, dtype))
    for launch in launches:
        code = compile_for_amd(launch, architecture)
        assert code.vector_spills == 0
        assert code.assembly.count("v_exp_f32") > 0
        # a wave of 64 threads or of 32, as the hardware has
        assert f".wavefront_size: {WAVES[architecture]}" in code.assembly
