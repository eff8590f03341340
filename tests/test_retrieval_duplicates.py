"""Near duplicates: pairs and groups against all pairs at once, the best image first, the tool."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ggem_jax.retrieval.index import IndexRefused, find_duplicates
from ggem_jax.retrieval.index.index import Index, build, remove
from ggem_jax.retrieval.pairs import connected_groups, cosines_to, similar_pairs
from ggem_jax.retrieval.tool.sheet import format_bytes

ROOT = Path(__file__).resolve().parent.parent


def unit(rng, n, d):
    vectors = rng.normal(size=(n, d))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_pairs_are_those_of_all_pairs_at_once(rows, dtype):
    vectors = (3 * unit(np.random.default_rng(0), 50, 8)).astype(dtype)
    wide = vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    expected = wide @ wide.T
    found = {
        (a, b): score
        for block in similar_pairs(vectors, 0.6, rows=rows)
        for a, b, score in zip(*(each.tolist() for each in block), strict=True)
    }
    a, b = np.nonzero(np.triu(expected >= 0.6, 1))
    assert len(a) > 20
    assert found.keys() == set(zip(a.tolist(), b.tolist(), strict=True))
    np.testing.assert_allclose(list(found.values()), [expected[pair] for pair in found], atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_connected_components(seed):
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 60, (2, 45))
    a, b = np.minimum(a, b)[a != b], np.maximum(a, b)[a != b]
    _, label = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(60, 60)))
    expected = [np.nonzero(label == each)[0].tolist() for each in np.unique(label)]
    blocks = zip(np.array_split(a, 4), np.array_split(b, 4), strict=True)
    found = [group.tolist() for group in connected_groups(60, blocks)]
    assert found == sorted(group for group in expected if len(group) > 1)


def test_a_long_chain_is_one_group_and_no_vectors_are_none():
    chain = np.arange(999, 0, -1)
    (group,) = connected_groups(1000, iter([(chain - 1, chain)]))
    assert group.tolist() == list(range(1000))
    assert connected_groups(0, iter([])) == []
    assert connected_groups(3, iter([])) == []
    assert list(similar_pairs(np.zeros((0, 4), np.float32), 0.5)) == []


def test_copies_have_the_cosine_1_and_zeros_are_like_nothing():
    vector = unit(np.random.default_rng(1), 1, 2048).astype(np.float16)
    vectors = np.concatenate([vector, np.zeros((2, 2048), np.float16), vector])
    ((a, b, _),) = similar_pairs(vectors, 1.0)
    assert (a.tolist(), b.tolist()) == ([0], [3])
    assert cosines_to(vectors, 0, np.array([3, 1])).tolist() == pytest.approx([1, 0], abs=1e-6)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        next(similar_pairs(np.zeros((2, 2), np.float32), threshold))
    with pytest.raises(ValueError, match="at least one row"):
        next(similar_pairs(np.zeros((2, 2), np.float32), 0.5, rows=0))


# Indexes


def mean_colours(images):
    for image in images:
        vector = image.mean((0, 1)) - 99.5
        yield (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Red in three sizes, blue in two files of one size, green alone; names that need escaping."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "<b>&amp;").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def save(name, colour, size, noise=0):
        pixels = np.clip(
            np.full((*size, 3), colour) + rng.integers(0, noise + 1, (*size, 3)), 0, 255
        )
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)

    save("red-small.png", (250, 20, 20), (10, 10))
    save("<b>&amp;/red-large.png", (250, 20, 20), (30, 40))
    save("red-middle.png", (250, 20, 20), (20, 20))
    save("blue-plain.png", (20, 20, 240), (16, 16))
    save("blue-noise.png", (20, 20, 240), (16, 16), noise=9)
    save("green.png", (20, 250, 20), (16, 16))
    build(folder, tmp_path / "my.index", mean_colours, {"model": "mean colour"})
    return tmp_path / "my.index"


def names(found):
    return [[each.file.path for each in group] for group in found.groups]


RED = ["<b>&amp;/red-large.png", "red-middle.png", "red-small.png"]
BLUE = ["blue-noise.png", "blue-plain.png"]


def test_most_pixels_come_first_then_the_largest_file(index):
    found = find_duplicates(index)
    assert names(found) == [RED, BLUE]
    assert [each.file.path for each in found.surplus] == [*RED[1:], BLUE[1]]
    (best, second), root = found.groups[1], index.parent / "photos"
    assert best.file.bytes == (root / "blue-noise.png").stat().st_size > second.file.bytes
    assert (best.file.width, best.file.height) == (16, 16)
    assert (found.groups[0][0].file.width, found.groups[0][0].file.height) == (40, 30)
    vectors = Index.open(index).vectors().take(np.array([best.id, second.id])).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (best.score, second.score) == pytest.approx((1, vectors[0] @ vectors[1]), abs=1e-6)


def test_at_1_only_copies_are_duplicates(index):
    shutil.copy(index.parent / "photos" / "green.png", index.parent / "photos" / "again.png")
    build(index.parent / "photos", index, mean_colours, {"model": "mean colour"})
    found = find_duplicates(index, threshold=1.0)
    assert names(found) == [RED, ["again.png", "green.png"]]


def test_an_empty_index_has_none_and_a_missing_one_is_told(index, tmp_path):
    remove(index, ["."])
    assert find_duplicates(index).groups == []
    with pytest.raises(IndexRefused, match="holds no index"):
        find_duplicates(tmp_path / "none.index")


def test_an_altered_entry_is_damage(index):
    with contextlib.closing(sqlite3.connect(index / "index.sqlite")) as database, database:
        database.execute("UPDATE images SET size = 'large'")
    with pytest.raises(IndexRefused, match="its entries have been altered"):
        find_duplicates(index)


def test_json_is_the_record_of_the_library(index, run):
    code, said, told = run("duplicates", "my.index", "--json", "--threshold", "0.9")
    record = find_duplicates("my.index", threshold=0.9).record()
    assert (code, json.loads(said), told) == (0, record, "")
    assert (record["surplus"], record["images"]) == (3, 6)
    assert record["surplus_bytes"] == sum(
        each["bytes"] for group in record["groups"] for each in group[1:]
    )
    assert record["groups"][0][0]["path"] == RED[0]


def test_the_table_and_the_sheet_show_every_image(index, run):
    (index.parent / "photos" / "red-small.png").unlink()
    code, said, _ = run("duplicates", "my.index", "--html", "sheet.html")
    assert code == 0
    assert said.startswith("my.index: 2 groups of images with cosines of 0.95 or more; all but")
    assert [line.split("   ")[-1] for line in said.splitlines()[1:]] == [
        "path", *RED, "path", *BLUE
    ]  # fmt: skip
    text = Path("sheet.html").read_text()
    assert text.count('src="data:image/jpeg;base64,') == 4
    assert "this image is no longer there" in text
    assert "<b>&amp;/red" not in text
    assert "&lt;b&gt;&amp;amp;/red-large.png" in text
    assert "<script" not in text
    assert text.count('<li class="best">') == 2


KILLS = """
import json, os, random, sys, time
sys.path.insert(0, "tests")
from interruptions import before_writes, killed
from ggem_jax.retrieval.__main__ import main
path, sheet = sys.argv[1:]
def work(dying):
    with before_writes(dying, also=["open", "chmod"]):
        main(["duplicates", path, "--json", "--html", sheet])
