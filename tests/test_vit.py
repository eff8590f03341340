"""ggem_jax/models/vit.py against a NumPy transcription, published sizes and PyTorch's
interpolation.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from flax import nnx
from scipy.special import erf

from ggem_jax import pooling
from ggem_jax.models.vit import (
    MAP,
    GGeM,
    ViT,
    ViTConfig,
    resample_position,
    sincos_position,
    used_exponents,
    vit_config,
)

SMALL = {"patch": 4, "width": 24, "depth": 2, "heads": 3, "mlp_width": 40, "image": 16}


def build(pool=pooling.avg_pool, num_classes=5, **changes):
    """Returns a small model, random parameters of which none is 0, and two images."""
    model = ViT(ViTConfig(**SMALL | changes), pool, num_classes)
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    return model, draw_variables(model, images)["params"], images


def apply(model, params, images, **options):
    """Returns the output of the jitted model."""
    return jax.jit(functools.partial(model.apply, **options))({"params": params}, images)


# Parameters with a head for 1,000 classes, at 224 px and with the class token. Ti, S: timm's
# deit_{tiny,small}_patch16_224; B, L, H: `num_params` in torchvision's documentation of vit_b_16,
# vit_b_32, vit_l_16, vit_l_32, vit_h_14.
PUBLISHED = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "L/32": 306_535_400,
    "H/14": 632_045_800,
}


@pytest.mark.parametrize(("variant", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(variant, count):
    model = ViT(vit_config(variant), pooling.cls_pool, 1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def numpy_norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def numpy_attention(queries, x, p):
    q, k, v = (np.einsum("bnd,dhe->bhne", t, p[name]["kernel"]) + p[name].get("bias", np.zeros((1,
    1)))[:, None] for t, name in
               ((queries, "query"), (x, "key"), (x, "value")))  # fmt: skip
    scores = np.einsum("bhqe,bhke->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhqk,bhke->bqhe", weights / weights.sum(-1, keepdims=True), v)
    return np.einsum("bqhe,hed->bqd", mixed, p["out"]["kernel"]) + p["out"]["bias"]


def numpy_mlp(x, p, gelu):
    hidden = x @ p["in"]["kernel"] + p["in"]["bias"]
    if gelu == "exact":
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
    elif gelu == "swiglu":
        gate, value = np.split(hidden, 2, axis=-1)
        hidden = gate / (1 + np.exp(-gate)) * value
    elif gelu == "quick":
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
    else:
        hidden = (
            hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))) / 2
        )
    return hidden @ p["out"]["kernel"] + p["out"]["bias"]


def numpy_vit(images, p, config):
    """Tokens before and after the final norm, in float64."""
    c, p = config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    b, rows = len(images), c.image // c.patch
    cut = (
        np.asarray(images, np.float64)
        .reshape(b, rows, c.patch, rows, c.patch, 3)
        .transpose(0, 1, 3, 2, 4, 5)
    )
    patches = np.einsum("bxyijc,ijcd->bxyd", cut, p["patch_embedding"]["kernel"]) + p[
        "patch_embedding"
    ].get("bias", 0)
    position = p["position"] if c.position == "learned" else sincos_position(rows, c.width)
    x = patches.reshape(b, -1, c.width) + position[len(position) - rows * rows :]
    if c.registers:
        x = np.concatenate([np.broadcast_to(p["registers"], (b, c.registers, c.width)), x], axis=1)
    if c.class_token:
        own = p["class_token"] + (position[:1] if len(position) > rows * rows else 0)
        x = np.concatenate([np.broadcast_to(own, (b, 1, c.width)), x], axis=1)
    x = numpy_norm(x, p["norm_pre"]) if c.pre_norm else x
    for i in range(c.depth):
        block = p[f"blocks_{i}"]
        for norm, branch, scale in (
            ("norm_1", "attention", "layer_scale_1"),
            ("norm_2", "mlp", "layer_scale_2"),
        ):
            y = numpy_norm(x, block[norm])
            y = (
                numpy_attention(y, y, block[branch])
                if branch == "attention"
                else numpy_mlp(y, block[branch], c.mlp if c.mlp == "swiglu" else c.gelu)
            )
            x = x + y * block.get(scale, 1.0)
    return x, numpy_norm(x, p["norm"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False},
        {"registers": 2, "layer_scale": 0.1},
        {"position": "sincos", "gelu": "tanh"},
        {"qkv_bias": False, "class_token": False, "registers": 1},
        {"gelu": "quick", "patch_bias": False, "pre_norm": True},
        {"mlp": "swiglu"},
    ],
    ids=str,
)
def test_tokens_equal_a_numpy_transcription(changes):
    model, params, images = build(**changes)
    output = apply(model, params, images)
    before, after = numpy_vit(images, params, model.config)
    np.testing.assert_allclose(output.tokens_before_norm, before, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(output.tokens, after, rtol=2e-4, atol=2e-5)
    head = jax.tree.map(np.asarray, params["head"])
    np.testing.assert_allclose(
        output.logits,
        np.asarray(output.descriptor) @ head["kernel"] + head["bias"],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.sampled
@pytest.mark.parametrize(
    "pool",
    [pooling.avg_pool, pooling.max_pool, GGeM(), GGeM(groups=1)],
    ids=["avg", "max", "ggem", "gem"],
)
@pytest.mark.parametrize(("class_token", "registers"), [(True, 0), (False, 0), (True, 3)])
def test_prefix_tokens_never_enter_a_pooling_of_patches(pool, class_token, registers):
    model, params, images = build(pool, class_token=class_token, registers=registers)
    output = apply(model, params, images)
    patches = output.tokens[:, model.config.prefix_tokens :]
    assert patches.shape[1] == 16
    if isinstance(pool, GGeM):
        want = pooling.ggem_pool(patches, params["pool"]["p"])
    else:
        want = pool(patches)
    np.testing.assert_allclose(output.descriptor, want, rtol=1e-5)


def test_class_token_pooling_takes_the_class_token_in_front_of_the_registers():
    model, params, images = build(pooling.cls_pool, registers=2)
    output = apply(model, params, images)
    np.testing.assert_array_equal(output.descriptor, output.tokens[:, 0])
    with pytest.raises(ValueError, match="class_token=True"):
        build(pooling.cls_pool, class_token=False)


def test_pooling_before_the_norm_norms_the_pooled_token():
    model, params, images = build(pooling.avg_pool, pool_order="pool-norm")
    output = apply(model, params, images)
    pooled = np.asarray(output.tokens_before_norm, np.float64)[:, 1:].mean(1)
    np.testing.assert_allclose(
        output.descriptor,
        numpy_norm(pooled, jax.tree.map(np.asarray, params["norm"])),
        rtol=1e-4,
        atol=1e-5,
    )


def test_ggem_has_one_exponent_for_each_head_and_starts_at_three():
    model = ViT(ViTConfig(**SMALL), GGeM())
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    assert params["pool"]["p"].tolist() == [3.0, 3.0, 3.0]
    alone = GGeM(groups=2, p_init=5.0).init(jax.random.key(0), jnp.ones((1, 4, 6)))["params"]
    assert alone["p"].tolist() == [5.0, 5.0]
    with pytest.raises(ValueError, match="number of groups"):
        GGeM().init(jax.random.key(0), jnp.ones((1, 4, 6)))


def test_exponents_stay_in_their_range_and_can_come_back():
    tokens = jnp.abs(jax.random.normal(jax.random.key(0), (2, 9, 6)))
    pool = GGeM(groups=2, p_range=(1.0, 50.0))
    outside, inside = {"p": jnp.array([-4.0, 900.0])}, {"p": jnp.array([1.0, 50.0])}

    def loss(params):
        return pool.apply({"params": params}, tokens).sum()

    value, gradient = jax.value_and_grad(loss)(outside)
    chex.assert_trees_all_close((value, gradient), jax.value_and_grad(loss)(inside), rtol=1e-5)
    assert bool(jnp.all(gradient["p"] != 0))


def test_ggem_takes_a_mask():
    tokens = jax.random.normal(jax.random.key(0), (2, 9, 6))
    mask = jnp.arange(9) < jnp.array([[5], [9]])
    pool = GGeM(groups=2)
    params = pool.init(jax.random.key(0), tokens)
    np.testing.assert_array_equal(
        pool.apply(params, tokens, mask=mask),
        pooling.ggem_pool(tokens, jnp.full(2, 3.0), mask=mask),
    )


def test_attention_pooling_equals_a_numpy_transcription():
    model, params, images = build(MAP())
    output = apply(model, params, images)
    tokens, p = (
        np.asarray(output.tokens, np.float64)[:, 1:],
        jax.tree.map(np.asarray, params["pool"]),
    )
    pooled = numpy_attention(np.broadcast_to(p["query"], (2, 1, 24)), tokens, p["attention"])
    want = pooled + numpy_mlp(numpy_norm(pooled, p["norm"]), p["mlp"], "exact")
    np.testing.assert_allclose(output.descriptor, want[:, 0], rtol=2e-4, atol=2e-5)
    with pytest.raises(ValueError, match="config"):
        MAP().init(jax.random.key(0), jnp.ones((1, 4, 24)))


def test_no_head_gives_no_logits():
    model, params, images = build(num_classes=0)
    output = apply(model, params, images)
    assert output.logits is None
    assert "head" not in params


def test_recomputing_the_blocks_changes_no_number():
    plain, params, images = build()
    remat = ViT(ViTConfig(**SMALL, remat=True), pooling.avg_pool, 5)

    def gradient(model):
        return jax.jit(
            jax.grad(lambda params: jnp.sum(model.apply({"params": params}, images).logits ** 2))
        )(params)

    chex.assert_trees_all_close(gradient(remat), gradient(plain), rtol=1e-4, atol=1e-5)


def test_a_block_that_is_recomputed_gives_its_gradients_before_the_one_below():
    """The gradients of its weights and of its input leave together."""
    model = ViT(ViTConfig(**SMALL, remat=True), pooling.avg_pool)
    images = jnp.ones((2, 16, 16, 3))
    variables = model.init(jax.random.key(0), images)

    def loss(variables):
        return model.apply(variables, images).descriptor.sum()

    barriers = [
        equation
        for equation in jax.make_jaxpr(jax.grad(loss))(variables).eqns
        if equation.primitive.name == "optimization_barrier"
    ]
    weights = len(jax.tree.leaves(variables["params"]["blocks_0"]))
    assert [len(equation.invars) for equation in barriers] == [weights + 1] * SMALL["depth"]


@pytest.mark.parametrize(("mlp", "hidden"), [("gelu", 2), ("swiglu", 1)])
def test_of_an_activation_its_input_and_output_are_kept(mlp, hidden):
    """Of 1 + 16 tokens; the gated MLP has an input of twice the channels."""
    model = ViT(ViTConfig(**SMALL, mlp=mlp), pooling.avg_pool)
    images = jnp.ones((2, 16, 16, 3))
    variables = model.init(jax.random.key(0), images)
    _, backward = jax.vjp(lambda v: model.apply(v, images).descriptor, variables)
    kept = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.shape[:2] == (2, 17)]
    assert kept.count((2, 17, SMALL["mlp_width"])) == hidden * SMALL["depth"]
    assert kept.count((2, 17, 2 * SMALL["mlp_width"])) == (mlp == "swiglu") * SMALL["depth"]


def test_dropout_and_drop_path_act_in_training_only():
    model, params, images = build(dropout=0.3, drop_path=0.5)
    quiet = apply(model, params, images).descriptor
    np.testing.assert_array_equal(quiet, apply(model, params, images).descriptor)
    train = jax.jit(
        lambda key: model.apply({"params": params}, images, train=True, rngs={"dropout": key})
    )
    noisy = [train(jax.random.key(key)).descriptor for key in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.allclose(noisy[0], noisy[2])
    assert not np.allclose(noisy[0], quiet)


def test_drop_path_skips_whole_branches_of_the_last_block_most():
    """With drop_path 1 the last block passes its tokens on unchanged, and the first is never
    skipped.
    """
    model, params, images = build(drop_path=1.0, depth=2)
    output = apply(model, params, images, train=True, rngs={"dropout": jax.random.key(0)})
    one_block, _ = numpy_vit(images, params, ViTConfig(**SMALL | {"depth": 1}))
    np.testing.assert_allclose(output.tokens_before_norm, one_block, rtol=2e-4, atol=2e-5)


def test_bfloat16_computes_in_bfloat16_on_float32_parameters():
    model, params, images = build(GGeM(), dtype="bfloat16")
    output = apply(model, params, images)
    chex.assert_type([output.tokens, output.descriptor, output.logits], jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(params), jnp.float32)
    exact = apply(ViT(ViTConfig(**SMALL), GGeM(), 5), params, images)
    np.testing.assert_allclose(
        output.descriptor.astype(jnp.float32), exact.descriptor, rtol=0.1, atol=0.05
    )


@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_images_of_another_size_resample_the_positions(position):
    model, params, _ = build(position=position)
    output = apply(model, params, jnp.ones((1, 24, 12, 3)))
    chex.assert_shape(output.tokens, (1, 1 + 6 * 3, 24))


# torch.nn.functional.interpolate(..., mode="bicubic", align_corners=False) of GRID, computed with
# PyTorch 2.13.0.
GRID = [[0.0, 1, 4, 9], [1, 0, 2, 5], [3, 3, 0, 1], [7, 2, 1, 0]]
INTERPOLATED = {
    (2, 2): [[-0.012695, 5.55957], [4.21582, -0.012695]],
    (6, 3): [
        [0.028039, 2.255209, 8.658306],
        [0.247504, 1.301758, 6.825558],
        [1.148865, 0.611799, 3.746794],
        [2.462753, 1.292499, 1.34385],
        [4.88502, 1.338867, 0.109051],
        [6.581687, 1.100586, 0.067283],
    ],
}


@pytest.mark.parametrize("new", INTERPOLATED)
def test_resampling_equals_pytorch(new):
    got = resample_position(jnp.array(GRID).reshape(16, 1), (4, 4), new)
    np.testing.assert_allclose(got.reshape(new), INTERPOLATED[new], rtol=1e-5, atol=1e-5)


def test_resampling_to_the_same_grid_changes_nothing():
    grid = jax.random.normal(jax.random.key(0), (16, 3))
    np.testing.assert_array_equal(resample_position(grid, (4, 4), (4, 4)), grid)


def test_sincos_position_by_hand():
    """Width 8: frequencies 1 and 1/100; sines then cosines of the column, then of the row."""
    table = sincos_position(2, 8)
    s, c, s2, c2 = math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)
    np.testing.assert_allclose(table[1], [s, s2, c, c2, 0, 0, 1, 1], rtol=1e-6)  # row 0, column 1
    np.testing.assert_allclose(table[2], [0, 0, 1, 1, s, s2, c, c2], rtol=1e-6)  # row 1, column 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"width": 25}, "multiple of heads"),
        ({"image": 18}, "multiple of patch"),
        ({"depth": 0}, "depth must be a whole number of at least 1, not 0"),
        ({"patch": (4, 4)}, "patch must be a whole number"),
        ({"registers": -1}, "registers must be a whole number of at least 0"),
        ({"mlp": "geglu"}, "mlp must be one of gelu, swiglu, not 'geglu'"),
        ({"gelu": "fast"}, "gelu must be one of exact, tanh, quick, not 'fast'"),
        ({"pool_order": "pool_norm"}, "pool_order must be one of norm-pool, pool-norm"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16"),
        ({"class_token": 2}, "class_token must be one of False, True, not 2"),
        ({"drop_path": 1.5}, "drop_path must be a probability"),
        ({"norm_eps": -1.0}, "norm_eps must be positive"),
        ({"position": "sincos", "width": 18}, "divisible by 4"),
    ],
)
def test_impossible_configs_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ViTConfig(**SMALL | changes)


def test_unknown_variants_are_refused_and_known_ones_can_be_changed():
    with pytest.raises(ValueError, match="Ti, S, B, L, H"):
        vit_config("XL/16")
    with pytest.raises(ValueError, match="patch size"):
        vit_config("S16")
    config = vit_config("S/8", image=96, registers=4)
    assert (config.patch, config.width, config.image, config.registers) == (8, 384, 96, 4)


def test_wrong_images_are_refused():
    model, params, _ = build()
    with pytest.raises(ValueError, match="multiples of 4"):
        model.apply({"params": params}, jnp.zeros((1, 15, 16, 3)))
    with pytest.raises(ValueError, match=r"\(b, h, w, 3\)"):
        model.apply({"params": params}, jnp.zeros((16, 16, 3)))


def test_pooling_works_inside_an_nnx_module():
    class Pool(nnx.Module):
        def __init__(self, groups):
            self.p = nnx.Param(jnp.full(groups, 3.0))

        def __call__(self, tokens):
            return pooling.ggem_pool(tokens, self.p[...])

    tokens = jax.random.normal(jax.random.key(0), (2, 9, 6))
    gradient = nnx.grad(lambda pool: pool(tokens).sum())(Pool(3))
    chex.assert_shape(gradient.p[...], (3,))
    assert bool(jnp.all(gradient.p[...] != 0))


@pytest.mark.parametrize("variant", ["S/²", "S16", "XL/16", 16])
def test_unknown_variants_are_refused(variant):
    with pytest.raises(ValueError, match="variant must be one of Ti, S, B, L, H"):
        vit_config(variant)


@pytest.mark.parametrize("head", [GGeM(groups=0), GGeM(p_init=0.5)])
def test_ggem_without_groups_or_with_exponents_out_of_range_is_refused(head):
    with pytest.raises(ValueError, match="GGeM needs groups of at least 1 and p_init in"):
        build(head)


@pytest.mark.parametrize(("p", "used"), [(-2e7, 1.0), (0.5, 1.0), (3.0, 3.0), (1e11, 1000.0)])
def test_exponents_far_out_of_range_are_used_at_its_end_and_keep_their_gradient(p, used):
    value, gradient = jax.value_and_grad(lambda p: used_exponents(p)[0])(jnp.array([p]))
    assert value == used
    assert gradient == 1


def test_cls_pool_is_recognised_inside_partial_and_jit_and_all_tokens_can_be_pooled():
    plain, params, images = build(pooling.cls_pool)
    want = apply(plain, params, images)
    for other in (functools.partial(pooling.cls_pool), jax.jit(pooling.cls_pool)):
        chex.assert_trees_all_close(
            apply(ViT(plain.config, other, plain.num_classes), params, images),
            want,
            rtol=1e-5,
            atol=1e-6,
        )
    both = ViT(
        plain.config, lambda tokens: tokens[:, 0] + tokens.mean(1), plain.num_classes, pooled="all"
    )
    whole = apply(both, params, images)
    chex.assert_trees_all_close(
        whole.descriptor, want.tokens[:, 0] + want.tokens.mean(1), rtol=1e-5, atol=1e-6
    )
    for model in (
        ViT(plain.config, pooling.cls_pool, pooled="patches"),
        ViT(plain.config, pooling.avg_pool, pooled="some"),
    ):
        with pytest.raises(ValueError, match="pooled"):
            model.init(jax.random.key(0), images)
