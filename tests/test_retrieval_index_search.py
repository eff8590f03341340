"""Index.search and Index.evaluate: queries of every kind, and what their records hold."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from ggem_jax.files.images import UnreadableImage, crop, read_image
from ggem_jax.retrieval import search
from ggem_jax.retrieval.index import Index, IndexRefused, build_index, describing
from ggem_jax.retrieval.index.index import build
from ggem_jax.retrieval.methods import METHODS, Method, choose_method
from ggem_jax.retrieval.rerank import superglobal_rerank
from ggem_jax.retrieval.rerank_files import rerank_files

ROOT = Path(__file__).resolve().parent.parent


def describe(image):
    """Describes an image by the mean colour of each quarter, without a network."""
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    quarters = [
        image[i * rows :][:rows, j * columns :][:, :columns] for i in (0, 1) for j in (0, 1)
    ]
    vector = np.concatenate([quarter.mean((0, 1)) for quarter in quarters]) - 99.5
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class Quarters:
    made = 0

    def __init__(self, settings, batch=None):
        Quarters.made += 1

    def fit(self, height, width):
        return None

    def __call__(self, images):
        return map(describe, images)


def pattern(seed):
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return np.kron(colours, np.ones((12, 16, 1), np.uint8))


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setattr(describing, "make_extractor", Quarters)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for seed in range(9):
        Image.fromarray(pattern(seed)).save(tmp_path / "photos" / f"{seed}.png")
    assert build_index("photos", "my.index", dtype="float32").added == 9
    Quarters.made = 0
    return Index.open("my.index")


def test_every_kind_of_query_finds_the_same(opened):
    image, vector = pattern(3), describe(pattern(3))
    big = np.zeros((40, 50, 3), np.uint8)
    big[5:29, 7:39] = image
    Image.fromarray(big).save("big.png")
    kinds = {
        "name": "photos/3.png",
        "path": Path("photos/3.png"),
        "array": image,
        "arrays": image[None],
        "Pillow": Image.fromarray(image),
        "vector": vector,
        "vectors": vector[None],
        "list of vectors": [vector],
        "list": ["photos/3.png"],
    }
    found = {name: opened.search(query, k=4) for name, query in kinds.items()}
    found["box"] = opened.search("big.png", k=4, boxes=[(7, 5, 39, 29)])
    for name, results in found.items():
        assert results.paths.shape == (1, 4), name
        assert results.paths[0, 0] == "3.png", name
        np.testing.assert_array_equal(results.paths, found["name"].paths, err_msg=name)
        np.testing.assert_allclose(results.scores, found["name"].scores, atol=2e-6, err_msg=name)
    assert found["name"].queries == ("photos/3.png",)
    assert found["vector"].queries == (None,)


def test_a_record_holds_ranks_and_scores_before_and_after(opened):
    queries = np.stack([describe(pattern(seed)) for seed in (1, 5)])
    vectors = opened.vectors().take(np.arange(9))
    method = choose_method("superglobal", candidates=6, neighbors=2)
    results = opened.search(queries, k=9, rerank=method)
    similarity = queries @ vectors.T
    order = np.argsort(-similarity, axis=1, kind="stable")
    first = (np.take_along_axis(similarity, order, 1), order)
    expected = superglobal_rerank(queries, vectors, first, num_candidates=6, num_neighbors=2)
    np.testing.assert_array_equal(results.ids, expected.ids)
    np.testing.assert_allclose(results.scores, expected.scores, atol=2e-6)
    np.testing.assert_array_equal(results.ranks, np.tile(np.arange(1, 10), (2, 1)))
    for row in range(2):
        for column, own in enumerate(results.ids[row]):
            place = int(np.flatnonzero(order[row] == own)[0])
            assert results.ranks_before[row, column] == place + 1
            assert results.scores_before[row, column] == pytest.approx(
                similarity[row, own], abs=2e-6
            )
            assert results.paths[row, column] == opened.paths[own]
    assert (len(results), results.method, results.root) == (2, method, opened.root)


def test_what_the_first_search_did_not_reach_has_no_rank_before(opened):
    results = opened.search(describe(pattern(2)), k=3, rerank=Method("dba", 3, {"neighbors": 4}))
    unreached = results.ranks_before == 0
    assert np.isnan(results.scores_before[unreached]).all()
    assert np.isfinite(results.scores_before[~unreached]).all()
    hits = results.record()["queries"][0]["results"]
    assert [hit["rank_before"] is None for hit in hits] == unreached[0].tolist()


def test_whole_images_of_the_index_use_the_stored_vector(opened):
    """Stored vectors are used even if the file has changed or is gone; other queries load the
    network once.
    """
    os.unlink("photos/4.png")
    assert opened.search("photos/4.png", k=1).paths.tolist() == [["4.png"]]
    assert opened.search(str(opened.root / "4.png"), k=1).paths.tolist() == [["4.png"]]
    assert Quarters.made == 0
    with pytest.raises(UnreadableImage, match=r"photos/4.png is not there: name an image"):
        opened.search("photos/4.png", use_stored=False)
    with pytest.raises(UnreadableImage, match="is not there"):
        opened.search("photos/4.png", boxes=[(0, 0, 5, 5)])
    assert opened.search(["photos/5.png", pattern(6)], k=1).paths.tolist() == [["5.png"], ["6.png"]]
    assert Quarters.made == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_reranker_may_be_named(opened, name):
    assert opened.search(pattern(3), k=2, rerank=name).method == choose_method(name)
    assert opened.search(pattern(3), k=2, rerank=name).paths.shape == (1, 2)


def test_a_box_is_cropped(opened):
    image, box = read_image(Path("photos/7.png")), (3, 2, 30, 20)
    one = opened.search("photos/7.png", boxes=[box])
    other = opened.search(crop(image, box))
    np.testing.assert_array_equal(one.scores, other.scores)
    assert one.boxes == (box,)


@pytest.mark.parametrize(
    ("queries", "options", "sentence"),
    [
        ([], {}, "queries must be at least one image or vector"),
        (np.ones((2, 5), np.float32), {}, r"vectors must be \(q, 12\) as in the index"),
        (np.ones((2, 12), int), {}, r"queries must be images .* not int64 of shape \(2, 12\)"),
        (np.ones((2, 3, 4, 5, 6)), {}, "queries must be images"),
        (np.ones((1, 12), np.float32), {"boxes": [(0, 0, 1, 1)]}, "boxes belong to images"),
        ("photos/1.png", {"boxes": []}, "boxes must be one for each of the 1 queries, not 0"),
        ("photos/1.png", {"boxes": [(90, 90, 99, 99)]}, "photos/1.png: nothing of the image"),
        ("photos/1.png", {"k": 0}, "k must be a whole number of at least 1, not 0"),
        ("photos/1.png", {"rerank": "best"}, "rerank must be one of superglobal, aqe"),
        ("photos", {}, "photos is no file: name an image"),
        ("photos/1.png", {"weights": "w.pth"}, "was made without a file of weights"),
    ],
)
def test_mistakes_are_one_sentence(opened, queries, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        opened.search(queries, **options)


def test_an_empty_index_is_refused(opened):
    from ggem_jax.retrieval.index import remove

    remove("my.index", ["."])
    for call in (
        lambda: Index.open("my.index").search(pattern(0)),
        lambda: Index.open("my.index").evaluate("truth.csv"),
    ):
        with pytest.raises(IndexRefused, match="holds no images: add some first"):
            call()


def test_vectors_of_an_index_of_another_program_are_searched(opened):
    """The index has no extractor, which only images would need."""
    build("photos", "own.index", lambda images: map(describe, images), {"model": "quarters"})
    own = Index.open("own.index")
    assert own.search(describe(pattern(2)), k=1).paths.tolist() == [["2.png"]]
    with pytest.raises(IndexRefused, match="was made with unknown settings"):
        own.search(pattern(2))


def test_a_search_loads_jax_when_it_searches_and_no_network_for_vectors(opened):
    code = """import sys, numpy as np
