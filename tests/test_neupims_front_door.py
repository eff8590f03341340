"""neupims/__init__.py: the public names, loaded on first use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import neupims

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_is_there_and_is_listed():
    assert {"simulate", "search_schedule", "explore", "validate", "Hardware"} <= set(
        neupims.__all__
    )
    assert set(neupims.__all__) <= set(dir(neupims))
    for name in neupims.__all__:
        value = getattr(neupims, name)
        assert value.__name__ == name
        assert value.__doc__


def test_unknown_names_are_refused_as_usual():
    with pytest.raises(AttributeError, match=r"module 'neupims' has no attribute 'simulation_'"):
        _ = neupims.simulation_


def test_the_package_loads_nothing_and_a_name_loads_its_module_only():
    code = (
        "import sys, neupims; print('jax' in sys.modules, [name for name in sys.modules if"
        " name.startswith('neupims.')]); neupims.load_model; print('neupims.timing' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert run.stdout.split("\n")[:2] == ["False []", "False"], run.stderr


def test_a_type_checker_sees_the_names_that_are_loaded():
    """The imports under TYPE_CHECKING name what `__getattr__` finds, with the same homes."""
    tree = ast.parse((ROOT / "neupims" / "__init__.py").read_text())
    seen = {
        alias.asname: node.module.removeprefix("neupims.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("neupims.")
        for alias in node.names
    }
    assert seen == neupims._HOMES
    assert (ROOT / "neupims" / "py.typed").is_file()


def test_no_module_has_the_name_of_a_public_function():
    """`import neupims.X` would hide the function X."""
    names = {path.stem for path in (ROOT / "neupims").iterdir()}
    assert not names & set(neupims.__all__)
