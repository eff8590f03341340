"""eval/studies/demo.py: trains, compares and reports, on two seeds and one epoch."""

import re

import pytest

from eval.studies import demo
from train.cli import load_config


def test_the_demo_trains_compares_and_reports(tmp_path, capsys, monkeypatch):
    small = ["--model.width", "16", "--model.depth", "1", "--model.mlp-width", "32"]
    monkeypatch.setattr(
        demo, "load_config", lambda kind, flags, tool: load_config(kind, [*flags, *small], tool)
    )
    demo.main(
        [
            "--out",
            str(tmp_path / "demo"),
            "--seeds",
            "2",
            "--epochs",
            "1",
            "--poolings",
            "gem",
            "ggem",
        ]
    )
    said = capsys.readouterr().out
    assert re.search(r"GeM .* \d+\.\d\d % \[", said)
    assert "What to try next" in said
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count('<div class="example">') == 12
    assert "2 poolings x 2 seeds, 1 epochs each" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page must need no other file"
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "gem-0",
        "gem-1",
        "ggem-0",
        "ggem-1",
        "report.html",
    ]


def test_one_seed_gives_no_interval(capsys):
    with pytest.raises(SystemExit, match="--seeds must be at least 2"):
        demo.main(["--seeds", "1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--poolings", "ggem"], "two or more different ones"),
        (["--poolings", "ggem", "ggem"], "two or more different ones"),
        (["--poolings", "avg", "mean"], "not mean"),
        (["--config", "imagenet"], "--config must be one of"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        demo.main(["--out", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())
