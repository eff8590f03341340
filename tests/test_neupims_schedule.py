"""neupims/timing/iteration.py: properties of the paper's machine ("intended", closed form), and the
algebra of stages in both fidelities.

All designs of a system run through one compiled function of ROWS designs, REQUESTS requests and 64
channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.calibration import Calibration
from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.workload import Batch, Decoder, Parallel, make_batch
from neupims.timing.gemm import Work
from neupims.timing.gemv_exact import channel_cycles_exact
from neupims.timing.iteration import simulate
from neupims.timing.overlap import side_by_side
from neupims.timing.stages import operations, stages

ROWS, REQUESTS, CHANNELS = 16, 24, 64
SYSTEMS = [("neupims", 2), ("neupims", 1), ("npu-pim", 1), ("npu-only", 1)]
RNG = np.random.default_rng(7)
LENGTHS, PLACES = RNG.integers(1, 2049, REQUESTS), RNG.integers(0, 8, REQUESTS)
BATCH = make_batch(LENGTHS, PLACES)
MODEL, SPREAD = load_model("gpt3-7b"), load_parallel("gpt3-7b")


@functools.cache
def compiled(system, sub_batches, fidelity):
    def one(*records):
        return simulate(
            *records,
            system=system,
            sub_batches=sub_batches,
            fidelity=fidelity,
            most_channels=CHANNELS,
        )

    return jax.jit(jax.vmap(one))


def stacked(records):
    rows = (
        (records * ROWS)[:ROWS]
        if len(records) == 1
        else records + records[-1:] * (ROWS - len(records))
    )
    return jax.tree.map(
        lambda *values: np.stack(
            [
                np.asarray(value, np.int32 if hasattr(value, "dtype") else np.float32)
                for value in values
            ]
        ),
        *rows,
    )


def run(
    system,
    sub_batches,
    hardware=None,
    model=MODEL,
    batch=BATCH,
    parallel=SPREAD,
    fidelity="intended",
):
    """The iterations of as many designs, models and batches as the longest list has."""
    lists = [
        each if isinstance(each, list) else [each]
        for each in (hardware or Hardware(), model, batch, parallel)
    ]
    rows = max(map(len, lists))
    assert rows <= ROWS
    result = compiled(system, sub_batches, fidelity)(*map(stacked, lists))
    return jax.tree.map(lambda value: np.asarray(value)[:rows], result)


def machine(**changes):
    return functools.reduce(
        lambda hardware, change: replace(hardware, change[0].replace("__", "."), change[1]),
        changes.items(),
        Hardware(),
    )


def test_two_sides_slow_each_other_down_until_one_ends():
    """NPU: 100 cycles, 50 of them waiting for the memory, 30 % longer beside PIM: 115. PIM: 60
    alone, 80 beside. PIM ends first, at 80; the NPU has done 80 / 115 of its work and goes on
    alone: 80 + 100 (1 - 80 / 115). With 40 cycles the NPU ends at 46, PIM has done 46 / 80 and goes
    on alone.
    """
    calibration = Calibration(pim_slowdown=0.3)

    def ends(cycles, memory_cycles, hardware=Hardware()):  # noqa: B008  # a frozen record
        npu = [Work(jnp.float32(cycles), jnp.float32(memory_cycles), *[jnp.float32(0)] * 4)]
        return [
            float(side.end)
            for side in side_by_side(
                hardware, calibration, npu, jnp.array([60.0]), jnp.array([80.0])
            )
        ]

    assert ends(100, 50) == pytest.approx([80 + 100 * (1 - 80 / 115), 80])
    assert ends(40, 20) == pytest.approx([46, 46 + 60 * (1 - 46 / 80)])
    blocked = ends(40, 20, machine(pim__row_buffers=1))
    assert blocked == pytest.approx([80 + 40, 80], rel=1e-2)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("system", "sub_batches", "fidelity"),
    [(*each, "intended") for each in SYSTEMS]
    + [("neupims", 2, "simulator"), ("npu-pim", 1, "simulator")],
)
def test_iteration_and_layer_are_sums_of_stages(system, sub_batches, fidelity):
    """7B runs 32 layers on one group of devices, 175B 96 on four."""
    models = ["gpt3-7b", "gpt3-175b"]
    result = run(
        system,
        sub_batches,
        model=[load_model(name) for name in models],
        parallel=[load_parallel(name) for name in models],
        fidelity=fidelity,
    )
    for row, layers in enumerate((32, 96 // 4)):
        a, b, c, d, e, f = result.stage_cycles[row].astype(float)
        two = (c + d, a + b + (c + d) * (layers - 1) + e + f)
        layer, iteration = two if sub_batches == 2 else (a + b + e, layers * (a + b + e))
        assert result.layer_cycles[row] == pytest.approx(layer, rel=1e-6)
        assert result.iteration_cycles[row] == pytest.approx(iteration, rel=1e-6)
        assert result.tokens_per_second[row] == pytest.approx(
            REQUESTS / (iteration / 1e9), rel=1e-6
        )
        listed = operations(system, sub_batches)
        for stage in stages(system, sub_batches):
            cycles = result.stage_cycles[row]["ABCDEF".find(stage.name[0].upper())]
            ends = [
                s + c
                for o, s, c in zip(
                    listed, result.op_starts[row], result.op_cycles[row], strict=True
                )
                if o.stage == stage.name
            ]
            assert cycles == pytest.approx(max(ends), rel=1e-6)


def test_operations_are_named_as_the_simulator_names_them():
    rest = ["attn.proj", "attn.res", "ffn.ln", "ffn.fc1", "ffn.gelu", "ffn.fc2", "ffn.res"]
    pim = ["attn.NeuPIMSLogitSoftmax", "attn.NeuPIMSAttend"]
    qkv = ["attn.ln", "attn.QKVgen"]
    by_stage = {
        name: [o.name for o in operations("neupims", 2) if o.stage == name] for name in "ABCDEF"
    }
    assert by_stage == {
        "A": qkv,
        "B": qkv + pim,
        "C": rest + qkv + pim,
        "D": rest + qkv + pim,
        "E": rest + pim,
        "F": rest,
    }
    for system in ("neupims", "npu-pim"):
        by_stage = {
            name: [o.name for o in operations(system, 1) if o.stage == name] for name in "ABE"
        }
        assert by_stage == {"A": qkv, "B": pim, "E": rest}
    assert [o.name for o in operations("npu-only", 1)] == [*qkv, "attn.attn.FusedMHA", *rest]
    assert {o.platform for o in operations("neupims", 2) if o.name in pim} == {"PIM"}


@pytest.mark.parametrize(("system", "sub_batches"), SYSTEMS)
def test_never_below_the_roofline(system, sub_batches):
    """Weights and products of each matrix product, keys and values of attention, and all bytes and
    products of the iteration.
    """
    machines = [
        Hardware(),
        machine(hbm__num_channels=8),
        machine(npu__num_arrays=2),
        machine(npu__array_width=64, npu__array_height=64),
    ]
    for model, parallel in ((MODEL, SPREAD), (load_model("llama3-8b"), load_parallel("llama3-8b"))):
        result = run(system, sub_batches, hardware=machines, model=model, parallel=parallel)
        tokens = (
            [np.sum(BATCH.sub_batches == which) for which in (0, 1)]
            if sub_batches == 2
            else [REQUESTS]
        )
        queries, keys = model.width / parallel.tp, model.kv_width / parallel.tp
        mlp = model.mlp_width / parallel.tp
        sizes = {
            "attn.QKVgen": model.width * (queries + 2 * keys),
            "attn.proj": queries * model.width,
            "ffn.fc1": model.width * mlp * (model.mlp_matrices - 1),
            "ffn.fc2": mlp * model.width,
        }
        npu_of = {stage.name: stage.npu_sub_batch for stage in stages(system, sub_batches)}
        pim_of = {stage.name: stage.pim_sub_batch for stage in stages(system, sub_batches)}
        for row, hardware in enumerate(machines):
            npu, hbm, pim = hardware.npu, hardware.hbm, hardware.pim
            peak_bytes = hbm.num_channels * 32
            peak_macs = npu.num_arrays * npu.array_width * npu.array_height
            for operation, cycles in zip(
                operations(system, sub_batches), result.op_cycles[row], strict=True
            ):
                if operation.name in sizes:
                    weights = sizes[operation.name]
                    assert cycles >= max(
                        2 * weights / peak_bytes,
                        weights * tokens[npu_of[operation.stage]] / peak_macs,
                    )
                elif operation.platform == "PIM":
                    mine = (
                        np.asarray(BATCH.sub_batches == pim_of[operation.stage])
                        if sub_batches == 2
                        else np.ones(REQUESTS, bool)
                    )
                    macs = np.bincount(PLACES[mine], LENGTHS[mine]).max() * queries
                    assert cycles >= macs / (32 * pim.macs_per_bank / 2)
            moved = result.counts.read_bytes[row] + result.counts.write_bytes[row]
            assert result.iteration_cycles[row] >= moved / peak_bytes
            assert result.iteration_cycles[row] >= result.counts.npu_macs[row] / peak_macs
            assert 0 < result.bandwidth_utilization[row] <= 1
            assert 0 <= result.pim_utilization[row] <= 1
            assert 0 < result.npu_utilization[row] <= 1


def never_slower(system, sub_batches, machines, **options):
    """Checks that each of the machines is at least as fast as the one before."""
    result = run(system, sub_batches, hardware=machines, **options)
    assert np.isfinite(result.iteration_seconds).all()
    assert (np.diff(result.iteration_seconds) <= 1e-6 * result.iteration_seconds[:-1]).all()
    return result.iteration_seconds


@pytest.mark.parametrize(("system", "sub_batches"), SYSTEMS)
def test_more_of_it_is_never_slower(system, sub_batches):
    channels = [
        machine(hbm__num_channels=channels) for channels in (8, 9, 12, 16, 24, 31, 32, 33, 48, 64)
    ]
    seconds = never_slower(system, sub_batches, channels)
    assert seconds[-1] < 0.95 * seconds[0]
    many = make_batch(RNG.integers(1, 2049, REQUESTS), RNG.integers(0, 8, REQUESTS))
    never_slower(
        system,
        sub_batches,
        channels,
        model=load_model("llama3-70b"),
        parallel=load_parallel("llama3-70b"),
        batch=many,
    )
    never_slower(
        system,
        sub_batches,
        [machine(npu__num_arrays=arrays) for arrays in (1, 2, 3, 4, 6, 8, 12, 16, 32)],
    )
    never_slower(
        system, sub_batches, [machine(npu__vector_units=units) for units in (1, 2, 5, 8, 16, 64)]
    )


@pytest.mark.parametrize(("system", "sub_batches"), SYSTEMS)
def test_faster_timings_are_never_slower(system, sub_batches):
    timings = [
        name
        for name in vars(Hardware().hbm)
        if name.startswith("t") and name.endswith("_cycles") and name != "trefi_cycles"
    ]
    assert len(timings) == 13
    slow = {f"hbm__{name}": getattr(Hardware().hbm, name) * 2 for name in timings}
    faster = [
        machine(
            **slow | {f"hbm__{name}": getattr(Hardware().hbm, name) for name in timings[:count]}
        )
        for count in range(14)
    ]
    seconds = never_slower(system, sub_batches, faster)
    assert sub_batches == 2 or system == "npu-only" or seconds[-1] < 0.9 * seconds[0]
    never_slower(
        system,
        sub_batches,
        [
            machine(hbm__trefi_cycles=cycles)
            for cycles in (1950, 2500, 3000, 3900, 5000, 7800, 10**6)
        ],
    )
    one_by_one = run(
        system,
        sub_batches,
        hardware=[Hardware()]
        + [
            machine(**{f"hbm__{name}": max(1, getattr(Hardware().hbm, name) * 0.7)})
            for name in timings
        ],
    )
    assert (one_by_one.iteration_seconds <= one_by_one.iteration_seconds[0] * (1 + 1e-6)).all()


@pytest.mark.parametrize(("system", "sub_batches"), SYSTEMS)
def test_names_of_channels_and_order_of_requests_do_not_matter(system, sub_batches):
    batches = [BATCH]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        order, names = rng.permutation(REQUESTS), rng.permutation(32)
        batches.append(
            Batch(
                BATCH.seq_lens[order],
                jnp.asarray(names, jnp.int32)[BATCH.channels[order]],
                BATCH.sub_batches[order],
            )
        )
    result = run(system, sub_batches, batch=batches)
    for part in (
        result.iteration_seconds,
        result.energy_joules,
        result.pim_utilization,
        result.layer_cycles,
    ):
        np.testing.assert_allclose(part, part[0], rtol=1e-5)


def test_order_matters_in_the_recurrence_by_one_refresh_interval_at_most():
    rng = np.random.default_rng(3)
    for operation in ("logit", "attend"):
        cycles = []
        for _ in range(6):
            lengths = rng.permutation(np.array([700, 33, 1, 1500, 512, 513, 90, 2048]))
            followed = channel_cycles_exact(
                Hardware(),
                MODEL,
                jnp.asarray(lengths),
                SPREAD,
                jnp.float32(0),
                jnp.zeros(8),
                operation=operation,
            )
            cycles.append(float(followed))
        assert max(cycles) - min(cycles) <= 1950


def test_an_empty_half_adds_nothing_to_the_other():
    """Requests of length 0 stand for no request and change nothing, wherever they are."""
    none = Batch(BATCH.seq_lens.at[5:].set(0), BATCH.channels, BATCH.sub_batches)
    elsewhere = Batch(none.seq_lens, BATCH.channels.at[5:].set(3), BATCH.sub_batches.at[5:].set(1))
    result = run("neupims", 1, batch=[none, elsewhere])
    assert result.iteration_seconds[0] == result.iteration_seconds[1]
    assert result.tokens_per_second[0] == pytest.approx(5 / result.iteration_seconds[0])


@pytest.mark.parametrize(("system", "sub_batches"), SYSTEMS)
def test_requests_of_length_0_change_nothing_at_the_front_either(system, sub_batches):
    lengths = BATCH.seq_lens
    last = Batch(lengths.at[5:].set(0), BATCH.channels, BATCH.sub_batches)
    first = Batch(*(jnp.roll(part, 3) for part in vars(last).values()))
    assert (int(last.seq_lens[0]) > 0, int(first.seq_lens[0])) == (True, 0)
    result = run(system, sub_batches, batch=[last, first], fidelity="simulator")
    assert result.layer_cycles[0] == pytest.approx(result.layer_cycles[1], rel=1e-6)


@pytest.mark.parametrize(("system", "sub_batches"), SYSTEMS)
def test_energy_parts_add_up(system, sub_batches):
    result = run(system, sub_batches)
    parts = [float(part[0]) for part in vars(result.energy).values()]
    assert len(parts) == 11
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(float(result.energy_joules[0]), rel=1e-5)
    assert (result.energy.pim[0] > 0) == (system != "npu-only")
    assert result.energy.link[0] > 0  # bytes cost energy though the default link costs no time


@pytest.mark.parametrize(("sub_batches", "messages"), [(1, 1), (2, 2)])
def test_a_link_carries_all_reduces_and_what_the_next_devices_need(sub_batches, messages):
    """24 requests of 4096 float16 channels. Four devices that share a layer: two all-reduces of 2 x
    3 messages of a quarter, in each of 32 layers. Two groups of devices: all of it once more, to
    the next group. A sub-batch sends half as much, twice as often.
    """
    linked = machine(link__bandwidth_bytes_per_second=1e9, link__latency_seconds=1e-3)
    spreads = [Parallel(1, 1), Parallel(4, 1), Parallel(1, 2)]
    free, paid = (
        run("neupims", sub_batches, hardware=hardware, parallel=spreads)
        for hardware in (Hardware(), linked)
    )
    activations = 2 * REQUESTS * 4096
    reduced = 32 * 2 * 2 * 3 * (messages * 1e-3 + activations / 4 / 1e9)
    forwarded = messages * 1e-3 + activations / 1e9
    np.testing.assert_allclose(
        paid.iteration_seconds - free.iteration_seconds,
        [0, reduced, forwarded],
        rtol=1e-3,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        paid.counts.link_bytes, [0, 32 * 2 * 2 * 3 * activations / 4, activations], rtol=1e-6
    )


@pytest.mark.parametrize(("system", "sub_batches"), [("neupims", 2), ("npu-only", 1)])
def test_mapped_and_compiled_is_the_loop(system, sub_batches):
    """Designs, models and batches vary together; the loop runs each alone, with its numbers as
    plain Python numbers.
    """
    machines = [
        Hardware(),
        machine(hbm__num_channels=16, hbm__tfaw_cycles=16),
        machine(npu__num_arrays=4, npu__clock_hz=1.4e9),
    ]
    names = ["gpt3-7b", "gpt3-30b", "llama3-8b"]
    batches = [
        BATCH,
        make_batch(LENGTHS[::-1], PLACES),
        make_batch(np.minimum(LENGTHS, 100), (PLACES + 8) % 16),
    ]
    mapped = run(
        system,
        sub_batches,
        machines,
        [load_model(name) for name in names],
        batches,
        [load_parallel(name) for name in names],
    )
    for row, name in enumerate(names):
        alone = simulate(
            machines[row],
            load_model(name),
            batches[row],
            load_parallel(name),
            system=system,
            sub_batches=sub_batches,
            fidelity="intended",
            most_channels=CHANNELS,
        )
        for got, expected in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[row], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "field",
    [
        "hbm.num_channels",
        "hbm.trefi_cycles",
        "npu.clock_hz",
        "npu.scratchpad_bytes",
        "pim.page_bytes",
        "link.latency_seconds",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_wrong_design_is_flagged_alone(field, value):
    group, name = field.split(".")
    hardware = stacked([Hardware()])
    values = np.asarray(getattr(getattr(hardware, group), name), np.float32).copy()
    values[3] = value
    object.__setattr__(getattr(hardware, group), name, values)
    result = compiled("neupims", 2, "intended")(
        hardware, *map(stacked, ([MODEL], [BATCH], [SPREAD]))
    )
    good = np.arange(ROWS) != 3
    assert not result.flagged[good].any()
    assert len(set(np.asarray(result.iteration_seconds)[good].tolist())) == 1
    if np.isnan(value):
        assert result.flagged[3]
    elif np.isfinite(result.iteration_seconds[3]) and not result.flagged[3]:
        assert field in (
            "hbm.trefi_cycles",
            "npu.scratchpad_bytes",
        )  # never refreshed, never tiled: possible machines


def test_tiles_that_never_fit_between_refreshes_are_flagged():
    rows = [machine(hbm__trefi_cycles=cycles) for cycles in (3900, 700, 16)]
    for fidelity in ("simulator", "intended"):
        assert run("neupims", 2, hardware=rows, fidelity=fidelity).flagged.tolist() == [
            False,
            True,
            True,
        ]


def test_both_clocks_together_change_no_cycle():
    for system, sub_batches in SYSTEMS:
        rows = [
            machine(npu__clock_hz=hz, hbm__clock_hz=hz, npu__interconnect_hz=2 * hz)
            for hz in (1e9, 5e8, 2e9)
        ]
        result = run(system, sub_batches, hardware=rows)
        np.testing.assert_allclose(result.iteration_cycles, result.iteration_cycles[0], rtol=1e-6)
        np.testing.assert_allclose(
            result.iteration_seconds * [1, 0.5, 2], result.iteration_seconds[0], rtol=1e-6
        )


def test_a_faster_core_counts_more_of_its_cycles_for_the_same_memory():
    result = run("neupims", 1, hardware=[machine(npu__clock_hz=hz) for hz in (5e8, 1e9, 2e9)])
    pim = result.channel_cycles[:, 0].max(axis=-1)
    np.testing.assert_allclose(pim / pim[1], [0.5, 1, 2], rtol=1e-5)
    assert (np.diff(result.iteration_seconds) <= 0).all()


def test_the_front_end_of_npu_pim_serves_one_channel_after_another():
    """In `simulator` fidelity commands leave one a cycle for all channels; in `intended` fidelity,
    spreading requests over channels helps.
    """
    spread = make_batch(np.full(REQUESTS, 512), np.arange(REQUESTS))
    heaped = make_batch(np.full(REQUESTS, 512), np.zeros(REQUESTS, int))
    meant = run("npu-pim", 1, batch=[spread, heaped]).stage_cycles[:, 1]
    coded = run("npu-pim", 1, batch=[spread, heaped], fidelity="simulator").stage_cycles[:, 1]
    assert meant[1] > 15 * meant[0]
    assert coded[0] > 2 * meant[0]


def test_extreme_machines_are_finite():
    rows = [
        machine(hbm__ranks=1, hbm__bank_groups=1, hbm__banks_per_group=1),
        machine(pim__banks_per_activation=64),
        machine(pim__page_bytes=64),
        machine(pim__page_bytes=700),
        machine(npu__array_width=256, npu__array_height=256),
        machine(npu__scratchpad_bytes=196608),
        machine(pim__row_buffers=3),
        machine(hbm__ranks=4),
        machine(hbm__trefi_cycles=1950),
    ]
    models = [
        MODEL,
        Decoder(layers=2, width=64, heads=4, kv_heads=1, mlp_width=100),
        load_model("gpt3-175b"),
    ]
    for model, parallel in zip(models, [SPREAD, Parallel(4, 1), Parallel(96, 1)], strict=True):
        result = run("neupims", 2, hardware=rows, model=model, parallel=parallel)
        assert not result.flagged.any()
        assert (result.stage_cycles > 0).all()
    assert (
        run("neupims", 2, hardware=[rows[6], Hardware()]).layer_cycles.tolist()
        == [run("neupims", 2).layer_cycles[0]] * 2
    )


def test_unknown_words_are_refused():
    for options in ({"system": "tpu"}, {"sub_batches": 3}, {"fidelity": "real"}, {"path": "open"}):
        with pytest.raises(ValueError, match="must be one of"):
            simulate(Hardware(), MODEL, BATCH, SPREAD, **options)
