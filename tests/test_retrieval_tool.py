"""`python -m ggem_jax.retrieval`: every command, its messages about mistakes, and its files."""

import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_weights_vit import file_of

from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.descriptors.whitening import Whitening, load_whitening, whiten
from ggem_jax.files.images import UnreadableImage
from ggem_jax.files.vectors import read_ranking, read_vectors, write_ranking
from ggem_jax.retrieval import index as library
from ggem_jax.retrieval.__main__ import main
from ggem_jax.retrieval.index import describing
from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.methods import choose_method
from ggem_jax.retrieval.metrics import Relevance, scores
from ggem_jax.retrieval.rerank import superglobal_rerank
from ggem_jax.retrieval.rerank_files import rerank_files
from ggem_jax.retrieval.tool import commands, compilation, progress
from ggem_jax.retrieval.tool.flags import parse

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--scales",
    "1",
    "--no-regional",
    "--longest-side",
    "160",
]  # one program of 160 x 160 pixels


class Colours:
    """Describes an image by its mean colour in a grid of 2 x 2, without a network."""

    def __init__(self, settings, batch=None):
        assert settings == DescriptorSettings(
            **{name: getattr(settings, name) for name in settings.record()}
        )

    def fit(self, height, width):
        return None

    def __call__(self, images):
        for image in images:
            if min(image.shape[:2]) < 2:
                yield UnreadableImage("too thin")
                continue
            rows, columns = image.shape[0] // 2, image.shape[1] // 2
            parts = [
                image[i * rows :][:rows, j * columns :][:, :columns].mean((0, 1))
                for i in (0, 1)
                for j in (0, 1)
            ]
            vector = np.concatenate(parts) - 99.5
            yield (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(describing, "make_extractor", Colours)
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: None)


