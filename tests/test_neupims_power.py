"""Power: of all parts at full speed by hand and against a published chip, in the mean over an
iteration, and as a result of `simulate` and `explore`.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims import explore, make_batch, make_case, simulate_case
from neupims.__main__ import main
from neupims.costs.energy import Counts, energy
from neupims.costs.power import peak_power, peak_watts, power_metrics
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace

BATCH = make_batch([300, 512, 40, 900], channels=[0, 1, 2, 3])
METRICS = ("power_watts", "peak_power_watts", "energy_joules_per_token", "tokens_per_joule")


def test_the_default_device_at_full_speed_draws_what_a_tpu_v4_draws():
    """Google's TPU v4 (Jouppi et al., ISCA 2023, table 4) has the same arrays at 1.05 GHz, a
    scratchpad of that size and 32 GB of HBM2 at 1.2 TB/s; it draws 192 W at most.
    """
    power = peak_power(Hardware())
    assert 0.8 * 192 < float(power.npu + power.memory) < 1.2 * 192


def test_peak_power_by_hand():
    """131072 products of 0.72 pJ at 1 GHz are 94.4 W; a product in all banks of 32 channels, 3216
    pJ every 2 ns, is 51.5 W, beside the second row buffers' 4.2 W.
    """
    power = peak_power(Hardware())
    assert float(power.arrays) == pytest.approx(94.4, rel=1e-3)
    assert float(power.pim) == pytest.approx(51.46 + 64 * 0.066 + 0.17, rel=1e-3)
    assert float(power.total) == pytest.approx(
        sum(float(getattr(power, each.name)) for each in dataclasses.fields(power))
    )
    assert float(peak_power(Hardware(), pim=False).pim) == 0


def test_a_slower_pace_of_products_draws_less():
    slow = replace(Hardware(), "pim.product_cycles", 4)
    fast, slow_pim = (
        float(peak_power(each).pim - peak_power(replace(each, "energy.pim_bit", 0)).pim)
        for each in (Hardware(), slow)
    )
    assert slow_pim == pytest.approx(fast / 2)


def test_no_iteration_draws_more_than_all_parts_at_full_speed():
    """Whatever a millisecond holds, from nothing to as much as its time allows."""
    peak = float(peak_power(Hardware()).total)
    most = Counts(
        npu_macs=131072e6,
        vector_operations=1024e6,
        scratchpad_bytes=4096e6,
        read_bytes=1.0e9,
        write_bytes=0.0,
        activations=1e9 / 1024,
        group_activations=0.0,
        gwrites=0.0,
        comps=32 * 0.5e6,
        result_reads=0.0,
        refreshes=64 * 1e6 / 3900,
        elapsed_cycles=1e6,
        link_bytes=0.0,
    )
    for share in (0.0, 0.3, 1.0):
        counts = jax.tree.map(lambda value, share=share: share * value, most)
        counts = dataclasses.replace(counts, elapsed_cycles=1e6)
        assert float(energy(counts, Hardware()).total) / 1e-3 < peak


def test_the_mean_is_energy_over_time_of_all_devices():
    """6 J in 20 ms on each of 4 devices is 1200 W; 100 tokens are 0.24 J each."""
    found = power_metrics(
        Hardware(), "neupims", joules=6.0, seconds=0.02, tokens=100.0, devices=4.0
    )
    assert found["power_watts"] == pytest.approx(1200)
    assert found["energy_joules_per_token"] == pytest.approx(0.24)
    assert found["tokens_per_joule"] == pytest.approx(1 / 0.24)
    assert float(found["peak_power_watts"]) == pytest.approx(
        4 * float(peak_power(Hardware()).total)
    )


def test_the_greatest_power_is_that_of_the_system():
    watts = {
        system: float(peak_watts(Hardware(), system)) for system in ("neupims", "npu-only", "gpu")
    }
    assert watts["gpu"] == 400
    assert watts["npu-only"] == pytest.approx(float(peak_power(Hardware(), pim=False).total))
    assert watts["npu-only"] < watts["neupims"]


def test_a_batch_of_designs_is_the_loop():
    values = jnp.array([1e9, 1.5e9, 3e9])
    batched = jax.vmap(lambda value: peak_power(replace(Hardware(), "hbm.clock_hz", value)).total)(
        values
    )
    for value, watts in zip(values.tolist(), batched, strict=True):
        one = peak_power(replace(Hardware(), "hbm.clock_hz", value)).total
        np.testing.assert_allclose(watts, one, rtol=1e-6)


@pytest.mark.parametrize("system", ["neupims", "npu-pim", "npu-only", "gpu"])
def test_simulate_and_explore_agree(system):
    """One design of `explore` is the case that `simulate` runs, by the closed form."""
    case = make_case("gpt3-7b", BATCH, system=system)
    found = simulate_case(case, path="closed").to_dict()
    halves = {"sub_batches": 2} if system == "neupims" else {}
    explored = explore(
        case.hardware,
        "gpt3-7b",
        BATCH,
        {"npu.num_arrays": [8]},
        method="grid",
        system=system,
        schedule="trace",
        **halves,
    )
    for name in METRICS:
        assert explored.base.metrics[name] == pytest.approx(found[name], rel=1e-4), name
    assert found["power_watts"] <= found["peak_power_watts"] * (1 + 1e-6)
    assert found["power_watts"] == pytest.approx(
        found["energy_joules"] * found["devices"] / found["iteration_seconds"], rel=1e-6
    )
    assert found["devices"] == 4
    assert found["tokens_per_joule"] * found["energy_joules_per_token"] == pytest.approx(1)


def test_a_faster_core_clock_does_not_change_what_is_done():
    """Only waiting and refresh depend on the time that an iteration takes."""
    slow, fast = (
        simulate_case(
            make_case("gpt3-7b", BATCH, changes={"npu.clock_hz": clock_hz}), path="closed"
        ).to_dict()["energy_parts_joules"]
        for clock_hz in (1e9, 2e9)
    )
    for part in ("npu", "vector", "scratchpad", "dram_array", "dram_interface", "pim", "link"):
        assert fast[part] == pytest.approx(slow[part], rel=1e-5), part
    assert fast["npu_idle"] < slow["npu_idle"]


KNOBS = {"npu.num_arrays": [2, 4, 8, 16], "hbm.num_channels": [16, 32, 64]}


def test_power_is_an_objective_of_explore():
    """The front of tokens/s and power: no design of it is both slower and hungrier than another."""
    found = explore(
        "neupims",
        "gpt3-7b",
        BATCH,
        KNOBS,
        method="grid",
        objectives="tokens_per_second:max,power_watts:min",
    )
    assert 1 < len(found.front) < 12
    pairs = [
        (each.metrics["tokens_per_second"], each.metrics["power_watts"]) for each in found.front
    ]
    assert pairs == sorted(pairs, reverse=True)


@pytest.mark.parametrize("metric", ["power_watts", "peak_power_watts"])
def test_power_is_a_constraint_of_explore(metric):
    every = explore("neupims", "gpt3-7b", BATCH, KNOBS, method="grid")
    limit = every.base.metrics[metric]
    some = explore(
        "neupims",
        "gpt3-7b",
        BATCH,
        KNOBS,
        method="grid",
        constraints=f"{metric} <= {limit:.6g} + 1",
    )
    assert 0 < some.kept < every.kept
    assert all(each.metrics[metric] <= limit + 1 for each in some.front)
    tokens = some.front[0].metrics["tokens_per_second"]
    assert tokens < every.front[0].metrics["tokens_per_second"]


def test_costs_are_knobs_of_explore():
    """A batch axis of costs: energy and area follow, speed does not."""
    knobs = {"energy.interface_bit": [0.5, 4.0], "area.scratchpad_megabyte": [0.5, 1.0]}
    found = explore("neupims", "gpt3-7b", BATCH, knobs, method="grid")
    assert found.points == 4
    (best,) = found.front  # the cheapest of all is best in both, and all are as fast
    assert best.knobs == {"energy.interface_bit": 0.5, "area.scratchpad_megabyte": 0.5}
    speed = best.metrics["tokens_per_second"]
    assert speed == pytest.approx(found.base.metrics["tokens_per_second"], rel=1e-6)


def test_the_commands_take_costs(capsys, tmp_path):
    """A file's tables, --set and both, in simulate, explore and show."""
    trace = tmp_path / "trace.csv"
    trace.write_text("seq_len,ch_idx\n300,0\n512,1\n40,2\n900,3\n")
    machine = tmp_path / "mine.toml"
    machine.write_text("[energy]\ninterface_bit = 4\n[area]\nmac = 0.01\n")
    common = ("--model", "gpt3-7b", "--trace", str(trace), "--json")

    def printed(*words):
        assert main(list(words)) == 0
        return json.loads(capsys.readouterr().out)

    def interface(*words):
        return printed("simulate", "--path", "closed", *common, *words)["energy_parts_joules"][
            "dram_interface"
        ]

    default = interface()
    assert interface("--hardware", str(machine)) == pytest.approx(5 * default, rel=1e-5)
    assert interface("--set", "energy.interface_bit=4") == pytest.approx(5 * default, rel=1e-5)
    changed = ("--hardware", str(machine), "--set", "energy.interface_bit=0.8")
    assert interface(*changed) == pytest.approx(default, rel=1e-5)

    shown = {
        each["name"]: each for each in printed("show", "constants", "--json", *changed)["constants"]
    }
    assert shown["energy.interface_bit"]["value"] == 0.8
    assert shown["energy.interface_bit"]["source"] == "--set"
    assert shown["area.mac"] == {
        "name": "area.mac",
        "value": 0.01,
        "unit": "mm2, of one processing element",
        "confidence": "given",
        "source": str(machine),
    }
    assert shown["energy.mac"]["confidence"] == "published"

    words = ("explore", "--trace", str(trace), "--knob", "npu.num_arrays=8,16", "--json")
    small = printed(*words, "--set", "area.mac=0.001")["base"]["metrics"]["area_mm2"]
    large = printed(*words, "--hardware", str(machine))["base"]["metrics"]["area_mm2"]
    macs = 4 * 8 * 128 * 128
    assert large - small == pytest.approx(macs * 0.009 / 0.55, rel=1e-3)


@pytest.mark.parametrize("command", ["simulate", "search"])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--set", "energy.nothing=1"),
            "there is no field energy.nothing (energy has activate_kilobyte",
        ),
        (("--set", "energy.mac=-1"), "energy.mac must be 0 or from 0.005 to 100 pJ"),
        (("--set", "area.uncore_share=1"), "area.uncore_share must be from 0 to 0.99 shares"),
        (("--set", "energy.memory=ddr2"), "there is no memory 'ddr2'; there are gddr6-aim, hbm2"),
        (("--set", "energy=1"), "energy is a group; name one of its fields"),
    ],
)
def test_impossible_costs_are_refused_in_one_sentence(capsys, tmp_path, command, words, sentence):
    trace = tmp_path / "trace.csv"
    trace.write_text("seq_len,ch_idx\n300,0\n")
    assert main([command, "--model", "gpt3-7b", "--trace", str(trace), *words]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("neupims: ")
    assert said.err.count("\n") == 1
    assert sentence in said.err
