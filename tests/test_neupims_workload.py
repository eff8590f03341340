"""neupims/machine/workload.py: models by their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.config import load_model
from neupims.machine.workload import Decoder, kv_cache_bytes, weight_bytes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt3-7b", 6.7e9), ("gpt3-13b", 13e9), ("gpt3-30b", 30e9), ("gpt3-175b", 175e9)],
)
def test_weights_are_the_published_size_less_embeddings(name, parameters):
    assert 0.94 < weight_bytes(load_model(name)) / 2 / parameters < 1.01


def test_kv_cache_of_one_token_by_hand():
    """GPT-3 175B: 96 layers x (key + value) x 12288 channels x 2 bytes = 4,718,592 bytes."""
    assert kv_cache_bytes(load_model("gpt3-175b"), 1) == 96 * 2 * 12288 * 2


def test_grouped_queries_and_gated_mlp():
    """Llama-3 8B: 32 layers of 4096 x 4096 twice, 4096 x 1024 twice and three 4096 x 14336 are
    6,979,321,856 numbers; 128 KiB of cache a token.
    """
    llama = Decoder(layers=32, width=4096, heads=32, kv_heads=8, mlp_width=14336, mlp_matrices=3)
    assert weight_bytes(llama) == 2 * 6_979_321_856
    assert kv_cache_bytes(llama, 1) == 128 * 1024


def test_a_batch_of_models_is_the_same_record_with_a_leading_axis():
    models = [load_model("gpt3-7b"), load_model("gpt3-13b")]
    batch = jax.tree.map(lambda *numbers: jnp.array(numbers), *models)
    assert jax.vmap(weight_bytes)(batch).tolist() == pytest.approx(
        [weight_bytes(model) for model in models]
    )
    in_axes = jax.tree.map(lambda _: 0, batch)
    assert jax.vmap(kv_cache_bytes, (in_axes, None))(batch, 2048).tolist() == pytest.approx(
        [kv_cache_bytes(model, 2048) for model in models]
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layers": 0}, "layers"),
        ({"layers": 2.5}, "layers"),
        ({"heads": np.int64(3)}, "heads"),
        ({"heads": 3}, "heads"),
        ({"kv_heads": 5}, "kv_heads"),
    ],
)
def test_impossible_models_are_refused_by_field(change, word):
    with pytest.raises(ValueError, match=word):
        Decoder(**{"layers": 2, "width": 64, "heads": 8, "kv_heads": 8, "mlp_width": 256} | change)
