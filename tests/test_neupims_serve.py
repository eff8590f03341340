"""neupims/serving/serve.py and the command: traces in, results out, and refusals."""

import json
import sys

import numpy as np
import pytest

import neupims
from neupims.__main__ import main
from neupims.commands import serve as command
from neupims.serving.ahead import STEPS
from neupims.serving.loop import CHUNK
from neupims.serving.policy import ORDERS, PLACEMENTS
from neupims.serving.prefill_devices import Prefilled, prefill_apart
from neupims.serving.rates import sweep_rates
from neupims.serving.requests import Arrivals
from neupims.serving.results import Totals, add_totals
from neupims.serving.serve import drop_empty, run_requests
from neupims.serving.server import check_lengths, make_requests, make_server
from neupims.timing.capacity import request_bytes

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
    tpot = (done.served.end - done.served.first) / 1e9 / [2, np.nan, 3]  # tokens after the first
    np.testing.assert_allclose(done.measures["tpot"], tpot)
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
        ("arrival,input,output\n5,3,4\n2023-11-16 18:15:46,3,4\n", "a number like those above"),
        ("timestamp,input,output\n1800-01-01,3,4\n2023-01-01,3,4\n", "more than three years"),
        ("timestamp,input,output\n2023-01-01 10:00:00.-9,3,4\n", "must be a number or a date"),
    ],
)
def test_impossible_traces_are_refused(capsys, tmp_path, text, reason):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    assert reason in refused(capsys, "--trace", path)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--rate", 0), "the rate must be a finite number above 0, in requests a second, not 0"),
        (("--rate", "nan"), "the rate must be a finite number above 0"),
        (("--rate", 1e-12), "3 requests arrive in more than three years"),
        (("--rate", 1e-12, "--arrivals", "poisson"), "3 requests arrive in more than three years"),
        (("--rate", 1, "--arrivals", ""), "arrivals are poisson, or gamma:CV"),
        (("--arrivals", "weekly", "--rate", 1), "arrivals are poisson, or gamma:CV"),
        (("--arrivals", "poisson"), "gets new arrivals: give a rate"),
        (("--slo", "ttft<2"), "an objective is ttft, tpot, latency or queueing below a time"),
        (("--slo", "ttft<2s,ttft<3s"), "the objective ttft is given twice"),
        (("--requests", 4), "must be from 1 to 3, not 4"),
        (("--pp", 2), "give --pp 1 and --tp 8"),
        (
            ("--tp", 1, "--model", "gpt3-175b", "--pp", 1),
            "is left for requests beside its weights, 3",
        ),
        (("--slo", ""), "an objective is ttft, tpot"),
        (("--slo", "ttft<1e999s"), "an objective is ttft, tpot"),
        (("--batch", 0), "batch must be a whole number of at least 1 and at most 1000000, not 0"),
        (("--batch", 10**10), "batch must be a whole number of at least 1"),
        (("--prefill-tokens", 10**12), "prefill_tokens must be a whole number of at least 1"),
        (("--interleaving", "chosen"), "interleaving chosen needs the system neupims"),
        (("--system", "neupims_nosbi", "--interleaving", "chosen"), "means interleaving off"),
        (("--rate-sweep", "1:inf:3"), "LOW and HIGH must be finite and above 0"),
        (("--rate-sweep", "1,2", "--prefill-groups", 2), "leave out --rate, --perfetto and"),
        (("--prefill-groups", 2), "1 needs prefill separate"),
        (("--chunk-tokens", 64), "--chunk-tokens belongs to --prefill chunked: leave it out"),
        (("--share", 0.9), "--share belongs to --rate-sweep RATES: leave it out"),
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
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,3,2\n2024-05-10 01:00:01.5+01:00,3,2\n"
    )
    assert neupims.read_arrivals(azure).nanoseconds.tolist() == [0, 1_490_070_000]
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text('{"timestamp": 27, "input_length": 6955, "output_length": 52}\n')
    found = neupims.read_arrivals(mooncake)
    assert (found.nanoseconds.tolist(), found.inputs.tolist()) == ([27_000_000], [6955])