def pattern(seed, size=(24, 32)):
    rng = np.random.default_rng(seed)
    return np.kron(
        rng.integers(0, 256, (2, 2, 3), np.uint8),
        np.ones((size[0] // 2, size[1] // 2, 1), np.uint8),
    )


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Twelve images, with names that HTML and terminals have to escape; the folder above is the
    current one.
    """
    monkeypatch.chdir(tmp_path)
    for seed in range(12):
        path = tmp_path / "photos" / ("", "<b>&amp;", 'quote"s')[seed % 3] / f"{seed:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pattern(seed)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def run(capsys):
    """Runs a command in this process: its exit code, output and errors."""

    def started(*arguments):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return started


@pytest.fixture
def indexed(colours, photos, run):
    assert run("index", photos, "-o", "my.index") == (
        0,
        "my.index: 12 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 0 skipped\n",
        "",
    )
    return photos


# What a start costs


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["search", "--help"],
        ["--version"],
        [],
        ["search"],
        ["index", "photos", "-o", "i", "--scales", "2"],
    ],
)
def test_help_and_wrong_flags_load_neither_jax_nor_numpy(arguments):
    code = f"""import sys
from ggem_jax.retrieval.__main__ import main
try:
    code = main({arguments!r})
except SystemExit as stop:
    code = stop.code
print(code, [name for name in ('jax', 'flax', 'numpy', 'PIL', 'rich') if name in sys.modules])"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert (
        done.stdout.splitlines()[-1]
        == f"{0 if arguments and arguments[-1].startswith('--') else 2} []"
    ), done.stderr


def test_help_names_every_command_and_a_default(run):
    code, said, _ = run("--help")
    assert code == 0
    assert all(
        f"\n    {name} " in said
        for name in (
            "index",
            "search",
            "add",
            "remove",
            "info",
            "verify",
            "rerank",
            "evaluate",
            "whiten",
        )
    )
    assert "(gem+)" in run("index", "--help")[1]


# Every mistake: one sentence, and the exit code

DAMAGED = ("deflate", "checksum", "encrypted", "method", "shape", "rows", "no_array")

MISTAKES = [
    ([], 2, "the following arguments are required: COMMAND"),
    (["serch"], 2, "invalid choice: 'serch'"),
    (["search", "my.index"], 2, "QUERY"),
    (["search", "my.index", "photos/00.png", "-k", "0"], 2, "whole number of at least 1, not '0'"),
    (["search", "my.index", "photos/00.png", "--box", "1,2,3"], 2, "must be x1,y1,x2,y2"),
    (["search", "my.index", "photos/00.png", "--box", "5,0,1,9"], 2, "x1 < x2"),
    (["search", "my.index", "photos/00.png", "--box", "-5,0,-9,9"], 2, "x1 < x2"),
    (["search", "my.index", "photos/00.png", "-k", "1_0"], 2,
    "whole number of at least 1, not '1_0'"),
    (["search", "my.index", "photos/00.png", "-k", "9" * 5000], 2, "must be at most 2147483647"),
    (["info", "esc\x1b[31m.index"], 1, r"esc\\x1b\[31m.index holds no index"),
    (["search", "my.index", "photos/00.png", "-k", "\u0663"], 2, "whole number of at least 1"),
    (["search", "my.index", "photos/00.png", "--rerank", "superglobal", "--beta", "nan"], 2,
    "number from 0 to 1e\\+06, not 'nan'"),
    (["search", "my.index", "photos/00.png", "--rerank", "superglobal", "--beta", "1e39"], 2,
    "number from 0 to 1e\\+06, not '1e39'"),
    (["search", "my.index", "photos/00.png", "--rerank", "dba", "--alpha", "inf"], 2,
    "number from 0 to 1e\\+06, not 'inf'"),
    (["search", "my.index", "photos/00.png", "--rerank", "aqe", "--neighbors", "0"], 2,
    "whole number of at least 1"),
    (["search", "my.index", "photos/00.png", "photos/03.png", "--box", "0,0,9,9"], 2,
    "give it 2 times"),
    (["search", "my.index", "photos/00.png", "--rerank", "aqe", "--beta", "1"], 2,
    "--beta is no option of aqe: it takes --candidates, --neighbors"),
    (["search", "my.index", "photos/00.png", "--candidates", "9"], 2,
    "--candidates is no option of none: nothing is reranked"),
    (["search", "my.index", "photos/00.png", "--html", "photos/00.png"], 2,
    "must end with .html or .htm"),
    (["search", "my.index", "photos/00.png", "--html", "no/sheet.html"], 2, "no is no folder"),
    (["search", "my.index", "photos/00.png", "--weights", "w.pth"], 2,
    "was made without a file of weights"),
    (["search", "my.index", "photos/none.png"], 1, "photos/none.png is not there"),
    (["search", "my.index", "photos"], 1, "photos is no file"),
    (["search", "my.index", "no_image.jpg"], 1, "no_image.jpg is not a readable image"),
    (["search", "my.index", "thin.png"], 1, "thin.png: too thin"),
    (["search", "my.index", "photos/00.png", "--box", "100,100,200,200"], 1,
    "photos/00.png: nothing of the image of 32 x 24 pixels is inside"),
    (["search", "none.index", "photos/00.png"], 1, "none.index holds no index"),
    (["search", "photos", "photos/00.png"], 1, "photos holds no index"),
    (["index", "photos", "-o", "photos"], 1, "photos exists and is not an index"),
    (["index", "none", "-o", "new.index"], 1, "none is not a folder"),
    (["index", "empty", "-o", "new.index"], 1, "there is no image"),
    (["index", "damaged", "-o", "new.index"], 1,
    "none of the 1 images in .*damaged could be indexed: a.png is not a readable image"),
    (["index", "photos", "-o", "my.index", "--pooling", "max"], 1,
    'pooling is "gem\\+" there, "max" here'),
    (["index", "photos", "-o", "new.index", "--longest-side", "10"], 2,
    "longest_side must be a whole number of at least 160 pixels, not 10"),
    (["index", "photos", "-o", "new.index", "--backbone", "resnet50"], 2,
    "resnet50 needs a file of weights"),
    (["index", "photos", "-o", "new.index", "--backbone", "resnet50", "--weights", "none.pth"], 1,
    "none.pth cannot be read: No such file"),
    (["add", "my.index", "empty"], 1, "is not inside"),
    (["add", "my.index", ""], 2, "an argument is empty: a variable of the shell may not be set"),
    (["add", "my.index", "--root="], 2, "an argument is empty, --root=:"),
    (["add", "my.index", "--batch", "4097"], 2, "--batch: must be at most 4096, not 4097"),
    (["remove", "my.index", ""], 2, "an argument is empty"),
    (["remove", "my.index", "*.gif"], 1, r"\*.gif matches no image"),
    (["info", "none.index"], 1, "none.index holds no index"),
    (["verify", "none.index"], 1, "none.index holds no index"),
    (["rerank", "none.npy", "q.npy", "-o", "out.npz"], 1,
    "none.npy cannot be read as an array: No such file"),
    (["rerank", "q.npy", "q.npy", "-o", "out.txt"], 2, "must end with .npz or .json"),
    (["rerank", "q.npz:q", "q.npy", "-o", "q.npz"], 2, "q.npz is read by this very command"),
    (["rerank", "q.npz", "q.npy", "-o", "out.npz"], 1,
    "it holds q, other: name one array as q.npz:NAME"),
    (["rerank", "q.npz:x", "q.npy", "-o", "out.npz"], 1, "it has no array 'x', but q, other"),
    (["rerank", "q.npy", "whole.npy", "-o", "out.npz"], 1,
    "whole.npy must hold vectors .* not int64"),
    (["rerank", "q.npy", "wide.npy", "-o", "out.npz"], 1,
    "q.npy has vectors of 12 numbers, wide.npy of 5"),
    (["rerank", "q.npy", "no_image.jpg", "-o", "out.npz"], 1,
    "no_image.jpg cannot be read as an array"),
    (["rerank", "q.npy", "q.npy", "--ranking", "wide.npy", "-o", "out.npz"], 1,
    "wide.npy must hold ids"),
    (["rerank", "nan.npy", "q.npy", "-o", "out.json"], 1,
    "nan.npy holds vectors that are not finite"),
    (["rerank", "q.npy", "nan.npy", "-o", "out.json"], 1,
    "nan.npy holds vectors that are not finite in float32"),
    (["rerank", "q.npy", "nan.npy", "-o", "out.json", "--normalize"], 1,
    "nan.npy holds vectors that are not finite in float64"),
    (["rerank", "large.npy", "q.npy", "-o", "out.json"], 1,
    "large.npy holds vectors that are not finite in float32"),
    (["rerank", "long.npy", "long.npy", "-o", "out.json", "--beta", "1e7"], 2,
    "from 0 to 1e\\+06, not '1e7'"),
    (["rerank", "q.npy", "q.npy", "-o", "out.json", "--beta", "inf"], 2, "not 'inf'"),
    (["rerank", "q.npy", "q.npy", "--ranking", "nan.json", "-o", "out.json"], 1,
    "nan.json holds scores that are not finite"),
    (["rerank", "q.npy", "q.npy", "--ranking", "deep.json", "-o", "out.json"], 1,
    "deep.json cannot be read as a ranking"),
    *((["rerank", "q.npy", f"{name}.npz", "-o", "out.npz"], 1,
    f"{name}.npz cannot be read as an array: .") for name in DAMAGED),
    *((["rerank", "q.npy", "q.npy", "--ranking", f"{name}.npz", "-o", "out.npz"], 1,
    f"{name}.npz ") for name in DAMAGED),
    (["rerank", "q.npy", "q.npy", "--ranking", "q.npz", "-o", "out.npz"], 1, "q.npz must hold ids"),
    (["rerank", "q.npy", "q.npy", "--ranking", "whole.npy", "-k", "3", "-o", "out.npz"], 2,
    "--ranking takes its place"),
    (["rerank", "q.npy", "q.npy", "--ranking", "whole.npy", "-o", "out.npz"], 1,
    "the ids of a ranking must be from 0 to 2, not from 0 to 7"),
    (["evaluate", "my.index", "none.csv"], 1, "none.csv cannot be read"),
    (["evaluate", "my.index", "truth.csv"], 1,
    "gone.png, relevant for .*00.png, is not in the database"),
    (["whiten", "my.index", "-o", "white.npz"], 1,
    "12 descriptors span 11 dimensions, and 12 are asked for"),
    (["whiten", "my.index", "-o", "white.npy"], 2, "must end with .npz"),
]  # fmt: skip


@pytest.fixture
def around(indexed, tmp_path):
    """The files and folders that the mistakes use."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"no image")
    (tmp_path / "no_image.jpg").write_bytes(b"no image")
    Image.new("RGB", (1, 5000)).save(tmp_path / "thin.png")
    (tmp_path / "truth.csv").write_text("query,relevant\nphotos/00.png,photos/gone.png\n")
    vectors = np.eye(3, 12, dtype=np.float32)
    np.save(tmp_path / "q.npy", vectors)
    np.savez(tmp_path / "q.npz", q=vectors, other=vectors)
    np.save(tmp_path / "whole.npy", np.array([[0, 7]] * 3))
    np.save(tmp_path / "wide.npy", np.ones((2, 5), np.float32))
    np.save(tmp_path / "nan.npy", np.where(np.arange(12) == 5, np.nan, vectors))
    np.save(tmp_path / "long.npy", np.full((3, 12), 1e5, np.float32))
    np.save(tmp_path / "large.npy", vectors.astype(np.float64) * 1e300)
    (tmp_path / "nan.json").write_text('{"ids": [[0], [1], [2]], "scores": [[NaN], [1], [1]]}')
    (tmp_path / "deep.json").write_text('{"ids": ' + "[" * 200_000)
    for name in DAMAGED:
        damaged_npz(tmp_path / f"{name}.npz", name)


def damaged_npz(path, kind, member="ids"):
    """Writes an .npz file in which one array cannot be read."""
    array = io.BytesIO()
    np.save(array, np.arange(300))
    content = array.getvalue()
    if kind in ("shape", "rows"):
        array = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            array,
            {
                "descr": "<i8",
                "fortran_order": False,
                "shape": (2**70 if kind == "shape" else 10**13, 12),
            },
        )
        content = array.getvalue()
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED if kind == "deflate" else zipfile.ZIP_STORED
    ) as file:
        file.writestr(
            f"{member}.npy" if kind != "no_array" else member,
            content if kind != "no_array" else b"text",
        )
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\1\2")
    if kind == "deflate":
        data[60:100] = b"\xff" * 40
    elif kind == "checksum":
        data[central - 1] ^= 1
    elif kind == "encrypted":
        data[6] |= 1
        data[central + 8] |= 1
    elif kind == "method":
        data[8] = data[central + 10] = 77
    path.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_whitening_is_told(tmp_path, kind):
    damaged_npz(tmp_path / "white.npz", kind, "mean")
    with pytest.raises(ValueError, match="is no file of a whitening"):
        load_whitening(tmp_path / "white.npz")


def test_every_mistake_is_one_sentence(around, run, tmp_path):
    before = sorted(path for path in tmp_path.rglob("*"))
    for arguments, code, sentence in MISTAKES:
        found, said, error = run(*arguments)
        assert (found, said, error.count("\n")) == (code, "", 1), arguments
        assert error.startswith("ggem-retrieval: "), arguments
        assert re.search(sentence, error), (arguments, error)
    assert sorted(path for path in tmp_path.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."), 1, "out of memory"),
        (
            RuntimeError("Unable to initialize backend 'tpu'"),
            1,
            "Unable to initialize backend 'tpu'",
        ),
        (
            OSError(28, "No space left on device", "sheet.html"),
            1,
            "No space left on device: sheet.html",
        ),
        (
            ModuleNotFoundError("No module named 'rich'"),
            1,
            r"No module named 'rich': pip install 'ggem-jax\[retrieval\]'",
        ),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to resume"),
    ],
)
def test_failures_of_the_machine(monkeypatch, run, photos, error, code, sentence):
    def fails(*_):
        raise error

    monkeypatch.setattr(describing, "make_extractor", fails)
    found, said, told = run("index", photos, "-o", "my.index")
    assert (found, said, told.count("\n")) == (code, "", 1)
    assert re.search(sentence, told)
    assert not Path("my.index").exists()


def test_other_errors_are_not_hidden(monkeypatch, photos):
    monkeypatch.setattr(
        describing,
        "make_extractor",
        lambda *_: (_ for _ in ()).throw(RuntimeError("a mistake of ours")),
    )
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["index", str(photos), "-o", "my.index"])


# The commands


def test_index_reports_what_was_skipped_and_does_nothing_twice(colours, photos, run, monkeypatch):
    (photos / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (1, 5000)).save(photos / "thin.png")
    code, said, told = run("index", photos, "-o", "my.index")
    assert (code, said) == (
        0,
        "my.index: 12 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 2 skipped\n",
    )
    assert sorted(told.splitlines()) == [
        "skipped: broken.jpg is not a readable image: cannot identify image file",
        "skipped: thin.png cannot be described: too thin",
    ]
    (photos / "broken.jpg").unlink()
    (photos / "thin.png").unlink()
    monkeypatch.setattr(
        describing,
        "make_extractor",
        lambda *_: pytest.fail("nothing is new, and no network is needed"),
    )
    assert run("index", photos, "-o", "my.index") == (
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


# Vectors of one's own


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


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


# The sheet


class Page(HTMLParser):
    """Reads a page: its images and text, and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        assert not {"href", "srcset", "onclick", "style"} & set(values)
        if tag == "img":
            self.images.append((values["alt"], values["src"]))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_sheet_holds_everything_it_shows(indexed, run):
    (indexed / "06.png").unlink()
    (indexed / "09.png").write_bytes(b"no image any more")
    queries = ["photos/03.png", "photos/<b>&amp;/01.png"]
    options = [
        "--rerank",
        "superglobal",
        "--candidates",
        "9",
        "--neighbors",
        "2",
        "--html",
        "sheet.html",
    ]
    code, said, told = run(
        "search", "my.index", *queries, "--box", "0,0,30,20", "--box", "1,1,32,24", *options
    )
    assert (code, told) == (0, "")
    assert said.count("the first 12") == 2
    text = Path("sheet.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "b>&amp;"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.images) == 2 + 2 * 10
    for _, source in page.images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= 320
    whole = "".join(page.texts)
    assert page.texts.count("<b>&amp;/01.png") == 2
    assert (
        page.texts.count("this image is no longer there")
        == page.texts.count("this image cannot be read")
        == 2
    )
    assert all(
        fact in whole
        for fact in (
            str(indexed),
            "superglobal (candidates 9, neighbors 2",
            "backbone efficientnet-lite0",
            "box 1, 1, 32, 24",
        )
    )
    moves = [each for each in page.texts if each[:1] in "▲▼=" and len(each) < 6 and each.strip()]
    assert len(moves) == 24
    assert [path.name for path in Path().glob("*.part")] == []


def test_the_box_of_the_query_is_drawn(photos):
    from ggem_jax.retrieval.tool.sheet import make_thumbnail

    plain, drawn = (
        np.asarray(Image.open(io.BytesIO(make_thumbnail(photos / "00.png", box)))).astype(int)
        for box in (None, (8, 4, 28, 20))
    )
    assert np.abs(drawn - plain)[4:7, 10:26].max() > 60
    assert np.abs(drawn - plain)[10:13, 14:20].mean() < 20


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_thumbnails_of_odd_images(tmp_path, size):
    from ggem_jax.retrieval.tool.sheet import make_thumbnail

    Image.new("RGB", size).save(tmp_path / "odd.png")
    assert (
        max(Image.open(io.BytesIO(make_thumbnail(tmp_path / "odd.png", (0, 0, 1, 1)))).size) <= 320
    )


# Progress and the cache


def test_lines_of_progress_tell_the_time_that_is_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = progress.Lines()
    for now[0], done in ((0.0, 100), (10.0, 110), (31.0, 131), (40.0, 140), (70.0, 170)):
        lines(done, 1000)
    assert (
        capsys.readouterr().err
        == "131 of 1000 images, 14 min left\n170 of 1000 images, 14 min left\n"
    )
    assert [progress.format_seconds(seconds) for seconds in (3, 89, 600, 12000)] == [
        "3 s",
        "89 s",
        "10 min",
        "3 h 20 min",
    ]


def test_the_oldest_programs_are_dropped(tmp_path):
    for age, name in enumerate(("new", "older", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    compilation.drop_oldest(tmp_path, 25)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "older"}


@pytest.mark.parametrize(
    ("base", "inside"),
    [
        ("/somewhere", "/somewhere/ggem-jax/"),
        ("", "/home/me/.cache/ggem-jax/"),
        ("relative", "/home/me/.cache/ggem-jax/"),
    ],
)
def test_the_cache_is_the_users_own(monkeypatch, base, inside):
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(compilation.cache_folder()).startswith(f"{inside}compiled-")


# Processes, and the real network


def finished(process, *, timeout=300):
    said, told = process.communicate(timeout=timeout)
    return process.returncode, said, told


def test_from_images_of_all_kinds_to_a_search_with_the_real_network(tool, tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    images = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((160, 160)))
        for _ in range(4)
    ]
    rotation = Image.Exif()
    rotation[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(images[0]).save(folder / "plain.png")
    Image.fromarray(np.rot90(images[0])).save(folder / "rotated.jpg", exif=rotation, quality=98)
    Image.fromarray(images[1]).convert("CMYK").save(folder / "cmyk.jpg", quality=98)
    Image.fromarray(images[2][..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.new("RGB", (1, 5000)).save(folder / "thin.png")
    (folder / "none.jpg").write_text("no image")
    Image.fromarray(images[1]).save(tmp_path / "rgb.png")
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}

    code, said, told = finished(
        tool(
            "ggem_jax.retrieval",
            "index",
            folder,
            "-o",
            tmp_path / "my.index",
            *SMALL,
            environment=own,
        )
    )
    assert (code, said.partition(": ")[2]) == (
        0,
        "4 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 2 skipped\n",
    ), told
    assert len(told.splitlines()) == 2
    assert "none.jpg is not a readable image" in told
    assert "an image of 1 x 5000 pixels is too thin" in told
    (kept,) = (tmp_path / "cache" / "ggem-jax").iterdir()

    queries = [folder / "plain.png", tmp_path / "rgb.png"]
    command = [
        "search",
        tmp_path / "my.index",
        *queries,
        "--rerank",
        "superglobal",
        "--json",
        "--html",
        tmp_path / "sheet.html",
    ]
    code, said, told = finished(tool("ggem_jax.retrieval", *command, environment=own))
    assert (code, told) == (0, "")
    first, second = (each["results"] for each in json.loads(said)["queries"])
    by_path = {hit["path"]: hit for hit in first}
    assert (first[0]["path"], by_path["plain.png"]["rank_before"]) == ("plain.png", 1)
    assert by_path["plain.png"]["score_before"] == pytest.approx(1, abs=2e-3)
    assert by_path["rotated.jpg"]["rank_before"] == 2
    assert by_path["rotated.jpg"]["score_before"] > 0.95 > by_path["deep.png"]["score_before"]
    assert min(second, key=lambda hit: hit["rank_before"])["path"] == "cmyk.jpg"
    assert len(Page((tmp_path / "sheet.html").read_text()).images) == 10
    programs = {path.name for path in kept.iterdir() if path.name.endswith("-cache")}

    for path in kept.rglob("*"):  # programs that were cut off are compiled again, without a word
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    code, said, told = finished(tool("ggem_jax.retrieval", *command, environment=own))
    assert (code, told) == (0, "")
    assert json.loads(said)["queries"][0]["results"] == first
    assert {path.name for path in kept.iterdir() if path.name.endswith("-cache")} == programs


def shell(line, tmp_path, **options):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
    } | {
        "PYTHONPATH": str(ROOT),
        "P": sys.executable,
    }
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
        **options,
    )


def test_closed_and_full_streams(indexed, tmp_path):
    tool = '"$P" -m ggem_jax.retrieval'
    assert (lambda done: (done.returncode, done.stderr))(
        shell(f"{tool} info my.index <&- >&-", tmp_path)
    ) == (0, "")
    assert (lambda done: (done.returncode, done.stdout))(
        shell(f"{tool} info none.index <&- 2>&-", tmp_path)
    ) == (1, "")
    done = shell(f"{tool} info my.index > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (1, "ggem-retrieval: No space left on device\n")
    done = shell(f"{tool} info my.index | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode in (0, 141), done.stderr) == (True, "")
    done = shell(f"{tool} info my.index > >(exec 0<&-; sleep 3); exit $?", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_is_one_sentence(photos, tool, tmp_path):
    np.save(tmp_path / "q.npy", unit(np.random.default_rng(0), 40, 8))
    command = [
        "rerank",
        tmp_path / "q.npy",
        tmp_path / "q.npy",
        "-o",
        tmp_path / "out.npz",
        "--method",
        "none",
    ]
    own = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, said, told = finished(
        tool("ggem_jax.retrieval", *command, environment=own, file_blocks=4)
    )
    assert (code, said, told) == (1, "", "ggem-retrieval: File too large\n")
    assert not (tmp_path / "out.npz").exists()
    assert not (tmp_path / "cache").exists()
    assert not list(tmp_path.glob(".out*"))


def test_interrupted(tool, tmp_path):
    os.mkfifo(tmp_path / "waits.npy")
    process = tool(
        "ggem_jax.retrieval",
        "rerank",
        tmp_path / "waits.npy",
        tmp_path / "waits.npy",
        "-o",
        tmp_path / "out.npz",
    )
    with open(tmp_path / "waits.npy", "wb"):  # returns when the other end is read
        process.send_signal(signal.SIGINT)
        assert finished(process) == (130, "", "ggem-retrieval: interrupted\n")


# Every command is one library call: its JSON is the library's record


def json_of(run, *arguments):
    code, said, _ = run(*arguments, "--json")
    return code, json.loads(said)


def test_json_of_the_commands_that_write_is_the_record_of_the_report(colours, photos, run):
    for path in ("tool.index", "library.index"):
        shutil.rmtree(path, ignore_errors=True)
    report = library.build_index(photos, "library.index")
    assert json_of(run, "index", photos, "-o", "tool.index") == (0, report.record())
    assert report.record()["added"] == 12
    Image.fromarray(pattern(60)).save(photos / "new.png")
    (photos / "broken.png").write_text("no image")
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


# Files of weights alone


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("timm-deit3", "deit3"), ("timm-vit", "vit"), ("hf-dinov2", "dinov2"), ("hf-clip", "clip")],
)
def test_a_vit_is_indexed_searched_and_reranked_with_its_weights_alone(
    photos, run, tmp_path, name, backbone
):
    (tmp_path / "weights").mkdir()
    weights, _ = file_of(name, tmp_path / "weights")
    code, said, told = run("index", photos, "-o", "my.index", "--weights", weights, *SMALL)
    assert (code, said) == (
        0,
        "my.index: 12 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 0 skipped\n",
    )
    unknown = backbone in ("vit", "clip")
    assert ("does not say how its images are normalised" in told) == unknown
    assert library.info("my.index")["settings"]["backbone"] == backbone
    options = ["--rerank", "superglobal", "--candidates", 12, "--neighbors", 2, "-k", 12]
    code, found = json_of(run, "search", "my.index", "photos/03.png", *options)
    assert code == 0
    first = {hit["rank_before"]: hit for hit in found["queries"][0]["results"]}
    assert (first[1]["path"], len(first)) == ("03.png", 12)
    assert first[1]["score_before"] == pytest.approx(1, abs=2e-3)
    assert run("search", "my.index", "photos/03.png", "--weights", weights)[0] == 0
    again = run("index", photos, "-o", "my.index", "--weights", weights, *SMALL)
    assert (
        again[1] == "my.index: 0 added, 0 updated, 12 unchanged, 0 reused, 0 removed, 0 skipped\n"
    )