from ggem_jax.retrieval.index import Index
opened = Index.open("my.index")
print([name for name in ("jax", "flax") if name in sys.modules])
print(opened.search(np.ones((1, 12), np.float32), k=2).ids.shape)
print([name for name in ("jax", "flax") if name in sys.modules])"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["[]", "(1, 2)", "['jax']"], done.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_vectors_that_are_not_finite_are_refused(opened, value):
    with pytest.raises(ValueError, match="must be finite in float32"):
        opened.search(np.full((1, 12), value))


@pytest.mark.parametrize("k", [0, 1.5, "3", None, True])
def test_k_must_be_a_whole_number(opened, k):
    sentence = f"k must be a whole number of at least 1, not {k!r}"
    with pytest.raises(ValueError, match=sentence):
        opened.search(describe(pattern(3)), k)
    with pytest.raises(ValueError, match=sentence):
        opened.evaluate("truth.csv", k=k)


@pytest.mark.parametrize("at", ["5", 5, (), (0,), (1.5,)])
def test_ranks_of_an_evaluation_must_be_whole_numbers(opened, at):
    with pytest.raises(ValueError, match=r"at must be (a )?whole number"):
        opened.evaluate("truth.csv", at=at)


def test_a_batch_of_images_in_a_list_is_refused_and_not_cut_to_its_first(opened):
    with pytest.raises(ValueError, match=r"an image must be \(h, w, 3\) uint8, not uint8 of shape"):
        opened.search([np.stack([pattern(3), pattern(4)])])


