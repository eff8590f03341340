"""Times SuperGlobal's reranking beside its formulas in NumPy.

    python -m benchmarks.bench_rerank

The size is that of ROxford5k: 70 queries, 4,993 vectors of 2,048, 400 candidates. Four contestants
take turns in one run:

- ours: `superglobal_rerank`
- its matrix products alone: the dot products of the candidates of each query with each other and
  with two vectors, jitted
- NumPy, all at once: gathers the neighbours of all candidates of all queries, as the published code
  does
- NumPy, one query at a time

Peak memory is measured in a process of its own for each contestant: what the call adds to the
memory before it. Rows go to benchmarks/results/rerank.csv.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.record import append, machine, median_and_spread, time_in_turns
from ggem_jax.retrieval import Ranking, superglobal_rerank
from ggem_jax.retrieval.exact_search import similarity

QUERIES, DATABASE, DIM, CANDIDATES, NEIGHBORS, BETA = 70, 4993, 2048, 400, 9, 0.15
CONTESTANTS = ("ours", "matrix products", "numpy", "numpy by query")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--memory",
        choices=CONTESTANTS,
        help="print the peak memory of one call of this contestant, and nothing else",
    )
    options = parser.parse_args()
    queries, database, ids = example()
    calls = contestants(queries, database, ids)
    if options.memory:
        print(json.dumps(peak_bytes(calls[options.memory])))
        return
    ours, theirs = calls["ours"](), calls["numpy"]()
    largest = float(
        np.abs(np.sort(np.asarray(ours.scores), axis=1) - np.sort(theirs, axis=1)).max()
    )
    if largest > 2e-6:
        sys.exit(f"ours and NumPy differ by {largest}")
    times = time_in_turns(calls, options.rounds)
    peaks = {name: peak_in_own_process(name) for name in calls}
    middle, peak = {name: median_and_spread(own)[0] for name, own in times.items()}, peaks["ours"]
    for name in calls:
        milliseconds, spread = median_and_spread(times[name])
        row = {
            "contestant": name,
            "queries": QUERIES,
            "database": DATABASE,
            "dim": DIM,
            "candidates": CANDIDATES,
            "ms": f"{milliseconds:.0f}",
        }
        row |= {
            "spread": f"{spread:.2f}",
            "over_ours": f"{milliseconds / middle['ours']:.2f}",
            "peak_mib": f"{peaks[name] / 2**20:.0f}",
        }
        append("rerank", machine() | row | {"peak_over_ours": f"{peaks[name] / peak:.1f}"})


def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns unit vectors of queries and database around 300 centres, and ids by similarity.

    The ids are `(q, n)`, best first.
    """
    rng = np.random.default_rng(0)
    places = rng.normal(size=(300, DIM)).astype(np.float32)

    def around(count):
        vectors = places[rng.integers(0, len(places), count)] + 0.8 * rng.normal(
            size=(count, DIM)
        ).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    queries, database = around(QUERIES), around(DATABASE)
    return queries, database, np.argsort(-(queries @ database.T), axis=1)


def contestants(queries: np.ndarray, database: np.ndarray, ids: np.ndarray) -> dict[str, Callable]:
    """Returns a call for each contestant, by name; each waits for its result."""
    ranking = Ranking(np.zeros(ids.shape, np.float32), ids.astype(np.int32))
    on_device, queries_on_device, candidates = (
        jnp.asarray(database),
        jnp.asarray(queries),
        jnp.asarray(ids[:, :CANDIDATES]),
    )

    @jax.jit
    def products(queries, database, candidates):
        def one(each):
            query, own = each
            x = database[own]
            return similarity(x, x, "float32").sum(), similarity(
                x, jnp.stack([query, query]), "float32"
            ).sum()

        return lax.map(one, (queries, candidates))

    return {
        "ours": lambda: jax.block_until_ready(
            superglobal_rerank(queries_on_device, on_device, ranking)
        ),
        "matrix products": lambda: jax.block_until_ready(
            products(queries_on_device, on_device, candidates)
        ),
        "numpy": partial(all_at_once, queries, database, ids),
        "numpy by query": partial(query_by_query, queries, database, ids),
    }


def all_at_once(queries: np.ndarray, database: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns scores `(q, n)` by the formulas for all queries together.

    It gathers neighbours `(q, m, k, d)`. Images that are not candidates have a score of 0.

    Args:
        queries: Unit vectors `(q, d)`.
        database: Unit vectors `(n, d)`.
        ids: Ids `(q, n)` by similarity; the first `CANDIDATES` of each row are the candidates.
    """
    candidates = ids[:, :CANDIDATES]
    x = database[candidates]  # (q, m, d)
    gram = x @ x.transpose(0, 2, 1)
    nearest = np.argsort(-gram, axis=2)[:, :, : NEIGHBORS + 1]
    weights = BETA * np.take_along_axis(gram, nearest, 2)
    weights[:, :, 0] = 1
    neighbours = np.take_along_axis(x[:, None], nearest[..., None], 2)  # (q, m, k, d)
    refined = (weights[..., None] * neighbours).sum(2) / weights.sum(2)[..., None]
    s1 = np.einsum("qd,qmd->qm", queries, refined)
    best = np.argsort(-s1, axis=1)[:, : NEIGHBORS + 1]
    expanded = np.take_along_axis(refined, best[..., None], 1).max(1)
    scores = np.zeros(ids.shape, np.float32)
    scores[:, :CANDIDATES] = (s1 + np.einsum("qd,qmd->qm", expanded, refined)) / 2
    return scores


def query_by_query(queries: np.ndarray, database: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns the scores of `all_at_once`, computed for one query after the other."""
    return np.concatenate(
        [all_at_once(queries[i : i + 1], database, ids[i : i + 1]) for i in range(len(queries))]
    )


def peak_bytes(call: Callable) -> int:
    """Returns the peak memory that a first call adds to this process, compiling included."""
    before = _resident()
    _reset_peak()
    call()
    return _peak() - before


def _resident() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def peak_in_own_process(name: str) -> int:
    """Returns the peak memory of one call of a contestant in a new process, in bytes."""
    command = [sys.executable, "-m", "benchmarks.bench_rerank", "--memory", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
