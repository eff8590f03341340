"""ggem_jax/models/resnet.py, scales.py and superglobal.py: sizes, the places of ReLU-P, refusals,
and gradients.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggem_jax.descriptors.scales import SCALES, rescale, scaled_size
from ggem_jax.descriptors.superglobal import check_size, superglobal_descriptors
from ggem_jax.files.images import crop, normalise
from ggem_jax.models.resnet import RELUP_ALPHA, ResNet, ResNetConfig, resnet_config
from ggem_jax.pooling import gem_pool, l2_normalize, regional_gem, scale_gem
from ggem_jax.weights.cvnet import cvnet_table

TINY = ResNetConfig(depths=(1, 2, 1, 1), widths=(12, 16, 24, 32), stem=8, descriptor=20)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (2, 70, 97, 3))


@pytest.fixture(scope="module")
def variables(images):
    """Random variables, also of the norms, because an untrained norm hides the layers before it."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(ResNet(TINY).init, jax.random.key(0), images)

    def drawn(x):
        return (
            rng.normal(size=x.shape) * np.prod(x.shape[:-1]) ** -0.5
            if len(x.shape) > 1
            else rng.uniform(0.5, 1.5, x.shape)
        )

    return jax.tree.map(lambda x: jnp.asarray(drawn(x), x.dtype), shapes)


@pytest.mark.parametrize(("variant", "millions"), [("50", 23.508), ("101", 42.500)])
def test_parameter_counts_are_the_published_ones(variant, millions):
    """ResNet-50 has 25.557 million parameters with its 1,000 classes, ResNet-101 44.549
    (torchvision's tables): less 2,049,000 of the classes.
    """
    config = resnet_config(variant)
    shapes = jax.eval_shape(
        ResNet(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    )
    head = shapes["params"].pop("head")
    assert round(sum(x.size for x in jax.tree.leaves(shapes["params"])) / 1e6, 3) == millions
    assert {name: x.shape for name, x in head["fc"].items()} == {
        "kernel": (2048, 2048),
        "bias": (2048,),
    }
    shapes["params"]["head"] = head
    paths = {
        tuple(step.key for step in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert paths == {parameter.path for parameter in cvnet_table(config.depths).values()}


@pytest.mark.parametrize(("height", "width"), [(32, 64), (33, 65), (1, 97), (70, 31)])
def test_maps_are_a_thirty_second_rounded_up(variables, height, width):
    shape = jax.eval_shape(
        ResNet(TINY).apply, variables, jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    ).shape
    assert shape == (2, -(-height // 32), -(-width // 32), 32)


@functools.partial(jax.jit, static_argnums=0)
def maps_of(config, variables, images):
    return ResNet(config).apply(variables, images, method="maps")


@pytest.mark.parametrize(
    ("changes", "floors"),
    [
        ({}, [(0.014, 0.014), (0, 0.014), (0, 0.014), (0, 0)]),
        ({"relup": 0.1}, [(0.1, 0.1), (0, 0.1), (0, 0.1), (0, 0)]),
        ({"relup": None}, [(0.014, 0), (0, 0), (0, 0), (0, 0)]),
        ({"relup": None, "relup_off": "everywhere"}, [(0, 0)] * 4),
    ],
    ids=["on", "another alpha", "off as the code", "off everywhere"],
)
def test_the_places_of_relup(variables, images, changes, floors):
    """The floors at the ends of stages are visible in the maps; those inside stage 1 in that it
    equals a stage computed by hand.
    """
    config = dataclasses.replace(TINY, **changes)
    assert [config.floors(stage) for stage in (1, 2, 3, 4)] == floors
    maps = maps_of(config, variables, images)
    assert [pytest.approx(float(x.min()), abs=1e-7) for x in maps] == [
        0,
        *(end for _, end in floors),
    ]
    block = variables["params"]["s1"]["b1"], variables["batch_stats"]["s1"]["b1"]
    np.testing.assert_allclose(
        maps[1], bottleneck_by_hand(*block, maps[0], *floors[0]), rtol=1e-4, atol=1e-5
    )


def bottleneck_by_hand(params, stats, x, inside, end):
    def normed(name, y):
        p, s = params[f"{name}_norm"], stats[f"{name}_norm"]
        return (y - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    def conv(name, x):
        kernel = np.asarray(params[name]["kernel"])
        side = len(kernel)
        padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))
        return np.einsum("bhwcij,ijcd->bhwd", windows, kernel)

    y = np.maximum(normed("a", conv("a", x)), inside)
    y = np.maximum(normed("b", conv("b", y)), inside)
    return np.maximum(normed("c", conv("c", y)) + normed("skip", conv("skip", x)), end)


def test_relup_off_in_the_code_is_not_off_everywhere(variables, images):
    maps = [
        maps_of(dataclasses.replace(TINY, relup=None, relup_off=off), variables, images)[-1]
        for off in ("code", "everywhere")
    ]
    assert np.abs(maps[0] - maps[1]).max() > 1e-5


def test_the_head(variables):
    pooled = jax.random.normal(jax.random.key(0), (3, 32))
    params = variables["params"]["head"]
    want = (
        pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True) @ params["fc"]["kernel"]
        + params["fc"]["bias"]
    )
    np.testing.assert_allclose(
        ResNet(TINY).apply(variables, pooled, method="describe"), want, rtol=1e-4, atol=1e-5
    )
    feature_map = jnp.abs(jax.random.normal(jax.random.key(0), (2, 3, 4, 32)))
    want = gem_pool(feature_map.reshape(2, 12, 32), params["p"][0], eps=1e-6)
    np.testing.assert_array_equal(ResNet(TINY).apply(variables, feature_map, method="pool"), want)


def test_bfloat16_is_near_and_gradients_are_finite(variables, images):
    exact = jax.jit(ResNet(TINY).apply)(variables, images)
    half = jax.jit(ResNet(dataclasses.replace(TINY, dtype="bfloat16")).apply)(variables, images)
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(jnp.float32) - exact).max() < 0.05 * exact.max()

    def loss(params, images):
        result = superglobal_descriptors(
            ResNet(TINY), variables | {"params": params}, images, scales=(1.0, 1.4142)
        )
        return jnp.sum(result.descriptor[:, :7])

    gradients = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], images)
    chex.assert_tree_all_finite(gradients)
    assert np.abs(gradients[1]).max() > 0


