"""neupims/__main__.py: what the tool prints, and how it refuses bad input."""

import json
from importlib import resources
from pathlib import Path

import pytest

from neupims import make_case, simulate_case
from neupims.__main__ import main

KEYS = {
    *(
        "system",
        "model",
        "batch",
        "fidelity",
        "stage_cycles",
        "ops",
        "layer_cycles",
        "iteration_cycles",
        "iteration_seconds",
        "tokens_per_second",
    ),
    *(
        "npu_utilization",
        "pim_utilization",
        "bandwidth_utilization",
        "energy_joules",
        "expected_error",
    ),
}
TRACE = "seq_len,ch_idx\n300,0\n40,1\n513,0\n7,2\n"


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def simulate(*flags, path="closed"):
    return main(["simulate", "--path", path, *map(str, flags)])


def printed(capsys, *flags, **options):
    assert simulate(*flags, "--json", **options) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out)


def refused(capsys, *flags, code=1):
    """The sentence of the tool on standard error, with nothing on standard output."""
    assert simulate(*flags, "--json") == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("neupims: " if code == 1 else "usage")
    assert code != 1 or said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("flags", "system", "halves", "buffers", "stages"),
    [
        (["neupims_sbi"], "neupims", 2, 2, "ABCDEF"),
        (["neupims_nosbi"], "neupims", 1, 2, "ABE"),
        (["NPU+PIM"], "npu-pim", 1, 1, "ABE"),
        (["npu-only"], "npu-only", 1, 2, ["all"]),
        (["main_newton_nosbi"], "neupims", 1, 1, "ABE"),
        (["npu-pim"], "npu-pim", 1, 1, "ABE"),
        (["neupims", "--sub-batches", 1, "--row-buffers", "single"], "neupims", 1, 1, "ABE"),
        (["gpu"], "gpu", 1, 2, ["all"]),
    ],
)
def test_every_spelling_prints_one_object_with_every_key(
    capsys, trace, flags, system, halves, buffers, stages
):
    result = printed(capsys, "--model", "GPT3-7B", "--trace", trace, "--system", *flags)
    assert set(result) >= KEYS
    assert (result["system"], result["sub_batches"], result["row_buffers"]) == (
        system,
        halves,
        buffers,
    )
    assert (result["model"], result["batch"], result["fidelity"]) == ("gpt3-7b", 4, "simulator")
    cycles = result["stage_cycles"]
    assert list(cycles) == list(stages)
    assert {each["stage"] for each in result["ops"]} == set(stages)
    for each in result["ops"]:
        assert {"stage", "platform", "op", "cycles"} <= set(each)
        assert each["platform"] in ("SA", "PIM")
    if halves == 2:
        layer, iteration = (
            cycles["C"] + cycles["D"],
            cycles["A"]
            + cycles["B"]
            + 31 * (cycles["C"] + cycles["D"])
            + cycles["E"]
            + cycles["F"],
        )
    else:
        layer = sum(cycles.values())
        iteration = 32 * layer
    assert result["layer_cycles"] == pytest.approx(layer, rel=1e-6)
    assert result["iteration_cycles"] == pytest.approx(iteration, rel=1e-6)
    assert result["iteration_seconds"] == pytest.approx(iteration / 1e9, rel=1e-6)
    assert result["tokens_per_second"] == pytest.approx(4 / result["iteration_seconds"], rel=1e-6)
    assert (result["expected_error"] is None) == (
        system == "gpu" or (system == "neupims" and buffers == 1)
    )


def test_the_default_follows_every_command(capsys, trace):
    assert (
        main(
            [
                "simulate",
                "--model",
                "gpt3-7b",
                "--trace",
                str(trace),
                "--system",
                "neupims_nosbi",
                "--json",
            ]
        )
        == 0
    )
    exact = json.loads(capsys.readouterr().out)
    assert exact["layer_cycles"] == pytest.approx(
        printed(capsys, "--model", "gpt3-7b", "--trace", trace, "--system", "neupims_nosbi")[
            "layer_cycles"
        ],
        rel=0.05,
    )


