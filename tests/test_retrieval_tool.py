"""`python -m ggem_jax.retrieval`: what a start costs, and every mistake with its one sentence."""

import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ggem_jax.descriptors.whitening import load_whitening
from ggem_jax.retrieval.__main__ import main
from ggem_jax.retrieval.index import describing

ROOT = Path(__file__).resolve().parent.parent


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
    assert "(gem+; own for a training run)" in run("index", "--help")[1]


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
def test_failures_of_the_machine(monkeypatch, run, twelve_photos, error, code, sentence):
    def fails(*_):
        raise error

    monkeypatch.setattr(describing, "make_extractor", fails)
    found, said, told = run("index", twelve_photos, "-o", "my.index")
    assert (found, said, told.count("\n")) == (code, "", 1)
    assert re.search(sentence, told)
    assert not Path("my.index").exists()


def test_other_errors_are_not_hidden(monkeypatch, twelve_photos):
    monkeypatch.setattr(
        describing,
        "make_extractor",
        lambda *_: (_ for _ in ()).throw(RuntimeError("a mistake of ours")),
    )
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["index", str(twelve_photos), "-o", "my.index"])