def test_columns_of_arrivals_are_chosen_by_name_and_read_in_their_unit(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("begins,t_ms,input,output\n0,0,0,2\n5,7,3,2\n")
    begins = neupims.read_arrivals(path, columns={"arrival": "begins"})
    assert begins.nanoseconds.tolist() == [
        0,
        5_000_000_000,
    ]  # "ns" is no unit here
    assert begins.notes == (
        "arrivals, column begins, are taken as seconds",
        "1 requests without input get a prompt of one token",
    )
    for name in ("t_ms", "2"):
        found = neupims.read_arrivals(path, columns={"arrival": name})
        assert found.nanoseconds.tolist() == [0, 7_000_000]
    with pytest.raises(ValueError, match="has no columns"):
        neupims.read_arrivals("alpaca:3", rate=1, columns={"arrival": "t"})


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (([], [], []), "holds no request"),
        (([0], [3], [0]), "must have input and output tokens"),
        (([5, 2], [3, 3], [4, 4]), "must rise from 0"),
        (([-5, 2], [3, 3], [4, 4]), "must rise from 0"),
        (([0, 2], [3, 3], [4]), "as many of each"),
        (([0.5], [3], [4]), "arrays of whole numbers"),
        (([4 * 10**17], [3], [4]), "more than three years"),
        (([0], [10**6], [4]), "more than 1000000 tokens"),
    ],
)
def test_impossible_requests_are_refused(columns, reason):
    with pytest.raises(ValueError, match=reason):
        Arrivals("mine", *(np.array(each, None if each else int) for each in columns))


def test_requests_are_stretched_cut_and_drawn_like_those_of_a_file(trace):
    made = neupims.read_arrivals(trace)
    for options in ({"rate": 40}, {"first": 2}, {"rate": 3, "process": "gamma:2", "first": 2}):
        found = neupims.read_arrivals(made, **options)
        wanted = neupims.read_arrivals(trace, **options)
        assert found.nanoseconds.tolist() == wanted.nanoseconds.tolist()
        assert (found.notes, found.outputs.tolist()) == (wanted.notes, wanted.outputs.tolist())


def test_no_file_of_a_run_is_written_over(capsys, trace, tmp_path):
    assert "is another file of this run" in refused(capsys, "--trace", trace, "--html", trace)
    assert trace.read_text() == TRACE
    page = tmp_path / "page"
    flags = ("--trace", trace, "--html", page, "--perfetto", page)
    assert "is another file of this run" in refused(capsys, *flags)
    assert "Is a directory" in refused(capsys, "--trace", trace, "--html", tmp_path)


def test_a_prompt_that_is_left_out_takes_no_memory_from_the_others():
    columns = [0, 5, 9], [50_000, 999_000, 400_000], [2, 2, 500_000]
    made = Arrivals("mine", *map(np.array, columns))
    _, server = make_server("llama3-8b", system="npu-only", tp=4, batch=16)
    kept, notes = check_lengths(server, made, "whole", True)
    assert kept.inputs.tolist() == [50_000]
    assert [note.partition(" are")[0] for note in notes] == [
        *("1 of 3 requests", "1 of 2 requests")  # a prompt without memory; one that grows too long
    ]
    with pytest.raises(ValueError, match="no memory of a device is left"):
        check_lengths(server, made, "whole", False)


def test_the_order_of_admission_holds_where_prompts_come_from_other_devices():
    made = Arrivals("mine", *(np.array(each) for each in ([0, 0, 0], [90, 30, 60], [1, 9, 9])))
    apart = Prefilled(made.nanoseconds, *(np.array([10, 20, 30]) + late for late in (0, 5)), 0.0)
    keys = {name: make_requests(made, ORDERS[name], 4, apart) for name in ("fcfs", "deadline")}
    for requests, numbers in keys.values():
        assert numbers.tolist() == [1, 2]  # the first one has its only token
        assert requests.keys[:2].tolist() == [0, 1]
    longest = make_requests(made, lambda seen: 99 - seen.inputs, 4, apart)[0]
    assert longest.keys[:2].tolist() == [69, 39]


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


def test_keys_and_values_go_over_the_link_before_they_are_decoded(trace):
    link = {"link.bandwidth_bytes_per_second": 1e9, "link.latency_seconds": 1e-3}
    _, server = make_server("llama3-8b", system="npu-only", tp=4, batch=16, changes=link)
    made, machine = neupims.read_arrivals(trace), server.hardware
    ready = prefill_apart(server.setting, machine, made, groups=1)
    places = machine, server.setting.model, made.inputs, server.setting.parallel
    way = request_bytes(*places, system="npu-only") / machine.link.bandwidth_bytes_per_second
    seconds = (ready.arrived - ready.end) / 1e9
    np.testing.assert_allclose(seconds, way + machine.link.latency_seconds, rtol=1e-3)


def test_a_channel_has_places_for_twice_its_share_of_the_batch():
    _, server = make_server("gpt3-7b", batch=100)
    assert server.rules.rows == 32
    assert server.rules.places == 2 * 4


