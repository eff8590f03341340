"""ggem_jax/retrieval/stores: a vector database gives the candidates."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pymilvus  # noqa: F401  # its loggers keep the streams of the first import, not of a test
import pytest

from ggem_jax.retrieval import Ranking, search, superglobal_rerank
from ggem_jax.retrieval.methods import choose_method
from ggem_jax.retrieval.stores import StoreRefused, VectorStore, search_store
from ggem_jax.retrieval.stores.milvus import open_milvus

ROOT = Path(__file__).resolve().parent.parent
NO_WHEELS = "pgserver has no wheels for Python 3.13 and newer"


def unit(rng, *shape):
    vectors = rng.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def example(count=700, dim=32, queries=4):
    """Queries and vectors around 30 centres, so that reranking changes the order."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, dim))
    around = centres[rng.integers(0, 30, count + queries)] + rng.normal(size=(count + queries, dim))
    vectors = (around / np.linalg.norm(around, axis=1, keepdims=True)).astype(np.float32)
    return vectors[:queries], vectors[queries:]


class Table:
    """A vector database in memory, which remembers what was asked of it."""

    def __init__(self, vectors, ids=None):
        self.vectors = np.asarray(vectors)
        self.numbers = np.arange(len(vectors)) if ids is None else np.asarray(ids)
        self.asked, self.taken = [], []

    def search(self, vectors, k):
        self.asked.append((np.shape(vectors), k))
        scores = vectors @ self.vectors.T.astype(np.float32)
        order = np.argsort(-scores, axis=1)[:, :k]
        return self.numbers[order], np.take_along_axis(scores, order, axis=1)

    def take(self, ids):
        self.taken += ids.tolist()
        at = {number: row for row, number in enumerate(self.numbers.tolist())}
        return self.vectors[[at[number] for number in ids.tolist()]]


def example_module(name):
    """A script of examples/, whose class is the store that the docs show."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    pytest.importorskip("pgserver", reason=NO_WHEELS)
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
        import pgserver

    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["table", "milvus", "pgvector", "usearch"])
def make_store(request, tmp_path):
    """Returns a function from vectors to a store of them, with their rows as ids."""
    opened, numbers = [], iter(range(1000))

    def make(vectors):
        dim, ids = vectors.shape[1], np.arange(len(vectors))
        if request.param == "table":
            return Table(vectors)
        if request.param == "milvus":
            store = open_milvus(
                f"milvus:{tmp_path / 'stores.db'}", f"c{next(numbers)}", dim=dim, new=True
            )
            opened.append(store)
        elif request.param == "pgvector":
            import psycopg

            uri = request.getfixturevalue("postgres")
            connection = psycopg.connect(uri, autocommit=True)
            opened.append(connection)
            connection.execute("DROP TABLE IF EXISTS images")
            store = example_module("pgvector_store").PgvectorStore(connection, dim)
        else:
            store = example_module("usearch_store").UsearchStore(dim, exact=True)
        store.put(ids, vectors)
        return store

    yield make
    for store in opened:
        store.close()


# Search and reranking


@pytest.mark.parametrize("rerank", ["superglobal", None])
def test_equals_search_and_reranking_on_arrays(make_store, rerank):
    queries, vectors = example()
    method = choose_method(rerank or "none", candidates=60 if rerank else None)
    expected = method.search(queries, vectors, k=20)
    store = make_store(vectors)
    assert isinstance(store, VectorStore)
    found = search_store(queries, store, k=20, size=len(vectors), rerank=method)
    for own, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own[1], right[1])
        np.testing.assert_array_equal(own[0], right[0])
    assert (found[1][1] != found[0][1][:, :20]).any() == (rerank is not None)


def settings_of(data):
    return choose_method(
        "superglobal",
        candidates=int(data["M"]),
        neighbors=int(data["K"]),
        beta=float(data["beta"]),
    )


@pytest.mark.golden
def test_the_golden_order(make_store, shared):
    """The authors' order of all vectors, wherever two scores differ by more than 1e-6."""
    folder = shared / "golden" / "superglobal"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    checked = 0
    for file in [*sorted(folder.glob("rerank_*.npz")), folder / "mini_benchmark.npz"]:
        data = np.load(file)
        queries, vectors, n = data["Q"], data["X"], len(data["X"])
        method = settings_of(data)
        before, after = search_store(queries, make_store(vectors), k=n, size=n, rerank=method)
        m = data["final_score_in_order1"].shape[1]
        expected = -np.sort(-data["final_score_in_order1"], axis=1)
        np.testing.assert_allclose(after[0][:, :m], expected, atol=1e-6, rtol=0)
        if float(data["min_gap"]) > 1e-6:
            np.testing.assert_array_equal(before[1], data["initial_ranks"].T, err_msg=file.name)
            np.testing.assert_array_equal(after[1], data["final_ranks"].T, err_msg=file.name)
            checked += 1
        array = superglobal_rerank(
            queries,
            vectors,
            Ranking(*search(queries, vectors, k=n)),
            num_candidates=method.candidates,
            num_neighbors=method.options["neighbors"],
            beta=method.options["beta"],
        )
        np.testing.assert_array_equal(after[1], np.asarray(array.ids), err_msg=file.name)
    assert checked >= 8


