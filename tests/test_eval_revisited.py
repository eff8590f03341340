"""eval/revisited.py on small ground truth of its own: descriptors and images, reranking,
distractors, ablation, mistakes in one sentence.
"""

import json
import pickle

import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from eval import descriptors, rerankers, revisited
from eval.rerankers import Rerank, rank_all, rerank_all
from ggem_jax.descriptors.backbones import Network
from ggem_jax.descriptors.extract import Extractor
from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.retrieval import search

QUERIES, DATABASE, DIM = 6, 40, 12


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def slow_scores(order, positive, ignored):
    """Average precision and precision at 1, 5, 10, by walking down the list once, in the manner of
    the protocol's own code.
    """
    place, found, area = 0, 0, 0.0
    hits = []
    for each in order:
        if each in ignored:
            continue
        if each in positive:
            before = found / place if place else 1.0
            found += 1
            area += (before + found / (place + 1)) / 2 / len(positive)
            hits.append(place + 1)
        place += 1
    at = [
        sum(hit <= min(k, hits[-1]) for hit in hits) / min(k, hits[-1]) if hits else 0.0
        for k in (1, 5, 10)
    ]
    return [area, *at]


def slow_evaluation(queries, database, gnd):
    """`{set-up: [mAP, mP@1, mP@5, mP@10]}`"""
    result = {}
    for setup, positive, ignored in (
        ("easy", ["easy"], ["junk", "hard"]),
        ("medium", ["easy", "hard"], ["junk"]),
        ("hard", ["hard"], ["junk", "easy"]),
    ):
        rows = []
        for query, lists in zip(queries, gnd, strict=True):
            good, bad = (
                {i for kind in kinds for i in lists[kind]} for kinds in (positive, ignored)
            )
            order = sorted(
                range(len(database)),
                key=lambda i, query=query: (
                    -float(np.dot(query.astype(np.float64), database[i].astype(np.float64)))
                ),
            )
            if good:
                rows.append(slow_scores(order, good, bad))
        result[setup] = np.mean(rows, axis=0).tolist()
    return result


@pytest.fixture
def world(tmp_path):
    """A folder with ground truth as JSON and pickle, and descriptors in files; one query has no
    hard image.
    """
    rng = np.random.default_rng(0)
    gnd = []
    for i in range(QUERIES):
        easy, hard, junk = np.split(rng.permutation(DATABASE)[:13], (4, 4 if i == 2 else 9))
        gnd.append(
            {
                "bbx": [4.6, 0.0, 12.9, 9.2],
                "easy": easy.tolist(),
                "hard": hard.tolist(),
                "junk": junk.tolist(),
            }
        )
    truth = {
        "imlist": [f"d{i}" for i in range(DATABASE)],
        "qimlist": [f"q{i}" for i in range(QUERIES)],
        "gnd": gnd,
    }
    (tmp_path / "gnd.json").write_text(json.dumps(truth))
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    arrays = {"queries": QUERIES, "database": DATABASE, "distractors": 150}
    arrays = {
        name: unit(rng.normal(size=(count, DIM)) + 0.5).astype(np.float32)
        for name, count in arrays.items()
    }
    for name, array in arrays.items():
        np.save(
            tmp_path / f"{name}.npy", array.astype(np.float16) if name == "distractors" else array
        )
    return tmp_path, truth, arrays


def files(folder, *more):
    return [
        str(folder / "gnd.json"),
        "--queries",
        str(folder / "queries.npy"),
        "--database",
        str(folder / "database.npy"),
        *more,
    ]


def said_as_json(capsys, flags):
    revisited.main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def numbers(result):
    return {setup: list(values.values()) for setup, values in result.items()}


def test_descriptors_from_files_agree_with_a_slow_evaluation(world, capsys):
    folder, truth, arrays = world
    said = said_as_json(capsys, files(folder))
    expected = slow_evaluation(arrays["queries"], arrays["database"], truth["gnd"])
    for setup, values in numbers(said["results"]["none"]).items():
        np.testing.assert_allclose(values, expected[setup], atol=1e-12)
    assert (said["queries"], said["database"], said["distractors"]) == (QUERIES, DATABASE, 0)


