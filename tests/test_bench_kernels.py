"""The GPU benchmark as far as it goes without a GPU: its sections on small shapes, the contestants
that it leaves out, its count of bytes, its plot.
"""

import csv
import sys

import numpy as np
import pytest

from benchmarks import bench_kernels, kernel_contestants, plot_kernels
from benchmarks.bench_kernels import SECTIONS, Bench
from benchmarks.kernel_contestants import B16, count_buffers, moved_bytes
from benchmarks.kernel_numerics import _error, checks
from benchmarks.plot_kernels import STAGES, draw, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    assert (
        Bench(folder, 600, 2, dry=True, implementation="xla").run(["norm", "training", "maps"]) == 0
    )
    return folder


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_stage_is_measured_for_every_contestant(folder):
    rows = [row for row in rows_of(folder / "kernels.csv") if row["operation"] == "norm_ggem"]
    contestants = {
        "ours",
        "xla formula",
        "xla closed form",
        "xla norm, our pooling",
        "copy",
        "negated copy",
    }
    for stage in STAGES:
        assert {row["contestant"] for row in rows if row["stage"] == stage} >= contestants
    for row in rows:
        ours = next(
            other
            for other in rows
            if (other["stage"], other["contestant"]) == (row["stage"], "ours")
        )
        assert float(row["over_ours"]) == pytest.approx(
            float(row["us"]) / float(ours["us"]), rel=0.02, abs=2e-3
        )
        assert float(row["us"]) > 0
    fastest_copy = min(
        (row for row in rows if row["stage"] == "both" and "copy" in row["contestant"]),
        key=lambda row: float(row["us"]),
    )
    assert float(fastest_copy["fraction_of_copy"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_training_step_is_measured_with_and_without_kernels(folder):
    rows = rows_of(folder / "kernel_training.csv")
    assert [row["contestant"] for row in rows] == 2 * [
        "fused norm and pooling",
        "no kernel",
        "pooling alone",
    ]
    assert [row["model"] for row in rows] == 3 * ["ViT-B/16 at 32 px"] + 3 * ["ViT-S/16 at 32 px"]
    assert float(rows[1]["over_no_kernel"]) == float(rows[4]["over_no_kernel"]) == 1
    assert all(float(row["images_per_s"]) > 0 for row in rows)


@pytest.mark.slow
def test_the_picture_is_drawn_from_the_rows(folder):
    draw(read(folder / "kernels.csv"), folder / "kernels.png")
    assert (folder / "kernels.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(folder.glob("*.part.png"))


def test_bytes_are_those_of_the_arrays():
    """256 images of 196 tokens and 768 channels, two bytes each: 77,070,336 bytes of tokens;
    786,432 bytes for a float32 per image and channel.
    """
    shape = (B16.batch, B16.tokens, B16.channels)
    assert moved_bytes("ggem", "forward", shape, "bfloat16") == 77_070_336 + 786_432
    assert moved_bytes("ggem", "backward", shape, "bfloat16") == 2 * 77_070_336 + 3 * 786_432
    statistics = 256 * 196 * 2 * 4
    assert (
        moved_bytes("norm_ggem", "both", shape, "bfloat16")
        == 3 * 77_070_336 + 6 * 786_432 + 2 * statistics
    )
    for case in (
        kernel_contestants.S16,
        B16,
        kernel_contestants.L16,
        kernel_contestants.B16_384,
        kernel_contestants.L14_518,
        kernel_contestants.B16_FLOAT32,
    ):
        for size in (case.token_bytes, case.token_bytes // 2 * 3):
            assert (
                4 * 60e6 <= count_buffers(size) * size <= 1.25e9
            )  # four times the L2 cache of an H200
    assert count_buffers(77_070_336) == 16


def test_without_a_gpu_it_says_so_and_what_runs(tool):
    process = tool("benchmarks.bench_kernels")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.strip().splitlines()[-1].startswith("timing kernels needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sections", "all, ggem"], f"--sections must be of {', '.join(SECTIONS)}, not all"),
        (["--budget", "nan"], "--budget must be a number of seconds, 0 or more, not nan"),
        (["--budget", "-1"], "--budget must be a number of seconds, 0 or more, not -1.0"),
        (["--rounds", "1"], "--rounds must be at least 2, not 1"),
        (
            ["--check", "--sections", "ggem"],
            "--check runs the numerics alone: not together with --dry or --sections",
        ),
        (
            ["--check"],
            (
                "--check: implementation='interpret' needs TRITON_INTERPRET=1 in the environment"
                " before triton is imported"
            ),
        ),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(monkeypatch, flags, said):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench_kernels", *flags])
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main()
    assert stopped.value.code == said


def with_a_contestant(monkeypatch, name, pool):
    monkeypatch.setitem(
        kernel_contestants.JAX_CONTESTANTS,
        "ggem",
        kernel_contestants.JAX_CONTESTANTS["ggem"] | {name: pool},
    )


@pytest.mark.slow
def test_a_contestant_that_raises_is_left_out_by_name(monkeypatch, tmp_path, capsys):
    def broken(tokens, p):
        raise RuntimeError("no compiler\nis here")

    with_a_contestant(monkeypatch, "xla broken", broken)
    assert Bench(tmp_path, 600, 2, dry=True, implementation="xla").run(["ggem"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert said == [
        f"left out: ggem, dry, (4, 9, 12), bfloat16, {stage}, xla broken: RuntimeError: no compiler"
        " is here"
        for stage in bench_kernels._STAGES
    ]
    assert {row["contestant"] for row in rows_of(tmp_path / "kernels.csv")} >= {
        "ours",
        "xla formula",
        "xla closed form",
        "copy",
    }


def test_a_contestant_that_disagrees_fails_the_run_and_the_others_are_timed(
    monkeypatch, tmp_path, capsys
):
    with_a_contestant(
        monkeypatch, "xla wrong", lambda tokens, p: 2 * kernel_contestants.formula(tokens, p)
    )
    assert Bench(tmp_path, 600, 2, dry=True, implementation="xla").run(["ggem"]) == 1
    assert (
        "left out: ggem, dry, (4, 9, 12), bfloat16, forward, xla wrong: it does not agree with"
        " ours: result 0 by" in capsys.readouterr().out
    )
    rows = rows_of(tmp_path / "kernels.csv")
    for stage in STAGES:
        timed = {row["contestant"] for row in rows if row["stage"] == stage}
        assert timed >= {"ours", "xla formula", "xla closed form", "copy"}
        assert "xla wrong" not in timed


def test_without_time_everything_is_left_out_by_name(tmp_path, capsys):
    assert Bench(tmp_path, 0, 2, dry=True, implementation="xla").run(list(SECTIONS)) == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for what in (
        "ggem, (2, 9, 12), float32, p = 3",
        "ggem, dry, (4, 9, 12), bfloat16, forward",
        "norm_ggem, dry, (4, 9, 12), bfloat16, both",
    ):
        assert f"no time left for {what}\n" in said
    for what in (
        "training",
        "superglobal, map, (2, 6, 7, 8), bfloat16, forward",
        "ggem, (2, 9, 12), float32, p = 3, size 1e-30",
    ):
        assert f"no time left for {what}\n" in said


@pytest.mark.slow
def test_what_cannot_be_drawn_is_refused_in_one_line(monkeypatch, tmp_path, folder):
    empty, other = tmp_path / "empty.csv", tmp_path / "other.csv"
    empty.write_text("")
    other.write_text("date,device\n2026-01-01,cpu\n")
    for flags, said in (
        (["--rows", empty], f"{empty} has no rows"),
        (["--rows", other], f"{other} has no columns contestant"),
        (["--rows", tmp_path], str(tmp_path)),
        (["--rows", tmp_path / "none.csv"], f"{tmp_path / 'none.csv'} does not exist"),
        (
            ["--rows", folder / "kernels.csv", "--out", tmp_path / "a.pdf"],
            f"--out must be a .png file, not {tmp_path / 'a.pdf'}",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["plot_kernels", *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            plot_kernels.main()
        assert said in stopped.value.code
        assert "\n" not in stopped.value.code


def test_the_numerics_see_a_wrong_result():
    assert _error(
        np.array([[1.0, 2.0], [4.0, 8.0]]), np.array([[1.0, 2.0], [4.0, 8.8]])
    ) == pytest.approx(0.8 / 8.8)
    assert _error(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == np.inf
    row = next(checks("xla", small=True))
    assert row["passed"]
    assert row["error"] == row["xla_error"]


def test_the_end_sums_up_the_checks_and_the_model(tmp_path, capsys):
    bench = Bench(tmp_path, 600, 2, dry=True, implementation="xla")
    assert bench.run(["defaults"]) == 0
    assert "2 checks of numerics, 0 failed; no time to compare with the model" in (
        capsys.readouterr().out
    )
    bench.over_model = [0.8, 1.5, 1.2]
    bench.dry = False  # on this CPU, no kernel is compiled
    assert bench.run(["defaults"]) == 1
    assert (
        "4 checks of numerics, 2 failed; measured over modelled time: median 1.20, from 0.80"
        in (capsys.readouterr().out)
    )
