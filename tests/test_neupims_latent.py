"""Latent attention: its products, its bytes, its memory, and its rows in PIM, counted by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from neupims.envelope import expected_error
from neupims.machine.calibration import DEFAULT
from neupims.machine.case import Case
from neupims.machine.config import load_model
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import Mix, find_mix
from neupims.machine.model import Decoder
from neupims.machine.model_size import flops_per_token, kv_cache_bytes, parameters
from neupims.machine.supported import check_latent
from neupims.machine.workload import Parallel, make_batch
from neupims.timing.attention import attention_counts
from neupims.timing.capacity import activation_bytes, device_weight_bytes, request_bytes
from neupims.timing.fit import fit
from neupims.timing.iteration import simulate
from neupims.timing.layout import layer_tiles
from neupims.timing.npu import Context
from neupims.timing.prefill import prefill, prefill_operations
from neupims.timing.stages import npu_operation, stages

# A latent of 512 and a rotary key of 64, as DeepSeek's; 16 heads of 128 channels.
LATENT = Decoder(
    *(4, 1024, 16, 16, 2048),
    mlp_matrices=3, head_dim=128, kv_rank=512, rope_dim=64, query_rank=256,
)  # fmt: skip
DIRECT = dataclasses.replace(LATENT, query_rank=0)
BATCH = make_batch([700, 90, 400], [0, 1, 0])
LENGTHS = np.array([700, 90, 400])
ALONE = Parallel(1, 1)
INTENDED = {"fidelity": "intended"}


def works_of(model, tokens, parallel=ALONE, system="npu-only", listed=None):
    """The work of each operation of a layer by name."""
    mix = find_mix(model).of_layer
    context = Context(Hardware(), model, BATCH, parallel, DEFAULT, system, "intended", mix)
    listed = stages("npu-only", 1)[0].operations if listed is None else listed
    return {each.name: npu_operation(each, context, tokens) for each in listed}


@pytest.mark.parametrize("model", [LATENT, DIRECT])
def test_products_of_a_decode_step(model):
    """They multiply each token with all weights of attention, and read each weight once."""
    works = works_of(model, 3.0)
    each = [works[name] for name in ("attn.QKVgen", "attn.proj")]
    weights = parameters(model).attention / 4
    assert float(sum(work.macs for work in each)) == 3 * weights
    latents = 512 + 64
    made = 3 * (1024 + 256) if model.query_rank else 3 * 1024  # inputs
    heads = 3 * 16 * (128 + 512 + 128)  # of absorbing, of values, of the output projection
    read = float(sum(work.read_bytes for work in each))
    assert read == 2 * (weights + made + heads)
    written = 3 * (16 * 192 + latents + 16 * 512 + 16 * 128 + 1024 + 256 * (model.query_rank > 0))
    assert float(sum(work.write_bytes for work in each)) == 2 * written


def test_all_products_of_a_step_are_the_published_count():
    """One request of 700 tokens: FLOPs of a token by `flops_per_token`, and the cache read once."""
    one = dataclasses.replace(BATCH, seq_lens=np.array([700]))
    mix = find_mix(LATENT).of_layer
    context = Context(Hardware(), LATENT, one, ALONE, DEFAULT, "npu-only", "intended", mix)
    works = [npu_operation(each, context, 1.0) for each in stages("npu-only", 1)[0].operations]
    assert float(sum(work.macs for work in works)) * 2 * 4 == flops_per_token(LATENT, 700)
    attention = next(work for work in works if work.macs == 16 * (576 + 512) * 700)
    assert float(attention.read_bytes) * 4 == kv_cache_bytes(LATENT, 700) == 2 * 4 * 576 * 700


def test_devices_share_the_heads_and_each_makes_the_latents():
    whole, shared = (works_of(LATENT, 3.0, Parallel(tp, 1)) for tp in (1, 4))
    latents = 3 * 1024 * (256 + 512 + 64)
    for name, alone in (("attn.QKVgen", latents), ("attn.proj", 0)):
        assert float(shared[name].macs) == (float(whole[name].macs) - alone) / 4 + alone
    attention = "attn.attn.FusedMHA"
    assert float(shared[attention].macs) == float(whole[attention].macs) / 4
    assert float(shared[attention].read_bytes) == float(whole[attention].read_bytes)
    weights = 4 * 2 * parameters(LATENT).layers / 4
    made = 4 * 2 * 1024 * (256 + 512 + 64)
    found = float(device_weight_bytes(LATENT, Parallel(4, 1)))
    assert found == pytest.approx((weights - made) / 4 + made)


def test_the_memory_of_a_request():
    given = (Hardware(), LATENT, LENGTHS, Parallel(4, 1))
    found = request_bytes(*given, system="gpu")
    np.testing.assert_array_equal(found, 2 * 4 * 576 * LENGTHS)  # on every device
    # A row holds 512 numbers, a tile a row of each of 32 banks: a key takes two rows of a bank, and
    # 16 tiles hold the 512 channels of 512 tokens, or one those of 32 tokens.
    values = np.asarray(layer_tiles(*given, fidelity="intended")) - 2 * np.ceil(LENGTHS / 32)
    assert (values >= np.ceil(LENGTHS / 32)).all()
    assert (values <= 16 * np.ceil(LENGTHS / 512)).all()
    plain = dataclasses.replace(LATENT, kv_rank=0, rope_dim=0, query_rank=0)
    assert float(activation_bytes(LATENT, ALONE, 2)) == 2 * 2 * (1024 + 16 * (128 + 512))
    assert float(activation_bytes(plain, ALONE, 2)) == 2 * 2 * (2 * 1024 + 3 * 2048)


def test_pim_multiplies_each_key_with_the_query_of_each_head():
    """576 channels take 36 commands of 16 for each query, 512 take 32; one bank of 32 has the key
    of a token, or 16 of the 512 channels of the values. The second row of a key is counted full.
    """
    counts = attention_counts(Hardware(), LATENT, BATCH, ALONE, fidelity="intended")
    tokens = np.ceil(LENGTHS / 32)
    logit = 16 * 2 * tokens * 32
    channels, tail = 16 * 16, np.ceil(LENGTHS % 512 / 16)
    attend = channels * (LENGTHS // 512 * 32 + tail)
    found = float(counts.products)
    assert logit.sum() + attend.sum() <= found <= 1.1 * (logit.sum() + attend.sum())


@pytest.mark.parametrize("system", ["npu-only", "gpu"])
def test_it_is_timed(system):
    done = simulate(Hardware(), LATENT, BATCH, ALONE, system=system, **INTENDED)
    works = works_of(LATENT, 3.0, system=system)
    assert not done.flagged
    assert float(done.layer_cycles) == pytest.approx(
        sum(float(work.cycles) for work in works.values()), rel=0.01
    )


def test_the_closed_form_and_the_recurrence_agree():
    options = {"system": "neupims", "sub_batches": 1} | INTENDED
    closed, exact = (
        simulate(Hardware(), LATENT, BATCH, ALONE, path=path, **options)
        for path in ("closed", "exact")
    )
    assert not closed.flagged
    assert float(closed.layer_cycles) == pytest.approx(float(exact.layer_cycles), rel=0.05)


def test_a_prefill_makes_keys_and_values_of_heads():
    """Causal attention of 192 channels of a key and 128 of a value, over heads."""
    works = works_of(LATENT, 1190.0, listed=prefill_operations())
    pairs = (LENGTHS * (LENGTHS + 1) / 2).sum()
    attention = works["attn.attn.FusedMHA"]
    assert float(attention.macs) == pytest.approx(16 * (192 + 128) * pairs)
    each = sum(works[name].macs for name in ("attn.QKVgen", "attn.proj"))
    assert float(each) == pytest.approx(1190 * parameters(LATENT).attention / 4)
    assert not prefill(Hardware(), LATENT, BATCH, ALONE).flagged


def test_the_public_simulator_knows_no_latents():
    sentence = r"latent attention \(kv_rank\) needs the fidelity intended"
    with pytest.raises(ValueError, match=sentence):
        simulate(Hardware(), LATENT, BATCH, ALONE)
    with pytest.raises(ValueError, match=sentence):
        fit("deepseek-v2", context=100)
    check_latent(Mix(latent=True), system="gpu", fidelity="simulator")
    assert find_mix(load_model("deepseek-v3")).latent


def test_traced_models_need_to_say_so():
    traced = jax.tree.map(lambda number: np.array([number]), LATENT)
    run = jax.vmap(lambda model: simulate(Hardware(), model, BATCH, ALONE, system="gpu").flagged)
    assert run(traced).all()


def test_values_of_other_models_are_no_latent_attention():
    model = Decoder(8, 1024, 16, 16, 4096)  # heads of 64 channels
    found = expected_error(Case(Hardware(), model, BATCH, ALONE))
    assert any("head dim 64" in reason for reason in found.not_validated)
    assert not any("latent" in reason for reason in found.not_validated)
    latent = expected_error(Case(Hardware(), LATENT, BATCH, ALONE))
    assert any(reason.startswith("latent attention") for reason in latent.not_validated)
