"""Compiled programs and weights that are kept between processes, so that nothing is traced twice.

They are kept in the folder `networks` of JAX's compilation cache, where that cache is on
(`jax_compilation_cache_dir`; the tool `ggem-retrieval` turns it on). JAX's own cache saves the
compilation; these files save the tracing and the loading of Flax as well. A program is used only
for the facts that it was made from: versions, the source code of this package, device, processor,
configuration, network, options and shapes. Other files are ignored and written again.

A compiled program is code. `ggem_jax.files.cache` reads only what nobody else could have written.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import pickle
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

import ggem_jax
from ggem_jax.files.cache import make_private, processor, read_cached, write_cached
from ggem_jax.files.normalisation import Channels

FOLDER = "networks"  # in JAX's compilation cache
MOST_BYTES = 128 * 2**20  # a program takes 2.3 MB, the weights of EfficientNet-Lite0 14 MB

_MOST_LOADED = 64  # programs that one process keeps in memory
# whose code makes a program or its weights
_ROOMS = ("descriptors", "files", "kernels", "models", "pooling", "weights")
_INSTALLED = "installed-weights"

Program = Callable[[list[jax.Array], np.ndarray], jax.Array]  # leaves, images -> descriptors

_loaded: dict[str, Program] = {}
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class KeptNetwork:
    """The installed network without its Flax module: enough to run programs that are kept."""

    mean: Channels  # as in `ggem_jax.descriptors.backbones.Network`, like the next three
    std: Channels
    stride: int
    pads: bool
    leaves: list[np.ndarray]  # of the variables

    @property
    def preprocessing(self) -> None:
        """None, as for every network that is not of a training run."""


def kept_folder() -> Path | None:
    """Returns the folder of programs, or None where JAX's compilation cache is off.

    It also counts as off if several processes share one computation, or the cache is no folder.
    """
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    on = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    if not folder or not on or "://" in str(folder) or jax.process_count() > 1:
        return None
    return Path(folder) / FOLDER


def load_program(
    facts: dict[str, Any], leaves: list[jax.Array], compile_it: Callable[[], jax.stages.Compiled]
) -> Program | None:
    """Returns a compiled program: loaded if it is kept, else compiled and then kept.

    Args:
        facts: JSON values that say what the program computes; `images` is the shape of its images.
        leaves: The first argument of the program, arrays on the device that it runs on.
        compile_it: Function that traces and compiles the program, under a name that nothing else
            has: what JAX loads from its own cache cannot be serialised on a CPU.

    Returns:
        The program; None where it is not kept and cannot be.
    """
    (device,) = leaves[0].devices()
    folder, surroundings = kept_folder(), _surroundings(device)
    if folder is None or surroundings is None:
        return None
    facts = surroundings | facts
    key = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:32]
    with _one_at_a_time:
        if key not in _loaded:
            program = _load_or_compile(folder, f"{key}.program", facts, leaves, compile_it)
            if program is None:
                return None
            while len(_loaded) >= _MOST_LOADED:
                del _loaded[next(iter(_loaded))]
            _loaded[key] = program
        return _loaded[key]


def load_kept_network() -> KeptNetwork | None:
    """Returns the installed network if it is kept and its file has not changed, else None."""
    folder, facts = kept_folder(), _network_facts()
    if folder is None or facts is None:
        return None
    contents = read_cached(folder, _INSTALLED, facts)
    if contents is None:
        return None
    try:
        file, values = pickle.loads(contents)
    except Exception:  # whatever is damaged is written again
        return None
    return KeptNetwork(**values) if file == _identify_file(file[0]) else None


def keep_network(network: KeptNetwork, file: Path) -> None:
    """Keeps the installed network for later processes, where programs are kept.

    Args:
        network: The network.
        file: The installed file of its weights.
    """
    folder, facts = kept_folder(), _network_facts()
    if folder is not None and facts is not None:
        contents = pickle.dumps((_identify_file(file), vars(network)), protocol=5)
        write_cached(folder, _INSTALLED, facts, contents, most_bytes=MOST_BYTES)


def _load_or_compile(folder, name, facts, leaves, compile_it) -> Program | None:
    (device,) = leaves[0].devices()
    contents = read_cached(folder, name, facts)
    program = None if contents is None else _deserialize(contents, device)
    if program is not None or not make_private(folder):
        return program
    with _kept_by_us_alone():
        compiled = compile_it()
    new = _serialize(compiled, leaves, np.zeros(facts["images"], np.float32), device)
    if new is not None:
        write_cached(folder, name, facts, new, most_bytes=MOST_BYTES)
    return compiled


@contextlib.contextmanager
def _kept_by_us_alone() -> Iterator[None]:
    """Keeps a program out of JAX's cache, which would return it without its functions."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _serialize(
    program: Any, leaves: list[jax.Array], images: np.ndarray, device: jax.Device
) -> bytes | None:
    """The program, if it computes the same after it is loaded again."""
    try:
        contents = pickle.dumps(serialize_executable.serialize(program), protocol=5)
        again = _deserialize(memoryview(contents), device)
        same = again is not None and np.array_equal(
            program(leaves, images), again(leaves, images), equal_nan=True
        )
    except Exception:  # some devices and some programs cannot be serialised: they are not kept
        return None
    return contents if same else None


def _deserialize(contents: memoryview, device: jax.Device) -> Program | None:
    try:
        serialized, in_tree, out_tree = pickle.loads(contents)
        return serialize_executable.deserialize_and_load(
            serialized, in_tree, out_tree, backend=device.client, execution_devices=[device]
        )
    except Exception:  # a program of another build of JAX's libraries: it is written again
        return None


def _surroundings(device: jax.Device) -> dict[str, Any] | None:
    """What a program depends on beside its own facts; None if the source code cannot be read."""
    source = _source_digest()
    if source is None:
        return None
    values = sorted(jax.config.values.items())
    options = [(name, str(value)) for name, value in values if "cache" not in name]
    return _versions() | {
        "source": source,
        "processor": processor(),
        "platform": [device.platform, device.client.platform_version],
        "device": [device.device_kind, device.id],
        "options": hashlib.sha256(repr(options).encode()).hexdigest(),
        "flags": [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
    }


def _network_facts() -> dict[str, Any] | None:
    source = _source_digest()
    return None if source is None else _versions() | {"source": source}


@functools.cache
def _versions() -> dict[str, Any]:
    return {
        "jax": [jax.__version__, jax.lib.__version__],
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@functools.cache
def _source_digest() -> str | None:
    """A digest of the code that programs are traced from; None if it cannot be read.

    Of Flax it is the file of its version: importing Flax, or asking for its metadata, takes longer.
    """
    found, flax = hashlib.sha256(), find_spec("flax")
    ours = [sorted((Path(ggem_jax.__file__).parent / room).glob("*.py")) for room in _ROOMS]
    theirs = (
        [Path(place) / "version.py" for place in flax.submodule_search_locations or ()]
        if flax
        else []
    )
    try:
        for path in itertools.chain(*ours, theirs):
            found.update(f"{path.parent.name}/{path.name}\n".encode())
            found.update(path.read_bytes())
    except OSError:
        return None
    return found.hexdigest()


def _identify_file(path: Path | str) -> tuple[str, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return str(path), found.st_size, found.st_mtime_ns
