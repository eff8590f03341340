"""neupims/machine/model.py, model_size.py and supported.py: what a model may be, and its size."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from neupims import Hardware, make_batch, simulate
from neupims.machine.model import Decoder
from neupims.machine.model_size import (
    flops_per_token,
    kv_cache_bytes,
    layer_weight_bytes,
    parameters,
    weight_bytes,
)
from neupims.machine.supported import is_timed
from neupims.machine.workload import Parallel

SMALL = {"layers": 4, "width": 64, "heads": 8, "kv_heads": 8, "mlp_width": 256}
LATENT = {"kv_rank": 32, "rope_dim": 4, "query_rank": 48, "head_dim": 16}
EXPERTS = {"experts": 8, "active_experts": 2, "shared_experts": 1, "expert_width": 32}


def small(**change):
    return Decoder(**SMALL | change)


def test_fields_that_are_left_out_hold_what_they_mean():
    model = small()
    assert (model.head_dim, model.value_dim) == (8, 8)
    assert small(head_dim=16).value_dim == 16
    assert small(experts=4, active_experts=1).expert_width == 256
    assert small(window=100).window_layers == 4
    assert small(window=100, window_layers=2).window_layers == 2
    assert small(experts=4, active_experts=1, dense_layers=1).moe_layers == 3
    assert model.moe_layers == 0


def test_widths_of_a_head_that_is_not_the_width_divided():
    model = small(heads=10, kv_heads=5, head_dim=16)
    assert (model.query_width, model.kv_width, model.value_width) == (160, 80, 160)
    attention = 64 * (160 + 80 + 80) + 160 * 64
    assert parameters(model).attention == 4 * attention


def test_widths_of_latent_attention():
    """DeepSeek-V2, section 2.1: per token and layer the cache holds d_c + d_h^R numbers."""
    model = small(**LATENT)
    assert model.cache_width == 32 + 4
    assert model.query_width == 8 * (16 + 4)
    query = 64 * 48 + 48 * 8 * 20
    keys = 64 * (32 + 4) + 32 * 8 * (16 + 16)
    assert parameters(model).attention == 4 * (query + keys + 8 * 16 * 64)
    assert kv_cache_bytes(model, 10) == 2 * 4 * 36 * 10
    direct = parameters(small(**LATENT | {"query_rank": 0})).attention
    assert direct - parameters(model).attention == 4 * (64 * 8 * 20 - query)


def test_experts_count_once_each_and_active_ones_by_token():
    model = small(mlp_matrices=3, dense_layers=1, vocabulary=1000, **EXPERTS)
    size = parameters(model)
    expert = 3 * 64 * 32
    assert size.experts == 3 * 8 * expert
    assert size.active_experts == 3 * 2 * expert
    assert size.mlp == 3 * 64 * 256 + 3 * (expert + 64 * 8)
    assert size.total - size.active == 3 * 6 * expert
    assert size.embeddings == size.lm_head == 64_000


def test_a_tied_lm_head_takes_no_bytes_but_is_computed():
    tied, untied = (small(vocabulary=1000, tied_embeddings=tie) for tie in (1, 0))
    assert weight_bytes(untied) - weight_bytes(tied) == 2 * 64_000
    assert flops_per_token(untied) == flops_per_token(tied)
    assert flops_per_token(tied) - flops_per_token(small()) == 2 * 64_000
    assert weight_bytes(tied) - layer_weight_bytes(tied) == 2 * 64_000


@pytest.mark.parametrize("bits", [8, 4])
def test_narrow_numbers_take_their_bits(bits):
    model = small(weight_bits=bits, vocabulary=1000)
    assert layer_weight_bytes(model) == layer_weight_bytes(small()) * bits / 16
    assert weight_bytes(model) == layer_weight_bytes(model) + 2 * 2 * 64_000
    experts = small(expert_bits=bits, **EXPERTS)
    narrower = parameters(experts).experts * (16 - bits) / 8
    assert weight_bytes(small(**EXPERTS)) - weight_bytes(experts) == narrower
    assert kv_cache_bytes(small(kv_bits=bits), 7) == kv_cache_bytes(small(), 7) * bits / 16
    assert weight_bytes(small(activation_bits=bits)) == weight_bytes(small())


def test_a_window_bounds_the_cache_and_the_products_of_its_layers():
    """Three of four layers keep the last 100 tokens."""
    model = small(window=100, window_layers=3)
    for tokens, kept in ((60, 4 * 60), (100, 4 * 100), (1000, 1000 + 3 * 100)):
        assert kv_cache_bytes(model, tokens) == 2 * 128 * kept
        assert flops_per_token(model, tokens) - flops_per_token(model) == 2 * 128 * kept


def test_flops_of_a_dense_token_by_hand():
    """Four layers of 12 x 64 x 64 parameters, and 10 tokens of 64 channels twice, each 2 FLOPs."""
    assert flops_per_token(small(), 10) == 2 * 4 * (12 * 64 * 64 + 2 * 10 * 64)
    latent = small(**LATENT)
    assert flops_per_token(latent, 10) - flops_per_token(latent) == 2 * 4 * 10 * 8 * (32 + 4 + 32)


def test_a_batch_of_unlike_models_has_the_sizes_of_each():
    models = [
        small(),
        small(head_dim=32, kv_heads=2),
        small(vocabulary=1000, tied_embeddings=1, weight_bits=8, kv_bits=4),
        small(window=5, window_layers=2),
        small(**LATENT),
        small(dense_layers=1, **EXPERTS),
    ]
    batch = jax.tree.map(lambda *numbers: jnp.array(numbers), *models)
    functions = (weight_bytes, lambda model: kv_cache_bytes(model, 20), flops_per_token)
    for function in functions:
        assert jax.vmap(function)(batch).tolist() == [function(model) for model in models]
    assert jax.vmap(is_timed)(batch).tolist() == [bool(is_timed(model)) for model in models]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head_dim": -1}, "head_dim must be a whole number of at least 0, not -1"),
        (
            {"heads": 10, "kv_heads": 10},
            "heads must divide the width, 64, but is 10; give head_dim",
        ),
        ({"weight_bits": 6}, "weight_bits must be 16, 8 or 4, not 6"),
        ({"kv_bits": 32}, "kv_bits must be 16, 8 or 4, not 32"),
        ({"weight_bits": 0}, "weight_bits must be 16, 8 or 4, not 0"),
        ({"expert_bits": 8}, "expert_bits is 8, but the model has no experts"),
        ({"tied_embeddings": True}, "tied_embeddings must be a whole number"),
        ({"experts": 4}, "active_experts must be from 1 to the experts, 4, but is 0"),
        ({"experts": 4, "active_experts": 5}, "active_experts must be from 1 to the experts, 4"),
        ({"active_experts": 2}, "active_experts is 2, but the model has no experts"),
        ({"expert_skew": 1.0}, "expert_skew is 1.0, but the model has no experts"),
        ({"experts": 4, "active_experts": 1, "expert_skew": -1}, "expert_skew must be a number of"),
        ({"experts": 4, "active_experts": 1, "dense_layers": 4}, "dense_layers must be below the"),
        ({"window_layers": 2}, "window_layers is 2, but the model has no window"),
        ({"window": 10, "window_layers": 5}, "window_layers must be at most the layers, 4"),
        ({"lm_head": 1}, "lm_head is 1, but the model has no vocabulary"),
        ({"lm_head": 2, "vocabulary": 9}, "lm_head must be a whole number"),
        ({"rope_dim": 8}, "rope_dim belongs to latent attention"),
        ({"value_dim": 16}, "value_dim belongs to latent attention"),
        ({"kv_rank": 8, "kv_heads": 4}, "kv_heads must be the heads, 8, with kv_rank"),
        ({"kv_rank": 8, "window": 4}, "window must be 0 with kv_rank"),
    ],
)
def test_contradictions_are_refused_by_field(change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        small(**change)
    assert "\n" not in str(caught.value)


def test_every_field_says_what_it_is():
    for each in dataclasses.fields(Decoder):
        assert each.metadata["meaning"], each.name


def test_a_traced_model_that_is_not_timed_is_flagged():
    models = [small(), small(weight_bits=8)]
    batch = jax.tree.map(lambda *numbers: jnp.array(numbers), *models)
    requests = make_batch([30, 40], [0, 1])
    found = jax.vmap(lambda model: simulate(Hardware(), model, requests, Parallel(1, 1)).flagged)(
        batch
    )
    assert found.tolist() == [False, True]