def test_the_pickle_says_the_same_as_the_json(world, capsys):
    folder, _, _ = world
    first = said_as_json(capsys, files(folder))
    second = said_as_json(capsys, [folder / "gnd.pkl", *files(folder)[1:]])
    assert second["results"] == first["results"]


def test_distractors_stand_behind_the_database(world, capsys):
    folder, truth, arrays = world
    said = said_as_json(capsys, files(folder, "--distractors", str(folder / "distractors.npy")))
    everything = np.concatenate(
        [arrays["database"], arrays["distractors"].astype(np.float16).astype(np.float32)]
    )
    expected = slow_evaluation(arrays["queries"], everything, truth["gnd"])
    for setup, values in numbers(said["results"]["none"]).items():
        np.testing.assert_allclose(values, expected[setup], atol=1e-12)
    assert said["distractors"] == 150


def test_an_npz_and_a_table_for_people(world, capsys):
    folder, _, arrays = world
    np.savez(folder / "both.npz", queries=arrays["queries"], database=arrays["database"])
    both = str(folder / "both.npz")
    revisited.main(
        [
            str(folder / "gnd.json"),
            "--queries",
            both,
            "--database",
            both,
            "--rerank",
            "none",
            "superglobal",
            "superglobal-paper",
        ]
    )
    said = capsys.readouterr().out
    assert [
        word in said
        for word in (
            "E mAP",
            "H mP@10",
            "none",
            "superglobal-paper",
            "6 queries, 40 images and 0 distractors",
        )
    ] == [True] * 5


def test_joined_arrays_are_one_store(world):
    _, _, arrays = world
    parts = tuple(arrays[name] for name in ("database", "queries", "distractors"))
    joined, whole = revisited.Joined(parts), np.concatenate(parts)
    assert joined.shape == whole.shape
    for rows in (1, 7, 43, 500):
        blocks = list(joined.blocks(rows))
        assert all(len(block) == rows for _, block in blocks[:-1])
        np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), whole)
    ids = np.random.default_rng(1).permutation(len(whole))
    np.testing.assert_array_equal(joined.take(ids), whole[ids])


@pytest.mark.parametrize(
    "name", ["none", "superglobal", "superglobal-paper", "aqe", "alpha-qe", "dba"]
)
def test_rerankers_order_all_rows_and_ask_any_database(name, world, monkeypatch):
    _, _, arrays = world
    how = Rerank(num_candidates=20, num_neighbors=3, qe_neighbors=4)
    joined = revisited.Joined((arrays["database"], arrays["distractors"]))
    whole = np.concatenate(joined.parts)
    initial = rank_all(arrays["queries"], joined)
    expected = search(arrays["queries"], whole, k=len(whole))
    np.testing.assert_array_equal(initial.ids, expected.ids)
    found = rerank_all(name, arrays["queries"], joined, initial, how)
    np.testing.assert_array_equal(found, rerank_all(name, arrays["queries"], whole, initial, how))
    assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(len(whole)), (QUERIES, 1)))
    monkeypatch.setattr(rerankers, "DEPTH", 30)
    shallow = rerank_all(name, arrays["queries"], joined, initial, how)
    assert np.array_equal(np.sort(shallow, axis=1), np.tile(np.arange(len(whole)), (QUERIES, 1)))
    np.testing.assert_array_equal(shallow[:, :30], found[:, :30])


@pytest.mark.parametrize("name", ["none", "superglobal", "superglobal-paper", "aqe", "alpha-qe"])
def test_a_query_that_is_in_the_database_is_left_out(name, world):
    """The ranking is the same as without the query's row in the database."""
    _, _, arrays = world
    database, how = arrays["database"], Rerank(num_candidates=60, num_neighbors=3, qe_neighbors=4)
    own = np.array([5, 0, 39])
    queries = database[own]
    found = rerank_all(name, queries, database, rank_all(queries, database, own=own), how, own=own)
    for i, row in enumerate(own):
        without = np.delete(database, row, axis=0)
        one = rerank_all(
            name, queries[i : i + 1], without, rank_all(queries[i : i + 1], without), how
        )[0]
        np.testing.assert_array_equal(found[i][found[i] != row], one + (one >= row))


