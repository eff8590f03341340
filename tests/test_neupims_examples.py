"""The examples in docstrings of the names that a user of `neupims` meets first."""

import doctest
import inspect

import pytest

import neupims

NAMES = [
    "Hardware",
    "load_hardware",
    "load_model",
    "make_batch",
    "read_trace",
    "simulate",
    "search_schedule",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_true(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.csv").write_text("seq_len,ch_idx\n300,0\n40,1\n")
    value = getattr(neupims, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(inspect.unwrap(value), name, globs={})
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)
