"""kernels/launch.py: jax-triton on demand."""

import os
import sys
import types

import pytest

from ggem_jax.kernels import launch


def test_missing_jax_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(NotImplementedError, match=r"pip install '.\[gpu\]' in a checkout"):
        launch.load_jax_triton()


@pytest.mark.parametrize(("before", "after"), [("", None), ("/somewhere", "/somewhere")])
def test_the_empty_cache_folder_that_jax_triton_sets_is_taken_back(monkeypatch, before, after):
    module = types.ModuleType("jax_triton")
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    monkeypatch.setenv("TRITON_CACHE_DIR", before)
    assert launch.load_jax_triton() is module
    assert os.environ.get("TRITON_CACHE_DIR") == after
