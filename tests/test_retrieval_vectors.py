"""The retrieval tool on vectors and rankings of one's own."""

import json

import numpy as np
import pytest
from retrieval_photos import unit

from ggem_jax.descriptors.whitening import Whitening, whiten
from ggem_jax.files.vectors import read_ranking, read_vectors, write_ranking
from ggem_jax.retrieval.rerank import superglobal_rerank
from ggem_jax.retrieval.tool import commands
from ggem_jax.retrieval.tool.flags import parse

# Vectors of one's own


def test_rerank_of_files_is_the_library_call(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: None)
    rng = np.random.default_rng(0)
    queries, database = unit(rng, 3, 8), unit(rng, 50, 8)
    np.save("q.npy", queries)
    np.save("d.npy", database)
    np.savez("d.npz", database=database.astype(np.float64), q=queries)
    similarity = queries @ database.T
    ids = np.argsort(-similarity, axis=1)[:, :20]
    expected = superglobal_rerank(
        queries,
        database,
        (np.take_along_axis(similarity, ids, 1), ids),
        num_candidates=10,
        num_neighbors=3,
    )
    options = ["--candidates", 10, "--neighbors", 3]
    assert run("rerank", "q.npy", "d.npy", "-o", "out.npz", "-k", 20, *options) == (
        0,
        "out.npz: 3 queries, 20 results each\n",
        "",
    )
    assert run("rerank", "d.npz:q", "d.npz:database", "-o", "out.json", "-k", 20, *options)[0] == 0
    np.save("ids.npy", ids)
    assert (
        run("rerank", "q.npy", "d.npy", "--ranking", "ids.npy", "-o", "again.npz", *options)[0] == 0
    )
    assert (
        run(
            "rerank",
            "q.npy",
            "d.npy",
            "--ranking",
            "again.npz",
            "--method",
            "none",
            "-o",
            "same.json",
        )[0]
        == 0
    )
    for name in ("out.npz", "out.json", "again.npz", "same.json"):
        found, order = read_ranking(name)
        np.testing.assert_array_equal(order, expected.ids)
        np.testing.assert_allclose(found, expected.scores, atol=2e-6)
    assert {name: value.dtype.kind for name, value in np.load("out.npz").items()} == {
        "ids": "i",
        "scores": "f",
    }


def test_vectors_of_any_length_are_told_and_can_be_normalized(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: None)
    rng = np.random.default_rng(1)
    queries, database = unit(rng, 2, 8), unit(rng, 30, 8)
    np.save("q.npy", queries)
    np.save("d.npy", database)
    np.save("q3.npy", (3 * queries).astype(">f8"))  # another byte order too
    np.save("d3.npy", database * rng.uniform(1, 9, (30, 1)))
    assert run("rerank", "q.npy", "d.npy", "-o", "a.npz") == (
        0,
        "a.npz: 2 queries, 30 results each\n",
        "",
    )
    assert "not of length 1; --normalize" in run("rerank", "q3.npy", "d3.npy", "-o", "b.npz")[2]
    assert run("rerank", "q3.npy", "d3.npy", "-o", "b.npz", "--normalize") == (
        0,
        "b.npz: 2 queries, 30 results each\n",
        "",
    )
    np.testing.assert_array_equal(read_ranking("a.npz")[1], read_ranking("b.npz")[1])


def test_a_ranking_that_cannot_be_written_leaves_what_was_there(tmp_path):
    write_ranking(tmp_path / "out.json", np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32))
    with pytest.raises(AttributeError):
        write_ranking(tmp_path / "out.json", None, np.zeros((1, 1), np.int32))
    assert json.loads((tmp_path / "out.json").read_text()) == {"ids": [[0]], "scores": [[0.0]]}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_name_ends_in_capitals_too_and_a_mark_of_order_is_read_over(tmp_path):
    write_ranking(tmp_path / "out.JSON", np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32))
    text = (tmp_path / "out.JSON").read_text()
    assert json.loads(text) == {"ids": [[0]], "scores": [[0.0]]}
    (tmp_path / "out.JSON").write_text(text, encoding="utf-8-sig")
    assert read_ranking(str(tmp_path / "out.JSON"))[1].tolist() == [[0]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [
        (np.float64, 1e300),
        (np.float64, 1e-300),
        (np.float32, 1e-25),
        (np.float32, 1e30),
        (np.float16, 1e-3),
    ],
)
def test_normalized_vectors_are_of_length_1_whatever_they_were(tmp_path, dtype, factor):
    vectors = unit(np.random.default_rng(0), 5, 8)
    scaled = np.concatenate([vectors.astype(np.float64) * factor, np.zeros((1, 8))]).astype(dtype)
    np.save(tmp_path / "v.npy", scaled)
    ((_, found),) = read_vectors(str(tmp_path / "v.npy"), normalize=True).blocks(9)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:5], vectors, atol=3e-3 if dtype == np.float16 else 1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 1, 1, 0], atol=1e-6)


def test_a_whitening_of_another_width_is_told():
    with pytest.raises(
        ValueError, match="the whitening is for descriptors of 3 numbers, and these have 4"
    ):
        whiten(
            np.ones((2, 4), np.float32),
            Whitening(np.zeros(3, np.float32), np.eye(3, dtype=np.float32)),
        )


def test_a_box_may_begin_with_a_minus():
    assert parse(["search", "my.index", "a.png", "--box", "-10,-10,50,50"], "tool").box == [
        (-10, -10, 50, 50)
    ]
