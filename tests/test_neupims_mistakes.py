"""neupims from Python: impossible input is refused in a sentence, and nothing is guessed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import neupims
from neupims.scheduling.decision import HardwareKnob

ROOT = Path(__file__).resolve().parent.parent
BATCH = neupims.make_batch([300, 512, 40, 77], channels=[0, 0, 0, 1])
FAR = neupims.make_batch([300, 512], channels=[0, 31])
NONE = neupims.Batch(*np.zeros((3, 2), int))
KNOBS = {"npu.num_arrays": [4, 8]}


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (([np.nan], [0]), "length of request 0 must be a whole number from 1 to 1000000, not nan"),
        (([np.inf], [0]), "length of request 0 must be a whole number from 1 to 1000000, not inf"),
        (([5], [np.nan]), "channel of request 0 must be from 0 to 31, not nan"),
        (([None], [0]), "the lengths of a batch must be whole numbers"),
        (([[1], [2, 3]], [0, 0]), "the lengths of a batch must be whole numbers"),
        (([5, 6], ["a", "b"]), "the channels of a batch must be whole numbers"),
        (([5, 6], [0, 1], [0]), r"one sub-batch for each request, not \(1,\)"),
        (([5, 6], [0, 1], [0, 7]), "the sub-batch of a request must be 0 or 1, not 7"),
        (([5, 6], [0, 1], [0.5, 1]), "the sub-batch of a request must be 0 or 1, not 0.5"),
    ],
)
def test_a_batch_holds_whole_numbers(parts, sentence):
    with pytest.raises(ValueError, match=sentence):
        neupims.make_batch(*parts)


@pytest.mark.parametrize(
    ("trace", "options", "sentence"),
    [
        (BATCH, {"sub_batches": 0}, "sub-batches must be 1 or 2, not 0"),
        (BATCH, {"sub_batches": 3}, "sub-batches must be 1 or 2, not 3"),
        (BATCH, {"fidelity": "exact"}, "fidelity must be one of simulator, intended, not 'exact'"),
        (BATCH, {"system": None}, "the system must be one of neupims"),
        (FAR, {"changes": {"hbm.num_channels": 16}}, "request 1 must be from 0 to 15, not 31"),
        (NONE, {}, "a batch needs at least one request"),
    ],
)
def test_a_case_is_checked_when_it_is_made(trace, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        neupims.make_case("gpt3-7b", trace, **options)


def test_a_request_on_a_channel_that_is_not_there_is_refused():
    machine = neupims.replace(neupims.Hardware(), "hbm.num_channels", 16)
    case = neupims.make_case("gpt3-7b", FAR)._replace(hardware=machine)
    sentence = "channel of request 1 must be from 0 to 15, not 31"
    with pytest.raises(ValueError, match=sentence):
        neupims.simulate_case(case)
    with pytest.raises(ValueError, match=sentence):
        neupims.search_schedule(case)
    with pytest.raises(ValueError, match=sentence):
        neupims.explore(machine, "gpt3-7b", FAR, KNOBS, method="grid", schedule="trace")


def test_padding_does_not_count():
    padded = neupims.Batch(*(np.pad(part, (0, 2)) for part in vars(BATCH).values()))
    cycles = [
        float(neupims.simulate_case(neupims.make_case("gpt3-7b", batch)).iteration.layer_cycles)
        for batch in (BATCH, padded)
    ]
    assert cycles[0] == cycles[1]


def knob(low, high, whole=True, name="npu.num_arrays"):
    return {"hardware_knobs": [HardwareKnob(name, low, high, whole)]}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sub_batches": (3,)}, r"sub_batches must be \(1,\), \(2,\) or \(1, 2\), not \(3,\)"),
        ({"sub_batches": ()}, r"sub_batches must be .*, not \(\)"),
        ({"sub_batches": 2}, "sub_batches must be .*, not 2"),
        ({"seeds": "2"}, "seeds must be a whole number, not '2'"),
        ({"order_levels": 2.5}, "order_levels must be a whole number, not 2.5"),
        ({"seed": 1.5}, r"the seed must be a whole number below 2\^63, not 1.5"),
        ({"seed": 2**70}, "the seed must be a whole number"),
        (knob(8, 2), "low of npu.num_arrays must be at most high, but 8 is above 2"),
        (
            knob(float("nan"), 2),
            "npu.num_arrays must be a whole number of arrays from 1 to 65536, not nan",
        ),
        (knob(-2, 4), "npu.num_arrays must be a whole number of arrays from 1 to 65536, not -2"),
        (knob(2, 4, whole=False), "npu.num_arrays must be searched with whole=True"),
        (knob(2, 4, name="npu.nope"), "must be HardwareKnob records of fields .*npu.nope"),
        ({"hardware_knobs": ["npu.num_arrays"]}, "hardware_knobs must be HardwareKnob records"),
        ({"hardware_knobs": knob(2, 4)["hardware_knobs"] * 2}, "a knob is repeated"),
    ],
)
def test_a_search_is_refused_before_it_begins(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        neupims.search_schedule(neupims.make_case("gpt3-7b", BATCH), **options)


def test_a_prefill_has_no_schedule():
    case = neupims.make_case("gpt3-7b", BATCH)._replace(prefill=True)
    with pytest.raises(ValueError, match="for a decode step, not for a prefill"):
        neupims.search_schedule(case)


@pytest.mark.parametrize("counts", [(1, 1), [1]])
def test_one_batch_stays_one_batch_however_it_is_written(counts):
    case = neupims.make_case("gpt3-7b", BATCH)
    found = neupims.search_schedule(case, budget=16, population=16, seeds=1, sub_batches=counts)
    assert found.strategies["evolution"].cost > 0
    assert found.best.sub_batches == 1


@pytest.mark.parametrize(
    ("knobs", "options", "sentence"),
    [
        ({"sub_batches": (1, 5)}, {}, "sub_batches must be 1 or 2, not 5"),
        (KNOBS, {"sub_batches": 0}, "sub_batches must be one of 1, 2, not 0"),
        (KNOBS, {"objectives": []}, r"objectives must be text .* not \(\)"),
        (KNOBS, {"objectives": ["area_mm2:min"]}, "objectives must be text"),
        (KNOBS, {"constraints": "area_mm2 <"}, "constraint 'area_mm2 <' is not an expression"),
        (KNOBS, {"points": "3"}, "points must be a whole number, not '3'"),
        (KNOBS, {"chunk": 1.5}, "chunk must be a whole number, not 1.5"),
        (KNOBS, {"seed": 1.5}, "the seed must be a whole number"),
    ],
)
def test_an_exploration_is_refused_before_it_begins(knobs, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        neupims.explore("neupims", "gpt3-7b", BATCH, knobs, method="grid", **options)


def test_tables_go_nowhere_where_the_output_is_closed():
    command = f"{sys.executable} -m neupims show hardware >&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
