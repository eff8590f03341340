"""Times what a user of `ggem-retrieval` waits for: a warm search, and the steps of indexing.

    python -m benchmarks.bench_retrieval_time [--before CHECKOUT] [--vectors 5000 1000000] [--page]
    python -m benchmarks.bench_retrieval_time --index 100 1000 [--before CHECKOUT]

Search: `ggem-retrieval search my.index query.jpg -k 5`, a process of its own from start to end, of
an index of random unit vectors of 1,280 in float16. The first process compiles and is not counted.
With `--before`, the code of another checkout, which reads the same format of an index, takes turns
with ours in the same run. Rows go to benchmarks/results/retrieval_time.csv.

Page: requests to the application of `serve`, in one process with a loaded network: images like one
of the index, and an upload of 1,024 x 768, whose network is timed alone too. The first request is
not counted. Rows go to benchmarks/results/retrieval_page.csv.

Index: `ggem-retrieval index` of so many photos of 12 megapixels and of 0.3, a process of its own;
an index of two photos comes first, so that the network is compiled. With `--before`, the codes take
turns. Rows go to benchmarks/results/retrieval_indexing.csv.

Steps: the CPU time of each step from file to vector, one image after another in one process, for
photos of 12 megapixels and of 0.3, decoded in full and as a draft. The photos are noise of all
scales, as JPEG of quality 90. Rows go to benchmarks/results/retrieval_steps.csv.

CPU seconds are those of all threads, of the user and of the system.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import append, machine
from ggem_jax.descriptors.compiled import CompiledDescriptor
from ggem_jax.descriptors.extract import Extractor
from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.files.images import decode_image, normalise
from ggem_jax.retrieval.index.folder import hash_file
from ggem_jax.retrieval.index.migration import bring_up_to_date
from ggem_jax.retrieval.index.reading import connect
from ggem_jax.retrieval.index.shards import append_vectors
from ggem_jax.retrieval.index.store import INDEX, Entry, Facts, put_entries, write_facts

ROOT = Path(__file__).resolve().parent.parent
DIM = 1280  # of EfficientNet-Lite0
_BLOCK_ROWS = 10_000
SIZES = {"12 megapixels": (3000, 4000), "0.3 megapixels": (480, 640)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="root of a checkout to compare with")
    parser.add_argument("--vectors", type=int, nargs="*", default=[5000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=8, help="photos of each size")
    parser.add_argument("--page", action="store_true", help="time requests to the page alone")
    parser.add_argument(
        "--index",
        type=int,
        nargs=2,
        metavar="COUNT",
        help="index so many photos of each size alone",
    )
    options = parser.parse_args()
    codes = {"now": ROOT} if options.before is None else {"before": options.before, "now": ROOT}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.index:
            for (label, size), count in zip(SIZES.items(), options.index, strict=True):
                write_photos(folder / label, size, count)
                for row in time_indexing(folder / label, codes):
                    append("retrieval_indexing", machine() | {"photos": label} | row)
            return
        write_photos(folder / "query", (768, 1024), 1)
        for size in options.vectors:
            write_index(folder / f"{size}.index", size)
            if options.page:
                query, index = folder / "query" / "0.jpg", folder / f"{size}.index"
                append("retrieval_page", machine() | time_page(index, query, options.rounds))
                continue
            for row in time_searches(folder, size, codes, options.rounds):
                append("retrieval_time", machine() | row)
        for label, size in {} if options.page else SIZES.items():
            write_photos(folder / label, size, options.images)
            for decoding in ("full", "draft"):
                row = {"photos": label, "images": options.images, "decoding": decoding}
                steps = time_steps(folder / label, draft=decoding == "draft")
                append("retrieval_steps", machine() | row | steps)


def write_photos(folder: Path, size: tuple[int, int], count: int) -> None:
    """Writes JPEG files of noise of all scales, which decode as photos do.

    Args:
        folder: A new folder.
        size: Height and width, pixels.
        count: Number of files.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        image = np.zeros((*size, 3), np.float32)
        for side in (4, 16, 64, 256):
            noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            image += np.asarray(noise.resize(size[::-1], Image.Resampling.BICUBIC)) / 4
        image += rng.normal(0, 4, size)[..., None]
        photo = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        photo.save(folder / f"{number}.jpg", quality=90)


def write_index(folder: Path, count: int) -> None:
    """Writes an index of random unit vectors in float16, whose images do not exist.

    Args:
        folder: A new folder.
        count: Number of vectors.
    """
    folder.mkdir()
    record = DescriptorSettings().resolve().record()
    facts = Facts(record, "float16", str(folder), dim=DIM, count=count)
    places = list[tuple[int, int]]()
    for block in _random_blocks(count):
        facts, at = append_vectors(folder, facts, block)
        places += at
    with contextlib.closing(connect(folder / INDEX, "mode=rwc")) as database:
        database.execute("BEGIN")
        bring_up_to_date(database, folder)
        put_entries(database, _entries(places))
        write_facts(database, facts)
        database.execute("COMMIT")


