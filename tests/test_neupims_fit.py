"""What a device's memory holds: refusals, warnings, reasons of `explore`, and `neupims fit`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims import (
    explore,
    fit,
    make_batch,
    make_case,
    read_trace,
    replace,
    search_schedule,
    simulate_case,
)
from neupims.__main__ import main
from neupims.exploration.impossible import REASONS, reason_code
from neupims.exploration.workloads import deal
from neupims.machine.hardware import Hardware, memory_bytes
from neupims.machine.systems import PIM_SYSTEMS
from neupims.machine.workload import Decoder, Parallel
from neupims.timing.capacity import (
    activation_bytes,
    channel_tiles,
    device_weight_bytes,
    find_overflow,
    request_bytes,
    request_tiles,
)
from neupims.timing.memory_check import check_memory, spread_more

SYSTEMS = ("neupims", "npu-pim", "npu-only", "gpu")
# 8 layers of 4 x 1024^2 + 2 x 1024 x 4096 float16 weights: 201,326,592 bytes.
MODEL = Decoder(layers=8, width=1024, heads=8, kv_heads=8, mlp_width=4096)
ONE = Parallel(1, 1)
MIB = 2**20


def machine(rows: int, channels: int = 4) -> Hardware:
    """A device with `rows` x `channels` x 32 KiB of HBM, and as much memory of its GPU."""
    hardware = replace(replace(Hardware(), "hbm.rows", rows), "hbm.num_channels", channels)
    return replace(hardware, "gpu.memory_bytes", memory_bytes(hardware.hbm))


def write_model(path, **changes):
    fields = {name: int(getattr(MODEL, name)) for name in ("layers", "width", "heads", "kv_heads")}
    fields |= {"mlp_width": int(MODEL.mlp_width)} | changes
    path.write_text("".join(f"{name} = {value}\n" for name, value in fields.items()))
    return path


def timed(case, **options):
    return simulate_case(case, path="closed", **options)


def case_of(tmp_path, batch, system="neupims", rows=2048, tp=1, pp=1, **options):
    model = write_model(tmp_path / "m.toml")
    changes = {"hbm.rows": rows, "hbm.num_channels": 4, "gpu.memory_bytes": rows * 4 * 32768}
    return make_case(model, batch, system=system, changes=changes, tp=tp, pp=pp, **options)


def test_bytes_by_hand():
    assert float(device_weight_bytes(MODEL, ONE)) == 192 * MIB
    assert float(device_weight_bytes(MODEL, Parallel(4, 2))) == 24 * MIB
    assert float(device_weight_bytes(MODEL, Parallel(1, 3))) == 192 * MIB * 3 / 8
    # The residual stream, and the input and the output of the activation: 1024 + 4096 + 4096.
    assert float(activation_bytes(MODEL, ONE, 10)) == 10 * 2 * 9216
    # Keys and values of a token: 2 x 1024 x 2 bytes in each of 8 layers.
    dense = [
        request_bytes(Hardware(), MODEL, [100], ONE, system=name)[0] for name in ("npu-only", "gpu")
    ]
    assert [float(each) for each in dense] == [100 * 32768.0] * 2
    shared = request_bytes(Hardware(), MODEL, [100], Parallel(4, 2), system="gpu")
    assert float(shared[0]) == 100 * 32768 / 8
    # With PIM: keys 4 x 2 tiles, values 1 x 32 tiles, of 32 KiB, in each of 8 layers.
    assert (
        float(request_bytes(Hardware(), MODEL, [100], ONE, system="neupims")[0]) == 40 * 8 * 32768
    )
    # 2,048 rows x 4 channels less 192 MiB leave 512 rows of each channel; activations take a part.
    assert float(channel_tiles(machine(2048), MODEL, ONE)) == 512
    assert float(channel_tiles(machine(2048), MODEL, ONE, 10)) == 510


def test_embeddings_are_weights_of_the_first_and_the_last_group():
    full = Decoder(layers=8, width=1024, heads=8, kv_heads=8, mlp_width=4096, vocabulary=32 * 1024)
    table = 64 * MIB
    assert float(device_weight_bytes(full, ONE)) == 192 * MIB + 2 * table
    assert float(device_weight_bytes(full, Parallel(1, 2))) == 96 * MIB + table
    assert float(device_weight_bytes(full, Parallel(2, 1))) == 96 * MIB + table


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("prefill", [False, True])
def test_weights_that_do_not_fit_are_refused_with_the_devices_that_would_do(
    tmp_path, system, prefill
):
    """1,536 rows hold exactly the weights of one device; two devices leave room for the batch."""
    batch = make_batch([100] * 4, [0, 1, 2, 3])
    case = case_of(tmp_path, batch, system, rows=1500)
    with pytest.raises(ValueError, match=r"the weights take 0.2 GB of each device, which has") as e:
        timed(case, prefill=prefill)
    assert "2 devices would do (--tp 2); --allow-overflow" in str(e.value)
    done = timed(case._replace(parallel=Parallel(2, 1)), prefill=prefill)
    assert done.overflow == ()
    allowed = timed(case, prefill=prefill, allow_overflow=True)
    assert "the weights take 0.2 GB" in allowed.overflow[0]


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_devices_that_would_do_are_the_fewest(system):
    batch = make_batch([300] * 4, np.arange(4) % 4)
    for rows, groups in ((1500, 1), (700, 1), (500, 2), (250, 1), (120, 1)):
        hardware, now = machine(rows), Parallel(1, groups)
        more = spread_more(hardware, MODEL, batch, now, system=system)
        assert more is not None
        assert not any(find_overflow(hardware, MODEL, batch, more, system=system))
        for tp in (1, 2, 4, 8):
            for pp in range(groups, MODEL.layers + 1):
                if MODEL.layers % pp == 0 and tp * pp < more.tp * more.pp:
                    fewer = Parallel(tp, pp)
                    assert any(find_overflow(hardware, MODEL, batch, fewer, system=system))


def test_a_request_that_no_device_holds():
    """A million tokens of one request lie in one channel, on however many devices."""
    batch = make_batch([10**6], [0])
    assert spread_more(machine(60), MODEL, batch, ONE) is None
    with pytest.raises(ValueError, match=r"of 1000000 tokens needs .* no number of devices"):
        check_memory(machine(2000), MODEL, batch, ONE)


@pytest.mark.parametrize("fidelity", ["simulator", "intended"])
def test_a_context_too_long_for_a_channel_is_refused_with_the_split_that_would_do(
    tmp_path, fidelity
):
    """4,000 tokens take 4,000 tiles of 32 KiB in 8 layers; a channel has 1,464."""
    batch = make_batch([4000], [0])
    case = case_of(tmp_path, batch, rows=3000, fidelity=fidelity)
    with pytest.raises(ValueError, match=r"needs .* tiles of its channel") as refused:
        timed(case)
    sentence = "these devices would do with each request on 4 channels (--kv-split 4"
    assert sentence + (" --fid" if fidelity == "simulator" else ")") in str(refused.value)
    split = case._replace(parallel=Parallel(1, 1, 4), fidelity="intended")
    assert timed(split).overflow == ()
    half = case._replace(parallel=Parallel(1, 1, 2), fidelity="intended")
    with pytest.raises(ValueError, match="on 4 channels"):
        timed(half)
    with pytest.raises(ValueError, match="tiles of its channel") as refused:
        timed(case, prefill=True)  # PIM does not compute it
    assert "--kv-split" not in str(refused.value)
    flat = case_of(tmp_path, make_batch([6000], [0]), "npu-only", rows=3000)
    with pytest.raises(ValueError, match="devices would do") as refused:
        timed(flat)
    assert "--kv-split" not in str(refused.value)


@pytest.mark.parametrize(
    ("system", "fidelity", "warned"),
    [
        ("neupims", "simulator", True),
        ("npu-pim", "simulator", True),
        ("neupims", "intended", False),
        ("npu-pim", "intended", False),
        ("npu-only", "simulator", False),
        ("npu-only", "intended", False),
        ("gpu", "simulator", False),
    ],
)
def test_a_batch_that_does_not_fit_together(tmp_path, system, fidelity, warned):
    """256 MiB less 192 MiB of weights hold 4 requests of 480 tokens (15 MiB each), not 8."""
    batch = make_batch([480] * 8, [0, 1, 2, 3] * 2)
    case = case_of(tmp_path, batch, system, fidelity=fidelity)
    if warned:
        found = timed(case).overflow
        assert len(found) == 1
        assert "keys and values of 8 requests need" in found[0]
        assert "would not fit" in found[0]
    else:
        with pytest.raises(ValueError, match=r"the keys and values of 8 requests .* would do"):
            timed(case)
        (sentence,) = timed(case, allow_overflow=True).overflow
        assert "would not fit" in sentence


def test_a_full_channel_is_refused_where_the_paper_s_machine_is_asked(tmp_path):
    batch = make_batch([300] * 3, [2, 2, 2])
    assert "channel 2 need" in timed(case_of(tmp_path, batch)).overflow[0]
    with pytest.raises(ValueError, match=r"channel 2 need .*neupims search"):
        timed(case_of(tmp_path, batch, fidelity="intended"))
    for system in ("npu-only", "gpu"):  # the channel of a request does not matter there
        assert timed(case_of(tmp_path, batch, system)).overflow == ()


@pytest.mark.parametrize("system", SYSTEMS)
def test_prompts_need_the_activations_of_all_tokens(tmp_path, system):
    """4 x 700 tokens: 52 MB of activations and 92 MB of keys and values exceed 64 MiB; a decode
    step has four tokens.
    """
    batch = make_batch([350] * 4, [0, 1, 2, 3])
    case = case_of(tmp_path, batch, system)
    assert timed(case).overflow == ()
    with pytest.raises(ValueError, match="beside weights and activations"):
        timed(case, prefill=True)
    assert timed(case, prefill=True, allow_overflow=True).first_token_seconds > 0


def test_a_full_pipeline_that_does_not_fit_is_warned_of(tmp_path):
    batch = make_batch([480] * 4, [0, 1, 2, 3])
    assert timed(case_of(tmp_path, batch, "gpu", rows=2048)).overflow == ()
    (sentence,) = timed(case_of(tmp_path, batch, "gpu", rows=700, pp=4)).overflow
    assert "a full pipeline has 4 such batches in flight" in sentence


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_overflows_is_the_same_under_jit_and_vmap(system):
    batch = make_batch([512, 300, 200, 400, 512, 512], [0, 1, 2, 3, 0, 1])
    rows = np.array([1500, 1700, 2048, 3000])

    def one(count):
        hardware = replace(machine(1500), "hbm.rows", count)
        hardware = replace(hardware, "gpu.memory_bytes", memory_bytes(hardware.hbm))
        return find_overflow(hardware, MODEL, batch, ONE, system=system, most_channels=4)

    together = jax.jit(jax.vmap(one))(jnp.asarray(rows))
    for place, count in enumerate(rows.tolist()):
        alone = find_overflow(machine(count), MODEL, batch, ONE, system=system)
        assert [bool(each[place]) for each in together] == [bool(each) for each in alone]
    assert bool(together.weights[0])
    assert not any(bool(each[-1]) for each in together)


def test_json_has_the_warnings_of_standard_error(tmp_path, capsys):
    model, trace = write_model(tmp_path / "m.toml"), tmp_path / "t.csv"
    trace.write_text("seq_len,ch_idx\n" + "300,2\n" * 3)
    flags = ["--model", str(model), "--trace", str(trace), "--json", "--path", "closed"]
    flags += ["--set", "hbm.rows=2048", "--set", "hbm.num_channels=4"]
    assert main(["simulate", *flags]) == 0
    said = capsys.readouterr()
    warnings = json.loads(said.out)["warnings"]
    assert said.err == "".join(f"neupims: warning: {each}\n" for each in warnings)
    assert len(warnings) == 1
    assert main(["simulate", *flags, "--fidelity", "intended"]) == 1
    assert capsys.readouterr().out == ""
    assert main(["simulate", *flags, "--fidelity", "intended", "--allow-overflow"]) == 0


# --- fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_the_largest_batch_fits_and_one_more_does_not(tmp_path, system, tp, pp):
    model = write_model(tmp_path / "m.toml")
    options = {"system": system, "tp": tp, "pp": pp}
    changes = {"hbm.rows": 3000, "hbm.num_channels": 4, "gpu.memory_bytes": 3000 * 4 * 32768}
    found = fit(model, changes=changes, context=700, **options)
    most = found.largest_batch.value
    assert found.batch == most > 0
    assert found.fits

    def over(requests):
        batch = make_batch([700] * requests, np.arange(requests) % 4)
        return any(find_overflow(machine(3000), MODEL, batch, Parallel(tp, pp), system=system))

    assert not over(most)
    assert over(most + 1)
    assert not fit(model, changes=changes, context=700, batch=most + 1, **options).fits


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_longest_context_fits_and_one_more_token_does_not(tmp_path, system):
    model = write_model(tmp_path / "m.toml")
    changes = {"hbm.rows": 3000, "hbm.num_channels": 4, "gpu.memory_bytes": 3000 * 4 * 32768}
    found = fit(model, changes=changes, batch=6, system=system)
    assert found.context == found.largest_context.value > 0

    def over(tokens):
        batch = make_batch([tokens] * 6, np.arange(6) % 4)
        return any(find_overflow(machine(3000), MODEL, batch, ONE, system=system))

    assert not over(found.context)
    assert over(found.context + 1)


def test_what_binds_is_named_and_by_hand(tmp_path):
    """12,000 tiles less 6,144 of weights: 1,464 of each channel, less activations; a request of 700
    tokens takes (22 x 2 + 2 x 32) x 8 = 864 tiles. So each channel holds one, all together 6.
    """
    model = write_model(tmp_path / "m.toml")
    changes = {"hbm.rows": 3000, "hbm.num_channels": 4}
    assert float(request_tiles(machine(3000), MODEL, [700], ONE)[0]) == 864
    found = fit(model, changes=changes, context=700)
    assert found.largest_batch == (4, 4, 6, "channel")
    assert found.kv_bytes_per_token == pytest.approx(864 * 32768 / 700)
    room = float(channel_tiles(machine(3000), MODEL, ONE, 4))
    left = found.channel_tokens_left
    assert float(request_tiles(machine(3000), MODEL, [left], ONE)[0]) <= room - 864
    assert float(request_tiles(machine(3000), MODEL, [left + 1], ONE)[0]) > room - 864
    assert found.memory_tokens_left == int((4 * room - 4 * 864) / 864 * 700)
    flat = fit(model, changes=changes, context=700, system="npu-only").largest_batch
    assert (flat.channel, flat.binding) == (None, "memory")
    # 183 MiB less activations, of 32 KiB a token
    assert flat.value == (3000 * 4 * 32768 - 192 * MIB) // (700 * 32768 + 2 * 9216)


def test_weights_that_leave_no_room_bind(tmp_path, capsys):
    model = write_model(tmp_path / "m.toml")
    flags = ["fit", "--model", str(model), "--set", "hbm.rows=500", "--set", "hbm.num_channels=4"]
    assert main([*flags, "--context", "100"]) == 0
    out = capsys.readouterr().out
    assert "not even one request fits: 4 devices would do (--tp 4)" in out
    assert "the weights, which leave no room" in out
    assert "groups of layers" not in out
    assert main([*flags, "--context", "100", "--pp", "2"]) == 0
    assert "the batch is that of all 2 groups of layers" in capsys.readouterr().out
    assert main([*flags, "--context", "100", "--tp", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_batch"]["value"] > 0


def test_a_batch_that_does_not_fit_is_named_with_the_devices_that_hold_it(tmp_path, capsys):
    model = write_model(tmp_path / "m.toml")
    flags = ["fit", "--model", str(model), "--set", "hbm.rows=3000", "--set", "hbm.num_channels=4"]
    assert main([*flags, "--context", "100", "--json"]) == 0
    most = json.loads(capsys.readouterr().out)["largest_batch"]["value"]
    asked = ["--context", "100", "--batch"]
    assert main([*flags, *asked, str(most)]) == 0
    assert "not fit" not in capsys.readouterr().out
    assert main([*flags, *asked, str(most + 1)]) == 0
    said = f"{most + 1:,} requests do not fit at 100 tokens: 2 devices would do ("
    assert said in capsys.readouterr().out
    assert main([*flags, "--batch", "1000000"]) == 0
    out = capsys.readouterr().out
    assert "1,000,000 requests do not fit: no number of devices would hold" in out


@pytest.mark.parametrize("flags", [["--context", "500"], ["--batch", "7"], []])
def test_json_of_fit_is_the_record_of_the_library(tmp_path, capsys, flags):
    model = write_model(tmp_path / "m.toml", tp=2)
    assert main(["fit", "--model", str(model), *flags, "--json", "--system", "NPU+PIM"]) == 0
    options = {flags[0][2:]: int(flags[1])} if flags else {}
    found = fit(model, system="npu+pim", **options)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))
    assert found.tp == 2


@pytest.mark.parametrize(
    ("features", "weights", "cache"),
    [
        # Queries 1024 x 8 x (128 + 64), the latent 1024 x (512 + 64), keys and values from it
        # 512 x 8 x (128 + 128), output 8 x 128 x 1024; 8 layers. The latent is the cache.
        (
            {"kv_rank": 512, "rope_dim": 64, "head_dim": 128, "value_dim": 128},
            2 * 8 * (1572864 + 589824 + 1048576 + 1048576 + 2 * 1024 * 4096),
            2 * 8 * (512 + 64),
        ),
        ({"weight_bits": 4}, 192 * MIB // 4, 32768),
        (
            {"experts": 4, "active_experts": 2, "expert_width": 512, "expert_skew": 0.5},
            2 * 8 * (4 * 1024 * 1024 + 4 * 1024 + 4 * 2 * 1024 * 512),
            32768,
        ),
    ],
)
def test_sizes_of_newer_models(tmp_path, features, weights, cache):
    model = write_model(tmp_path / "m.toml", **features)
    found = fit(model, system="gpu", context=1000)
    assert found.weight_bytes == weights
    assert found.kv_bytes_per_token == cache
    request = 1000 * cache + found.activation_bytes / found.batch
    assert found.largest_batch.value == int((40e9 - weights) / request)
    assert fit(model, system="gpu", context=1000, batch=found.batch).fits


def test_a_latent_has_a_layout_in_tiles_in_intended_fidelity_alone(tmp_path):
    latent = {"kv_rank": 512, "rope_dim": 64, "head_dim": 128, "value_dim": 128}
    model = write_model(tmp_path / "m.toml", **latent)
    for system in SYSTEMS:
        if system in PIM_SYSTEMS:
            with pytest.raises(ValueError, match="needs the fidelity intended"):
                fit(model, system=system, context=1000)
            assert fit(model, system=system, context=1000, fidelity="intended").fits
        else:
            assert fit(model, system=system, context=1000).fits


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--context", "0"], "context must be"),
        (["--batch", "-3"], "batch must be"),
        (["--model", "gpt9"], "gpt9"),
        (["--tp", "3"], "tp must divide"),
        (["--set", "hbm.rows=0"], "hbm.rows"),
    ],
)
def test_impossible_flags_of_fit_are_one_sentence(tmp_path, capsys, flags, words):
    model = write_model(tmp_path / "m.toml")
    assert main(["fit", "--model", str(model), *flags]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.count("\n") == 1


# --- explore and search ------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_explore_counts_its_impossible_designs_by_reason(system):
    """Rows: 1,500 do not hold the weights, 1,560 no request, 2,300 not all eight, 6,000 all."""
    field = "gpu.memory_bytes" if system == "gpu" else "hbm.rows"
    scale = 4 * 32768 if system == "gpu" else 1
    knobs = {
        field: [rows * scale for rows in (1500, 1560, 2300, 6000)],
        "parallel.tp": [1, 3],
    }
    base = replace(machine(6000), "gpu.memory_bytes", 6000.0 * 4 * 32768)
    found = explore(
        base, MODEL, make_batch([512] * 8, [0] * 8), knobs, method="grid", system=system
    )
    assert sum(found.flagged_by_reason.values()) == found.flagged == 7
    assert found.kept == 1
    alone = "a request alone exceeds the memory beside the weights"
    if system in PIM_SYSTEMS:
        alone = "a request alone exceeds a channel beside the weights"
        alone += " (parallel.kv_split spreads it)"
    assert found.flagged_by_reason == {
        "heads do not divide over the devices of a layer": 4,
        "weights exceed the memory": 1,
        alone: 1,
        "the batch exceeds the memory beside the weights": 1,
    }
    assert set(found.flagged_by_reason) <= set(REASONS)
    assert found.front[0].knobs[field] == 6000 * scale
    assert found.base.metrics["area_mm2"] > 0
    assert found.to_dict()["flagged_by_reason"] == found.flagged_by_reason
    assert not any("impossible" in each for each in found.warnings)


def test_an_impossible_base_design_is_warned_of():
    knobs = {"hbm.rows": [1500, 6000]}
    found = explore(
        machine(1500), MODEL, make_batch([100] * 4, [0] * 4), knobs, method="grid", points=2
    )
    assert found.warnings[0] == "the base design is impossible: weights exceed the memory"


def test_a_channel_that_overflows_as_dealt_is_no_design():
    """With 2,500 rows a channel has 964 tiles less activations, and a request of 300 tokens takes
    (10 x 2 + 32) x 8 = 416. Three on one channel do not fit.
    """
    batch = make_batch([300] * 3, [0, 0, 0])
    knobs = {"hbm.rows": [2500, 6000]}
    for options, flagged in (
        ({}, 0),  # dealt to three channels
        ({"schedule": "trace", "fidelity": "intended"}, 1),
        ({"schedule": "trace"}, 0),  # the public simulator times such traces
    ):
        found = explore(machine(6000), MODEL, batch, knobs, method="grid", **options)
        reasons = {"the requests of a channel exceed it": 1} if flagged else {}
        assert found.flagged_by_reason == reasons


def test_a_dealt_batch_may_overflow_one_channel():
    """Five requests of 864 tiles: 4,320 of 4 x 1,464, but one channel must hold two of them."""
    batch = deal(jnp.asarray([700] * 5), 4)
    assert REASONS[int(reason_code(machine(3000), MODEL, batch, ONE))] == (
        "the requests of a channel exceed it"
    )
    assert int(reason_code(machine(3000), MODEL, batch, ONE, full_channels=True)) == 0


def test_a_channel_that_is_not_there_matters_to_all_systems_but_the_gpu():
    batch = make_batch([700], [5], num_channels=8)
    for system in SYSTEMS:
        code = int(reason_code(machine(3000), MODEL, batch, ONE, system=system))
        if system == "gpu":
            assert code == 0
        else:
            assert REASONS[code] == "a request on a channel that does not exist"


def trace_with_a_full_channel(path):
    path.write_text("seq_len,ch_idx\n" + "300,0\n" * 3 + "40,1\n" * 2)
    return path


def test_search_finds_a_schedule_that_fits_and_says_what_does_not(tmp_path, capsys):
    """Channel 0 holds one request of 300 tokens, so the trace overflows it; others may hold them.
    The message about the trace is not one about what was found and written.
    """
    trace, out = trace_with_a_full_channel(tmp_path / "t.csv"), tmp_path / "out.csv"
    flags = ["--model", str(write_model(tmp_path / "m.toml")), "--trace", str(trace)]
    flags += ["--set", "hbm.rows=2200", "--set", "hbm.num_channels=4", "--budget", "16"]
    flags += [
        "--seeds",
        "1",
        "--population",
        "16",
        "--strategy",
        "random",
        "--sub-batches",
        "1",
        "--realisable",
        "--export-trace",
        str(out),
    ]
    assert main(["search", *flags, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert len(found["warnings"]) == 1
    assert found["warnings"][0].startswith("as published, the requests of channel 0 need")
    assert said.err == f"neupims: warning: {found['warnings'][0]}\n"
    written = read_trace(out, num_channels=4)
    assert not any(find_overflow(machine(2200), MODEL, written, ONE))
    # Where the others must stay, the trace that is written overflows too, and is said to.
    assert main(["search", *flags, "--json", "--new-only", "1"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert [each.split(",")[0] for each in warnings] == ["as published", f"in {out}"]
    assert "channel 0 need" in warnings[1]
    assert any(find_overflow(machine(2200), MODEL, read_trace(out, num_channels=4), ONE))


def test_search_refuses_what_no_schedule_fits_unless_it_is_allowed(tmp_path):
    batch = make_batch([100] * 8, [0, 1, 2, 3] * 2)
    case = case_of(tmp_path, batch, rows=1500)
    options = {"budget": 16, "population": 16, "seeds": 1, "sub_batches": (1,)}
    with pytest.raises(ValueError, match="the weights take"):
        search_schedule(case, **options)
    found = search_schedule(case, allow_overflow=True, **options)
    assert [each.split(",")[0] for each in found.overflow] == [
        "as published",
        "in the best schedule",
    ]
    # Too many requests for the whole memory: the public simulator times them.
    many = case_of(tmp_path, make_batch([480] * 8, [0, 1, 2, 3] * 2))
    assert len(search_schedule(many, **options).overflow) == 2
    with pytest.raises(ValueError, match="8 requests"):
        search_schedule(many._replace(fidelity="intended"), **options)
