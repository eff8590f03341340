"""Reads thousands of damaged and hostile files of weights, and counts what comes of it.

    python -m benchmarks.fuzz_weights --files 26000

Seeds are small files of every kind: checkpoints of training scripts with settings, optimizer states
and several networks, the old form of PyTorch, TorchScript, safetensors, shards, npz and plain
pickles. Each is cut, has bits flipped and pieces moved, inside its archive too, and gets operations
that run a command where a pickle is really unpickled. A file must either be read, or be refused in
one sentence by `UnreadableWeights` or `MismatchedWeights`; nothing of it may run. The table tells
how many were read and refused, and the longest time and the most memory that one file took, traced
by `tracemalloc`, which makes reading about twice as slow. The exit code is 1 where a file failed;
`--keep` is a folder for such files.
"""

import argparse
import collections
import io
import json
import pickle
import pickletools
import random
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bench_weights import cases
from ggem_jax.files.arrays import read_checkpoint
from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.files.pickles import read_pickle
from ggem_jax.files.safetensors_files import write_safetensors
from ggem_jax.files.torch_files import write_torch
from ggem_jax.weights.architecture import Given
from ggem_jax.weights.text import from_published_names, holds_text
from ggem_jax.weights.vit import from_arrays

GIVEN = Given(heads=3, gelu="quick")  # of the small networks of `cases`
LONGEST, LARGEST = 10.0, 512  # seconds and MB that a file may take
WHICH = (None, None, None, "ema", "model", "teacher", "student", "base_encoder", "nowhere")
SETTINGS = (
    b"cargparse\nNamespace\n)\x81}(X\x02\x00\x00\x00lrG?\x50bM\xd2\xf1\xa9\xfcX\x03\x00\x00\x00out"
    b"cpathlib\nPosixPath\n(X\x01\x00\x00\x00/tRub"
)
NAMES = ("posix system", "builtins eval", "argparse Namespace", "types SimpleNamespace",
    "collections defaultdict", "torch FloatStorage", "torch.storage _load_from_bytes", "torch Size",
    "torch._utils _rebuild_tensor_v2", "numpy.core.multiarray scalar", "__torch__ os.system",
    "__torch__.a B", "torch.jit._pickle build_intlist", "builtins int")  # fmt: skip


class Seed(NamedTuple):
    """A sound file, or files beside each other of which the first is given to the reader."""

    files: dict[str, bytes]
    is_pickle: bool = False  # of plain data, read by `read_pickle`


