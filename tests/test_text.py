"""The text transformer: which tokens a token sees, which token is the descriptor, and refusals.
Parity with published towers: test_weights_text.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggem_jax.models.text import TextConfig, TextTransformer, end_of

SMALL = {"vocabulary": 20, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "context": 8}
IDS = jnp.array([[1, 5, 7, 19, 0, 0], [1, 3, 19, 4, 19, 0]])


def started(outputs=0, **changes):
    model = TextTransformer(TextConfig(**(SMALL | changes)), outputs=outputs)
    variables = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
        model.init(jax.random.key(0), IDS),
    )
    return model, variables


def test_a_causal_token_sees_what_is_before_it_only():
    changed = IDS.at[0, 3].set(2)
    for causal in (True, False):
        model, variables = started(causal=causal)
        moved = np.abs(
            model.apply(variables, IDS).tokens - model.apply(variables, changed).tokens
        ).max(axis=(0, 2))
        assert (moved[3:] > 1e-3).all()
        assert (moved[:3] > 1e-3).all() != causal


def test_the_descriptor_is_the_token_that_ends_the_text_or_the_last_one():
    model, variables = started()
    output = model.apply(variables, IDS)
    np.testing.assert_array_equal(
        output.descriptor, output.tokens[jnp.arange(2), jnp.array([3, 2])]
    )
    model, variables = started(pooled="last")
    output = model.apply(variables, IDS)
    np.testing.assert_array_equal(output.descriptor, output.tokens[:, -1])


def test_what_follows_the_end_of_a_causal_text_changes_nothing():
    model, variables = started()
    np.testing.assert_allclose(
        model.apply(variables, IDS[:, :4]).descriptor,
        model.apply(variables, IDS).descriptor,
        atol=1e-6,
    )


@pytest.mark.parametrize(("end_id", "places"), [(None, [3, 2]), (4, [5, 3]), (7, [2, 5])])
def test_a_text_ends_at_its_first_end_and_at_its_last_place_without_one(end_id, places):
    np.testing.assert_array_equal(end_of(IDS, TextConfig(**SMALL, end_id=end_id)), places)


def test_the_projection_is_a_dense_layer_of_the_descriptor():
    model, variables = started(outputs=5)
    output = model.apply(variables, IDS)
    np.testing.assert_allclose(
        output.projected, output.descriptor @ variables["params"]["head"]["kernel"], atol=1e-5
    )
    assert started()[0].apply(started()[1], IDS).projected is None


def test_recomputing_the_blocks_changes_no_number():
    model, variables = started()
    again, _ = started(remat=True)
    np.testing.assert_array_equal(
        model.apply(variables, IDS).tokens, again.apply(variables, IDS).tokens
    )


def test_a_gated_mlp_has_twice_the_channels_before_the_gate():
    mlp = jax.eval_shape(
        TextTransformer(TextConfig(**SMALL, mlp="swiglu")).init, jax.random.key(0), IDS
    )["params"]["blocks_0"]["mlp"]
    assert (mlp["in"]["kernel"].shape, mlp["out"]["kernel"].shape) == ((16, 48), (24, 16))


def test_dropout_acts_in_training_only():
    model, variables = started(dropout=0.5)
    quiet = model.apply(variables, IDS).descriptor
    assert (
        np.abs(
            model.apply(variables, IDS, train=True, rngs={"dropout": jax.random.key(0)}).descriptor
            - quiet
        ).max()
        > 0.1
    )


@pytest.mark.parametrize(
    "ids",
    [np.zeros((2, 9), int), np.zeros((2, 0), int), np.zeros(3, int), np.zeros((2, 3))],
    ids=["long", "none", "flat", "real"],
)
def test_wrong_ids_are_refused(ids):
    model, variables = started()
    with pytest.raises(ValueError, match=r"ids must be whole numbers \(b, n\) with n from 1 to 8"):
        model.apply(variables, ids)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocabulary": 0}, "vocabulary"),
        ({"heads": 3}, "multiple of heads"),
        ({"end_id": 20}, "end_id"),
        ({"pooled": "first"}, "end, last"),
    ],
    ids=["vocabulary", "heads", "end", "pooled"],
)
def test_impossible_configs_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TextConfig(**(SMALL | changes))