def test_vectors_of_other_kinds_are_taken(opened):
    vector = describe(pattern(3))
    for kind in (vector.tolist(), vector.astype(ml_dtypes.bfloat16)):
        assert opened.search(kind, k=1).paths.tolist() == [["3.png"]]
    with pytest.raises(ValueError, match=r"of one length .* of 5 and 12 numbers"):
        opened.search([vector, vector[:5]])


def test_a_pillow_image_of_16_bits_is_read_as_its_file_is(opened):
    grey = np.linspace(0, 2**16 - 1, 24 * 32).astype(np.uint16).reshape(24, 32)
    Image.fromarray(grey).save("grey.png")
    of_file, of_image = opened.search(["grey.png", Image.open("grey.png")]).scores
    np.testing.assert_array_equal(of_file, of_image)
    with pytest.raises(UnreadableImage, match=r"a query .* it has 32 bits a channel"):
        opened.search(Image.fromarray(grey.astype(np.float32)))


@pytest.mark.parametrize("rerank", ["", ["aqe"], 3])
def test_a_reranker_that_is_none_is_refused(opened, rerank):
    with pytest.raises(ValueError, match="rerank must be one of superglobal, aqe"):
        opened.search(describe(pattern(3)), rerank=rerank)
    with pytest.raises(ValueError, match="rerank must be one of superglobal, aqe"):
        Method("sum", 400, {})


@pytest.mark.parametrize("candidates", [0, "5", 2.5, True])
def test_candidates_are_a_whole_number_and_0_is_not_taken_for_the_default(candidates):
    sentence = f"candidates must be a whole number of at least 1, not {candidates!r}"
    for name in ("aqe", "none"):
        with pytest.raises(ValueError, match=sentence):
            choose_method(name, candidates=candidates)
        with pytest.raises(ValueError, match=sentence):
            Method(name, candidates, {})


def test_an_option_of_another_method_is_refused_when_the_method_is_made():
    sentence = "--beta is no option of aqe: it takes --candidates, --neighbors"
    with pytest.raises(ValueError, match=sentence):
        Method("aqe", 5, {"beta": 1})
    with pytest.raises(ValueError, match=sentence):
        choose_method("aqe", beta=1)
    with pytest.raises(ValueError, match="options must be a dictionary"):
        Method("aqe", 5, None)


def test_k_does_not_bound_the_candidates_of_search_evaluation_and_files(opened):
    """All three rerank the same candidates, whatever k is, and return the first k."""
    method = choose_method("superglobal", candidates=7, neighbors=3, beta=2.0)
    stored = opened.vectors().take(np.arange(9)).astype(np.float32)
    query = describe(pattern(10))[None]
    first = search(query, stored, k=7)
    expected = np.asarray(method.rerank(query, stored, first).ids)[:, :2]
    assert not set(expected[0]) <= set(np.asarray(first.ids)[0, :2])  # k=2 alone would not do
    np.testing.assert_array_equal(opened.search(query, k=2, rerank=method).ids, expected)

    np.save("queries.npy", query)
    np.save("database.npy", stored)
    found = rerank_files("queries.npy", "database.npy", "out.npz", k=2, rerank=method)
    np.testing.assert_array_equal(found.ids, expected)
    everything = rerank_files("queries.npy", "database.npy", "out.npz", rerank=method)
    assert everything.ids.shape == (1, 7)

    Image.fromarray(pattern(10)).save("query.png")
    (raised,) = set(expected[0]) - set(np.asarray(first.ids)[0, :2])
    Path("truth.csv").write_text(f"query,relevant\nquery.png,photos/{opened.paths[raised]}\n")
    evaluation = opened.evaluate("truth.csv", k=2, at=(2,), rerank=method)
    assert evaluation.depth == 2
    assert (evaluation.before["recall@2"], evaluation.after["recall@2"]) == (0, 1)


@pytest.mark.parametrize("k", [0, 2.5, "3", True])
def test_k_of_files_must_be_a_whole_number(opened, k):
    np.save("queries.npy", np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match=f"k must be a whole number of at least 1, not {k!r}"):
        rerank_files("queries.npy", "queries.npy", "out.npz", k=k)


def test_reranking_vectors_of_another_length_warns(opened):
    with pytest.warns(UserWarning, match="reranking needs vectors of length 1") as warned:
        opened.search(7 * describe(pattern(3)), rerank="aqe")
    assert warned[0].filename == __file__


def test_settings_of_another_kind_are_refused(opened):
    with pytest.raises(ValueError, match="settings must be a DescriptorSettings, not dict"):
        build_index("photos", "other.index", {"scales": 1})
    assert not Path("other.index").exists()