def main(argv: list[str] | None = None) -> int:
    """Runs the files and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--keep", type=Path, help="folder for files that fail")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        failed = fuzz(Path(folder), arguments.files, arguments.seed, arguments.keep)
    return 1 if failed else 0


def fuzz(folder: Path, files: int, seed: int, keep: Path | None = None) -> int:
    """Reads altered files, prints the table, and returns how many failed.

    Args:
        folder: An empty folder for the files.
        files: How many.
        seed: Of the random numbers.
        keep: A folder for files that fail; None: they are not kept.
    """
    rng = random.Random(seed)
    ran = folder / "ran"  # what the payloads write
    payloads = list(hostile(ran))
    seeds = make_seeds(folder)
    counts = {kind: collections.Counter() for kind in seeds}
    worst: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in seeds}
    failures = []
    tracemalloc.start()
    for number in range(files):
        kind = list(seeds)[number % len(seeds)]
        altered = alter(seeds[kind], rng, payloads)
        place = folder / "case"
        place.mkdir(exist_ok=True)
        for name, data in altered.files.items():
            (place / name).write_bytes(data)
        outcome, seconds, size = read(place / next(iter(altered.files)), altered, rng)
        if ran.exists():
            outcome = "RAN"
            ran.unlink()
        if seconds > LONGEST or size > LARGEST:
            outcome = "TOO MUCH"
        counts[kind][outcome] += 1
        worst[kind] = [max(worst[kind][0], seconds), max(worst[kind][1], size)]
        if outcome.isupper():
            failures.append(f"{kind}, file {number}: {outcome}")
            for name, data in altered.files.items() if keep else ():
                (keep / f"{number}-{name}").write_bytes(data)  # type: ignore[operator]
    tracemalloc.stop()
    columns = ["read", "UnreadableWeights", "UnsafePickle", "MismatchedWeights", "AmbiguousWeights"]
    print(f"{'kind':<22}{''.join(f'{name:>19}' for name in columns)}{'s at most':>11}{'MB':>7}")
    for kind, count in counts.items():
        told = "".join(f"{count[name]:>19}" for name in columns)
        print(f"{kind:<22}{told}{worst[kind][0]:>11.2f}{worst[kind][1]:>7.1f}")
    print(f"{files} files, {len(failures)} failed")
    for failure in failures[:20]:
        print(failure)
    return len(failures)


def read(path: Path, altered: Seed, rng: random.Random) -> tuple[str, float, float]:
    """Returns the outcome of reading a file, an upper-case one for a failure, seconds and MB.

    Args:
        path: The file.
        altered: What it is.
        rng: Chooses the network and the tower.
    """
    tracemalloc.reset_peak()
    before, began = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        if altered.is_pickle:
            read_pickle(path)
        else:
            arrays = read_checkpoint(path, rng.choice(WHICH)).arrays
            if holds_text(arrays) and rng.random() < 0.5:
                from_published_names(arrays, given=GIVEN, source=str(path))
            else:
                from_arrays(arrays, path, given=GIVEN)
        outcome = "read"
    except (UnreadableWeights, MismatchedWeights) as error:
        outcome = type(error).__name__
        if "\n" in str(error) or path.parent.name not in str(error):
            outcome = f"SENTENCE {str(error)[:200]!r}".upper()
    except BaseException as error:  # whatever comes is counted
        outcome = f"{type(error).__name__}: {str(error)[:200]!r}".upper()
    size = (tracemalloc.get_traced_memory()[1] - before) / 1e6
    return outcome, time.process_time() - began, size


def hostile(ran: Path) -> Iterator[bytes]:
    """Yields operations of pickles that write a file; each is tried on Python's own reader.

    Args:
        ran: The file that they write.
    """
    command = _plain(f"touch {ran}")
    for operations in (
        b"cposix\nsystem\n(" + command + b"tR0",
        b"(" + command + b"iposix\nsystem\n0",
        b"(cposix\nsystem\n" + command + b"o0",
        b"\x8c\x05posix\x8c\x06system\x93(" + command + b"tR0",
        b"cbuiltins\neval\n(" + _plain(f"__import__('os').system('touch {ran}')") + b"tR0",
    ):
        pickle.loads(b"\x80\x04" + operations + b"N.")  # of our own making
        if not ran.exists():
            raise RuntimeError(f"this payload does not run: {operations!r}")
        ran.unlink()
        yield operations


def alter(seed: Seed, rng: random.Random, payloads: list[bytes]) -> Seed:
    """Returns a seed with one of its files altered, from the outside or inside its archive.

    Args:
        seed: The sound files.
        rng: The choices.
        payloads: Operations that run a command where they are unpickled.
    """
    name = rng.choice(list(seed.files))
    data = seed.files[name]
    if zipfile.is_zipfile(io.BytesIO(data)) and rng.random() < 0.8:
        data = _alter_zip(data, rng, payloads)
    else:
        is_pickle = data.startswith(b"\x80")
        data = _alter_pickle(data, rng, payloads) if is_pickle else _alter_bytes(data, rng)
    return seed._replace(files={**seed.files, name: data})


def _alter_zip(data: bytes, rng: random.Random, payloads: list[bytes]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickles = [name for name in entries if name.endswith("data.pkl")]
    chosen = rng.choice(pickles if pickles and rng.random() < 0.7 else list(entries))
    alter_entry = (
        _alter_pickle if chosen in pickles else lambda entry, rng, _: _alter_bytes(entry, rng)
    )
    entries[chosen] = alter_entry(entries[chosen], rng, payloads)
    if rng.random() < 0.1:
        entries[rng.choice(list(entries))] = entries.pop(rng.choice(list(entries)))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    return written.getvalue()


def _alter_pickle(data: bytes, rng: random.Random, payloads: list[bytes]) -> bytes:
    """With a payload, another name, or operations left out, doubled or exchanged; or any bytes."""
    try:
        operations = [(at or 0, op.name, arg) for op, arg, at in pickletools.genops(data)]
    except Exception:  # several pickles, or none
        return _alter_bytes(data, rng)
    way = rng.randrange(5)
    at, *_ = operations[rng.randrange(1, len(operations))]
    if way == 0:
        return data[:at] + rng.choice(payloads) + data[at:]
    if way == 1 and (found := [each for each in operations if each[1] == "GLOBAL"]):
        at, _, named = rng.choice(found)
        other = rng.choice(NAMES).replace(" ", "\n")
        return data[:at] + f"c{other}\n".encode() + data[at + len(named) + 2 :]
    if way == 2:
        starts = [each[0] for each in operations]
        first, last = sorted(rng.choices(range(1, len(starts)), k=2))
        last = min(last, first + 40)
        piece = data[starts[first] : starts[last]]
        return data[:at] + piece * rng.choice((1, 1, 2, 50)) + data[at:]
    if way == 3:
        starts = [each[0] for each in operations]
        place = rng.randrange(1, len(starts) - 1)
        return data[: starts[place]] + data[starts[place + 1] :]
    return _alter_bytes(data, rng)


def _alter_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, with bits flipped, or with a piece moved or repeated."""
    if not data:
        return bytes([rng.randrange(256)])
    way, at = rng.randrange(4), rng.randrange(len(data))
    if rng.random() < 0.5:
        at = min(at, rng.randrange(400))  # where the headers are
    if way == 0:
        return data[:at]
    if way == 1:
        piece = data[at : at + rng.randrange(1, 64)]
        to = rng.randrange(len(data))
        return data[:to] + piece * rng.choice((1, 2, 9)) + data[to:]
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        broken[min(at + rng.randrange(32), len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(broken)


def make_seeds(folder: Path) -> dict[str, Seed]:
    """Returns sound files of every kind by their kind.

    Args:
        folder: For files on the way.
    """
    draw = np.random.default_rng(0)
    weights = {
        name: {n: draw.normal(size=shape).astype(np.float32) for n, shape in case.shapes.items()}
        for name, case in cases(small=True).items()
    }
    plain, clip = weights["MAE-B/16"], weights["CLIP-B/16"]
    student = {f"module.backbone.{name}": value for name, value in plain.items()}
    teacher = {f"backbone._orig_mod.{name}": value for name, value in plain.items()}
    both = {
        f"{who}.{name}": value for who in ("student", "teacher") for name, value in plain.items()
    }
    state = {
        "state": {0: {"step": 5, "exp_avg": np.ones(4, np.float32)}},
        "param_groups": [{"lr": 0.1}],
    }
    training = {"epoch": 5, "state_dict": plain, "state_dict_ema": plain, "optimizer": state}
    names = {
        "training": training | {"args": SETTINGS},
        "student and teacher": {"student": student, "teacher": teacher, "args": SETTINGS},
        "both in one": {"model": {"state_dict": both}},
        "open_clip": {"state_dict": {f"module.{n}": v for n, v in clip.items()}},
    }
    seeds = {kind: Seed({"net.pth.tar": _archive(value)}) for kind, value in names.items()}
    seeds["TorchScript"] = Seed({"net.pt": _archive(clip, program=True)})
    seeds["old PyTorch"] = Seed({"net.pth": _old(training | {"args": SETTINGS})})
    write_torch(folder / "net.pth", plain)
    seeds["PyTorch"] = Seed({"net.pth": (folder / "net.pth").read_bytes()})
    dino = weights["DINOv2-B/14 registers"]
    for kind, arrays in (("safetensors", dino), ("shard", plain)):
        write_safetensors(folder / "net.safetensors", arrays)
        seeds[kind] = Seed({"net.safetensors": (folder / "net.safetensors").read_bytes()})
    shard = {"model-00001-of-00001.safetensors": seeds.pop("shard").files["net.safetensors"]}
    index = {"metadata": {}, "weight_map": dict.fromkeys(plain, next(iter(shard)))}
    seeds["shards"] = Seed({"model.safetensors.index.json": json.dumps(index).encode(), **shard})
    for kind in ("AugReg-B/16", "SigLIP-B/16"):
        np.savez(folder / "net.npz", **weights[kind])  # type: ignore[arg-type]
        seeds[kind] = Seed({"net.npz": (folder / "net.npz").read_bytes()})
    value = [{"box": (1.5, 2), "sets": {1, "a"}, "array": np.arange(6.0), (1, "b"): None}] * 3
    for protocol in (0, 2, 4):
        data = pickle.dumps(value, protocol)
        seeds[f"pickle, protocol {protocol}"] = Seed({"gnd.pkl": data}, is_pickle=True)
    return seeds


def _operations(value: Any, storage: Callable[[np.ndarray], bytes]) -> bytes:
    """Operations of a pickle for nested dictionaries with tensors; bytes stand as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        items = (pickle.dumps(k, 2)[2:-1] + _operations(v, storage) for k, v in value.items())
        return b"}(" + b"".join(items) + b"u"
    if not isinstance(value, np.ndarray):
        return pickle.dumps(value, 2)[2:-1]
    strides = tuple(step // value.itemsize for step in value.strides)
    parts = (_plain(part) for part in (0, value.shape, strides, False, {}))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(value) + b"".join(parts) + b"tR"


def _plain(value: Any) -> bytes:
    """Operations of a plain value without memo entries."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_plain, value)) + b"t"
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def _stored(storages: list[np.ndarray], *view: None) -> Callable[[np.ndarray], bytes]:
    """A function that takes an array into the storages and returns the persistent id of its own."""

    def storage(array: np.ndarray) -> bytes:
        storages.append(array)
        rest = (str(len(storages) - 1), "cpu", array.size, *view)
        parts = b"".join(map(_plain, rest))
        return b"(" + _plain("storage") + b"ctorch\nFloatStorage\n" + parts + b"tQ"

    return storage


def _archive(value: dict, program: bool = False) -> bytes:
    """The zip form, or a TorchScript archive with one module."""
    storages: list[np.ndarray] = []
    operations = _operations(value, _stored(storages))
    if program:
        operations = b"c__torch__.net\nNet\n)\x81" + operations + b"b"
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02" + operations + b".")
        for number, array in enumerate(storages):
            archive.writestr(f"net/data/{number}", array.tobytes())
        if program:
            archive.writestr("net/constants.pkl", b"\x80\x02).")
            archive.writestr("net/code/__torch__/net.py", b"raise SystemExit")
    return written.getvalue()


def _old(value: dict) -> bytes:
    """The form from before PyTorch 1.6."""
    storages: list[np.ndarray] = []
    operations = b"\x80\x02" + _operations(value, _stored(storages, None)) + b"."
    keys = [str(number) for number in range(len(storages))]
    heads = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    parts = [*(pickle.dumps(each, 2) for each in heads), operations, pickle.dumps(keys, 2)]
    sizes = [each.size.to_bytes(8, "little") + each.tobytes() for each in storages]
    return b"".join([*parts, *sizes])


if __name__ == "__main__":
    sys.exit(main())