class FakeExtractor:
    """Describes an image by its mean colour, rotated by the settings; counts the images."""

    seen = 0

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, images):
        for image in images:
            FakeExtractor.seen += 1
            colour = image.reshape(-1, 3).mean(0) / 255 + 0.01
            yield unit(
                np.concatenate(
                    [colour, [0.1 * self.settings.regional, 0.2 * self.settings.scale_gem]]
                )
            ).astype(np.float32)


@pytest.fixture
def images(world, monkeypatch):
    """One colour for each image of the database; queries have the colour of their first easy image,
    but only inside the box.
    """
    folder, truth, _ = world
    rng = np.random.default_rng(3)
    colours = rng.integers(0, 256, (DATABASE, 3)).astype(np.uint8)
    (folder / "jpg").mkdir()
    for name, colour in zip(truth["imlist"], colours, strict=True):
        Image.new("RGB", (16, 16), tuple(colour.tolist())).save(
            folder / "jpg" / f"{name}.jpg", quality=100, subsampling=0
        )
    for name, lists in zip(truth["qimlist"], truth["gnd"], strict=True):
        image = np.full((20, 20, 3), 255, np.uint8)
        image[0:9, 4:12] = colours[lists["easy"][0]]
        image = Image.fromarray(image)
        image.save(folder / "jpg" / f"{name}.jpg", quality=100, subsampling=0)
    FakeExtractor.seen = 0
    monkeypatch.setattr(revisited, "make_extractor", FakeExtractor)
    return folder


def test_images_are_described_queries_in_their_boxes(images, capsys):
    said = said_as_json(capsys, [images / "gnd.json", "--images", images / "jpg"])
    assert FakeExtractor.seen == QUERIES + DATABASE
    assert said["results"]["none"]["easy"]["mP@1"] == 1.0
    assert said["descriptor"]["sizes"] == "exact"
    assert said["descriptor"]["longest_side"] == 0


def test_the_cache_keeps_descriptors_by_setting(images, capsys):
    flags = [images / "gnd.json", "--images", images / "jpg", "--cache", images / "cache"]
    first = said_as_json(capsys, flags)
    assert said_as_json(capsys, flags) == first
    assert FakeExtractor.seen == QUERIES + DATABASE
    said_as_json(capsys, [*flags, "--no-regional"])
    assert FakeExtractor.seen == 2 * (QUERIES + DATABASE)
    kept = sorted((images / "cache").iterdir())
    assert [path.suffix for path in kept] == [".npz", ".npz"]
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"in the cache is damaged .*: delete it"):
        said_as_json(capsys, flags)


def test_the_ablation_is_one_command(images, capsys):
    flags = [
        str(images / "gnd.json"),
        "--images",
        str(images / "jpg"),
        "--ablation",
        "--num-candidates",
        "10",
    ]
    revisited.main(flags)
    said = capsys.readouterr().out
    steps = ["plain", "+ GeM+", "+ Regional GeM", "+ Scale GeM", "+ ReLU-P", "+ reranking"]
    assert [said.index(step) for step in steps] == sorted(said.index(step) for step in steps)
    assert "ReLU-P is a part of ResNets" in said
    assert FakeExtractor.seen == 4 * (QUERIES + DATABASE)
    assert list(said_as_json(capsys, flags)["results"]) == steps


class Tiny(nn.Module):
    """A network whose map has a place for each 32 pixels."""

    @nn.compact
    def __call__(self, images):
        return nn.relu(nn.Conv(6, (32, 32), (32, 32), padding="SAME", name="conv")(images) + 0.2)


