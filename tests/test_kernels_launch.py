"""kernels/launch.py: jax-triton on demand; and where the code of a sign rule is."""

import ast
import os
import sys
import types
from pathlib import Path

import pytest

from ggem_jax.kernels import launch, ptxas
from ggem_jax.pooling import sign_rules

ROOT = Path(__file__).resolve().parent.parent


def test_missing_jax_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(NotImplementedError, match=r"pip install '.\[gpu\]' in a checkout"):
        launch.load_jax_triton()


@pytest.mark.parametrize(("before", "after"), [("", None), ("/somewhere", "/somewhere")])
def test_the_empty_cache_folder_that_jax_triton_sets_is_taken_back(monkeypatch, before, after):
    module = types.ModuleType("jax_triton")
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    monkeypatch.setenv("TRITON_CACHE_DIR", before)
    monkeypatch.setattr(ptxas, "cuda_plugin", lambda: Path("jax_cuda12_plugin"))
    assert launch.load_jax_triton() is module
    assert os.environ.get("TRITON_CACHE_DIR") == after


def test_a_jax_without_cuda_is_named(monkeypatch):
    """jax-triton 0.4 imports all the same."""
    monkeypatch.setitem(sys.modules, "jax_triton", types.ModuleType("jax_triton"))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ptxas, "cuda_plugin", lambda: None)
    launch._available.cache_clear()
    assert not launch.available()
    launch._available.cache_clear()
    with pytest.raises(NotImplementedError, match="need a JAX with CUDA, which this one is not"):
        launch.load_jax_triton()


@pytest.mark.parametrize("version", ["0.3", "0.4"])
def test_fusion_of_products_and_sums_is_asked_for(monkeypatch, version):
    calls = []

    def triton_call_03(*inputs, kernel, grid, out_shape, enable_fp_fusion=False, **options):
        calls.append(enable_fp_fusion)
        return ()

    def triton_call_04(*inputs, kernel, grid, out_type, backend_options=None, **options):
        calls.append(backend_options["enable_fp_fusion"])
        return ()

    triton_call = triton_call_03 if version == "0.3" else triton_call_04
    module = types.SimpleNamespace(triton_call=triton_call)
    monkeypatch.setattr(launch, "load_jax_triton", lambda: module)
    launch.call("triton", None, (), (), programs=1, warps=4)
    assert calls == [True]


def test_a_sign_rule_is_in_two_modules_and_its_offset_in_a_third():
    """The modules that compare with the name of a rule are those that a new rule has to change."""
    found = {"ggem_jax/pooling/sign_rules.py"}
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "ggem_jax" / "pooling").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
        constants = [n for node in compared for n in ast.walk(node) if isinstance(n, ast.Constant)]
        if {constant.value for constant in constants} & set(sign_rules.RULES):
            found.add(path.relative_to(ROOT).as_posix())
    assert found == {
        "ggem_jax/pooling/sign_rules.py",
        "ggem_jax/pooling/fused.py",
        "kernels/powers.py",
    }
