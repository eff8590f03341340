"""eval/studies/accelerator.py: simulates, searches and explores with small budgets, and writes one
page.
"""

import configparser
import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import neupims
from eval.studies import accelerator

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def only_train(monkeypatch):
    """Only the extra `train` is installed, as for `make demo`."""
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    packages = {
        extra: set(re.findall(r"^([\w-]+)", text, flags=re.MULTILINE))
        for extra, text in extras["options.extras_require"].items()
    }
    for package in packages["neupims"] | packages["oracle"]:
        if package not in packages["train"]:
            monkeypatch.setitem(sys.modules, package, None)


def test_the_extra_train_is_enough_to_explore(only_train):
    batch = neupims.make_batch([300, 40], channels=[0, 1])
    found = neupims.explore("neupims", "gpt3-7b", batch, {"npu.num_arrays": [4, 8]}, method="grid")
    assert found.points == 2


@pytest.mark.slow
def test_the_demo_simulates_searches_and_reports(only_train, tmp_path, capsys):
    accelerator.main(["--out", str(tmp_path), "--budget", "128", "--points", "16"])
    said = capsys.readouterr().out
    assert [said.count(f"neupims {command}") for command in ("simulate", "search", "explore")] == [
        3,
        1,
        1,
    ]
    page = (tmp_path / "accelerator.html").read_text()
    for title in (
        "Three systems",
        "Stages of NeuPIMs",
        "Search for a schedule",
        "Channels",
        "Machines",
    ):
        assert f"<h2>{title}" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page must need no other file"
    before, after = (
        list(csv.reader((tmp_path / f"{name}.csv").read_text().splitlines()))
        for name in ("sharegpt-like", "searched")
    )
    assert sorted(row[0] for row in before) == sorted(row[0] for row in after)
    assert len(before) == accelerator.REQUESTS + 1


def test_lengths_are_like_sharegpts():
    """Mean input and output are 80 and 296 tokens; a request is at a uniform point of its output.
    Channels are balanced by the paper's estimate.
    """
    batch = accelerator.draw()
    lengths = np.asarray(batch.seq_lens)
    assert 180 < lengths.mean() < 300
    tokens = np.bincount(batch.channels, weights=lengths, minlength=accelerator.CHANNELS)
    assert tokens.max() < 1.5 * tokens.mean()
