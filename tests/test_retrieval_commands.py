"""Every command of the retrieval tool, and its JSON, which is the record of one library call."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from retrieval_photos import Colours, json_of, pattern, unit

from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.descriptors.whitening import load_whitening
from ggem_jax.files.vectors import read_ranking
from ggem_jax.retrieval import index as library
from ggem_jax.retrieval.index import describing
from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.methods import choose_method
from ggem_jax.retrieval.metrics import Relevance, scores
from ggem_jax.retrieval.rerank_files import rerank_files

ROOT = Path(__file__).resolve().parent.parent


# The commands


def test_index_reports_what_was_skipped_and_does_nothing_twice(
    colours, twelve_photos, run, monkeypatch
):
    (twelve_photos / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (1, 5000)).save(twelve_photos / "thin.png")
    code, said, told = run("index", twelve_photos, "-o", "my.index")
    assert (code, said) == (
        0,
        "my.index: 12 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 2 skipped\n",
    )
    assert sorted(told.splitlines()) == [
        "skipped: broken.jpg is not a readable image: cannot identify image file",
        "skipped: thin.png cannot be described: too thin",
    ]
    (twelve_photos / "broken.jpg").unlink()
    (twelve_photos / "thin.png").unlink()
    monkeypatch.setattr(
        describing,
        "make_extractor",
        lambda *_: pytest.fail("nothing is new, and no network is needed"),
    )
    assert run("index", twelve_photos, "-o", "my.index") == (
        0,
        "my.index: 0 added, 0 updated, 12 unchanged, 0 reused, 0 removed, 0 skipped\n",
        "",
    )


def test_add_and_remove(indexed, run):
    Image.fromarray(pattern(50)).save(indexed / "new.png")
    (indexed / "00.png").unlink()
    assert run("add", "my.index")[:2] == (
        0,
        "my.index: 1 added, 0 updated, 11 unchanged, 0 reused, 0 removed, 0 skipped\n"
        "not reachable now: 1 image (00.png); kept until --prune\n",
    )
    assert (
        run("add", "my.index", "--prune")[1]
        == "my.index: 0 added, 0 updated, 12 unchanged, 0 reused, 1 removed, 0 skipped\n"
    )
    assert (
        run("remove", "my.index", 'quote"s', "<b>*/*")[1]
        == "my.index: 0 added, 0 updated, 4 unchanged, 0 reused, 8 removed, 0 skipped\n"
    )
    code, said, told = run("add", "my.index", 'photos/quote"s')
    assert (code, said) == (1, "")
    assert re.search(r"quote\"s is excluded by /quote\"s: include that pattern first", told)
    assert (
        run("add", "my.index", 'photos/quote"s', "--include", 'quote"s')[1]
        == "my.index: 4 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 0 skipped\n"
    )
    assert run("remove", "my.index", ".")[0] == 0
    assert run("search", "my.index", indexed / "new.png")[::2] == (
        1,
        "ggem-retrieval: my.index holds no images: add some first\n",
    )


def test_info(indexed, run):
    code, said, _ = run("info", "my.index", "--json")
    facts = json.loads(said)
    assert (code, facts["images"], facts["dim"], facts["dtype"], facts["root"]) == (
        0,
        12,
        12,
        "float16",
        str(indexed),
    )
    assert facts["settings"] == DescriptorSettings(decoding="draft").record()
    code, said, _ = run("info", "my.index")
    assert "images                 12\n" in said
    assert "settings.backbone      efficientnet-lite0\n" in said


def test_verify_finds_damage(indexed, run):
    assert run("verify", "my.index", "--deep") == (0, "my.index is sound\n", "")
    assert json.loads(run("verify", "my.index", "--json")[1]) == {
        "sound": True,
        "damage": [],
        "notes": [],
    }
    (shard,) = Path("my.index").glob("vectors-*.npy")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, said, _ = run("verify", "my.index")
    assert (code, said.splitlines()[-1]) == (1, "my.index is damaged")
    assert said.startswith(f"damage: my.index/{shard.name} holds altered vectors: 1 image")
    code, said, _ = run("verify", "my.index", "--json")
    assert (code, json.loads(said)["sound"], len(json.loads(said)["damage"])) == (1, False, 1)
    assert run("add", "my.index", "--repair")[0] == 0
    assert run("verify", "my.index")[0] == 0


def test_search_finds_a_image_of_the_index_itself(indexed, run):
    code, said, told = run("search", "my.index", "photos/03.png", "-k", 3)
    assert (code, told) == (0, "")
    assert re.fullmatch(r" +1 +1\.000[01] +03\.png", said.splitlines()[2])  # stored in float16
    assert len(said.splitlines()) == 5


def test_search_tells_ranks_before_and_after_as_json(indexed, run):
    options = ["--rerank", "superglobal", "--candidates", "8", "--neighbors", "2", "--json"]
    code, said, _ = run(
        "search", "my.index", "photos/03.png", "photos/<b>&amp;/01.png", "-k", 99, *options
    )
    found = json.loads(said)
    assert (code, found["root"]) == (0, str(indexed))
    assert found["rerank"] == {
        "method": "superglobal",
        "candidates": 8,
        "neighbors": 2,
        "beta": 0.15,
        "variant": "code",
    }
    assert [each["query"] for each in found["queries"]] == [
        "photos/03.png",
        "photos/<b>&amp;/01.png",
    ]
    opened = Index.open("my.index")
    vectors = opened.vectors().take(np.arange(12)).astype(np.float32)
    for each in found["queries"]:
        own = vectors[opened.paths.index(each["query"].removeprefix("photos/"))]
        for place, hit in enumerate(each["results"]):
            assert set(hit) == {"path", "rank", "score", "rank_before", "score_before"}
            assert hit["rank"] == place + 1
            assert hit["score_before"] == pytest.approx(
                own @ vectors[opened.paths.index(hit["path"])], abs=1e-3
            )
        before = sorted(each["results"], key=lambda hit: hit["rank_before"])
        assert [hit["rank_before"] for hit in before] == list(range(1, 13))
        assert [hit["score_before"] for hit in before] == sorted(
            (hit["score_before"] for hit in before), reverse=True
        )


@pytest.mark.parametrize("method", ["aqe", "alpha-qe", "dba", "superglobal", "none"])
def test_every_method_finds_the_query_first(indexed, run, method):
    code, said, _ = run(
        "search",
        "my.index",
        "photos/03.png",
        "-k",
        4,
        "--rerank",
        method,
        *(["--neighbors", 1] if method != "none" else []),
        "--json",
    )
    results = json.loads(said)["queries"][0]["results"]
    assert (code, results[0]["path"], results[0]["rank_before"], len(results)) == (
        0,
        "03.png",
        1,
        4,
    )


def test_a_box_is_the_part_that_is_meant(indexed, run):
    big = np.zeros((60, 80, 3), np.uint8)
    big[20:44, 40:72] = pattern(6)
    Image.fromarray(big).save("big.png")
    results = json.loads(run("search", "my.index", "big.png", "--box", "40,20,72,44", "--json")[1])[
        "queries"
    ][0]
    assert (results["box"], results["results"][0]["path"]) == ([40, 20, 72, 44], "06.png")
    assert results["results"][0]["score"] == pytest.approx(1, abs=1e-3)


def test_evaluate_agrees_with_the_metrics(indexed, run):
    opened = Index.open("my.index")
    with open("truth.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["query", "relevant", "ignored"],
                ["photos/00.png", "photos/03.png;photos/06.png", "photos/09.png"],
                ["other.png", "photos/09.png", ""],
            ]
        )
    Image.fromarray(pattern(9)).save("other.png")
    code, said, _ = run(
        "evaluate",
        "my.index",
        "truth.csv",
        "--rerank",
        "superglobal",
        "--neighbors",
        "2",
        "--at",
        "1,3",
        "--json",
    )
    found = json.loads(said)
    place = {path: i for i, path in enumerate(opened.paths)}
    vectors = opened.vectors().take(np.arange(12)).astype(np.float32)
    order = np.argsort(
        -(vectors[[place["00.png"], place["09.png"]]] @ vectors.T), axis=1, kind="stable"
    )
    relevance = [
        Relevance(
            np.array([place["03.png"], place["06.png"]]),
            np.array([place["00.png"], place["09.png"]]),
        ),
        Relevance(np.array([place["09.png"]]), np.array([], int)),
    ]
    expected = scores(order, relevance, kappas=(1, 3))
    assert (code, found["queries"], found["without_relevant"], found["depth"]) == (0, 2, 0, 12)
    assert (
        set(found["before"])
        == set(found["after"])
        == {"mAP", "mP@1", "mP@3", "recall@1", "recall@3"}
    )
    assert found["before"]["mAP"] == pytest.approx(expected.mean_average_precision)
    assert found["before"]["mP@3"] == pytest.approx(expected.mean_precision_at[3])
    assert found["before"]["recall@1"] >= 0.5
    said = run("evaluate", "my.index", "truth.csv", "--rerank", "none")[1]
    assert said.startswith("2 queries, 12 images, the first 12 results of each\n")
    assert f"mAP           {100 * expected.mean_average_precision:>10.2f} %\n" in said


def test_whitening_is_learned_used_and_found_again(indexed, run):
    assert run("whiten", "my.index", "-o", "white.npz", "--dim", 4)[:2] == (
        0,
        "white.npz: from 12 to 4 numbers, learned from 12 of 12 images\n",
    )
    assert load_whitening("white.npz").projection.shape == (12, 4)
    assert run("index", indexed, "-o", "white.index", "--whitening", "white.npz")[0] == 0
    assert run("whiten", "white.index", "-o", "again.npz")[::2] == (
        1,
        (
            "ggem-retrieval: white.index holds vectors that are whitened already: learn from an"
            " index without --whitening\n"
        ),
    )
    assert (
        run("search", "white.index", "photos/03.png")[0] == 0
    )  # no flag: the build's own file is still there
    Path("white.npz").rename("moved.npz")
    code, _, told = run("search", "white.index", "photos/03.png")
    assert code == 1
    assert "white.npz, which is not there: name it with --whitening FILE" in told
    assert run("search", "white.index", "photos/03.png", "--whitening", "moved.npz")[0] == 0
    assert run("whiten", "my.index", "-o", "other.npz", "--dim", 3)[0] == 0
    code, _, told = run("search", "white.index", "photos/03.png", "--whitening", "other.npz")
    assert (
        code,
        "other.npz is not the file of whitening that white.index was made with" in told,
    ) == (1, True)


def test_an_index_of_another_program_is_told(indexed, run):
    from ggem_jax.retrieval.index.index import build

    build(
        indexed,
        "own.index",
        lambda images: Colours(DescriptorSettings())(images),
        {"model": "mean colour"},
    )
    code, _, told = run("search", "own.index", "photos/03.png")
    assert (code, "was made with unknown settings" in told) == (1, True)


# Every command is one library call: its JSON is the library's record


def test_json_of_the_commands_that_write_is_the_record_of_the_report(colours, twelve_photos, run):
    for path in ("tool.index", "library.index"):
        shutil.rmtree(path, ignore_errors=True)
    report = library.build_index(twelve_photos, "library.index")
    assert json_of(run, "index", twelve_photos, "-o", "tool.index") == (0, report.record())
    assert report.record()["added"] == 12
    Image.fromarray(pattern(60)).save(twelve_photos / "new.png")
    (twelve_photos / "broken.png").write_text("no image")
    report = library.add_images("library.index")
    assert json_of(run, "add", "tool.index") == (0, report.record())
    assert report.record()["skipped"][0]["path"] == "broken.png"
    report = library.remove("library.index", ["new.png"])
    assert json_of(run, "remove", "tool.index", "new.png") == (0, report.record())
    assert (report.removed, report.record()["removed"]) == (1, 1)


def test_json_of_info_and_verify_is_the_record_of_the_library(indexed, run):
    assert json_of(run, "info", "my.index") == (0, library.info("my.index"))
    assert json_of(run, "verify", "my.index", "--deep") == (
        0,
        library.verify("my.index", deep=True).record(),
    )
    next(Path("my.index").glob("vectors-*.npy")).unlink()
    code, found = json_of(run, "verify", "my.index")
    assert (code, found) == (1, library.verify("my.index").record())
    assert found["damage"]


@pytest.mark.parametrize("rerank", ["superglobal", "none", "aqe"])
def test_json_of_search_is_the_record_of_the_results(indexed, run, rerank):
    queries, boxes = ["photos/03.png", "photos/06.png"], [(0, 0, 16, 12), (1, 1, 32, 24)]
    results = Index.open("my.index").search(
        queries, k=5, rerank=rerank, boxes=boxes, use_stored=False
    )
    flags = ["--box", "0,0,16,12", "--box", "1,1,32,24", "--rerank", rerank, "-k", 5]
    code, found = json_of(run, "search", "my.index", *queries, *flags)
    assert (code, found) == (0, json.loads(json.dumps(results.record())))
    assert len(found["queries"][1]["results"]) == 5


def test_json_of_evaluate_is_the_record_of_the_evaluation(indexed, run):
    Path("truth.csv").write_text("query,relevant\nphotos/00.png,photos/03.png;photos/06.png\n")
    flags = ["--rerank", "aqe", "--neighbors", 2, "--at", "1,4", "-k", 8]
    found = Index.open("my.index").evaluate(
        "truth.csv", k=8, at=(1, 4), rerank=choose_method("aqe", neighbors=2)
    )
    assert json_of(run, "evaluate", "my.index", "truth.csv", *flags) == (0, found.record())
    assert set(found.after) == {"mAP", "mP@1", "mP@4", "recall@1", "recall@4"}


def test_json_of_rerank_and_whiten_is_the_record_and_the_files_are_alike(indexed, run):
    rng = np.random.default_rng(3)
    np.save("q.npy", unit(rng, 2, 8))
    np.save("d.npy", unit(rng, 30, 8))
    found = rerank_files("q.npy", "d.npy", "library.npz", k=20, rerank="alpha-qe")
    flags = ["-k", 20, "--method", "alpha-qe"]
    code, record = json_of(run, "rerank", "q.npy", "d.npy", "-o", "tool.npz", *flags)
    assert (code, record | {"output": "library.npz"}) == (0, found.record())
    for one, other in zip(read_ranking("tool.npz"), read_ranking("library.npz"), strict=True):
        np.testing.assert_array_equal(one, other)
    learned = library.whiten_index("my.index", "library-white.npz", dim=3)
    code, record = json_of(run, "whiten", "my.index", "-o", "tool-white.npz", "--dim", 3)
    assert (code, record | {"file": "library-white.npz"}) == (0, learned.record())
    for one, other in zip(
        load_whitening("tool-white.npz"), load_whitening("library-white.npz"), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_only_the_module_that_parses_knows_namespaces():
    parsing = {"flags.py"}
    for path in (ROOT / "ggem_jax" / "retrieval").rglob("*.py"):
        assert path.name in parsing or "Namespace" not in path.read_text(), path