def test_the_expected_error_is_that_of_the_path(capsys, trace):
    flags = ["--model", "gpt3-7b", "--trace", trace, "--system", "npu-pim"]
    errors = [printed(capsys, *flags, path=path)["expected_error"] for path in ("exact", "closed")]
    table = json.loads(resources.files("neupims").joinpath("expected_error.json").read_text())
    for path, error in zip(("exact", "closed"), errors, strict=True):
        assert error == table[path]["npu+pim"] | {"path": path, "of": table["of"]}
    assert errors[0]["layer_max_percent"] != errors[1]["layer_max_percent"]


def test_sub_batches_auto_takes_the_faster(capsys, trace):
    """Four requests are not worth interleaving; long requests that share channels are."""
    flags = ["--model", "gpt3-7b", "--system", "neupims"]
    for lines, best in ((TRACE, 1), ("seq_len,ch_idx\n" + "3500,0\n3500,0\n3500,1\n3500,1\n", 2)):
        trace.write_text(lines)
        results = {
            halves: printed(capsys, *flags, "--trace", trace, "--sub-batches", halves)
            for halves in ("1", "2", "auto")
        }
        assert results["auto"]["iteration_seconds"] == min(
            results[halves]["iteration_seconds"] for halves in "12"
        )
        assert results["auto"]["sub_batches"] == best
    assert (
        printed(
            capsys,
            "--model",
            "gpt3-7b",
            "--trace",
            trace,
            "--system",
            "npu-pim",
            "--sub-batches",
            "auto",
        )["sub_batches"]
        == 1
    )


@pytest.mark.parametrize("spelling", ["neupims_sbi", "NeuPIMs_noSBI", "main_newton_nosbi"])
def test_sub_batches_auto_contradicts_a_spelling_that_fixes_their_number(capsys, trace, spelling):
    flags = ["--model", "gpt3-7b", "--trace", trace, "--system", spelling, "--sub-batches", "auto"]
    count = 2 if spelling == "neupims_sbi" else 1
    assert f"the system {spelling} means sub-batches {count}, not auto" in refused(capsys, *flags)


def test_what_only_one_number_of_sub_batches_can_do_is_found(capsys, trace):
    """A GWRITE so long that it fits between refreshes only if its row is open; beside the NPU the
    row is closed.
    """
    flags = ["--model", "gpt3-7b", "--trace", trace, "--set", "pim.gwrite_bursts=630"]
    assert printed(capsys, *flags, "--sub-batches", "auto", path="exact")["sub_batches"] == 1
    assert "between the refreshes" in refused(capsys, *flags, "--sub-batches", 2)


