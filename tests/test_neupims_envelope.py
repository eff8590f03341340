"""neupims/envelope.py: errors are stated only where something was measured."""

import json

import numpy as np
import pytest
from test_neupims_validate import KNOBS, MEASURED, write_table

from benchmarks.neupims_expected_error import gain_errors, kind_of_gain, measure, tabulate
from neupims import make_batch, make_case, replace
from neupims.__main__ import main
from neupims.envelope import (
    ExpectedError,
    envelope,
    expected_error,
    features,
    gain_error,
    join_errors,
    load_table,
    runs_of,
)
from neupims.exploration.space import make_space
from neupims.exploration.validated import count_validated
from neupims.exploration.workloads import make_workloads
from neupims.machine.workload import Decoder, Parallel

BATCH = make_batch([600, 40, 513, 300], [0, 1, 0, 2])


def case_of(system="neupims_sbi", batch=BATCH, **options):
    return make_case("gpt3-7b", batch, system=system, **options)


def with_model(case, **changes):
    fields = {
        name: int(getattr(case.model, name))
        for name in ("layers", "width", "heads", "kv_heads", "mlp_width")
    }
    return case._replace(model=Decoder(**(fields | changes)))


@pytest.mark.parametrize("spelling", ["neupims_sbi", "neupims_nosbi", "npu+pim", "npu-only"])
@pytest.mark.parametrize("path", ["exact", "closed"])
def test_inside_the_envelope_the_error_is_that_of_the_table(spelling, path):
    found = expected_error(case_of(spelling), path=path)
    table = load_table()
    assert found.percent == table[path][spelling] | {"path": path, "of": table["of"]}
    assert found.not_validated == ()
    assert found.percent["layer_runs"] > 0
    assert found.nearest["layer_error_percent"] == next(
        run["layer_error_percent"][path]
        for run in table["runs"][spelling]
        if run["run"] == found.nearest["run"]
    )


def test_the_table_knows_every_feature_and_its_own_runs():
    for spelling in load_table()["runs"]:
        limits = envelope(spelling)
        assert set(features(case_of(spelling))) <= set(limits)
        for run in runs_of(spelling):
            assert all(
                limits[name][0] <= value <= limits[name][1]
                for name, value in run["features"].items()
            )


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"hbm.trfc_cycles": 380}, ["DRAM timings (hbm.trfc_cycles 380, validated 260)"]),
        ({"npu.clock_hz": 1.4e9}, ["clocks (npu.clock_hz 1.4e+09, validated 7e+08 to 1e+09)"]),
        ({"hbm.num_channels": 128}, ["channels (hbm.num_channels 128, validated 16 to 64)"]),
        ({"hbm.bus_bits": 64}, ["organisation of the memory (hbm.bus_bits 64, validated 128)"]),
        ({"npu.num_arrays": 4}, ["NPU (npu.num_arrays 4, validated 8)"]),
        ({"npu.scratchpad_bytes": 4e6}, ["scratchpad (npu.scratchpad_bytes 4e+06, validated"]),
        ({"pim.macs_per_bank": 32}, ["PIM units (pim.macs_per_bank 32, validated 16)"]),
        (
            {"hbm.trp_cycles": 40, "hbm.tras_cycles": 90, "npu.num_arrays": 4},
            ["NPU (", "DRAM timings (hbm.trp_cycles 40, validated 14 to 22; hbm.tras_cycles 90"],
        ),
        ({"link.latency_seconds": 1e-6}, ["communication between devices"]),
        ({"energy.mac": 1.0, "hbm.rows": 65536, "gpu.memory_bytes": 80e9}, []),
    ],
)
def test_each_field_of_the_machine_outside_the_runs_is_named(change, reasons):
    case = case_of()
    for name, value in change.items():
        case = case._replace(hardware=replace(case.hardware, name, value))
    found = expected_error(case)
    assert (found.percent is None) == bool(reasons)
    assert len(found.not_validated) == len(reasons)
    for sentence, start in zip(found.not_validated, reasons, strict=True):
        assert sentence.startswith(start)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_heads": 8}, "grouped queries (queries of a key 4, validated 1)"),
        ({"mlp_matrices": 3}, "gated MLP (mlp matrices 3, validated 2)"),
        ({"head_dim": 256}, "size of the model (head dim 256, validated 128)"),
        ({"window": 128}, "sliding window (window 128, validated 0"),
        ({"kv_bits": 8}, "numbers of fewer bits (kv bits 8, validated 16)"),
        ({"experts": 8, "active_experts": 2}, "mixture of experts (experts 8, validated 0"),
    ],
)
def test_each_kind_of_model_outside_the_runs_is_named(changes, reason):
    found = expected_error(with_model(case_of(), **changes))
    assert found.percent is None
    assert any(each.startswith(reason) for each in found.not_validated)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (case_of("gpu"), "a GPU"),
        (case_of(fidelity="intended"), "intended fidelity"),
        (case_of("npu-only")._replace(prefill=True), "a prefill"),
        (case_of("main_newton_nosbi"), "neupims with 1 sub-batches and 1 row buffers"),
        (case_of(batch=make_batch([9000] * 4, [0, 1, 2, 3])), "batch (longest tokens 9000"),
        (case_of(batch=make_batch([600], [0])), "batch (requests 1, validated 4 to 512)"),
    ],
)
def test_other_reasons(case, reason):
    found = expected_error(case)
    assert found.percent is None
    assert found.not_validated[0].startswith(reason)
    assert (found.nearest is None) == (not reason.startswith("batch"))


