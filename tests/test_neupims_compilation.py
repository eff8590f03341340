"""Compiled programs of the tool neupims are kept in a folder of this user alone, or not at all."""

import os
import sys

import pytest

from neupims.commands import compilation

SET = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has not loaded JAX, with its cache folder in `tmp_path`."""
    for name in (*SET, "JAX_ENABLE_COMPILATION_CACHE", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "jax")
    return monkeypatch


def test_programs_are_kept_in_a_folder_of_this_user_alone(fresh, tmp_path):
    compilation.keep_programs()
    folder = compilation.cache_folder()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert folder.parent == tmp_path / "cache" / "ggem-jax"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("place", ["a file", "open to others", "a link", "no home"])
def test_nothing_is_kept_where_it_cannot_be_kept_safely(fresh, place, tmp_path):
    folder = compilation.cache_folder()
    folder.parent.mkdir(parents=True)
    if place == "a file":
        folder.write_text("in its place")
    elif place == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif place == "a link":
        folder.symlink_to(tmp_path)
    else:
        fresh.delenv("XDG_CACHE_HOME")

        def fail():
            raise RuntimeError("Could not determine home directory.")

        fresh.setattr(compilation.Path, "home", fail)
    compilation.keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_COMPILATION_CACHE_DIR", "/another"), ("JAX_ENABLE_COMPILATION_CACHE", "False")],
)
def test_the_user_names_another_folder_or_turns_the_cache_off(fresh, name, value):
    fresh.setenv(name, value)
    compilation.keep_programs()
    assert os.environ.get("JAX_COMPILATION_CACHE_DIR") == ("/another" if value[0] == "/" else None)
    assert not compilation.cache_folder().exists()


def test_the_oldest_programs_are_dropped(fresh):
    fresh.setattr(compilation, "MOST_BYTES", 2500)
    folder = compilation.cache_folder()
    folder.mkdir(parents=True, mode=0o700)
    for age, name in enumerate(("new", "old", "oldest")):
        (folder / name).write_bytes(b"x" * 1000)
        os.utime(folder / name, (1000 - age, 1000 - age))
    compilation.keep_programs()
    assert {path.name for path in folder.iterdir()} == {"new", "old"}


@pytest.mark.slow
def test_a_damaged_program_is_compiled_again(tool, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("seq_len,ch_idx\n300,0\n40,1\n")

    def run():
        flags = ("simulate", "--model", "gpt3-7b", "--trace", trace, "--path", "closed", "--json")
        process = tool("neupims", *flags, environment={"XDG_CACHE_HOME": str(tmp_path)})
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        return out

    first = run()
    (folder,) = (tmp_path / "ggem-jax").iterdir()
    programs = list(folder.glob("*-cache"))
    assert programs
    for damaged in (b"", b"no program", programs[0].read_bytes()[:-100]):
        for program in programs:
            program.write_bytes(damaged)
        assert run() == first
