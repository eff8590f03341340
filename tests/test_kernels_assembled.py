"""Kernels handed to the launcher of JAX's CUDA plugin, which runs ptxas before it needs a GPU."""

import functools
import os
import re
import zlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernel_versions
from ggem_jax.kernels import launch, ptxas
from ggem_jax.pooling import ggem_pool, norm_ggem_pool, superglobal_pool

pytestmark = pytest.mark.assembled

TOKENS = jax.ShapeDtypeStruct((8, 196, 768), "bfloat16")
CHANNELS, EXPONENTS = (jax.ShapeDtypeStruct((length,), "float32") for length in (768, 12))


def gradient(pool, arguments):
    def loss(*arguments):
        return jnp.sum(pool(*arguments).astype(jnp.float32))

    return jax.grad(loss, tuple(range(len(arguments))))


FUNCTIONS = {
    "ggem": (ggem_pool, (TOKENS, EXPONENTS)),
    "norm": (norm_ggem_pool, (TOKENS, CHANNELS, CHANNELS, EXPONENTS)),
    "superglobal": (superglobal_pool, (jax.ShapeDtypeStruct((1, 32, 22, 2048), "bfloat16"),)),
}


@functools.cache
def kernels_of(name, capability):
    function, arguments = FUNCTIONS[name]
    if name != "superglobal":  # whose gradient is plain JAX
        function = gradient(function, arguments)
    return kernel_versions.kernels_of(function, *arguments, capability=capability)


@pytest.mark.sampled
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_jax_assembles_what_triton_writes(name, capability):
    kernels = kernels_of(name, capability)
    assert len(kernels) == (1 if name == "superglobal" else 2)
    assert [kernel_versions.assemble(kernel) for kernel in kernels] == [None] * len(kernels)
    target = f".target sm_{capability}".encode()
    assert all(target in zlib.decompress(kernel) for kernel in kernels)


def test_one_jitted_function_is_compiled_for_each_gpu():
    pool = jax.jit(functools.partial(ggem_pool, implementation="triton"))
    for capability in (80, 90, 80):
        with launch.compiled_for(capability):
            lowered = pool.trace(TOKENS, EXPONENTS).lower(lowering_platforms=("cuda",))
        (kernel,) = kernel_versions.kernels_in(lowered.as_text())
        assert f".target sm_{capability}".encode() in zlib.decompress(kernel)


def test_jax_refuses_a_newer_version():
    """This shows that the tests above can fail, and that no kernel is written in a version beyond
    JAX's.
    """
    (kernel,) = kernels_of("superglobal", 90)
    message = kernel_versions.assemble(kernel_versions.in_version(kernel, "9.9"))
    assert "Unsupported .version 9.9" in message
    (newest,) = re.findall(r"current version is '([\d.]+)'", message)
    assert kernel_versions.ptx_version(kernel) <= newest


@pytest.mark.parametrize("first", ["11.7.99", "12.3.103", "12.9.86"])
def test_jax_takes_the_ptxas_that_we_think_it_takes(monkeypatch, tmp_path, first):
    """Two ptxas on PATH record that they are used; jaxlib skips some versions."""
    real = ptxas.of_jax().path
    for name, version in (("first", first), ("second", "12.9.87")):
        script = tmp_path / name / "ptxas"
        script.parent.mkdir()
        script.write_text(
            f'#!/bin/sh\ncase "$1" in --version) echo "Cuda, V{version}";;'
            f' *) echo {name} >> {tmp_path}/used; exec {real} "$@";; esac\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/first:{tmp_path}/second:{os.environ['PATH']}")
    ours = ptxas.of_jax().path.parent.name
    (tmp_path / "used").unlink()  # we ask for --help too
    (kernel,) = kernels_of("superglobal", 90)
    assert "Unsupported" in kernel_versions.assemble(kernel_versions.in_version(kernel, "9.8"))
    assert (tmp_path / "used").read_text().split() == [ours]