def test_the_nearest_run_is_that_with_the_least_difference():
    """A run of one request of 512 tokens, 8 heads of 128 and a tFAW of 60 was measured."""
    one = {"width": 1024, "heads": 8, "kv_heads": 8, "mlp_width": 4096}
    request = make_batch([512], [0])
    for faw, reasons in (
        (60, ()),
        (61, ("DRAM timings (hbm.tfaw_cycles 61, validated 16 to 60)",)),
    ):
        changes = {"hbm.tfaw_cycles": faw}
        case = case_of("neupims_nosbi", request, changes=changes, tp=1)
        found = expected_error(with_model(case, **one))
        assert found.not_validated == reasons
        assert '"tFAW": 60' in found.nearest["run"]
        differs = {"hbm.tfaw_cycles": {"run": 60.0, "case": 61.0}} if reasons else {}
        assert found.nearest["differs"] == differs


def test_several_workloads_have_an_error_only_if_all_have():
    good = ExpectedError({"layer_mean_percent": 2.0}, (), {"run": "a"})
    bad = ExpectedError(None, ("x", "y"), {"run": "b"})
    worse = ExpectedError(None, ("y", "z"), {"run": "c"})
    assert join_errors([good, good]) == good
    assert join_errors([good, bad, worse]) == ExpectedError(None, ("x", "y", "z"), {"run": "b"})


