"""The processors that a process may use are counted, not those of the computer."""

import importlib
import os

import pytest


@pytest.mark.parametrize("package", ["ggem_jax", "neupims"])
def test_processors_are_those_that_the_process_may_use(package, monkeypatch):
    count = importlib.import_module(f"{package}.processors").count_processors
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        assert count() == len(allowed)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert count() == 1
        finally:
            os.sched_setaffinity(0, allowed)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for known, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda known=known: known)
        assert count() == expected