def test_several_settings_from_one_pass_are_those_of_each_alone():
    import jax

    model = Tiny()
    variables = model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    network = Network(model, variables, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 32)
    settings = [
        descriptors.vary_pooling(DescriptorSettings(longest_side=160))[name]
        for name in ("average", "GeM", "scale", "all")
    ]
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (120, 160, 3)).astype(np.uint8),
        rng.integers(0, 256, (200, 200, 3)).astype(np.uint8),
    ]
    together = np.stack(list(descriptors.SharedExtractor(settings, network=network)(images)))
    assert together.shape == (2, len(settings), 6)
    for i, one in enumerate(settings):
        np.testing.assert_allclose(
            np.stack(list(Extractor(one, network=network)(images[1:]))), together[1:, i], atol=2e-6
        )
    assert np.abs(together[:, 0] - together[:, -1]).max() > 1e-3


def test_settings_that_cannot_share_are_refused():
    with pytest.raises(ValueError, match="may differ in pooling"):
        descriptors.SharedExtractor([DescriptorSettings(), DescriptorSettings(longest_side=224)])


def broken(folder, change):
    truth = json.loads((folder / "gnd.json").read_text())
    change(truth)
    (folder / "gnd.json").write_text(json.dumps(truth))


def saved(folder, name, array):
    np.save(folder / f"{name}.npy", array)


