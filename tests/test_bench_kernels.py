"""The GPU benchmark as far as it goes without a GPU: all of its sections on small shapes, its count of bytes, its picture."""

import csv

import numpy as np
import pytest

from benchmarks.bench_kernels import B16, SECTIONS, Bench, _buffers, moved_bytes
from benchmarks.kernel_numerics import _error, checks
from benchmarks.plot_kernels import STAGES, draw, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    assert Bench(folder, 600, 2, dry=True, implementation="xla").run(["norm", "training", "maps"]) == 0
    return folder


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_stage_is_measured_for_every_contestant(folder):
    rows = [row for row in rows_of(folder / "kernels.csv") if row["operation"] == "norm_ggem"]
    contestants = {"ours", "xla formula", "xla closed form", "xla norm, our pooling", "copy", "negated copy"}
    for stage in STAGES:
        assert {row["contestant"] for row in rows if row["stage"] == stage} >= contestants
    for row in rows:
        ours = next(other for other in rows if (other["stage"], other["contestant"]) == (row["stage"], "ours"))
        assert float(row["over_ours"]) == pytest.approx(float(row["us"]) / float(ours["us"]), rel=0.02, abs=2e-3)
        assert float(row["us"]) > 0
    fastest_copy = min((row for row in rows if row["stage"] == "both" and "copy" in row["contestant"]), key=lambda row: float(row["us"]))
    assert float(fastest_copy["fraction_of_copy"]) == pytest.approx(1, abs=1e-3)


def test_a_training_step_is_measured_with_and_without_kernels(folder):
    rows = rows_of(folder / "kernel_training.csv")
    assert [row["contestant"] for row in rows] == ["fused norm and pooling", "pooling alone", "no kernel"]
    assert float(rows[-1]["over_no_kernel"]) == 1
    assert all(float(row["images_per_s"]) > 0 for row in rows)


def test_the_picture_is_drawn_from_the_rows(folder):
    draw(read(folder / "kernels.csv"), folder / "kernels.png")
    assert (folder / "kernels.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(folder.glob("*.part.png"))


def test_bytes_are_those_of_the_arrays():
    """256 images of 196 tokens and 768 channels, two bytes each: 77,070,336 bytes of tokens; 786,432 bytes for a float32 per image and channel."""
    shape = (B16.batch, B16.tokens, B16.channels)
    assert moved_bytes("ggem", "forward", shape, "bfloat16") == 77_070_336 + 786_432
    assert moved_bytes("ggem", "backward", shape, "bfloat16") == 2 * 77_070_336 + 3 * 786_432
    statistics = 256 * 196 * 2 * 4
    assert moved_bytes("norm_ggem", "both", shape, "bfloat16") == 3 * 77_070_336 + 6 * 786_432 + 2 * statistics
    assert _buffers(77_070_336) * 77_070_336 >= 4 * 60e6  # four times the L2 cache of an H200
    assert _buffers(20_000_000) * 20_000_000 >= 4 * 60e6


def test_without_a_gpu_it_says_so_and_what_runs(tool):
    process = tool("benchmarks.bench_kernels")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.strip().splitlines()[-1].startswith("timing kernels needs an NVIDIA GPU")
    process = tool("benchmarks.bench_kernels", "--sections", "all")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"must be of {', '.join(SECTIONS)}, not all" in errors


def test_the_numerics_see_a_wrong_result():
    assert _error(np.array([[1.0, 2.0], [4.0, 8.0]]), np.array([[1.0, 2.0], [4.0, 8.8]])) == pytest.approx(0.8 / 8.8)
    assert _error(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == np.inf
    row = next(checks("xla", small=True))
    assert row["passed"]
    assert row["error"] == row["xla_error"]