def test_the_help_of_a_search_says_what_its_seed_is(capsys):
    assert main(["search", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--seed N seed of the random numbers of all searches together (default: 0)" in said


def test_a_pipe_and_a_link_stay_what_they_are(capsys, trace, tmp_path):
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "link.html").symlink_to("real.html")
    assert (
        simulate(
            "--model",
            "gpt3-7b",
            "--trace",
            trace,
            "--html",
            tmp_path / "link.html",
            "--perfetto",
            "/dev/null",
        )
        == 0
    )
    capsys.readouterr()
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_text().startswith("<!DOCTYPE")
    assert Path("/dev/null").is_char_device()


def test_brackets_in_names_are_words(capsys, trace, tmp_path):
    model = tmp_path / "a[red].toml"
    model.write_text("layers = 2\nwidth = 512\nheads = 4\nkv_heads = 4\nmlp_width = 2048\n")
    assert simulate("--model", model, "--trace", trace) == 0
    assert "a[red].toml" in capsys.readouterr().out.replace("\n", "")


def test_set_reaches_the_hardware(capsys, trace):
    flags = ["--model", "gpt3-7b", "--trace", trace, "--system", "neupims_nosbi"]
    usual, halved = (
        printed(capsys, *flags, *more) for more in ([], ["--set", "hbm.num_channels=16"])
    )
    assert halved["stage_cycles"]["A"] > 1.8 * usual["stage_cycles"]["A"]
    faster = printed(capsys, *flags, "--set", "npu.clock_hz=2e9", "--set", "hbm.clock_hz=2e9")
    assert faster["iteration_seconds"] == pytest.approx(usual["iteration_seconds"] / 2)


@pytest.mark.parametrize(
    "system",
    ["neupims", *(pytest.param(name, marks=pytest.mark.slow) for name in ("npu-only", "gpu"))],
)
def test_whole_numbers_beyond_32_bits(capsys, trace, system):
    """3 GHz and 3 GB of scratchpad give the same result as whole numbers and as decimal numbers."""
    flags = ["--model", "gpt3-7b", "--trace", trace, "--system", system]
    whole, real = (
        printed(
            capsys,
            *flags,
            "--set",
            f"hbm.clock_hz=3000000000{point}",
            "--set",
            f"npu.scratchpad_bytes=3000000000{point}",
            path="exact",
        )
        for point in ("", ".0")
    )
    assert whole == real


def test_tables_name_stages_and_throughput(capsys, trace):
    assert simulate("--model", "gpt3-7b", "--trace", trace) == 0
    out = capsys.readouterr().out
    for words in ("attn.QKVgen", "tokens/s", "stage F", "expected error"):
        assert words in out


@pytest.mark.parametrize(
    "lines",
    [
        "\ufeff" + TRACE,
        TRACE.replace("\n", "\r\n"),
        TRACE.replace("\n", "\n\n"),
        TRACE.rstrip("\n"),
        "seq_len,ch_idx,note\n300,0,a\n40,1,\n513,0,b\n7,2,c\n",
        "seq_len, ch_idx\n 300, 0\n40 ,1\n513,0\n7,2\n   \n",
    ],
)
def test_odd_traces_are_read(capsys, trace, lines):
    flags = ["--model", "gpt3-7b", "--trace", trace]
    usual = printed(capsys, *flags)
    trace.write_bytes(lines.encode())
    assert printed(capsys, *flags) == usual


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "seq_len,ch_idx"),
        ("seq_len,ch_idx\n", "no request"),
        ("300,0\n", "seq_len,ch_idx"),
        ("seq_len,ch_idx\n300,0\n-5,1\n", "line 3"),
        ("seq_len,ch_idx\n0,0\n", "line 2"),
        ("seq_len,ch_idx\n300,32\n", "from 0 to 31, not 32"),
        ("seq_len,ch_idx\n300,-1\n", "from 0 to 31, not -1"),
        ("seq_len,ch_idx\n300\n", "line 2"),
        ("seq_len,ch_idx\n300.5,0\n", "line 2"),
        ("seq_len,ch_idx\nnan,0\n", "line 2"),
        ("seq_len,ch_idx\n" + "9" * 400 + ",0\n", "line 2"),
        ("seq_len,ch_idx\n" + "9" * 5000 + ",0\n", "line 2"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "not a CSV file"),
        (b"seq_len,ch_idx\n3\x0000,0\n", "trace.csv"),
        ('seq_len,ch_idx\n"300,0\n', "line 2"),
        # keys: 28125 tiles of 32 tokens x 2 rows of 512 channels; values: 1758 rows of tokens x 32
        # tiles; 32 layers
        (
            "seq_len,ch_idx\n900000,0\n",
            "request 0 of 900000 tokens needs 3600192 tiles of its channel, which has",
        ),
    ],
)
def test_wrong_traces_are_refused(capsys, trace, content, words):
    trace.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(capsys, "--model", "gpt3-7b", "--trace", trace)
    assert words in said
    assert len(said) < 1000