MISTAKES = {
    "a bad npz": (lambda f: (f / "queries.npz").write_bytes(b"abc"), ["--queries", "queries.npz"],
    "is not a file of descriptors"),
    "two arrays": (lambda f: np.savez(f / "x.npz", a=[1.0], b=[1.0]), ["--queries", "x.npz"],
    "one that is called queries, not a, b"),
    "no truth": (lambda f: (f / "gnd.json").unlink(), [], "gnd.json cannot be read: No such file"),
    "no JSON": (lambda f: (f / "gnd.json").write_text("{"), [], "is not a ground truth: "),
    "a list": (lambda f: (f / "gnd.json").write_text("[]"), [], "is not a ground truth of imlist"),
    "an id too large": (lambda f: broken(f, lambda t: t["gnd"][0]["easy"].append(DATABASE)), [],
    "whole numbers below 40"),
    "no box": (lambda f: broken(f, lambda t: t["gnd"][0].update(bbx=None)), [],
    "bbx must be four numbers, not None"),
    "two lists": (lambda f: broken(f, lambda t: t["gnd"][0]["junk"].append(t["gnd"][0]["easy"][0])),
    [], "image [0-9]+ is in two of easy, hard and junk of one query"),
    "the first edition": (lambda f: broken(f, lambda t: t["gnd"][0].update(
        ok=t["gnd"][0].pop("easy"))), [], "lacks 'easy': .*first edition"),
    "no junk": (lambda f: broken(f, lambda t: t["gnd"][0].pop("junk")), [], "'junk'"),
    "a query less": (lambda f: broken(f, lambda t: t["qimlist"].pop()), [], "they are 6 and 5"),
    "rows": (lambda f: saved(f, "database", unit(np.ones((41, DIM), np.float32))), [],
    "for each of the 40 images .*, not 41; .*--distractors"),
    "query rows": (lambda f: saved(f, "queries", unit(np.ones((5, DIM), np.float32))), [],
    "--queries must have a row for each of the 6 .*, not 5"),
    "lengths": (lambda f: saved(f, "queries", unit(np.ones((6, 7), np.float32))), [],
    "must have one length, not 7 and 12"),
    "no unit": (lambda f: saved(f, "queries", np.ones((6, DIM), np.float32)), [],
    "--queries must be unit vectors"),
    "NaN": (lambda f: saved(f, "queries", np.full((6, DIM), np.nan, np.float32)), [],
    "--queries must be unit vectors"),
    "dtype": (lambda f: saved(f, "queries", np.ones((6, DIM), int)), [],
    "must be float32 or float16"),
    "objects": (lambda f: np.save(f / "queries.npy", np.array([{}]), allow_pickle=True), [],
    "is not a file of descriptors"),
    "no array": (lambda f: (f / "queries.npy").write_bytes(b"abc"), [],
    "is not a file of descriptors"),
    "no distractors": (lambda f: None, ["--distractors", "none.npy"], "none.npy cannot be read"),
    "distractors": (lambda f: saved(f, "distractors", unit(np.ones((3, 5), np.float32))),
    ["--distractors", "distractors.npy"], "not 5 and 12"),
    "ablation": (lambda f: None, ["--ablation"], "it needs --images"),
    "cache": (lambda f: None, ["--cache", "c"], "it goes with --images"),
    "both": (lambda f: None, ["--images", "jpg"], "either --images or both"),
    "reranker": (lambda f: None, ["--rerank", "magic"], "superglobal"),
    "beta": (lambda f: None, ["--beta", "-1"], "--beta must be at least 0, it is -1"),
    "backbone": (lambda f: None, ["--backbone", "vgg"], "backbone must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_sentence(mistake, world, monkeypatch):
    folder, _, _ = world
    spoil, flags, said = MISTAKES[mistake]
    spoil(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=said) as stop:
        revisited.main([*files(folder), *flags])
    assert str(stop.value).startswith("eval.revisited: ")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("name", ["gnd", "gnd.txt", "gnd.json.gz"])
def test_a_ground_truth_of_another_ending_is_refused(world, name):
    folder, _, _ = world
    (folder / "gnd.json").rename(folder / name)
    with pytest.raises(SystemExit, match=rf"{name} must end in \.json, \.pkl or \.pickle"):
        revisited.main([str(folder / name), *files(folder)[1:]])


@pytest.mark.parametrize(("old", "new"), [("json", "JSON"), ("pkl", "pickle")])
def test_every_spelling_of_an_ending_is_read(world, old, new):
    folder, _, _ = world
    (folder / f"gnd.{old}").rename(folder / f"gnd.{new}")
    assert len(revisited.read_ground_truth(folder / f"gnd.{new}").queries) == QUERIES


def test_a_byte_order_mark_is_read_over(world):
    folder, _, _ = world
    (folder / "gnd.json").write_bytes(b"\xef\xbb\xbf" + (folder / "gnd.json").read_bytes())
    assert len(revisited.read_ground_truth(folder / "gnd.json").queries) == QUERIES


def test_a_pickle_that_asks_for_more_than_data_is_refused(world):
    folder, _, _ = world
    (folder / "gnd.pkl").write_bytes(b"cbuiltins\nprint\n(S'run'\ntR.")
    with pytest.raises(SystemExit, match=r"gnd\.pkl.*builtins\.print"):
        revisited.main([str(folder / "gnd.pkl"), *files(folder)[1:]])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda folder: (folder / "jpg" / "d7.jpg").unlink(),
            r"1 of 46 images of .* are not in .*d7\.jpg",
        ),
        (
            lambda folder: (folder / "jpg" / "d7.jpg").write_bytes(b"nothing"),
            r"d7\.jpg is not a readable image",
        ),
        (
            lambda folder: broken(
                folder, lambda truth: truth["gnd"][1].update(bbx=[50, 50, 60, 60])
            ),
            r"q1\.jpg: nothing of the image .* is inside",
        ),
        (
            lambda folder: broken(folder, lambda truth: truth["gnd"][1].update(bbx=[5, 5])),
            r"bbx must be four numbers, not \[5, 5\]",
        ),
    ],
)
def test_mistakes_about_images(spoil, said, images):
    spoil(images)
    with pytest.raises(SystemExit, match=said):
        revisited.main(
            [
                str(images / "gnd.json"),
                "--images",
                str(images / "jpg"),
                "--cache",
                str(images / "cache"),
            ]
        )
    assert not list(images.glob("cache/*"))


@pytest.mark.golden
def test_the_real_ground_truth_is_read(shared):
    folder = shared / "data" / "revisitop"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    for name, counts in {
        "roxford5k": (4993, 3029, 2497, 1356),
        "rparis6k": (6322, 6874, 10350, 7153),
    }.items():
        truth = revisited.read_ground_truth(folder / f"gnd_{name}.json")
        lists = [
            sum(len(getattr(query, kind)) for query in truth.lists)
            for kind in ("easy", "hard", "junk")
        ]
        assert (len(truth.database), *lists) == counts
        assert len(truth.queries) == len(truth.boxes) == 70