def test_json_and_tables_say_why_there_is_no_error(tmp_path, capsys):
    trace = tmp_path / "t.csv"
    trace.write_text("seq_len,ch_idx\n600,0\n40,1\n513,0\n300,2\n")
    flags = ["simulate", "--trace", str(trace), "--path", "closed", "--model"]
    for model, known in (("gpt3-7b", True), ("llama3-8b", False)):
        assert main([*flags, model, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["expected_error"] is not None) == known == (found["not_validated"] == [])
        assert found["nearest_validated"]["layer_error_percent"]
        assert found["fidelity_answers"].startswith(
            "what the authors' public simulator would print"
        )
        assert main([*flags, model]) == 0
        said = capsys.readouterr().out
        assert ("not validated" in said) == (not known)
        assert ("grouped queries (queries of a key 4, validated 1)" in said) == (not known)
        assert "nearest validated run" in said
    assert main([*flags, "gpt3-7b", "--fidelity", "intended"]) == 0
    assert "intended fidelity: what the machine of the paper would do" in capsys.readouterr().out


# --- gains -------------------------------------------------------------------------------------


def test_the_error_of_a_gain_is_of_measured_gains_of_its_kind():
    before = case_of()
    after = before._replace(batch=make_batch([600, 40, 513, 300], [0, 1, 2, 2]))
    found = gain_error(before, after)
    table = load_table()["gains"]["another schedule, sub-batches 2"]["closed"]
    assert found == table | {"of": "another schedule, sub-batches 2"}
    assert found["least_points"] <= found["bias_points"] <= found["most_points"]
    one = gain_error(before, after._replace(sub_batches=1))
    assert one["of"] == "sub-batches 2 to 1"
    llama = with_model(before, kv_heads=8)
    assert gain_error(llama, llama._replace(batch=after.batch)) is None
    assert gain_error(before._replace(sub_batches=1), after._replace(sub_batches=1)) is None


TRACES = {
    "x.csv": [(600, 0), (500, 0), (400, 1), (300, 1)],
    "searched-x.csv": [(600, 0), (300, 0), (500, 1), (400, 1)],
    "other.csv": [(600, 0), (300, 0), (500, 1), (401, 1)],
}


@pytest.fixture
def measured(tmp_path):
    """Runs of two sub-batches: 1,000 cycles as published, 800 as searched, and another batch."""
    folder = tmp_path / "neupims_2"
    (folder / "traces").mkdir(parents=True)
    runs, ops = [], []
    for number, (name, rows) in enumerate(TRACES.items()):
        text = "".join(f"{length},{channel}\n" for length, channel in rows)
        (folder / "traces" / name).write_text(f"seq_len,ch_idx\n{text}")
        kind = "schedule_searched" if name.startswith("searched") else "schedule_baseline"
        run = KNOBS | MEASURED | {"run_id": f"r{number}", "kind": kind, "trace": name}
        cycles = "800" if kind.endswith("searched") else "1000"
        runs.append(run | {"system": "neupims_sbi", "layer_cycles": cycles, "sub_batch_mode": "1"})
        ops.append({"run_id": f"r{number}", "system": "neupims_sbi", "stage": "A", "op": "attn.ln"})
    write_table(folder / "runs.csv", runs)
    write_table(folder / "ops.csv", [row | {"cycles": 100} for row in ops])
    return measure(folder)


def test_gains_are_of_two_schedules_of_one_batch(measured):
    """20 % was measured; the error is the predicted gain less that."""
    published, searched, other = measured
    assert kind_of_gain(published, searched) == "another schedule, sub-batches 2"
    for pair in ((searched, published), (other, searched), (published, published)):
        assert kind_of_gain(*pair) is None
    layers = [each.layer("closed").predicted for each in (published, searched)]
    predicted = 100 * (1 - layers[1] / layers[0])
    found = gain_errors([(published, searched)], "closed")
    assert found["bias_points"] == pytest.approx(predicted - 20, abs=0.02)
    assert found["spread_points"] is None
    assert (found["n"], found["sets"]) == (1, ["neupims_2"])
    assert found["gains"][0]["measured_percent"] == 20


def test_the_table_of_made_runs(measured):
    """All runs of the second set are held out; a layer's error is that of the prediction."""
    table = json.loads(json.dumps(tabulate(measured)))
    assert set(table) >= {"of", "exact", "closed", "gains", "usual_features", "runs"}
    assert [run["held_out"] for run in table["runs"]["neupims_sbi"]] == [True] * 3
    assert table["exact"]["neupims_sbi"]["layer_runs"] == 3
    first = table["runs"]["neupims_sbi"][0]
    layer = measured[0].layer("exact")
    assert first["layer_error_percent"]["exact"] == pytest.approx(
        100 * (layer.predicted / 1000 - 1), abs=0.01
    )
    assert Parallel(1, 1) == measured[0].case.parallel


def test_knobs_of_a_design_are_compared_with_the_envelope():
    """GPT3-7B has 32 heads: the heads of a device are compared, not tp; other knobs as they are."""
    limits = envelope("neupims_sbi")
    low, high = limits["model.heads_of_device"]
    shares = [tp for tp in (1, 2, 4, 8, 16, 32) if low <= 32 / tp <= high]
    assert 0 < len(shares) < 6
    knobs = {"parallel.tp": [1, 2, 4, 8, 16, 32], "npu.num_arrays": [4, 8]}
    values = np.array([[tp, arrays] for tp in knobs["parallel.tp"] for arrays in (4, 8)], float)
    options = {"system": "neupims", "sub_batches": 2, "fidelity": "simulator", "schedule": "trace"}
    workload = make_workloads("gpt3-7b", BATCH)
    assert count_validated(make_space(knobs), workload, options, values) == len(shares)
