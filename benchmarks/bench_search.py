"""Times exact search in more vectors than should be in memory.

    python -m benchmarks.bench_search

70 queries search 1,000,000 vectors of 2,048 in float16, in one memory-mapped file of 4.1 GB. Three
calls take turns in one run: our search; reading the file once, block by block; and the matrix
product of the queries with as many blocks as the file has, in float32 and in memory. The ratio is
ours over the sum of the other two.

Peak memory is the anonymous memory of this process (RssAnon), without pages of mapped files; a
thread watches it. On the first 50,000 vectors, the ids are compared with a brute-force search over
the same vectors in float64. A row goes to benchmarks/results/search.csv.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.record import append, machine
from ggem_jax.retrieval import search

_ROWS = 16384  # rows of a block where reading and product are timed separately


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=70)
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="folder of the temporary file of 4.1 GB (default: that of the system)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "vectors.npy"
        write_vectors(path, options.rows, options.dim)
        rng = np.random.default_rng(1)
        queries = jnp.asarray(
            unit(rng.normal(size=(options.queries, options.dim)).astype(np.float32))
        )
        loss = check_ids(path, np.asarray(queries), options.k, min(options.rows, 50_000))
        calls: dict[str, Callable] = {
            "search": lambda: jax.block_until_ready(
                search(queries, np.load(path, mmap_mode="r"), k=options.k)
            ),
            "reading": lambda: read(path),
            "product": lambda: multiply(queries, options.rows, options.dim),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        peak = 0
        for _ in range(options.rounds + 1):
            for name, call in calls.items():
                with Watched() as memory:
                    began = time.perf_counter()
                    call()
                    seconds[name].append(time.perf_counter() - began)
                peak = max(peak, memory.peak) if name == "search" else peak
    middle = {name: float(np.median(own[1:])) for name, own in seconds.items()}
    row = {"queries": options.queries, "rows": options.rows, "dim": options.dim, "k": options.k}
    row |= {f"{name}_s": f"{value:.2f}" for name, value in middle.items()}
    ratio = middle["search"] / (middle["reading"] + middle["product"])
    append(
        "search",
        machine()
        | row
        | {"over_reading_and_product": f"{ratio:.2f}", "peak_anonymous_mib": f"{peak / 2**20:.0f}"}
        | loss,
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors divided by their length along the last axis."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def write_vectors(path: Path, rows: int, dim: int) -> None:
    """Writes random unit vectors in float16, block by block."""
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, dim))
    draw = jax.jit(
        lambda i: jax.random.normal(jax.random.key(i, impl="rbg"), (_ROWS, dim)) / dim**0.5
    )
    for i, start in enumerate(range(0, rows, _ROWS)):
        file[start : start + _ROWS] = np.asarray(draw(i), np.float16)[: rows - start]
    file.flush()


def check_ids(path: Path, queries: np.ndarray, k: int, rows: int) -> dict[str, str]:
    """Compares ids with a brute-force search, and returns the columns on what bfloat16 loses.

    The reference is all scores in float64, rounded to float32, with equal ones in the order of
    their ids. The columns have the share of the k best that bfloat16 keeps, and its largest error.

    Raises:
        SystemExit: Some ids differ.
    """
    part = np.load(path, mmap_mode="r")[:rows]
    exact = [
        queries.astype(np.float64) @ part[start : start + _ROWS].astype(np.float64).T
        for start in range(0, rows, _ROWS)
    ]
    expected = np.argsort(-np.concatenate(exact, axis=1).astype(np.float32), axis=1, kind="stable")[
        :, :k
    ]
    found = np.asarray(search(queries, part, k=k).ids)
    if different := int(np.sum(found != expected)):
        sys.exit(f"{different} of {found.size} ids differ from a brute force")
    print(f"all {found.size} ids among {rows} vectors are those of a brute force", flush=True)
    rounded = search(queries, part, k=k, precision="bfloat16")
    kept = np.mean(
        [
            len(np.intersect1d(a, b)) / k
            for a, b in zip(np.asarray(rounded.ids), expected, strict=True)
        ]
    )
    scores = np.take_along_axis(np.concatenate(exact, axis=1), np.asarray(rounded.ids), axis=1)
    return {
        "bfloat16_kept": f"{kept:.4f}",
        "bfloat16_error": f"{np.abs(np.asarray(rounded.scores) - scores).max():.1e}",
    }


def read(path: Path) -> None:
    """Reads the file once, through a buffer of one block."""
    buffer = bytearray(_ROWS * 4096)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def multiply(queries: jax.Array, rows: int, dim: int) -> None:
    """Multiplies the queries with as many blocks of ones as the file has."""
    block = jnp.ones((_ROWS, dim))
    for _ in range(-(-rows // _ROWS)):
        jax.block_until_ready(_product(queries, block))


@jax.jit
def _product(queries, block):
    return jnp.einsum("qd,nd->qn", queries, block, precision=lax.Precision.HIGHEST)


class Watched:
    """Records the largest RssAnon of this process inside a `with`, sampled every 10 ms."""

    def __enter__(self) -> "Watched":
        self.peak, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            with open("/proc/self/status") as file:
                self.peak = max(
                    self.peak,
                    next(
                        int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon")
                    ),
                )


if __name__ == "__main__":
    main()
