"""eval/retrieval.py and eval/studies/retrieval.py on images made here, against a slow evaluation;
docs/retrieval_study.md against its numbers.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import retrieval
from eval.descriptors import POOLINGS
from eval.studies import retrieval as retrieval_study
from ggem_jax.retrieval.metrics import Relevance

ROOT = Path(__file__).resolve().parent.parent


class FakeExtractor:
    """Describes an image by the mean and the spread of its colours; each of several settings has
    its own weighting.
    """

    seen = 0

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, images):
        for image in images:
            FakeExtractor.seen += 1
            pixels = image.reshape(-1, 3) / 255
            x = np.concatenate([pixels.mean(0) - 0.5, pixels.std(0)]) + 1e-3
            several = not hasattr(self.settings, "record")
            x = (
                np.stack([x * (1 + i * np.arange(6)) for i in range(len(self.settings))])
                if several
                else x
            )
            yield (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three classes of five images of similar colours, one class of one image, and one file whose
    name is not that of an image.
    """
    rng = np.random.default_rng(0)
    for name, count in (("ants", 5), ("bees", 5), ("deep/cows", 5), ("lone", 1)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        colour = rng.uniform(60, 190, 3)
        for i in range(count):
            noise = np.clip(
                colour + rng.normal(0, 40, 3) + rng.normal(0, 15, (24, 24, 3)), 0, 255
            ).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    FakeExtractor.seen = 0
    monkeypatch.setattr(retrieval, "make_extractor", FakeExtractor)
    return tmp_path / "photos"


def run(capsys, *flags):
    retrieval.main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def slowly(folder):
    """mAP, and precision and recall at 1 and 3, of the classes of a folder, by walking down sorted
    lists.
    """
    paths = sorted(folder.rglob("*.png"))
    vectors = list(
        FakeExtractor(retrieval.DescriptorSettings())(
            np.asarray(Image.open(path)) for path in paths
        )
    )
    rows = []
    for path, query in zip(paths, vectors, strict=True):
        others = [
            (float(query @ vector), other)
            for other, vector in zip(paths, vectors, strict=True)
            if other != path
        ]
        right = [
            other.parent == path.parent for _, other in sorted(others, key=lambda pair: -pair[0])
        ]
        if not any(right):
            continue
        area, found = 0.0, 0
        for place, hit in enumerate(right):
            if hit:
                area += (
                    ((found / place if place else 1.0) + (found + 1) / (place + 1)) / 2 / sum(right)
                )
                found += 1
        rows.append([area, right[0], sum(right[:3]) / 3, right[0], any(right[:3])])
    return np.mean(rows, axis=0)


def test_classes_agree_with_a_slow_evaluation(folder, capsys):
    said = run(capsys, folder, "--k", 1, 3)
    assert FakeExtractor.seen == 16
    (result,) = said["results"]
    measures = [result[name]["value"] for name in ("mAP", "mP@1", "mP@3", "recall@1", "recall@3")]
    np.testing.assert_allclose(measures, slowly(folder), atol=1e-6)
    assert 0.3 < measures[0] < 1
    assert result["mAP"]["low"] < result["mAP"]["value"] < result["mAP"]["high"]
    assert (said["database"], said["queries"], said["queries_without_relevant"]) == (16, 16, 1)


def test_a_csv_says_the_same_as_the_folders(folder, capsys):
    lines = ["query,relevant"]
    for path in folder.rglob("*.png"):
        others = ";".join(
            str(other.relative_to(folder)) for other in path.parent.glob("*.png") if other != path
        )
        lines.append(f"{path.relative_to(folder)},{others}")
    (folder / "truth.csv").write_text("\n".join(lines) + "\n")
    classes = {
        result["rerank"]: result
        for result in run(capsys, folder, "--rerank", "none", "aqe", "--qe-neighbors", 2)["results"]
    }
    listed = run(capsys, folder / "truth.csv", "--rerank", "none", "aqe", "--qe-neighbors", 2)
    for result in listed["results"]:
        assert result["mAP"]["value"] == pytest.approx(
            classes[result["rerank"]]["mAP"]["value"], abs=1e-12
        )
    (folder.parent / "elsewhere.csv").write_text("\n".join(lines) + "\n")
    moved = run(capsys, folder.parent / "elsewhere.csv", "--root", folder, "--database",
    folder / "deep" / "..", "--rerank", "none", "aqe",
                "--qe-neighbors", 2)  # fmt: skip
    assert moved["results"] == listed["results"]


def test_boxes_ignored_images_and_queries_from_elsewhere(folder, capsys):
    """Half of the query's image is like the bees; without its box the query is not. The image that
    would come first is ignored.
    """
    bees = [np.asarray(Image.open(path)) for path in sorted((folder / "bees").glob("*.png"))]
    Image.fromarray(np.concatenate([bees[0], np.full((24, 24, 3), 255, np.uint8)], axis=1)).save(
        folder.parent / "query.png"
    )
    (folder / "truth.csv").write_text(
        "query,relevant,ignored,x1,y1,x2,y2\n../query.png,bees/1.png,bees/0.png,0,0,24.7,24\n../query.png,bees/1.png,,,,,\n"
    )
    said = run(capsys, folder / "truth.csv")
    assert (said["queries"], said["database"], FakeExtractor.seen) == (2, 16, 18)
    order = slow_order(folder, bees[0])
    order.remove(folder / "bees" / "0.png")
    place = order.index(folder / "bees" / "1.png")
    whole = slow_order(folder, np.asarray(Image.open(folder.parent / "query.png"))).index(
        folder / "bees" / "1.png"
    )
    expected = [(1.0 if p == 0 else 0.0) / 2 + 1 / (p + 1) / 2 for p in (place, whole)]
    assert said["results"][0]["mAP"]["value"] == pytest.approx(np.mean(expected), abs=1e-6)


def slow_order(folder, pixels):
    paths = sorted(folder.rglob("*.png"))
    query, *vectors = FakeExtractor(retrieval.DescriptorSettings())(
        [pixels, *(np.asarray(Image.open(path)) for path in paths)]
    )
    return [
        path
        for _, path in sorted(
            zip(vectors, paths, strict=True), key=lambda pair: -float(pair[0] @ query)
        )
    ]


def test_the_table_has_every_pooling_with_every_reranker(folder, capsys):
    flags = [str(folder), "--table", "--num-candidates", "8", "--qe-neighbors", "3"]
    said = run(capsys, *flags)
    names = ["none", "superglobal", "superglobal-paper", "aqe", "alpha-qe", "dba"]
    assert [(own["pooling"], own["rerank"]) for own in said["results"]] == [
        (pooling, name) for pooling in POOLINGS for name in names
    ]
    assert FakeExtractor.seen == 16
    retrieval.main(flags)
    text = capsys.readouterr().out
    assert text.count("superglobal-paper") == len(POOLINGS)
    assert "1 queries have no relevant image" in text


MISTAKES = {
    "no file": (lambda f: None, ["none.csv"], r"none\.csv cannot be read: No such file"),
    "columns": (lambda f: (f / "t.csv").write_text("a,b\n"), ["t.csv"],
    "must name the columns query and relevant"),
    "not there": (lambda f: (f / "t.csv").write_text("query,relevant\nants/0.png,ants/9.png\n"),
    ["t.csv"], "relevant for .* not in the"),
    "no query": (lambda f: (f / "t.csv").write_text("query,relevant\nx.png,ants/0.png\n"),
    ["t.csv"], r"x\.png is not a readable image"),
    "box": (lambda f: (f / "t.csv").write_text("query,relevant,x1,y1,x2,y2\n"
    "ants/0.png,ants/1.png,90,90,99,99\n"), ["t.csv"], "nothing of"),
    "nothing relevant": (lambda f: (f / "t.csv").write_text("query,relevant\nants/0.png,\n"),
    ["t.csv"], "no query of t.csv has a relevant image"),
    "no images": (lambda f: (f / "empty").mkdir(), ["empty"], "there are no images in empty"),
    "broken": (lambda f: (f / "ants" / "0.png").write_bytes(b"x"), ["."],
    r"0\.png is not a readable image"),
    "k": (lambda f: None, [".", "--k", "0"], "--k must be whole numbers of at least 1, not 0"),
    "root": (lambda f: None, [".", "--root", "."], "--root and --database go with a CSV file"),
    "neighbours": (lambda f: None, [".", "--qe-neighbors", "0"],
    "--qe-neighbors must be at least 1, it is 0"),
    "longest side": (lambda f: None, [".", "--longest-side", "20"],
    "longest_side must be a whole number of at least 160"),
    "unknown": (lambda f: None, [".", "--polling", "gem"], "--polling.*perhaps --pooling"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_sentence(mistake, folder, monkeypatch):
    spoil, flags, said = MISTAKES[mistake]
    spoil(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=said) as stop:
        retrieval.main(flags)
    assert str(stop.value).startswith("eval.retrieval: ")
    assert "\n" not in str(stop.value)


def test_the_study_on_a_small_set(tmp_path, monkeypatch, capsys):
    """Images of two colours: all poolings with all rerankers, differences, pixels, and the file."""
    rng = np.random.default_rng(0)
    images = {
        f"{i}": np.clip(rng.normal(80 + 80 * (i % 2), 60, (12, 12, 3)), 0, 255).astype(np.uint8)
        for i in range(12)
    }
    every = np.arange(12)
    relevance = [
        Relevance(every[(every % 2 == i % 2) & (every != i)], np.array([i])) for i in every[:6]
    ]
    small = retrieval_study.Set(
        list(images), images.__getitem__, every, every[:6], relevance, 160,
        lambda image: retrieval_study._shrink_to_grey(image, 8),
        retrieval_study.Rerank(qe_neighbors=2),
    )  # fmt: skip
    monkeypatch.setattr(retrieval_study, "SETS", {"small": lambda data, study: small})
    monkeypatch.setattr(retrieval_study, "make_extractor", FakeExtractor)
    out = tmp_path / "study.csv"
    retrieval_study.main(
        ["--data", str(tmp_path), "--sets", "small", "--out", str(out), "--num-candidates", "5"]
    )
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 + 6 * len(POOLINGS)
    of = {(row["pooling"], row["reranker"]): row for row in rows}
    for row in rows:
        if row["pooling"] not in ("average", "pixels"):
            expected = float(row["average_precision"]) - float(
                of["average", row["reranker"]]["average_precision"]
            )
            assert float(row["average_precision_less_average"]) == pytest.approx(expected, abs=2e-4)
    assert "| all |" in capsys.readouterr().out


def test_the_study_refuses_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("GGEM_SHARED", raising=False)
    with pytest.raises(SystemExit, match="--data must name the folder"):
        retrieval_study.main([])
    with pytest.raises(SystemExit, match=r"corridor\.zip cannot be read: No such file"):
        retrieval_study.main(["--data", str(tmp_path), "--sets", "corridor"])
    with pytest.raises(
        SystemExit, match="--sets must be among corridor, omniglot, landmark, not moon"
    ):
        retrieval_study.main(["--data", str(tmp_path), "--sets", "moon"])


def test_the_page_of_the_study_has_the_numbers_of_its_file():
    """Every table of the page agrees with the file."""
    with retrieval_study.RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs" / "retrieval_study.md").read_text()
    names = list(dict.fromkeys(row["set"] for row in rows))
    assert names == ["corridor", "omniglot", "omniglot, queries apart", "landmark"]
    for name in names:
        own = [row for row in rows if row["set"] == name]
        tables = retrieval_study.make_set_tables(own).partition("\n")[2]
        assert tables.strip() in page
