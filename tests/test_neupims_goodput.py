"""Goodput: the highest rate at which limits hold, of machines side by side, and as an objective."""

import numpy as np
import pytest

import neupims
from neupims.__main__ import main
from neupims.exploration import goodput
from neupims.exploration.goodput import ServedTrace, split_goodput
from neupims.exploration.points import Objective, parse_objectives
from neupims.exploration.workloads import make_workloads
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace_all
from neupims.serving import goodput as serving_goodput
from neupims.serving import lanes as serving_lanes
from neupims.serving.goodput import find_goodputs
from neupims.serving.lanes import run_lanes
from neupims.serving.objectives import Tail, excess, parse_tails
from neupims.serving.policy import first_come
from neupims.serving.requests import read_arrivals, stretch
from neupims.serving.results import measure
from neupims.serving.serve import run_requests
from neupims.serving.server import fit_channels, make_server

REQUESTS = read_arrivals("alpaca:12", rate=1.0)
TAILS = parse_tails("ttft_p90<150ms,tpot_p99<8ms")


@pytest.fixture(scope="module")
def server():
    return make_server("llama3-8b", tp=4, batch=16)[1]


each_placement = pytest.mark.parametrize(
    "placement",
    [
        "round-robin",
        pytest.param("greedy", marks=pytest.mark.slow),
        pytest.param("least-work", marks=pytest.mark.slow),
    ],
)
CHANGES = {"npu.num_arrays": 2, "hbm.num_channels": 20}


def serve_alone(server, rate):
    """The requests at a rate, and what became of them, on one machine alone."""
    came = stretch(REQUESTS, rate)
    return came, run_requests(server, came, first_come, None, None).served


@each_placement
def test_the_goodput_is_a_rate_that_holds_and_a_little_more_does_not(placement):
    alone = [
        make_server("llama3-8b", tp=4, batch=48, placement=placement, changes=changes)[1]
        for changes in ({"hbm.num_channels": 24}, CHANGES)
    ]
    found = find_goodputs(alone[0], [each.hardware for each in alone], REQUESTS, TAILS)
    assert found[0] > found[1] > 0
    for server, rate in zip(alone, found, strict=True):
        for factor, holds in ((1.0, True), (1.05, False)):
            came, served = serve_alone(server, rate * factor)
            assert (excess(TAILS, measure(came, served)) <= 1) == holds


@pytest.mark.parametrize("apart", [True, False])
@each_placement
def test_lanes_with_fewer_channels_serve_as_alone(placement, apart, monkeypatch):
    """Few places and little room, so that channels, places and turns count."""
    machines = [{"hbm.num_channels": 3}, {"hbm.num_channels": 5}, {"hbm.num_channels": 8}]
    servers = [
        make_server(
            *("llama3-8b",), tp=8, batch=12, placement=placement, interleaving="off", changes=each
        )[1]
        for each in machines
    ]
    requests = read_arrivals("alpaca:40", rate=2000.0)
    shared = fit_channels(servers[0], 1, 8)
    assert (shared.rules.rows, shared.rules.places) == (8, 12)
    monkeypatch.setattr(serving_lanes, "are_apart", lambda: apart)
    lanes = run_lanes(shared, [each.hardware for each in servers], [requests])
    for lane, server in zip(lanes, servers, strict=True):
        ran = run_requests(server, requests, first_come, None, None)
        alone = ran.served
        np.testing.assert_allclose(lane.totals, ran.totals, rtol=1e-5)
        # Lanes round some times differently, by nanoseconds.
        np.testing.assert_allclose(lane.served.end, alone.end, rtol=1e-6)
        np.testing.assert_allclose(lane.served.admitted, alone.admitted, rtol=1e-6)


def test_machines_side_by_side_have_the_goodputs_of_one_after_another(server, monkeypatch):
    machines = [replace_all(server.hardware, {"npu.num_arrays": count}) for count in (4, 8)]
    apart = find_goodputs(server, machines, REQUESTS, TAILS)
    for module in (serving_lanes, serving_goodput):
        monkeypatch.setattr(module, "are_apart", lambda: False)
    together = find_goodputs(server, machines, REQUESTS, TAILS)
    np.testing.assert_allclose(together, apart, rtol=1e-6)