def test_a_trace_must_be_a_file(capsys, tmp_path):
    assert "absent.csv" in refused(capsys, "--model", "gpt3-7b", "--trace", tmp_path / "absent.csv")
    assert str(tmp_path) in refused(capsys, "--model", "gpt3-7b", "--trace", tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "gpt5"], "gpt3-7b"),
        (["--system", "tpu"], "neupims"),
        (["--set", "hbm.nothing=3"], "num_channels"),
        (["--set", "hbm=3"], "hbm.num_channels"),
        (["--set", "nothing"], "FIELD=VALUE"),
        (["--set", "hbm.num_channels=many"], "a number of channels, or text with a unit"),
        (["--set", "hbm.num_channels=0"], "hbm.num_channels"),
        (["--set", "hbm.num_channels=2.5"], "hbm.num_channels"),
        (["--set", "hbm.num_channels=2"], "channel"),
        (["--set", "hbm.num_channels=inf"], "hbm.num_channels"),
        (["--set", "hbm.num_channels=1e12"], "hbm.num_channels"),
        (["--set", "hbm.trp_cycles=-1"], "hbm.trp_cycles"),
        (["--set", "hbm.trp_cycles=nan"], "hbm.trp_cycles"),
        (["--set", "hbm.trefi_cycles=600"], "hbm.trefi_cycles"),
        (["--set", "hbm.trefi_cycles=inf"], "from 16 to 1e7 memory cycles, not inf"),
        (["--set", "hbm.bank_groups=3000000000"], "from 1 to 256"),
        (["--set", "npu.clock_hz=1" + 320 * "0"], "from 1e6 to 1e11 Hz"),
        (["--set", "hbm.num_channels=1" + 400 * "0"], "from 1 to 65536"),
        (["--html", "absent/page.html"], "absent/page.html"),
        (["--model", "Absent/My.toml"], "Absent/My.toml"),
        (["--set", "hbm.banks_per_group=0"], "hbm.banks_per_group"),
        (["--tp", "3"], "heads"),
        (["--tp", "0"], "tp"),
        (["--pp", "33"], "layers"),
        (["--model", "llama3-8b", "--tp", "32", "--pp", "40"], "layers"),
        (["--system", "npu-only", "--sub-batches", "2"], "neupims"),
        (["--system", "neupims_sbi", "--sub-batches", "1"], "sub-batches 2"),
    ],
)
def test_wrong_flags_are_refused(capsys, trace, flags, words):
    assert words in refused(capsys, "--model", "gpt3-7b", "--trace", trace, *flags)


def test_heads_that_do_not_divide(capsys, trace, tmp_path):
    model = tmp_path / "mine.json"
    numbers = {"layers": 2, "width": 1536, "heads": 12, "kv_heads": 4, "mlp_width": 4096}
    for change, words in (
        ({"heads": 7}, "heads"),
        ({"kv_heads": 5}, "kv_heads"),
        ({"layers": 0}, "layers"),
        ({"tp": 6}, "key and value heads"),
    ):
        model.write_text(json.dumps(numbers | change))
        assert words in refused(capsys, "--model", model, "--trace", trace)
    model.write_text(json.dumps(numbers | {"tp": 12}))  # a key head for 3 devices
    assert printed(capsys, "--model", model, "--trace", trace)["layer_cycles"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["dance"],
        ["simulate"],
        ["simulate", "--model", "gpt3-7b", "--trace", "x", "--sub-batches", "3"],
        ["--json"],
    ],
)
def test_wrong_words_exit_with_2(capsys, flags):
    assert main(flags) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage")


def test_a_full_channel_is_warned_of_and_timed(capsys, trace):
    trace.write_text("seq_len,ch_idx\n" + "7000,0\n" * 4)
    assert simulate("--model", "gpt3-7b", "--trace", trace, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["batch"] == 4
    assert "the requests of channel 0 need" in said.err


@pytest.mark.parametrize(
    ("flags", "case", "options"),
    [
        ([], {}, {}),
        (["--system", "NPU+PIM", "--tp", 8], {"system": "npu+pim", "tp": 8}, {}),
        (["--sub-batches", "auto"], {}, {"fastest": True}),
        (
            ["--set", "hbm.num_channels=16", "--row-buffers", "single", "--sub-batches", 1],
            {"changes": {"hbm.num_channels": 16}, "row_buffers": 1, "sub_batches": 1},
            {},
        ),
        (["--fidelity", "intended", "--pp", 2], {"fidelity": "intended", "pp": 2}, {}),
    ],
)
def test_json_is_the_record_of_the_library(capsys, trace, flags, case, options):
    result = printed(capsys, "--model", "gpt3-7b", "--trace", trace, *flags)
    found = simulate_case(make_case("gpt3-7b", trace, **case), path="closed", **options)
    assert json.loads(json.dumps(found.to_dict())) == result


def test_json_of_a_prefill_is_the_record_of_the_library(capsys, trace):
    flags = ["--model", "gpt3-7b", "--trace", str(trace), "--system", "gpu", "--prefill", "--json"]
    assert main(["simulate", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    found = simulate_case(make_case("gpt3-7b", trace, system="gpu"), prefill=True)
    assert json.loads(json.dumps(found.to_dict())) == result
    assert result["first_token_seconds"] > 0