def fork(**when):
    with open(sheet, "w") as file:
        file.write("the sheet of before")
    return killed(work, **when), open(sheet).read()
sys.stdout.flush()
said, sys.stdout = sys.stdout, open(os.devnull, "w")
rng, start = random.Random(0), time.monotonic()
found = [fork()]
whole = time.monotonic() - start
found += [fork(wait=rng.uniform(0, whole)) for _ in range(8)]
number, dead = 0, True
while dead:
    found.append(fork(number=number))
    dead, number = found[-1][0], number + 1
print(json.dumps(found), file=said)
"""


def test_kills(index, tmp_path):
    """A sheet is the one of before or complete, whenever its writer is killed."""
    command = [sys.executable, "-c", KILLS, str(index), str(tmp_path / "sheet.html")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (_, whole), *found = json.loads(run.stdout)
    assert whole.rstrip().endswith("</html>")
    seen = {True: 0, False: 0}
    for dead, text in found:
        is_new = text != "the sheet of before"
        # the date in the sheet has minutes
        assert not is_new or (len(text) == len(whole) and text.rstrip().endswith("</html>"))
        assert dead or is_new
        seen[is_new] += dead
    assert seen[False] > 5
    assert not found[-1][0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--threshold", "1.5"], "must be a number above 0 and at most 1, not '1.5'"),
        (["--threshold", "0"], "must be a number above 0 and at most 1"),
        (["--threshold", "nan"], "must be a number above 0 and at most 1, not 'nan'"),
        (["--threshold", "-1"], "must be a number above 0 and at most 1, not '-1'"),
        (["--html", "sheet.pdf"], "must end with .html or .htm"),
        (["--html", "none/sheet.html"], "none is no folder"),
    ],
)
def test_mistakes_are_one_sentence(index, run, flags, sentence):
    code, said, told = run("duplicates", "my.index", *flags)
    assert (code, said, told.count("\n")) == (2, "", 1)
    assert sentence in told


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.2 kB"), (41_400_000, "41 MB"),
     (9_960_000, "10 MB"), (1.5e9, "1.5 GB"), (3e16, "30000 TB")],
)  # fmt: skip
def test_sizes_are_written_as_people_do(size, text):
    assert format_bytes(size) == text


def test_memory_is_that_of_two_blocks_and_jax_is_not_loaded():
    """6,000 vectors, most of them alike: all cosines at once would be 144 MB."""
    code = """import resource, sys
import numpy as np
from ggem_jax.retrieval.pairs import connected_groups, similar_pairs
vectors = np.random.default_rng(0).normal(size=(6000, 16)).astype(np.float32)
vectors[:, 0] += 9
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
groups = connected_groups(6000, ((a, b) for a, b, _ in similar_pairs(vectors, 0.95, rows=512)))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(groups), (after - before) // 1024, "jax" in sys.modules)"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    groups, mebibytes, jax = done.stdout.split()
    assert (int(groups) >= 1, jax) == (True, "False"), done.stderr
    assert int(mebibytes) < 64
