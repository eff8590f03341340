"""kernels/ptxas.py with scripts in place of ptxas: which one JAX takes, and what Triton is told."""

import os
import types
import warnings
from pathlib import Path

import jax.numpy as jnp
import pytest

from ggem_jax.kernels import launch, ptxas
from ggem_jax.pooling import dispatch, ggem_pool

HOPPER = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a")
BLACKWELL = (*HOPPER, *(f"sm_{number}{a}" for number in (100, 103, 120, 121) for a in ("", "a")))
VARIABLES = "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"


def write_ptxas(folder: Path, version: str, targets=BLACKWELL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = ",".join(f"'{target}'" for target in targets)
    path = folder / "ptxas"
    path.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, V{version}";;'
        f' --help) echo "{names}";; esac\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Puts a ptxas where JAX looks, or none; the two of Triton are 12.9 and 13.4."""

    def versions():
        own = zip(VARIABLES, ((12, 9), (13, 4)), strict=True)
        named = {name: os.environ[name] for name in VARIABLES}
        return {n: ptxas.read(Path(named[n])).version[:2] if named[n] else v for n, v in own}

    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
    monkeypatch.setattr(ptxas, "_versions_of_triton", versions)
    monkeypatch.setattr(ptxas, "_capability_here", lambda: None)
    ptxas.fit_triton_to_jax.cache_clear()
    launch._available.cache_clear()

    def put(*arguments):
        path = write_ptxas(tmp_path / "bin", *arguments) if arguments else None
        folders = [] if path is None else [path.parent]
        monkeypatch.setattr(ptxas, "_folders", lambda: iter(folders))
        return path

    yield put
    ptxas.fit_triton_to_jax.cache_clear()
    launch._available.cache_clear()


def test_triton_keeps_its_own_where_that_is_not_newer(found):
    found("13.4.59")
    assert ptxas.fit_triton_to_jax(90) is None
    assert [os.environ[name] for name in VARIABLES] == ["", ""]


def test_triton_takes_that_of_jax_where_its_own_is_newer(found):
    path = found("12.9.86")
    assert ptxas.fit_triton_to_jax(90) is None
    assert [os.environ[name] for name in VARIABLES] == ["", str(path)]


def test_without_a_ptxas_the_package_is_named(found):
    found()
    assert "pip install nvidia-cuda-nvcc-cu12" in ptxas.fit_triton_to_jax(90)


def test_a_ptxas_that_does_not_know_the_gpu_is_named_with_it(found, monkeypatch):
    """Triton 3.9 would end the whole process: LLVM does not know sm_100a in that version of PTX."""
    path = found("12.6.85", HOPPER)
    assert ptxas.fit_triton_to_jax(90) is None
    reason = ptxas.fit_triton_to_jax(100)
    assert f"ptxas 12.6.85 ({path}), which does not know the GPU (sm_100a)" in reason
    assert "PATH" in reason
    assert ptxas.fit_triton_to_jax(None) is None  # no GPU here
    ptxas.fit_triton_to_jax.cache_clear()
    monkeypatch.setattr(ptxas, "_capability_here", lambda: 120)
    assert "sm_120a" in ptxas.fit_triton_to_jax(None)


def test_a_ptxas_that_the_user_gave_to_triton_is_left_alone(found, monkeypatch, tmp_path):
    found("12.9.86")
    newer = write_ptxas(tmp_path / "newer", "13.0.88")
    monkeypatch.setenv(VARIABLES[0], str(newer))
    assert "TRITON_PTXAS_PATH makes Triton write for 13.0: unset it" in ptxas.fit_triton_to_jax(90)
    assert os.environ[VARIABLES[0]] == str(newer)


def test_one_warning_then_plain_jax(found, monkeypatch):
    found()
    monkeypatch.setattr(launch, "load_jax_triton", lambda: types.ModuleType("jax_triton"))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name)
    tokens, p = jnp.ones((2, 3, 4)), jnp.ones(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert dispatch.choose_implementation(None, tokens, lambda: None) == "xla"
        assert ggem_pool(tokens, p).shape == (2, 4)
    (warning,) = caught
    assert "plain JAX is used" in str(warning.message)
    assert "pip install nvidia-cuda-nvcc-cu12" in str(warning.message)
    with launch.compiled_for(90), pytest.raises(NotImplementedError, match="pip install nvidia"):
        dispatch.choose_implementation("triton", tokens, lambda: None)


def test_jax_passes_over_what_is_old_faulty_or_no_program(monkeypatch, tmp_path):
    text = tmp_path / "text"
    write_ptxas(text, "12.9.86").chmod(0o644)
    write_ptxas(tmp_path / "old", "11.7.99")
    write_ptxas(tmp_path / "faulty", "12.3.103")
    right = write_ptxas(tmp_path / "right", "12.3.107")
    write_ptxas(tmp_path / "later", "13.4.59")
    names = ("absent", "text", "old", "faulty", "right", "later")
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in names))
    monkeypatch.chdir(tmp_path)
    assert str(ptxas.of_jax()) == f"ptxas 12.3.107 ({right})"
    here = write_ptxas(tmp_path / "work" / "bin", "12.8.93")
    monkeypatch.chdir(tmp_path / "work")  # whose bin comes first
    assert str(ptxas.of_jax()) == f"ptxas 12.8.93 ({here})"
