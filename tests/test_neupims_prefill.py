"""neupims/timing/prefill.py: hand-worked attention, the roofline, and what prefill shares with
decoding.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.__main__ import main
from neupims.machine.calibration import DEFAULT
from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.workload import Parallel, make_batch
from neupims.timing.iteration import simulate
from neupims.timing.prefill import prefill, prefill_attention
from neupims.timing.stages import NPU_ATTENTION, operations

MODEL, SPREAD = load_model("gpt3-7b"), load_parallel("gpt3-7b")
NAMES = [each.name for each in operations("npu-only", 1)]


def prompts(*lengths):
    return make_batch(np.array(lengths), np.zeros(len(lengths), int))


def cycles_of(result):
    return dict(zip(NAMES, result.op_cycles.tolist(), strict=True))


def test_attention_of_one_prompt_by_hand():
    """256 tokens are 2 blocks of queries, which meet 3 blocks of keys; a device of four has 8 heads
    of 128 channels; 128 columns pass 8 arrays in 16 cycles. Logit of a head: 2 blocks loaded in 128
    cycles each, the first stream of each hidden behind it, 16 more for the third: 272. Attend: 3
    blocks of weights loaded, 384.
    """
    work = prefill_attention(Hardware(), MODEL, jnp.array([256]), SPREAD, calibration=DEFAULT)
    assert float(work.busy_cycles) == 8 * (272 + 384)
    assert float(work.cycles) == 8 * (272 + 384) + 128 + 128 + 16
    assert float(work.macs) == 2 * 8 * 128 * 256 * 257 / 2
    assert float(work.read_bytes) == 2 * 256 * 128 * (8 + 8 + 8)
    assert float(work.write_bytes) == 2 * 256 * 128 * 8


def test_softmax_bounds_a_machine_of_one_vector_unit():
    """Half of 256 queries have at most 128 keys: one pass of 128 lanes, one level of sums, 2 + 3
    cycles. The others have two passes and three levels, 6 + 6 cycles. 8 heads.
    """
    slow = replace(Hardware(), "npu.vector_units", 1)
    work = prefill_attention(slow, MODEL, jnp.array([256]), SPREAD, calibration=DEFAULT)
    assert float(work.cycles) == 8 * (128 * 5 + 128 * 12) + 128 + 128 + 16


def test_keys_that_do_not_fit_are_read_for_each_block_of_queries():
    """256 tokens of 128 channels: 2 x 2 x 256 x 128 bytes of keys and values, half of 262,144; 2
    blocks of queries meet 3 blocks of 128 keys.
    """
    for scratchpad, keys in ((262144, 256), (262143, 3 * 128)):
        small = replace(Hardware(), "npu.scratchpad_bytes", scratchpad)
        work = prefill_attention(small, MODEL, jnp.array([256]), SPREAD, calibration=DEFAULT)
        assert float(work.read_bytes) == 2 * 128 * 8 * (256 + 2 * keys)


def test_many_arrays_stream_no_faster_than_instructions_come():
    cycles = [
        float(
            prefill_attention(
                replace(Hardware(), "npu.num_arrays", count),
                MODEL,
                jnp.array([4096]),
                SPREAD,
                calibration=DEFAULT,
            ).busy_cycles
        )
        for count in (16, 32, 64)
    ]
    assert cycles[0] > cycles[1] == cycles[2]


def test_grouped_queries_read_fewer_keys():
    llama = load_model("llama3-8b")
    work = prefill_attention(
        Hardware(), llama, jnp.array([100]), Parallel(1, 1), calibration=DEFAULT
    )
    assert float(work.read_bytes) == 2 * 100 * 128 * (32 + 8 + 8)


def test_prompts_of_one_token_are_a_decode_step_without_attention():
    batch = prompts(*[1] * 96)
    one, other = (
        cycles_of(prefill(Hardware(), MODEL, batch, SPREAD)),
        cycles_of(
            simulate(
                Hardware(),
                MODEL,
                batch,
                SPREAD,
                system="npu-only",
                sub_batches=1,
                fidelity="intended",
            )
        ),
    )
    for name in set(NAMES) - {NPU_ATTENTION.name}:
        assert one[name] == pytest.approx(other[name], rel=1e-6)


@pytest.mark.parametrize("system", ["npu-only", "gpu"])
def test_never_below_the_roofline_and_products_as_counted(system):
    lengths = np.array([700, 33, 1, 1500])
    result = prefill(Hardware(), MODEL, prompts(*lengths), SPREAD, system=system)
    weights = 4096 * (3072 + 1024 + 2 * 4096)  # of a device: queries, keys, values; output; MLP
    macs = lengths.sum() * weights + 2 * 8 * 128 * (lengths * (lengths + 1) / 2).sum()
    assert float(result.counts.npu_macs) == pytest.approx(32 * macs, rel=1e-5)
    peak = 131072e9 if system == "npu-only" else 156e12
    assert float(result.iteration_seconds) > 32 * macs / peak
    assert float(result.tokens_per_second) == pytest.approx(
        lengths.sum() / float(result.iteration_seconds), rel=1e-6
    )
    assert not result.flagged


def test_attention_grows_with_the_square_and_products_with_the_tokens():
    short, long = (
        cycles_of(prefill(Hardware(), MODEL, prompts(length), SPREAD)) for length in (8192, 16384)
    )
    assert long[NPU_ATTENTION.name] / short[NPU_ATTENTION.name] == pytest.approx(4, rel=0.02)
    assert long["ffn.fc1"] / short["ffn.fc1"] == pytest.approx(2, rel=0.02)


def test_mapped_is_the_loop_and_better_machines_are_faster():
    batch = prompts(300, 40, 900)
    names = ("hbm.num_channels", "npu.num_arrays", "npu.vector_units", "npu.clock_hz")
    machines = [
        Hardware(),
        *(
            replace(Hardware(), name, 2 * value)
            for name, value in zip(names, (32, 8, 8, 1e9), strict=True)
        ),
    ]
    rows = jax.tree.map(
        lambda *values: jnp.stack([jnp.float32(value) for value in values]), *machines
    )
    mapped = jax.vmap(lambda hardware: prefill(hardware, MODEL, batch, SPREAD))(rows)
    alone = [
        float(prefill(machine, MODEL, batch, SPREAD).iteration_seconds) for machine in machines
    ]
    np.testing.assert_allclose(mapped.iteration_seconds, alone, rtol=1e-5)
    assert max(alone[1:]) < alone[0]


def test_only_the_npu_and_the_gpu_have_prefill():
    with pytest.raises(ValueError, match="npu-only or gpu, not 'neupims'"):
        prefill(Hardware(), MODEL, prompts(3), SPREAD, system="neupims")


@pytest.mark.parametrize(
    ("flags", "lines", "words"),
    [
        (["--sub-batches", "2"], "300,0\n", "--sub-batches"),
        (["--path", "closed"], "300,0\n", "--path"),
        ([], "1000000,0\n", "request 0 of 1000000 tokens needs"),
    ],
)
def test_what_prefill_does_not_have_is_refused(capsys, tmp_path, flags, lines, words):
    (tmp_path / "trace.csv").write_text("seq_len,ch_idx\n" + lines)
    assert (
        main(
            [
                "simulate",
                "--model",
                "gpt3-7b",
                "--trace",
                str(tmp_path / "trace.csv"),
                "--prefill",
                *flags,
            ]
        )
        == 1
    )
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert words in said.err


@pytest.mark.parametrize("system", ["neupims", "gpu"])
def test_the_tool(capsys, tmp_path, system):
    trace = tmp_path / "trace.csv"
    trace.write_text("seq_len,ch_idx\n300,0\n40,1\n513,0\n7,2\n")
    flags = [
        "simulate",
        "--model",
        "gpt3-175b",
        "--trace",
        str(trace),
        "--system",
        system,
        "--prefill",
    ]
    assert (
        main(
            [
                *flags,
                "--json",
                "--html",
                str(tmp_path / "page.html"),
                "--perfetto",
                str(tmp_path / "trace.json"),
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["phase"], result["fidelity"], result["expected_error"]) == (
        "prefill",
        "intended",
        None,
    )
    assert result["system"] == ("gpu" if system == "gpu" else "npu-only")
    assert result["first_token_seconds"] == pytest.approx(
        4 * result["iteration_seconds"]
    )  # 175B: four groups of devices
    assert main([*flags, "--json", "--set", "link.bandwidth_bytes_per_second=1e9"]) == 0
    linked = json.loads(capsys.readouterr().out)
    forward = 2 * 860 * 12288 / 1e9  # float16 activations, three times from group to group
    assert linked["first_token_seconds"] == pytest.approx(
        4 * linked["iteration_seconds"] - forward, rel=1e-5
    )
    assert (
        result["layer_cycles"]
        == result["stage_cycles"]["all"]
        == pytest.approx(sum(each["cycles"] for each in result["ops"]), rel=1e-6)
    )
    assert "the prefill of gpt3-175b" in (tmp_path / "page.html").read_text()
    assert main(flags) == 0
    assert "time to the first token" in capsys.readouterr().out
