"""neupims/serving/serve.py and the command: traces in, results out, and refusals."""

import json

import numpy as np
import pytest

import neupims
from neupims.__main__ import main

TRACE = "arrival_s,input_tokens,output_tokens\n0.0,30,3\n0.001,50,1\n0.5,20,4\n"
MODEL = ("--model", "llama3-8b", "--tp", "4", "--batch", "16", "--system", "npu-only")


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def serve(*flags):
    return main(["serve", *MODEL, *map(str, flags)])


def refused(capsys, *flags):
    """The sentence of the tool on standard error, with nothing on standard output."""
    assert serve(*flags, "--json") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("neupims: ")
    assert said.err.count("\n") == 1
    return said.err


def test_a_trace_is_served_and_printed(capsys, trace, tmp_path):
    assert serve("--trace", trace, "--slo", "ttft<1s,tpot<1us", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    done = neupims.serve(
        *("llama3-8b", trace), system="npu-only", tp=4, batch=16, slo="ttft<1s,tpot<1us"
    )
    told = done.to_dict()
    assert {**found, "wall_seconds": 0} == {**told, "wall_seconds": 0}
    assert found["output_tokens"] == done.iterations.requests.sum() == 8
    assert found["input_tokens"] == done.iterations.prompt_tokens.sum() == 100
    assert found["meets_objectives"] == pytest.approx(1 / 3)  # the one of a single token
    assert done.served.end[1] == done.served.first[1]
    assert done.served.admitted[2] == 500_000_000  # nobody was there
    wide = done.iterations
    assert found["seconds"] == pytest.approx(done.served.end.max() / 1e9)
    assert wide.seconds.sum() == pytest.approx(found["busy_share"] * found["seconds"])

    page, events = tmp_path / "page.html", tmp_path / "events.json"
    assert serve("--trace", trace, "--html", page, "--perfetto", events) == 0
    assert "time to first token" in capsys.readouterr().out
    assert page.read_text().count("<svg") == 3 + 4  # over time, and distributions
    listed = json.loads(events.read_text())["traceEvents"]
    assert sum(each["ph"] == "X" for each in listed) == len(wide.end)
    assert sum(each["ph"] == "b" and each["name"] == "decode" for each in listed) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("arrival_s,input,output\n", "holds no request"),
        ("arrival_s,input,output\n-1,3,4\n", "line 2: the arrival must not be negative, but is -1"),
        ("arrival_s,input,output\n5,3,4\n2,3,4\n", "line 3: the arrival is 3 s before that of"),
        ("arrival_s,input,output\nnan,3,4\n", "must be a number or a date, not 'nan'"),
        ("timestamp,input,output\n5,3,4\n", "may be of seconds or of milliseconds"),
        ("input,output\n5,3\n", "has no arrivals: give a rate"),
        ("arrival_s,input,output\n0,30,0\n", "holds no request with output"),
        ("arrival_s,input,output\n0,900000,9\n", "grows to 900008 tokens, but the memory holds"),
    ],
)
def test_impossible_traces_are_refused(capsys, tmp_path, text, reason):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    assert reason in refused(capsys, "--trace", path)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--rate", 0), "the rate must be more than 0 requests a second, not 0"),
        (("--rate", "nan"), "the rate must be more than 0"),
        (("--arrivals", "weekly", "--rate", 1), "arrivals are poisson, or gamma:CV"),
        (("--arrivals", "poisson"), "gets new arrivals: give a rate"),
        (("--slo", "ttft<2"), "an objective is ttft, tpot, latency or queueing below a time"),
        (("--slo", "ttft<2s,ttft<3s"), "the objective ttft is given twice"),
        (("--requests", 4), "must be from 1 to 3, not 4"),
        (("--pp", 2), "give --pp 1 and --tp 8"),
        (("--batch", 0), "must be at least 1"),
        (("--prefill-groups", 2), "needs prefill separate"),
    ],
)
def test_impossible_flags_are_refused(capsys, trace, flags, reason):
    assert reason in refused(capsys, "--trace", trace, *flags)


def test_traces_of_azure_and_mooncake_are_read(tmp_path):
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    assert neupims.read_arrivals(azure).nanoseconds.tolist() == [0, 4_314_579_000]
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text('{"timestamp": 27, "input_length": 6955, "output_length": 52}\n')
    found = neupims.read_arrivals(mooncake)
    assert (found.nanoseconds.tolist(), found.inputs.tolist()) == ([27_000_000], [6955])


def test_rates_stretch_or_draw_arrivals(trace):
    assert neupims.read_arrivals(trace, rate=40).nanoseconds.tolist() == [0, 100_000, 50_000_000]
    drawn = neupims.read_arrivals("sharegpt:4000", rate=8, process="gamma:3", seed=1)
    gaps = np.diff(drawn.nanoseconds) / 1e9
    assert drawn.rate == pytest.approx(8, rel=0.15)
    assert gaps.std() / gaps.mean() == pytest.approx(3, rel=0.15)


def test_prompts_in_chunks_leave_decoding_going(trace):
    options = {"system": "npu-only", "tp": 4, "batch": 16, "rate": 500.0}
    done = neupims.serve("llama3-8b", trace, prefill="chunked", chunk_tokens=24, **options)
    each = done.iterations
    assert each.prompt_tokens.sum() == 100
    assert each.requests.sum() == 8
    assert (each.prompt_tokens + each.requests).max() <= 24 + 4  # an ended prompt counts twice
    assert ((each.prompt_tokens > 0) & (each.requests > 0)).any()
    assert (done.served.end >= done.served.first).all()


def test_prompts_on_devices_of_their_own_follow_each_other(trace):
    done = neupims.serve("llama3-8b", trace, system="npu-only", tp=4, batch=16, prefill="separate")
    served = done.served
    assert served.admitted[0] == 0
    assert served.admitted[1] == max(served.first[0], 1_000_000)
    assert served.end[1] == served.first[1]  # a request of one token never decodes
    assert (served.end[[0, 2]] > served.first[[0, 2]]).all()
    assert done.iterations.requests.sum() == 2 + 3
    assert done.prefill_joules > 0


def test_many_rates_at_once_serve_as_each_alone(capsys, trace, tmp_path):
    flags = ("--trace", trace, "--rate-sweep", "5,400", "--slo", "latency<60ms", "--share", "0.6")
    page = tmp_path / "page.html"
    assert serve(*flags, "--html", page, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert page.read_text().count("<svg") == 5
    low, high = found["rates"][0], found["rates"][-1]
    assert (low, high) == (5, 400)
    assert found["rates"] == sorted(found["rates"])
    for rate, run in zip(found["rates"], found["runs"], strict=True):
        if rate in (low, high):
            alone = neupims.serve(
                "llama3-8b", trace, rate=rate, system="npu-only", tp=4, batch=16
            ).to_dict()
            assert run["seconds"] == pytest.approx(alone["seconds"], rel=1e-6)
            assert run["latency"] == pytest.approx(alone["latency"], rel=1e-6)
            assert run["energy_joules"] == pytest.approx(alone["energy_joules"], rel=1e-5)
    meets = [run["meets_objectives"] for run in found["runs"]]
    for rate, share in zip(found["rates"], meets, strict=True):
        if rate <= (found["highest_rate"] or 0):
            assert share >= 0.6
    assert "a sweep needs from 2" in refused(capsys, "--trace", trace, "--rate-sweep", "3,3")
    assert "rates are R,R,..." in refused(capsys, "--trace", trace, "--rate-sweep", "1:2")