def test_limits_that_always_hold_give_what_the_machine_serves_at_most(server):
    (loose,) = find_goodputs(server, [server.hardware], REQUESTS, parse_tails("ttft_p99<1000s"))
    came = REQUESTS.__class__(
        "at once", 0 * REQUESTS.nanoseconds, REQUESTS.inputs, REQUESTS.outputs
    )
    ran = run_requests(server, came, first_come, None, None)
    assert loose == pytest.approx(len(came.inputs) / (ran.served.end.max() / 1e9), rel=1e-9)
    (strict,) = find_goodputs(server, [server.hardware], REQUESTS, parse_tails("tpot_p50<1us"))
    assert strict == 0


def test_a_machine_without_memory_has_none_and_leaves_its_neighbour_alone(server):
    tiny = replace_all(server.hardware, {"hbm.rows": 1024})
    alone = find_goodputs(server, [server.hardware], REQUESTS, TAILS)
    both = find_goodputs(server, [tiny, server.hardware], REQUESTS, TAILS)
    np.testing.assert_array_equal(both, [0, alone[0]])
    np.testing.assert_array_equal(find_goodputs(server, [tiny], REQUESTS, TAILS), [0])


def test_excess_is_that_of_the_worst_percentile():
    measures = {"ttft": np.array([1.0, 3.0]), "tpot": np.array([0.1, np.nan])}
    assert excess((Tail("ttft", 50, 1.0), Tail("tpot", 99, 0.2)), measures) == pytest.approx(2.0)
    assert excess((Tail("tpot", 50, 0.2),), {"tpot": np.array([np.nan])}) == 0


def test_tails_are_read():
    assert parse_tails("ttft_p99<2s, tpot_p99.9 <= 100ms") == (
        Tail("ttft", 99, 2.0),
        Tail("tpot", 99.9, 0.1),
    )
    assert len(parse_tails("ttft_p50<1s,ttft_p99<2s")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft<2s", "such as ttft_p99<2s"),
        ("ttft_p0<2s", "not 'ttft_p0<2s'"),
        ("ttft_p101<2s", "not 'ttft_p101<2s'"),
        ("ttft_p99<2", "not 'ttft_p99<2'"),
        ("speed_p99<2s", "not 'speed_p99<2s'"),
        ("ttft_p99<2s,ttft_p99.0<1s", "given twice"),
    ],
)
def test_tails_of_another_form_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_tails(text)


def test_the_limits_are_taken_out_of_the_objectives():
    found, tails = split_goodput(
        parse_objectives("goodput@ttft_p99<2s,tpot_p99<1s:max,area_mm2:min")
    )
    assert found == (Objective("goodput", True), Objective("area_mm2", False))
    assert tails == parse_tails("ttft_p99<2s,tpot_p99<1s")


EXPLORED = {
    "hardware": "neupims",
    "models": "llama3-8b",
    "batches": "alpaca:16",
    "knobs": {"npu.num_arrays": [2, 8], "sub_batches": [1, 2]},
    "method": "grid",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": "goodput:max"}, "goodput@LIMITS:max"),
        ({"objectives": "goodput@ttft_p99<2s:min"}, "goodput@LIMITS:max"),
        ({"objectives": "goodput@ttft_p99<2s:max"}, "need each other"),
        ({"serve": ServedTrace("alpaca:10")}, "need each other"),
        (
            {"objectives": "goodput@ttft_p99<2s:max", "serve": "alpaca:10"},
            "serve must be a ServedTrace of the requests, not 'alpaca:10'",
        ),
        (
            {
                "objectives": "goodput@ttft_p9<2s:max,goodput@ttft_p99<1s:max",
                "serve": ServedTrace("alpaca:9"),
            },
            "one goodput",
        ),
        (
            {
                "objectives": "goodput@ttft_p99<2s:max",
                "serve": ServedTrace("alpaca:10"),
                "knobs": {"parallel.pp": [1, 2]},
            },
            "knob parallel.pp",
        ),
        ({"measures": [3]}, r"measures must be records of Measure, not \[3\]"),
        (
            {"objectives": "goodput@ttft_p99<2s:max", "serve": ServedTrace("alpaca:1")},
            "one instant",
        ),
    ],
)
def test_a_goodput_that_is_not_one_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        neupims.explore(**(EXPLORED | changes))


