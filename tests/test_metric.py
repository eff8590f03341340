"""ggem_jax/losses/metric_learning.py and models/embedder.py: losses against NumPy in float64, by
hand, and at their edges.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables

from ggem_jax.losses import metric_learning as metric
from ggem_jax.models.embedder import Embedder
from ggem_jax.models.vit import GGeM, ViT, ViTConfig

RNG = np.random.default_rng(0)
DESCRIPTORS, PROXIES, LABELS = (
    RNG.normal(size=(7, 5)),
    RNG.normal(size=(4, 5)),
    np.array([0, 1, 1, 3, 0, 3, 1]),
)
LOSSES = {
    "normalised-softmax": {"temperature": 0.1},
    "arcface": {"scale": 8.0, "margin": 0.4},
    "proxy-anchor": {"scale": 5.0, "margin": 0.2},
}


def cosines(descriptors, proxies):
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (descriptors, proxies)]
    return unit[0] @ unit[1].T


def cross_entropy(logits, labels):
    return float(
        np.mean(
            [
                np.log(np.exp(row - row[label]).sum())
                for row, label in zip(logits, labels, strict=True)
            ]
        )
    )


def oracle(name, descriptors, labels, proxies, **options):
    """The published equations, term by term."""
    cos = cosines(descriptors, proxies)
    if name == "normalised-softmax":
        return cross_entropy(cos / options["temperature"], labels)
    if name == "arcface":
        for i, label in enumerate(labels):
            angle = np.arccos(cos[i, label]) + options["margin"]
            cos[i, label] = (
                np.cos(angle)
                if angle <= np.pi
                else cos[i, label] - options["margin"] * np.sin(options["margin"])
            )
        return cross_entropy(options["scale"] * cos, labels)
    a, margin, there = options["scale"], options["margin"], sorted(set(labels.tolist()))
    pull = sum(
        np.log(1 + sum(np.exp(-a * (cos[i, c] - margin)) for i in np.flatnonzero(labels == c)))
        for c in there
    ) / len(there)
    push = sum(
        np.log(1 + sum(np.exp(a * (cos[i, c] + margin)) for i in np.flatnonzero(labels != c)))
        for c in range(len(proxies))
    ) / len(proxies)
    return pull + push


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_their_equations(name):
    got = metric.LOSSES[name](
        jnp.float32(DESCRIPTORS), jnp.array(LABELS), jnp.float32(PROXIES), **LOSSES[name]
    )
    assert float(got) == pytest.approx(
        oracle(name, DESCRIPTORS, LABELS, PROXIES, **LOSSES[name]), rel=2e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_differences_of_the_equations(name):
    loss = metric.LOSSES[name]
    slope = jax.grad(lambda d, p: loss(d, jnp.array(LABELS), p, **LOSSES[name]), argnums=(0, 1))(
        jnp.float32(DESCRIPTORS), jnp.float32(PROXIES)
    )
    for which, array in enumerate((DESCRIPTORS, PROXIES)):
        for place in ((0, 0), (3, 2)):
            step = np.zeros_like(array)
            step[place] = 1e-5
            ends = [[DESCRIPTORS, PROXIES] for _ in range(2)]
            ends[0][which], ends[1][which] = array + step, array - step
            values = [oracle(name, d, LABELS, p, **LOSSES[name]) for d, p in ends]
            assert float(slope[which][place]) == pytest.approx(
                (values[0] - values[1]) / 2e-5, rel=2e-3, abs=2e-5
            )


@pytest.mark.parametrize("name", LOSSES)
def test_lengths_do_not_matter_and_nothing_overflows(name):
    loss = metric.LOSSES[name]
    one = loss(jnp.float32(DESCRIPTORS), jnp.array(LABELS), jnp.float32(PROXIES))
    np.testing.assert_allclose(
        loss(jnp.float32(DESCRIPTORS * 30), jnp.array(LABELS), jnp.float32(PROXIES / 7)),
        one,
        rtol=1e-4,
    )
    same = jnp.ones((3, 5))
    value, slope = jax.value_and_grad(loss)(
        same, jnp.array([0, 0, 1]), jnp.concatenate([same[:1], -same[:1]])
    )  # cosines of 1 and -1
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_arcface_without_a_margin_is_the_normalised_softmax_of_its_scale():
    arrays = jnp.float32(DESCRIPTORS), jnp.array(LABELS), jnp.float32(PROXIES)
    np.testing.assert_allclose(
        metric.arcface_loss(*arrays, scale=20, margin=0),
        metric.normalised_softmax_loss(*arrays, temperature=0.05),
        rtol=1e-6,
    )


@pytest.mark.parametrize("margin", [0.5, 1.5])
def test_the_loss_of_arcface_rises_with_the_angle_all_the_way(margin):
    """The descriptor moves along the half circle from its proxy; the other class is orthogonal to
    both.
    """
    angles = np.linspace(0.01, np.pi - 0.01, 200)
    on_circle = jnp.stack([jnp.cos(angles), jnp.sin(angles), jnp.zeros(200)], axis=1)
    proxies = jnp.array([[1.0, 0, 0], [0, 0, 1]])
    values = jax.vmap(
        lambda x: metric.arcface_loss(x[None], jnp.array([0]), proxies, scale=8.0, margin=margin)
    )(on_circle)
    assert (np.diff(values) > 0).all()


def test_proxies_of_absent_classes_push_and_do_not_pull():
    """Class 2 is not in the batch: its proxy only adds to the push, and moving it away lowers the
    loss.
    """
    slope = jax.grad(metric.proxy_anchor_loss, argnums=2)(
        jnp.float32(DESCRIPTORS), jnp.array(LABELS), jnp.float32(PROXIES)
    )[2]
    arrays = jnp.float32(DESCRIPTORS), jnp.array(LABELS)
    before = metric.proxy_anchor_loss(*arrays, jnp.float32(PROXIES))
    assert metric.proxy_anchor_loss(*arrays, jnp.float32(PROXIES).at[2].add(-0.02 * slope)) < before


@pytest.mark.parametrize(
    ("name", "shapes", "options", "sentence"),
    [
        ("arcface", ((7, 5), (7,), (4, 6)), {}, r"descriptors \(b, d\)"),
        ("arcface", ((7, 5), (6,), (4, 5)), {}, r"labels \(b,\)"),
        ("proxy-anchor", ((7,), (7,), (4, 5)), {}, "proxies"),
        ("arcface", ((7, 5), (7,), (4, 5)), {"margin": 1.6}, "margin is out of range: 1.6"),
        ("arcface", ((7, 5), (7,), (4, 5)), {"scale": 0.0}, "scale"),
        ("proxy-anchor", ((7, 5), (7,), (4, 5)), {"scale": -1.0}, "scale"),
        ("normalised-softmax", ((7, 5), (7,), (4, 5)), {"temperature": 0.0}, "temperature"),
    ],
)
def test_what_does_not_fit_is_refused(name, shapes, options, sentence):
    descriptors, labels, proxies = shapes
    with pytest.raises(ValueError, match=sentence):
        metric.LOSSES[name](
            jnp.ones(descriptors), jnp.zeros(labels, int), jnp.ones(proxies), **options
        )


@pytest.mark.parametrize("dim", [0, 6])
def test_an_embedder_gives_unit_vectors_of_the_pooled_tokens(dim):
    vit = ViT(ViTConfig(patch=4, width=8, depth=1, heads=2, mlp_width=16, image=8), GGeM())
    model, images = Embedder(vit, dim), jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    variables = draw_variables(model, images)
    descriptors = jax.jit(model.apply)(variables, images)
    pooled = jax.jit(vit.apply)({"params": variables["params"]["vit"]}, images).descriptor
    if dim:
        pooled = (
            pooled @ variables["params"]["projection"]["kernel"]
            + variables["params"]["projection"]["bias"]
        )
    np.testing.assert_allclose(
        descriptors, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-6
    )
