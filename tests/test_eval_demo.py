"""eval/studies/demo.py: trains, compares and reports, on two seeds and one epoch."""

import re

import pytest

from eval.studies import demo
from train.cli import load_config


def test_the_demo_trains_compares_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "POOLINGS", {"gem": "GeM", "ggem": "GGeM"})
    small = ["--model.width", "16", "--model.depth", "1", "--model.mlp-width", "32"]
    monkeypatch.setattr(
        demo, "load_config", lambda kind, flags, tool: load_config(kind, [*flags, *small], tool)
    )
    demo.main(["--out", str(tmp_path / "demo"), "--seeds", "2", "--epochs", "1"])
    said = capsys.readouterr().out
    assert re.search(r"GeM .* \d+\.\d\d % \[", said)
    assert "What to try next" in said
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count('<div class="digit">') == 12
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