def test_designs_are_explored_by_goodput_and_area(server):
    found = neupims.explore(
        **EXPLORED | {"knobs": {"npu.num_arrays": [2, 8]}},
        serve=neupims.ServedTrace("alpaca:12", batch=16),
        objectives="goodput@ttft_p90<150ms,tpot_p99<8ms:max,area_mm2:min",
        constraints="goodput > 0.5",
        parallel={"tp": 4},
    )
    machines = [replace_all(server.hardware, {"npu.num_arrays": count}) for count in (8, 2)]
    alone = find_goodputs(server, machines, REQUESTS, TAILS)
    assert [each.knobs["npu.num_arrays"] for each in found.front] == [8, 2]
    assert [each.metrics["goodput"] for each in found.front] == alone.tolist()
    assert "alpaca:12: arrivals are drawn: poisson, seed 0" in found.trace_notes
    assert found.to_dict()["base"]["metrics"]["goodput"] == pytest.approx(alone[0], rel=1e-12)


def test_each_model_is_served_once_in_each_setting(monkeypatch):
    calls = []

    def layers_times_arrays(server, machines, requests, tails):
        setting = server.setting
        calls.append((int(setting.model.layers), setting.interleaving, len(machines)))
        scale = setting.model.layers * (100 if setting.interleaving == "on" else 1)
        return np.array([scale * each.npu.num_arrays for each in machines])

    monkeypatch.setattr(goodput, "find_goodputs", layers_times_arrays)
    workloads = make_workloads(
        ["gpt3-7b", "gpt3-30b"], ["alpaca:4", "alpaca:5"], parallel={"pp": 1}, dealt=True
    )
    measure = goodput.measure_goodput(
        workloads, Hardware(), REQUESTS, TAILS, (), system="neupims", sub_batches=2,
        fidelity="simulator",
    )  # fmt: skip
    knobs = {"npu.num_arrays": np.array([2.0, 4, 8]), "sub_batches": np.array([1.0, 2, 1])}
    found = measure.compute(knobs)["goodput"]
    layers = np.array([int(each.model.layers) for each in workloads])
    assert len(set(layers)) == 2
    np.testing.assert_array_equal(found, np.array([2, 400, 8])[:, None] * layers)
    few, many = sorted(set(layers.tolist()))
    expected = [(few, "off", 2), (many, "off", 2), (few, "on", 1), (many, "on", 1)]
    assert sorted(calls) == sorted(expected)


@pytest.mark.slow
def test_interleaving_is_a_knob_of_goodput():
    found = neupims.explore(
        **EXPLORED,
        serve=neupims.ServedTrace("alpaca:12", batch=16),
        objectives="goodput@ttft_p90<150ms,tpot_p99<8ms:max,area_mm2:min",
    )
    best = found.front[0]
    assert best.knobs["sub_batches"] == 1  # sixteen requests gain nothing from two halves
    off = make_server("llama3-8b", batch=16, interleaving="off")[1]
    machine = replace_all(off.hardware, {"npu.num_arrays": best.knobs["npu.num_arrays"]})
    alone = find_goodputs(off, [machine], REQUESTS, TAILS)
    assert best.metrics["goodput"] == pytest.approx(float(alone[0]), rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [
                *("--serve", "alpaca:1", "--knob", "npu.num_arrays=2,4"),
                *("--objectives", "goodput@ttft_p99<2s:max"),
            ],
            "take at least two requests that arrive apart",
        ),
        (["--serve-batch", "8", "--knob", "npu.num_arrays=2,4"], "--serve-batch needs --serve"),
        (["--serve-requests", "8", "--system", "neupims,npu-pim"], "--serve-requests is for the"),
    ],
)
def test_flags_of_serving_are_refused_where_nothing_is_served(flags, message, capsys):
    assert main(["explore", "--trace", "alpaca:8", *flags]) != 0
    assert message in capsys.readouterr().err


def test_requests_that_were_read_are_served_as_they_are():
    again = goodput.read_served(ServedTrace(REQUESTS), seed=5)
    np.testing.assert_array_equal(again.nanoseconds, REQUESTS.nanoseconds)