def _random_blocks(rows: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(1)
    for start in range(0, rows, _BLOCK_ROWS):
        block = np.abs(rng.standard_normal((min(_BLOCK_ROWS, rows - start), DIM), np.float32))
        yield (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)


def _entries(places: list[tuple[int, int]]) -> Iterator[Entry]:
    for number, (shard, row) in enumerate(places):
        path, content = f"{number // 1000}/{number}.jpg".encode(), number.to_bytes(16, "big")
        yield Entry(path, 1, 1, 1, number, content, 640, 480, 0, shard, row)


def time_searches(
    folder: Path, size: int, codes: dict[str, Path], rounds: int
) -> list[dict[str, Any]]:
    """Returns a row for each code: the medians of a warm search.

    Args:
        folder: Folder of the index `SIZE.index` and the query.
        size: Number of vectors in the index.
        codes: Roots of checkouts by label; they take turns.
        rounds: Rounds that count, after the one that compiles.

    Raises:
        SystemExit: A search fails, or the codes rank differently.
    """
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in codes}
    ranked: dict[str, list[str]] = {}
    for _ in range(rounds + 1):
        for label, root in codes.items():
            said, *times = _search(root, folder, size, folder / f"cache {label}")
            ranked[label] = [line.split()[-1] for line in said.splitlines()[2:]]
            seconds[label].append((times[0], times[1]))
    if len({tuple(paths) for paths in ranked.values()}) > 1:
        sys.exit(f"the codes rank differently: {ranked}")
    rows = []
    for label, times in seconds.items():
        cpu, wall = (statistics.median(own) for own in zip(*times[1:], strict=True))
        first, rest = times[0][0], {"code": label, "vectors": size, "dim": DIM, "rounds": rounds}
        rows.append(
            rest | {"cpu_s": f"{cpu:.2f}", "wall_s": f"{wall:.2f}", "first_cpu_s": f"{first:.2f}"}
        )
    return rows


def time_indexing(photos: Path, codes: dict[str, Path]) -> list[dict[str, Any]]:
    """Returns a row for each code: what indexing a folder takes, the network compiled before.

    Args:
        photos: Folder of the photos.
        codes: Roots of checkouts by label.

    Raises:
        SystemExit: A command fails.
    """
    two, rows = photos.with_name("two"), []
    shutil.rmtree(two, ignore_errors=True)
    two.mkdir()
    for path in sorted(photos.iterdir())[:2]:
        shutil.copy(path, two)
    for label, root in codes.items():
        cache, made = photos.with_name(f"cache {label}"), photos.with_name(f"{label}.index")
        for folder in (two, photos):
            shutil.rmtree(made, ignore_errors=True)
            _, cpu, wall = _run(root, cache, "index", folder, "-o", made)
        count = len(list(photos.iterdir()))
        row = {"code": label, "images": count, "cpu_s": f"{cpu:.1f}", "wall_s": f"{wall:.1f}"}
        rows.append(row | {"images_per_cpu_s": f"{count / cpu:.1f}"})
    return rows


def _search(root: Path, folder: Path, size: int, cache: Path) -> tuple[str, float, float]:
    """The output of one search, its CPU seconds and its seconds."""
    query = folder / "query" / "0.jpg"
    return _run(root, cache, "search", folder / f"{size}.index", query, "-k", "5")


def _run(root: Path, cache: Path, *arguments: str | Path) -> tuple[str, float, float]:
    """The output of one command of the tool, its CPU seconds and its seconds."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    own |= {"PYTHONPATH": str(root), "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "ggem_jax.retrieval", *arguments]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=root, env=own, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{arguments[0]} of {root} failed")
    return said, usage.ru_utime + usage.ru_stime, time.perf_counter() - began


def time_page(index: Path, query: Path, rounds: int) -> dict[str, Any]:
    """Returns the milliseconds of warm requests to the page, the medians of all rounds.

    Args:
        index: Folder of the index.
        query: Image that is uploaded.
        rounds: Rounds that count, after the one that compiles.
    """
    from starlette.testclient import TestClient

    from ggem_jax.retrieval.index.index import Index
    from ggem_jax.retrieval.page import make_app

    client = TestClient(make_app(index), base_url="http://localhost")
    settings, data = DescriptorSettings(), query.read_bytes()
    descriptor, fit = CompiledDescriptor(settings), Extractor(settings).fit
    takes, small = descriptor.takes, decode_image(query, fit=fit, draft=True).pixels
    batch = normalise(small[None], mean=takes.mean, std=takes.std)

    def similar() -> None:
        client.get("/similar/0", params={"k": 60}).raise_for_status()

    def upload() -> None:
        files = {"image": ("0.jpg", data, "image/jpeg")}
        client.post("/search", files=files, data={"k": "60"}).raise_for_status()

    calls = {"similar": similar, "upload": upload, "network": lambda: descriptor(batch)}
    row: dict[str, Any] = {"vectors": len(Index.open(index)), "dim": DIM, "rounds": rounds}
    for name, call in calls.items():
        times = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        row[f"{name}_ms"] = f"{1e3 * statistics.median(times[1:]):.1f}"
    return row


def time_steps(folder: Path, *, draft: bool) -> dict[str, str]:
    """Returns the CPU milliseconds of each step for one image, the median of all images.

    Args:
        folder: Folder of the images; the first one compiles and is not counted.
        draft: Whether JPEGs are decoded at a fraction of their size (`decode_image`).
    """
    settings = DescriptorSettings()
    descriptor = CompiledDescriptor(settings)
    takes, fit = descriptor.takes, Extractor(settings).fit
    steps: dict[str, list[float]] = {}

    def step(name: str, call: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = call()
        steps.setdefault(name, []).append(time.process_time() - began)
        return result

    for path in [sorted(folder.iterdir())[0], *sorted(folder.iterdir())]:
        step("hash", lambda path=path: hash_file(path))
        # decoded and resized
        small = step("decode", lambda path=path: decode_image(path, fit=fit, draft=draft).pixels)
        step(
            "network",
            lambda small=small: descriptor(normalise(small[None], mean=takes.mean, std=takes.std)),
        )
    middle = {name: 1e3 * statistics.median(times[1:]) for name, times in steps.items()}
    row = {f"{name}_ms": f"{value:.1f}" for name, value in middle.items()}
    return row | {"images_per_cpu_s": f"{1e3 / sum(middle.values()):.1f}"}


if __name__ == "__main__":
    main()
