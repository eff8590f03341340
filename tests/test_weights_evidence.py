"""benchmarks/weights_evidence.py and weights_inspect.py: the docs hold what they print."""

from pathlib import Path

import pytest

from benchmarks import weights_evidence, weights_inspect

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def outcomes():
    return {
        (row.network, row.naming, row.settings is not None): weights_evidence.outcome(row)
        for row in weights_evidence.rows()
    }


def test_each_kind_is_read_with_a_source_or_asked_for(outcomes):
    assert len(outcomes) > 40
    for row, cells in outcomes.items():
        for cell in cells[:2]:
            assert ": " in cell or cell.startswith("**asks** `--"), row
            assert not cell.startswith("refused"), row
    asked = {row: [cell for cell in cells if "asks" in cell] for row, cells in outcomes.items()}
    assert not any(cells for (_, _, settings), cells in asked.items() if settings)
    for kind, flag in (
        (("CLIP B/32", "open_clip", False), "gelu"),
        (("CLIP bigG/14", "Hugging Face", False), "gelu"),
        (("post-norm B/16", "timm", False), "norm"),
        (("MoCo v3 S/16", "MoCo v3", False), "heads"),
        (("DeiT III", "DeiT's code", False), "architecture"),
    ):
        assert asked[kind] == [f"**asks** `--{flag}`"]
    assert outcomes["CLIP bigG/14", "timm", True][0].startswith("16: ")
    assert outcomes["DINOv2 g/14", "timm", False][0].startswith("24: ")
    assert outcomes["post-norm B/16", "timm", True][2].startswith("post: ")


def test_the_docs_show_this_table(capsys):
    weights_evidence.main()
    page = (DOCS / "weights.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page, "python -m benchmarks.weights_evidence"


def test_the_docs_show_what_inspect_says(capsys):
    weights_inspect.main()
    page = (DOCS / "weights_inspect.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page, "python -m benchmarks.weights_inspect"