def test_only_the_candidates_are_fetched():
    queries, vectors = example()
    store = Table(vectors)
    method = choose_method("superglobal", candidates=50)
    before, _ = search_store(queries, store, k=10, size=len(vectors), rerank=method)
    assert store.asked == [((4, 32), 66)]  # and 16 more, for equal scores at the end
    assert len(store.taken) == 4 * 66
    assert set(before[1].ravel().tolist()) <= set(store.taken)
    assert before[1].shape == (4, 50)


def test_equal_scores_at_the_end_of_the_candidates():
    """The candidates are those of the smallest ids, whichever of them the database gives first."""

    class Backwards(Table):
        def search(self, vectors, k):
            scores = vectors @ self.vectors.T
            order = len(self.vectors) - 1 - np.argsort(-scores[:, ::-1], axis=1, kind="stable")
            return order[:, :k], None

    vectors = unit(np.random.default_rng(1), 12, 8)
    vectors[5:12] = vectors[5]
    before, _ = search_store(vectors[5:6], Backwards(vectors), k=3, size=12, rerank=None)
    assert before[1].tolist() == [[5, 6, 7]]


def test_ids_of_63_bits_and_equal_vectors():
    vectors = np.repeat(unit(np.random.default_rng(1), 10, 8), 3, axis=0)
    ids = np.random.default_rng(2).permutation(2**63 - 1 - np.arange(30))
    before, after = search_store(vectors[:1], Table(vectors, ids), k=30, size=30, rerank=None)
    assert before[1][0, :3].tolist() == sorted(ids[:3].tolist())
    assert sorted(after[1][0].tolist()) == sorted(ids.tolist())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rerank": "aqe"}, ValueError, "aqe needs more than the candidates"),
        ({"rerank": "dba"}, ValueError, "rerank by superglobal, or search without"),
        ({"queries": np.full((1, 8), np.nan)}, ValueError, "queries must be finite"),
        ({"queries": np.ones(8)}, ValueError, "queries must be finite vectors"),
        ({"k": 0}, ValueError, "k must be a whole number"),
        (
            {"size": None},
            StoreRefused,
            r"gave ids \(2, 20\) where 416 results are asked for and 400",
        ),
        ({"twice": True}, StoreRefused, "gave an id twice"),
        ({"narrow": True}, StoreRefused, r"must give vectors \(20, 8\) of floating point, not"),
        ({"whole": True}, StoreRefused, r"of floating point, not int64 of shape"),
    ],
    ids=str,
)
def test_refuses(change, error, words):
    vectors = unit(np.random.default_rng(0), 20, 8)

    class Odd(Table):
        def search(self, queries, k):
            ids, scores = super().search(queries, k)
            return np.where(ids == ids[0, 0], ids[0, 1], ids) if "twice" in change else ids, scores

        def take(self, ids):
            found = super().take(ids)
            found = found[:, 1:] if "narrow" in change else found
            return found.astype(int) if "whole" in change else found

    given = {"queries": vectors[:2], "k": 5, "size": 20, "rerank": "superglobal"}
    given |= {name: value for name, value in change.items() if name in given}
    with pytest.raises(error, match=words):
        search_store(given.pop("queries"), Odd(vectors), **given)
