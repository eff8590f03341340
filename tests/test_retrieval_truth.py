"""ggem_jax.retrieval.truth.py: a user's ground truth as a CSV file."""

import subprocess
import sys
from pathlib import Path

import pytest

from ggem_jax.retrieval.truth import read_truth, to_relevance


@pytest.fixture
def written(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "truth.csv"
        path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
        return path

    return write


def test_one_row_for_each_pair_and_several_in_a_row_say_the_same(written, tmp_path):
    pairs = read_truth(
        written("query,relevant,ignored\na.jpg,b.jpg,\na.jpg,c/d.jpg,e.jpg\nf.jpg,a.jpg,\n")
    )
    together = read_truth(
        written(
            "relevant , query,ignored\r\nb.jpg; c/d.jpg"
            " ,./a.jpg,x/../e.jpg\r\n\r\na.jpg,f.jpg,\r\n",
            "utf-8-sig",
        )
    )
    assert pairs == together
    assert pairs[0] == (
        tmp_path / "a.jpg",
        None,
        [tmp_path / "b.jpg", tmp_path / "c" / "d.jpg"],
        [tmp_path / "e.jpg"],
    )
    assert [query.path.name for query in pairs] == ["a.jpg", "f.jpg"]


def test_a_box_tells_queries_of_one_image_apart(written):
    found = read_truth(
        written(
            "query,relevant,x1,y1,x2,y2\na.jpg,b.jpg,0,0,10,10.5\na.jpg,c.jpg,,,,\na.jpg,d.jpg,0.0,0,10,10.5\n"
        )
    )
    assert [(query.box, [path.name for path in query.relevant]) for query in found] == [
        ((0, 0, 10, 10.5), ["b.jpg", "d.jpg"]),
        (None, ["c.jpg"]),
    ]


def test_another_root(written):
    assert read_truth(written("query,relevant\na.jpg,/else/b.jpg\n"), root="/photos")[0][::2] == (
        Path("/photos/a.jpg"),
        [Path("/else/b.jpg")],
    )


def test_places_in_the_database_and_the_query_itself(written, tmp_path):
    queries = read_truth(
        written("query,relevant,ignored\na.jpg,c.jpg,d.jpg\nb.jpg,b.jpg;c.jpg,\nelsewhere.jpg,,\n")
    )
    found = to_relevance(queries, [tmp_path / f"{name}.jpg" for name in "abcd"])
    assert [(each.positive.tolist(), each.ignored.tolist()) for each in found] == [
        ([2], [0, 3]),
        ([1, 2], []),
        ([], []),
    ]
    with pytest.raises(ValueError, match=r"c\.jpg, relevant for .*a\.jpg, is not in the database"):
        to_relevance(queries, [tmp_path / "a.jpg"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must name the columns query and relevant"),
        ("query;relevant\n", "separated by commas"),
        ("query,relevent\n", "it is 'query,relevent'"),
        ("query,relevant,x1,y1\n", "the last four together"),
        ("query,query,relevant\n", "each once"),
        ("query,relevant\n", "no row under its header"),
        ("query,relevant\na.jpg\n", "line 2, must have 2 columns as the first line has, not 1"),
        ("query,relevant\na.jpg,b.jpg\n,b.jpg\n", "line 3, names no query"),
        (
            "query,relevant,ignored\na.jpg,b.jpg,b.jpg\n",
            r"b\.jpg both relevant and ignored for a\.jpg",
        ),
        ("query,relevant,x1,y1,x2,y2\na.jpg,b.jpg,1,2,3,\n", "must have a box"),
        ("query,relevant,x1,y1,x2,y2\na.jpg,b.jpg,5,0,1,9\n", "x1 < x2"),
        ("query,relevant,x1,y1,x2,y2\na.jpg,b.jpg,0,0,nan,9\n", "of numbers"),
        ('query,relevant\na.jpg,"b\n', "is no CSV"),
        (b"query,relevant\n\xff\xfe,b\n", "no text in UTF-8"),
    ],
)
def test_mistakes_are_told_with_their_line(written, text, said):
    with pytest.raises(ValueError, match=said):
        read_truth(written(text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_truth(tmp_path / "none.csv")


def test_loads_no_jax():
    code = (
        "import sys, ggem_jax.retrieval.truth; print([name for name in ('jax', 'flax') if name"
        " in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=60,
    )
    assert run.stdout.strip() == "[]", run.stderr
