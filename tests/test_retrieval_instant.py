"""Programs and weights that are kept between processes, and small searches without JAX."""

import errno
import json
import os
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggem_jax.descriptors import programs
from ggem_jax.descriptors.compiled import CompiledDescriptor
from ggem_jax.descriptors.extract import Extractor
from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.files import cache
from ggem_jax.retrieval import search
from ggem_jax.retrieval.tool import compilation

exact_search = sys.modules[search.__module__]  # the function has the name of its module

SMALL = DescriptorSettings(scales=1, longest_side=160)
FACTS = {"model": "twice", "images": [3]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of programs; none are in memory."""
    monkeypatch.setattr(programs, "kept_folder", lambda: tmp_path / programs.FOLDER)
    monkeypatch.setattr(programs, "_loaded", {})
    return tmp_path / programs.FOLDER


def multiply_as_a_kept_program(leaves, images):
    """The program of `Twice`: JAX's cache may hold another one that is called `multiply`."""
    return leaves[0] * images


def two():
    return jax.device_put([np.full(3, 2, np.float32)])


class Twice:
    """A small program, and how often it was compiled."""

    def __init__(self):
        self.compiled = 0

    def __call__(self):
        self.compiled += 1
        number = jax.ShapeDtypeStruct((3,), np.float32)
        return jax.jit(multiply_as_a_kept_program).lower([number], number).compile()

    def load(self, facts=FACTS):
        """Runs the program of a process that has none in memory, and checks its result."""
        programs._loaded.clear()
        program = programs.load_program(facts, two(), self)
        if program is None:
            return False
        assert np.asarray(program(two(), np.arange(3, dtype=np.float32))).tolist() == [0, 2, 4]
        return True


@pytest.fixture
def kept(folder):
    """A program that is kept, and its file."""
    program = Twice()
    program.load()
    (file,) = folder.iterdir()
    return program, file


# Programs


def test_a_program_that_is_kept_is_not_compiled_again(kept):
    program, file = kept
    program.load()
    program.load()
    assert program.compiled == 1
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_process_keeps_a_program_in_memory(kept):
    program, file = kept
    file.unlink()
    assert programs.load_program(FACTS, two(), program)
    assert program.compiled == 1


def rewrite(contents):
    """A file with the right checksum and facts, and other contents."""

    def damage(file):
        facts = json.loads(file.read_bytes().split(b"\n")[1])
        cache.write_cached(file.parent, file.name, facts, contents, most_bytes=10**9)

    return damage


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "cut off in the first line": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "a flipped bit": lambda file: file.write_bytes(
        file.read_bytes()[:-9] + bytes([file.read_bytes()[-9] ^ 1]) + file.read_bytes()[-8:]
    ),
    "something else": lambda file: file.write_text("no program\n\n"),
    "no pickle": rewrite(b"no pickle"),
    "no executable": rewrite(pickle.dumps((b"no executable", None, None))),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_ignored_and_written_again(damage, kept):
    program, file = kept
    sound = file.read_bytes()
    damage(file)
    assert not file.exists() or file.read_bytes() != sound
    program.load()
    assert program.compiled == 2
    program.load()
    assert program.compiled == 2


VERSIONS, SOURCE = programs._versions(), programs._source_digest()
OTHER = VERSIONS | {
    "jax": [name.translate(str.maketrans("012", "345")) for name in VERSIONS["jax"]]
}
CHANGES = {  # to facts of the same length, so that only their comparison tells them apart
    "version": lambda patch: patch(programs, "_versions", lambda: OTHER),
    "source": lambda patch: patch(programs, "_source_digest", lambda: SOURCE[::-1]),
    "processor": lambda patch: patch(programs, "processor", lambda: cache.processor()[::-1]),
    "flags": lambda patch: patch(os, "environ", {**os.environ, "XLA_FLAGS": "--other"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_program_of_other_surroundings_is_never_used(change, kept, monkeypatch):
    program, file = kept
    CHANGES[change](monkeypatch.setattr)
    program.load()
    assert program.compiled == 2
    (other,) = set(file.parent.iterdir()) - {file}
    other.write_bytes(file.read_bytes())  # a file of the other surroundings under the new name
    program.load()
    assert program.compiled == 3


def test_configuration_and_facts_choose_the_program(kept):
    program, _ = kept
    with jax.default_matmul_precision("bfloat16"):
        program.load()
    assert program.compiled == 2
    program.load(FACTS | {"model": "another"})
    assert program.compiled == 3


def test_without_the_code_of_the_package_nothing_is_kept(folder, monkeypatch):
    monkeypatch.setattr(programs, "_source_digest", lambda: None)
    assert programs.load_program(FACTS, two(), Twice()) is None
    assert not folder.exists()


def test_a_program_that_cannot_be_serialised_works(folder, monkeypatch):
    def fail(_):
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(programs.serialize_executable, "serialize", fail)
    assert Twice().load()
    assert not list(folder.iterdir())


def test_a_program_that_computes_something_else_when_it_is_loaded_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(programs, "_deserialize", lambda *_: lambda leaves, images: images + 1)
    assert Twice().load()
    assert not list(folder.iterdir())


def test_what_is_kept_here_is_not_in_the_cache_of_jax(folder):
    """JAX returns programs from its cache that cannot be serialised: they fail when they run."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    seen = []

    class Watched(Twice):
        def __call__(self):
            seen.append(getattr(jax.config, name))
            return super().__call__()

    Watched().load()
    assert (seen, getattr(jax.config, name)) == ([1e9], before)


# Who may write


OTHERS = {
    "the folder is writable by others": lambda file, patch: file.parent.chmod(0o777),
    "the folder is writable by its group": lambda file, patch: file.parent.chmod(0o770),
    "the file is writable by others": lambda file, patch: file.chmod(0o666),
    "somebody else owns them": lambda file, patch: patch(os, "geteuid", lambda: 12345),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_somebody_else_could_have_written_is_not_read(kind, kept, monkeypatch):
    program, file = kept
    OTHERS[kind](file, monkeypatch.setattr)
    if program.load():  # the folder is sound, and the file was compiled and written again
        assert (program.compiled, file.stat().st_mode & 0o777) == (2, 0o600)
    else:  # left to JAX
        assert program.compiled == 1


@pytest.mark.parametrize("place", ["file", "folder"])
def test_links_are_not_followed(place, kept):
    program, file = kept
    path = {"file": file, "folder": file.parent}[place]
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
    assert program.load() == (place == "file")
    assert program.compiled == (2 if place == "file" else 1)


def test_nothing_is_written_where_somebody_else_could(folder):
    folder.mkdir()
    folder.chmod(0o777)
    assert not Twice().load()
    assert not list(folder.iterdir())


def test_the_tool_keeps_nothing_in_a_folder_that_others_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.delitem(sys.modules, "jax")
    compilation.cache_folder().mkdir(parents=True)
    compilation.cache_folder().chmod(0o777)
    compilation.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    compilation.cache_folder().chmod(0o700)
    compilation.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(compilation.cache_folder())
    for name in ("CACHE_DIR", "MIN_COMPILE_TIME_SECS"):  # set by the call, not by this test
        monkeypatch.delenv(f"JAX_COMPILATION_{name}", raising=False)
        monkeypatch.delenv(f"JAX_PERSISTENT_CACHE_{name}", raising=False)


def test_a_read_only_folder_is_read_and_not_written(kept, monkeypatch):
    program, file = kept

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache, "replacing", fail)
    monkeypatch.setattr(cache.os, "utime", fail)
    program.load()
    assert program.compiled == 1
    program.load(FACTS | {"model": "another"})
    assert (program.compiled, list(file.parent.iterdir())) == (2, [file])


def test_without_a_folder_the_program_is_left_to_jax(folder, monkeypatch):
    folder.write_text("a file in its place")
    assert not Twice().load()
    folder.unlink()
    monkeypatch.setattr(cache.os, "access", lambda *_: False)
    assert not Twice().load()


def test_the_size_is_bounded_and_what_is_used_stays(tmp_path):
    for age, name in enumerate(("new", "old", "oldest")):
        cache.write_cached(tmp_path, name, FACTS, b"x" * 1000, most_bytes=10**6)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert cache.read_cached(tmp_path, "oldest", FACTS) == b"x" * 1000  # now the newest
    cache.write_cached(tmp_path, "another", FACTS, b"x" * 1000, most_bytes=3500)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "oldest", "another"}


def test_programs_are_kept_where_jax_keeps_its_own(monkeypatch):
    class Config:
        jax_compilation_cache_dir, jax_enable_compilation_cache = "/somewhere", True

    monkeypatch.setattr(programs.jax, "config", Config)
    assert str(programs.kept_folder()) == "/somewhere/networks"
    for off in ({"dir": None}, {"dir": ""}, {"dir": "gs://bucket/cache"}, {"on": False}):
        monkeypatch.setattr(Config, "jax_compilation_cache_dir", off.get("dir", "/somewhere"))
        monkeypatch.setattr(Config, "jax_enable_compilation_cache", off.get("on", True))
        assert programs.kept_folder() is None


# The network


IMAGE = np.random.default_rng(0).integers(0, 256, (160, 200, 3)).astype(np.uint8)


def test_the_vectors_are_the_same_with_and_without_the_cache(folder, monkeypatch):
    with monkeypatch.context() as off:
        off.setattr(programs, "kept_folder", lambda: None)
        without = Extractor(SMALL).describe(IMAGE)
    assert not folder.exists()
    writing = Extractor(SMALL).describe(IMAGE)
    assert len(list(folder.iterdir())) == 2  # the program and the weights
    programs._loaded.clear()

    def fail(_):
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(CompiledDescriptor, "network", property(fail))
    np.testing.assert_array_equal(writing, without)
    np.testing.assert_array_equal(Extractor(SMALL).describe(IMAGE), without)
    other = DescriptorSettings(scales=1, longest_side=160, mean=(0.4,) * 3, std=(0.2,) * 3)
    assert np.abs(Extractor(other).describe(IMAGE) - without).max() > 1e-3


def test_other_options_are_other_programs(folder):
    first = Extractor(SMALL).describe(IMAGE)
    plain = DescriptorSettings(scales=1, longest_side=160, pooling="max", regional=False)
    programs._loaded.clear()
    assert np.abs(Extractor(plain).describe(IMAGE) - first).max() > 1e-3
    assert len(list(folder.iterdir())) == 3


def test_the_weights_are_read_again_where_their_file_has_changed(folder, monkeypatch):
    leaves = [np.ones(3, np.float32)]
    file = folder.parent / "weights.pth"
    file.write_bytes(b"first")
    programs.keep_network(programs.KeptNetwork((0.5,) * 3, (0.5,) * 3, 32, True, leaves), file)
    assert programs.load_kept_network().leaves[0].tolist() == [1, 1, 1]
    (kept,) = folder.iterdir()
    sound = kept.read_bytes()
    kept.write_bytes(sound.replace(leaves[0].tobytes(), np.full(3, 2, np.float32).tobytes()))
    assert kept.read_bytes() != sound
    assert programs.load_kept_network() is None  # the altered weights are no weights
    kept.write_bytes(sound)
    file.write_bytes(b"another")
    assert programs.load_kept_network() is None
    file.unlink()
    assert programs.load_kept_network() is None


def test_the_programs_of_a_given_network_are_not_kept(folder):
    network = Extractor(SMALL).network
    for path in folder.iterdir():
        path.unlink()
    Extractor(SMALL, network=network).describe(IMAGE)
    assert not list(folder.iterdir())


SCRIPT = """
import sys
import numpy as np
from ggem_jax.descriptors.extract import DescriptorSettings, Extractor
image = np.random.default_rng(0).integers(0, 256, (160, 200, 3)).astype(np.uint8)
vector = Extractor(DescriptorSettings(scales=1, longest_side=160)).describe(image)
print(vector.tobytes().hex()[:4000], "flax" in sys.modules)
"""


def test_two_processes_at_once_and_a_third_without_flax(tool, tmp_path):
    (tmp_path / "describe_one.py").write_text(SCRIPT)
    own = {
        "XDG_CACHE_HOME": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(tmp_path),
    }
    (tmp_path / "cache").mkdir(mode=0o700)
    both = [tool("describe_one", environment=own) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [told for _, told in said] == ["", ""]
    assert said[0][0] == said[1][0]
    assert said[0][0].endswith(" True\n")
    names = sorted(path.suffix for path in (tmp_path / "cache" / programs.FOLDER).iterdir())
    assert names == ["", ".program"]
    found, told = tool("describe_one", environment=own).communicate(timeout=300)
    assert (found, told) == (said[0][0].replace(" True", " False"), "")


# Searches by NumPy


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class Halves:
    """A store in two arrays."""

    def __init__(self, vectors):
        self.parts, self.shape = np.array_split(vectors, 2), vectors.shape

    def take(self, ids):
        return np.concatenate(self.parts)[ids]

    def blocks(self, rows):
        vectors = np.concatenate(self.parts)
        return ((start, vectors[start : start + rows]) for start in range(0, len(vectors), rows))


def both_ways(monkeypatch, queries, database, k):
    """The rankings of NumPy and of JAX."""
    with monkeypatch.context() as patch:
        patch.setattr(exact_search, "_search_blocks", None)
        small = search(queries, database, k=k)
    with monkeypatch.context() as patch:
        patch.setattr(exact_search, "_search_in_numpy", None)
        patch.setattr(exact_search, "_NUMPY_NUMBERS", 0)
        return small, search(queries, database, k=k)


@pytest.mark.parametrize("kind", [np.asarray, Halves])
@pytest.mark.parametrize(
    ("dtype", "n", "d", "k"),
    [
        ("float16", 700, 1280, 20),
        ("float32", 61, 24, 61),
        ("float64", 5, 3, 1),
        (jnp.bfloat16, 9, 8, 3),
    ],
)
def test_numpy_and_jax_find_the_same(kind, dtype, n, d, k, monkeypatch):
    rng = np.random.default_rng(n)
    small, large = both_ways(monkeypatch, unit(rng, 3, d), kind(unit(rng, n, d).astype(dtype)), k)
    np.testing.assert_array_equal(small.ids, large.ids)
    np.testing.assert_array_equal(small.scores, large.scores)
    assert (small.ids.dtype, small.scores.dtype) == (large.ids.dtype, large.scores.dtype)
    assert isinstance(small.ids, jax.Array)


def test_ties_are_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    database = np.repeat(unit(rng, 10, 8), 30, axis=0)[rng.permutation(300)]
    for k in (1, 17, 45, 300):
        small, large = both_ways(monkeypatch, unit(rng, 3, 8), database, k)
        np.testing.assert_array_equal(small.ids, large.ids)
    scores, ids = map(np.asarray, small)
    assert np.sum(scores[:, 1:] == scores[:, :-1]) > 500
    assert np.all((scores[:, 1:] < scores[:, :-1]) | (ids[:, 1:] > ids[:, :-1]))


def test_what_is_no_number_is_the_same(monkeypatch):
    database = np.array([[-0.0], [0.0], [np.nan], [-1.0], [np.inf], [-np.inf]], np.float32)
    small, large = both_ways(monkeypatch, np.ones((1, 1), np.float32), database, 6)
    assert small.ids.tolist() == large.ids.tolist() == [[4, 0, 1, 3, 2, 5]]
    np.testing.assert_array_equal(small.scores, large.scores)


def test_large_searches_are_left_to_jax(monkeypatch):
    monkeypatch.setattr(exact_search, "_search_in_numpy", None)
    rng = np.random.default_rng(0)
    queries, database = unit(rng, 2, 8), unit(rng, 50, 8)
    monkeypatch.setattr(exact_search, "_NUMPY_SCORES", 99)
    assert search(queries, database, k=3).ids.shape == (2, 3)
    monkeypatch.setattr(exact_search, "_NUMPY_SCORES", 100)
    with pytest.raises(TypeError):
        search(queries, database, k=3)
    assert search(queries, database, k=3, precision="bfloat16").ids.shape == (2, 3)
    monkeypatch.setattr(exact_search, "_NUMPY_NUMBERS", 399)
    assert search(queries, database, k=3).ids.shape == (2, 3)