@pytest.mark.parametrize(
    "off",
    [(), ("gemp",), ("rgem",), ("sgem",), ("relup",), ("gemp", "rgem", "sgem", "relup")],
    ids=lambda off: "-".join(off) or "all",
)
def test_superglobal_is_its_parts(variables, images, off):
    scales = (1.0, 1.4142)
    result = superglobal_descriptors(
        ResNet(TINY), variables, images, scales=scales, **dict.fromkeys(off, False)
    )
    model = ResNet(dataclasses.replace(TINY, relup=None if "relup" in off else RELUP_ALPHA))
    by_scale = []
    for scale in scales:
        x = model.apply(variables, rescale(images, scale))
        x = x if "rgem" in off else regional_gem(x)
        places = x.reshape(2, -1, 32)
        pooled = (
            gem_pool(places, variables["params"]["head"]["p"][0])
            if "gemp" in off
            else gem_pool(places, 4.6, eps=1e-8)
        )
        by_scale.append(model.apply(variables, pooled, method="describe"))
    want = (
        jnp.mean(jnp.stack(by_scale), axis=0) if "sgem" in off else scale_gem(jnp.stack(by_scale))
    )
    np.testing.assert_allclose(result.raw, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.descriptor, l2_normalize(want), rtol=1e-4, atol=1e-5)
    assert result.by_scale.shape == (2, 2, 20)


@pytest.mark.parametrize(
    ("scales", "rgem", "side"),
    [(SCALES[3], True, 92), (SCALES[5], True, 130), (SCALES[1], True, 65), (SCALES[3], False, 2)],
)
def test_the_least_size_is_that_of_the_official_code(scales, rgem, side):
    check_size(side, 500, scales, rgem=rgem)
    with pytest.raises(ValueError, match=f"the shorter side must be at least {side}$"):
        check_size(500, side - 1, scales, rgem=rgem)


# Scales and images


@pytest.mark.parametrize("antialias", [False, True])
def test_rescaling_by_hand(antialias):
    """Halving 4 pixels: without antialiasing the two nearest, (a + b) / 2; with it the weights 3,
    3, 1 (inside), so (3 a + 3 b + c) / 7.
    """
    line = jnp.array([0.0, 4.0, 8.0, 16.0])[None, :, None] * jnp.ones((4, 1, 1))
    want = [(3 * 0 + 3 * 4 + 8) / 7, (4 + 3 * 8 + 3 * 16) / 7] if antialias else [2, 12]
    np.testing.assert_allclose(
        rescale(line, 0.5, antialias=antialias)[:, :, 0], [want, want], rtol=1e-6
    )


