"""neupims/serving/cost.py: iterations cost what `simulate` and `prefill` say."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims import prefill, simulate
from neupims.machine.case import select_model, select_system
from neupims.machine.systems import PIM_SYSTEMS
from neupims.machine.workload import Batch
from neupims.serving import clock
from neupims.serving.cost import ModelCosts, split_halves
from neupims.serving.tables import Setting, make_tables

LONGEST, BATCH = 700, 64


def draw(setting, hardware, share, seed=0):
    """Lengths in places, which of them are held, and the same requests as a batch."""
    random = np.random.default_rng(seed)
    rows = 1
    if setting.system in PIM_SYSTEMS:
        rows = int(hardware.hbm.num_channels) // setting.parallel.kv_split
    shape = (rows, BATCH // rows)
    holds = random.random(shape) < share
    holds[0, 0] = True
    lengths = random.integers(1, LONGEST, shape)
    halves = np.asarray(split_halves(jnp.asarray(holds)))
    interleaved = setting.system == "neupims" and setting.interleaving == "on"
    there = np.where(holds, lengths, 0).ravel()  # places without a request have length 0
    rows = np.repeat(np.arange(shape[0]), shape[1])
    parts = there, rows, halves.ravel() * interleaved
    return lengths, holds, Batch(*(jnp.asarray(part, jnp.int32) for part in parts))


def compare(setting, hardware, shares):
    tables = make_tables(setting, hardware, BATCH, LONGEST)
    decode = jax.jit(ModelCosts(setting).decode)
    for share in shares:
        lengths, holds, batch = draw(setting, hardware, share)
        spent = decode(tables, jnp.asarray(lengths), jnp.asarray(holds))
        wanted = simulate(
            *(hardware, setting.model, batch, setting.parallel),
            system=setting.system,
            fidelity=setting.fidelity,
            sub_batches=2 if setting.interleaving == "on" and setting.system == "neupims" else 1,
        )
        check(spent, wanted, setting, hardware)


def check(spent, wanted, setting, hardware):
    busy = float(wanted.layer_cycles) * setting.model.layers / hardware.npu.clock_hz
    close = partial(np.testing.assert_allclose, rtol=2e-6)
    close(clock.join(spent.time) / 1e9, wanted.iteration_seconds)
    close(spent.joules, wanted.energy_joules)
    close(spent.npu_seconds, busy * wanted.npu_utilization)
    close(spent.pim_seconds, busy * wanted.pim_utilization)
    close(spent.bus_seconds, busy * wanted.bandwidth_utilization)


def make_setting(system, fidelity="simulator", interleaving="on", model="gpt3-7b", **options):
    _, decoder, parallel = select_model(model, pp=1, **options)
    return Setting(decoder, parallel, system, fidelity, interleaving)


def hardware_of(system):
    return select_system(system)[2]


def test_a_decode_step_costs_what_simulate_says():
    compare(make_setting("neupims"), hardware_of("neupims"), (0.0, 0.3, 0.9))


@pytest.mark.slow
@pytest.mark.parametrize("fidelity", ["simulator", "intended"])
@pytest.mark.parametrize("system", ["neupims", "npu-pim", "npu-only", "gpu"])
def test_a_decode_step_costs_what_simulate_says_of_every_system(system, fidelity):
    compare(make_setting(system, fidelity), hardware_of(system), (0.0, 0.3, 0.9))


@pytest.mark.slow
def test_a_decode_step_costs_what_simulate_says_of_other_models():
    neupims = hardware_of("neupims")
    compare(make_setting("neupims", interleaving="off"), neupims, (0.0, 0.5))
    split = make_setting("neupims", "intended", model="llama3-8b", tp=1, kv_split=4)
    headed = split._replace(model=dataclasses.replace(split.model, lm_head=1))
    compare(headed, neupims, (0.1, 0.9))
    for model in ("gemma3-4b", "mixtral-8x7b", "deepseek-v2-lite"):  # windows, experts, latents
        compare(make_setting("neupims", "intended", model=model), neupims, (0.5,))


@pytest.mark.slow
def test_a_prefill_costs_what_prefill_says():
    for system in ("neupims", "gpu"):
        setting, hardware = make_setting(system), hardware_of(system)
        tables = make_tables(setting, hardware, BATCH, LONGEST)
        lengths, holds, batch = draw(setting, hardware, 0.2)
        prompts = jnp.asarray(np.where(holds, lengths, 0).ravel())
        spent = jax.jit(ModelCosts(setting).prefill)(tables, prompts)
        where = "gpu" if system == "gpu" else "npu-only"
        wanted = prefill(hardware, setting.model, batch, setting.parallel, system=where)
        wanted = dataclasses.replace(wanted, pim_utilization=0 * wanted.npu_utilization)
        check(spent, wanted, setting, hardware)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["npu-only", "gpu"])
def test_chunks_without_decoding_cost_what_prefill_says(system):
    setting, hardware = make_setting(system, "intended"), hardware_of(system)
    tables = make_tables(setting, hardware, LONGEST, LONGEST)
    nothing, prompts = jnp.zeros((1, 4), jnp.int32), jnp.array([130, 0, 77])
    mixed = jax.jit(ModelCosts(setting).mixed)
    spent = mixed(tables, nothing, nothing > 0, 0 * prompts, prompts)
    none = jnp.zeros(3, jnp.int32)
    batch = Batch(prompts, none, none)
    wanted = prefill(hardware, setting.model, batch, setting.parallel, system=system)
    wanted = dataclasses.replace(wanted, pim_utilization=0 * wanted.npu_utilization)
    check(spent, wanted, setting, hardware)
    # Chunk after chunk, attention is the same in sum, but weights are read twice.
    half = prompts // 2
    parts = [
        mixed(tables, nothing, nothing > 0, at, n)
        for at, n in ((0 * half, half), (half, prompts - half))
    ]
    assert sum(int(clock.join(part.time)) for part in parts) > int(clock.join(spent.time))


def test_the_chosen_interleaving_is_the_faster_one():
    setting, hardware = make_setting("neupims"), hardware_of("neupims")
    tables = make_tables(setting, hardware, BATCH, LONGEST)
    times = {}
    for name in ("on", "off", "chosen"):
        lengths, holds, _ = draw(setting, hardware, 0.9)
        spent = jax.jit(ModelCosts(setting._replace(interleaving=name)).decode)(
            tables, jnp.asarray(lengths), jnp.asarray(holds)
        )
        times[name] = int(clock.join(spent.time))
    assert times["chosen"] == min(times["on"], times["off"]) < max(times.values())
