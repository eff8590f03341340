"""Batches of the published figures, and the page that shows them."""

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.neupims_paper import CHANNELS, estimate, place, stream

ROOT = Path(__file__).resolve().parent.parent


def test_estimate_is_algorithm_1():
    # 300 tokens: 2 rows of 4 heads with 10 tiles of keys; 32 heads with 4 tiles of values; 100 for
    # each GWRITE, 184 for each tile.
    assert estimate(np.array([300])) == pytest.approx([2 * (100 + 10 * 184) + 32 * (100 + 4 * 184)])


def test_new_requests_go_to_the_least_load_and_to_the_next_channel():
    loads = np.zeros(CHANNELS)
    loads[:3] = 1e9
    channels, turn = place(np.array([100, 100]), loads, CHANNELS - 1)
    assert channels.tolist() == [[3, CHANNELS - 1], [4, 0]]
    assert turn == CHANNELS + 1


def test_a_stream_meets_requests_in_proportion_to_their_output():
    table = np.array([[10, 100], [10, 300]])
    lengths, channels = stream(table, 512, np.random.default_rng(0))
    assert channels.shape == (512, 2)
    assert channels.max() < CHANNELS
    # Three of four requests that are alive are long ones, each anywhere in its output: the mean is
    # 10 + (50 + 3 * 150) / 4.
    assert lengths.mean() == pytest.approx(10 + 125, rel=0.1)


def test_the_page_shows_the_committed_speed_ups():
    page = (ROOT / "docs" / "accelerator" / "published.md").read_text(encoding="utf-8")
    with open(ROOT / "benchmarks" / "results" / "neupims_paper.csv", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if " over " in row["figure"] and row["batch"] == "all" and row["published"]
        ]
    shown = [row for row in rows if row["model"] == "all"]
    assert len(shown) > 20
    for row in shown:
        assert (
            f"{float(row['mean']):.2f} ({float(row['least']):.2f} to {float(row['greatest']):.2f})"
            in page
        ), row