def test_totals_of_parts_of_a_run_are_added_and_the_most_is_kept():
    one, other = Totals(*[1.0] * len(Totals._fields)), Totals(*[3.0] * len(Totals._fields))
    both = add_totals(other, one)
    assert both.most_blocks == 3
    assert set(both._replace(most_blocks=4)) == {4}


def test_many_rates_at_once_serve_as_each_alone(capsys, trace, tmp_path):
    flags = ("--trace", trace, "--rate-sweep", "5,400", "--slo", "queueing<1us", "--share", "0.6")
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
    fails = [share < 0.6 for share in meets]
    first = fails.index(True)  # there is a rate that fails, and a lower one that does not
    assert first > 0
    assert found["highest_rate"] == found["rates"][first - 1]
    assert found["lowest_rate_that_fails"] == found["rates"][first]
    inside = [5 * 80 ** (1 / 3), 5 * 80 ** (2 / 3)]  # of the first round of bisection
    assert all(any(rate == pytest.approx(each) for rate in found["rates"]) for each in inside)
    assert "a sweep needs from 2" in refused(capsys, "--trace", trace, "--rate-sweep", "3,3")
    said = refused(capsys, "--trace", trace, "--rate-sweep", "1:2")
    assert "rates are R,R,..." in said
    assert "not '1:2' (a range has two colons)" in said


def test_the_command_names_every_order_and_placement():
    """It lists them itself, since a parser that imported them would load JAX."""
    assert tuple(ORDERS) == command.ORDERS
    assert tuple(PLACEMENTS) == command.PLACEMENTS


def test_changes_without_effect_are_warned_of(capsys, trace):
    """Prompts are computed as intended, where vector units matter."""
    flags = ("--set", "pim.macs_per_bank=8", "--set", "npu.speedup_8_bit=2")
    flags += ("--set", "npu.vector_units=4")
    assert serve("--trace", trace, *flags, "--json") == 0
    said = capsys.readouterr()
    warnings = json.loads(said.out)["warnings"]
    assert [each.partition(" ")[0] for each in warnings] == [
        "npu.speedup_8_bit",
        "pim.macs_per_bank",
    ]
    assert said.err == "".join(f"neupims: warning: {each}\n" for each in warnings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 2.5}, "batch must be a whole number of at least 1 .*, not 2.5"),
        ({"batch": "x"}, "batch must be a whole number .*, not 'x'"),
        ({"batch": True}, "batch must be a whole number .*, not True"),
        ({"prefill_tokens": 2.5}, "prefill_tokens must be a whole number"),
        ({"chunk_tokens": 2.5}, "chunk_tokens must be a whole number"),
        ({"spare": "x"}, "from 0 to below 1, not 'x'"),
        ({"first": 1.5}, "from 1 to 3, not 1.5"),
        ({"first": "x"}, "from 1 to 3, not 'x'"),
        ({"rate": "x"}, "the rate must be a finite number above 0, .*, not 'x'"),
        (
            {"prefill_groups": "x"},
            "prefill_groups must be a whole number of at least 1, .* not 'x'",
        ),
        ({"slo": ("ttft<2s",)}, "slo must be text such as ttft<2s,tpot<100ms, or Limits, not"),
        ({"slo": None}, "slo must be text .* not None"),
    ],
)
def test_arguments_of_another_kind_are_refused(options, words, trace):
    with pytest.raises(ValueError, match=words):
        neupims.serve("llama3-8b", trace, tp=4, **options)
    if not {"rate", "prefill_groups"} & set(options):
        with pytest.raises(ValueError, match=words):
            sweep_rates("llama3-8b", trace, [1, 2], tp=4, **options)


def test_steps_computed_together_cost_what_they_cost_alone(monkeypatch):
    requests = neupims.read_arrivals("alpaca:16", rate=20.0)
    _, server = make_server("llama3-8b", tp=4, batch=64, system="npu-only")
    module, most = sys.modules["neupims.serving.serve"], []

    def watch(steps):
        most.append(int((steps.computed.reshape(CHUNK, -1) > 0).sum(axis=1).max()))
        return drop_empty(steps)

    monkeypatch.setattr(module, "drop_empty", watch)
    several = run_requests(server, requests, ORDERS["fcfs"], None, None)
    monkeypatch.setattr(module, "look_ahead", lambda rules: rules)
    one = run_requests(server, requests, ORDERS["fcfs"], None, None)
    assert most == [STEPS, 1]  # iterations of a step, in a run of each kind
    np.testing.assert_allclose(several.served.end, one.served.end, rtol=0, atol=100)  # ns
    np.testing.assert_array_equal(several.iterations.requests, one.iterations.requests)
    np.testing.assert_allclose(several.totals, one.totals, rtol=1e-5)