def test_rescaling_keeps_constants_and_sizes_are_cut():
    assert scaled_size(37, 50, 0.7071) == (26, 35)
    assert rescale(jnp.zeros((2, 37, 50, 3)), 1.4142).shape == (2, 52, 70, 3)
    np.testing.assert_allclose(
        rescale(jnp.full((11, 7, 3), 2.5), 0.6, antialias=True), 2.5, rtol=1e-6
    )
    x = jax.random.normal(jax.random.key(0), (5, 4, 3))
    np.testing.assert_array_equal(rescale(x, 1.0), x)
    gradient = jax.grad(lambda x: rescale(x, 0.7071, antialias=True).sum())(x)
    assert float(gradient.sum()) == pytest.approx(3 * 3 * 2, rel=1e-5)


def test_boxes_are_cut_to_whole_pixels_inside_the_picture():
    image = np.arange(10 * 8 * 3, dtype=np.uint8).reshape(10, 8, 3)
    np.testing.assert_array_equal(crop(image, (1.9, 2.2, 5.9, 7.1)), image[2:7, 1:5])
    np.testing.assert_array_equal(crop(image, (-3, 4, 100, 100)), image[4:])
    for box in ((3, 3, 3.9, 8), (9, 0, 12, 5), (5, 0, 2, 5)):
        with pytest.raises(
            ValueError, match="nothing of the image of 8 x 10 pixels is inside the box"
        ):
            crop(image, box)
    with pytest.raises(ValueError, match="a box must be four numbers"):
        crop(image, (1, 2, float("nan"), 4))


def test_normalising():
    image = np.array([[[0, 128, 255]]], np.uint8)
    want = [-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(normalise(image)[0, 0], want, rtol=1e-6)
    with pytest.raises(ValueError, match="image must be uint8"):
        normalise(image.astype(np.float32))


def apply_tiny(shape, dtype=np.float32):
    return ResNet(TINY).init(jax.random.key(0), np.ones(shape, dtype))


REFUSED = {
    "variant": ("variant must be one of 50, 101, not '152'", lambda: resnet_config("152")),
    "depths": ("depths must be four whole numbers", lambda: ResNetConfig(depths=(3, 4, 6))),
    "no blocks": ("depths must be four whole numbers", lambda: ResNetConfig(depths=(3, 4, 0, 3))),
    "widths": ("widths must be multiples of 4", lambda: resnet_config("50", widths=(6, 8, 8, 8))),
    "stem": ("stem must be a whole number", lambda: resnet_config("50", stem=0)),
    "relup": (
        "relup must be None or a number of at least 0",
        lambda: resnet_config("50", relup=-1.0),
    ),
    "relup_off": (
        "relup_off must be code or everywhere",
        lambda: resnet_config("50", relup_off="paper"),
    ),
    "norm_eps": ("norm_eps must be positive", lambda: resnet_config("50", norm_eps=0.0)),
    "dtype": (
        "dtype must be one of float32, bfloat16, float16",
        lambda: resnet_config("50", dtype="float64"),
    ),
    "no images": (
        r"images must be floating point \(b, height, width, 3\)",
        lambda: apply_tiny((1, 0, 40, 3)),
    ),
    "grey images": (
        r"images must be floating point \(b, height, width, 3\)",
        lambda: apply_tiny((1, 40, 40, 1)),
    ),
    "integer images": (
        "images must be floating point .* not uint8",
        lambda: apply_tiny((1, 40, 40, 3), np.uint8),
    ),
    "small images": (
        "images of 91 x 200 pixels are too small",
        lambda: superglobal_descriptors(ResNet(TINY), {}, jnp.ones((1, 91, 200, 3))),
    ),
    "no scales": (
        "scales must be at least one number",
        lambda: superglobal_descriptors(ResNet(TINY), {}, jnp.ones((1, 91, 200, 3)), scales=()),
    ),
    "scale": ("scale must be a positive number", lambda: rescale(jnp.ones((4, 4, 3)), 0.0)),
    "nothing left": (
        "nothing is left of images of 4 x 1 pixels",
        lambda: rescale(jnp.ones((4, 1, 3)), 0.5),
    ),
    "integer pixels": (
        r"images must be floating point \(\.\.\., h, w, c\)",
        lambda: rescale(jnp.ones((4, 4, 3), int), 0.5),
    ),
}


@pytest.mark.parametrize(("sentence", "call"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_refused_in_one_sentence(sentence, call):
    with pytest.raises(ValueError, match=sentence):
        call()
