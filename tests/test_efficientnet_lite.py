"""ggem_jax/models/efficientnet_lite.py: published sizes, convolutions against XLA's and
TensorFlow's rule, images of any size.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from jax import lax

from ggem_jax.models.efficientnet_lite import (
    EfficientNetLite,
    EfficientNetLiteConfig,
    block_configs,
    depthwise_conv,
    efficientnet_lite_config,
)

# Trainable parameters; github.com/tensorflow/tpu,
# efficientnet/lite/efficientnet_lite_builder_test.py.
PUBLISHED = {
    "lite0": 4_652_008,
    "lite1": 5_416_680,
    "lite2": 6_092_072,
    "lite3": 8_197_096,
    "lite4": 13_006_568,
}

LITE0 = efficientnet_lite_config("lite0")


def shapes(model, height=32, width=32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, height, width, 3)))


@pytest.mark.parametrize(("variant", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(variant, count):
    params = shapes(EfficientNetLite(efficientnet_lite_config(variant)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (33, 32), (63, 65), (224, 224), (225, 301), (1, 32)]
)
def test_a_side_of_the_map_is_a_32nd_rounded_up(height, width):
    model = EfficientNetLite(LITE0)
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    if min(height, width) < 32:
        with pytest.raises(ValueError, match=r"at least 32, not of shape \(2, 1, 32, 3\)"):
            jax.eval_shape(model.apply, shapes(model), images)
        return
    features = jax.eval_shape(model.apply, shapes(model), images)
    assert features.shape == (2, -(-height // 32), -(-width // 32), 1280)
    assert jax.eval_shape(
        lambda variables, x: model.apply(variables, x, method="logits"), shapes(model), images
    ).shape == (2, 1000)


def test_logits_are_the_head_of_the_mean_of_the_map():
    model = EfficientNetLite(EfficientNetLiteConfig(width=0.5, depth=0.3, image=32), num_classes=7)
    images = jax.random.normal(jax.random.key(1), (2, 40, 33, 3))
    variables = draw_variables(model, images, method="logits")
    features, logits = jax.jit(
        lambda v, x: (model.apply(v, x), model.apply(v, x, method="logits"))
    )(variables, images)
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        logits, features.mean((1, 2)) @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-5
    )
    assert features.min() >= 0
    assert features.max() <= 6


def test_a_model_without_a_head():
    model = EfficientNetLite(LITE0, num_classes=0)
    assert "head" not in shapes(model)["params"]
    with pytest.raises(ValueError, match="num_classes=0"):
        jax.eval_shape(
            lambda v, x: model.apply(v, x, method="logits"),
            shapes(model),
            jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
        )


@pytest.mark.sampled
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sides", [(8, 8), (9, 8), (7, 11), (1, 2)])
def test_depthwise_conv_is_the_grouped_convolution(kernel, stride, sides):
    features = jax.random.normal(jax.random.key(0), (2, *sides, 6))
    filters = jax.random.normal(jax.random.key(1), (kernel, kernel, 1, 6))
    numbers = ("NHWC", "HWIO", "NHWC")
    want = lax.conv_general_dilated(
        features,
        filters,
        (stride, stride),
        "SAME",
        dimension_numbers=numbers,
        feature_group_count=6,
        precision="highest",
    )
    got = depthwise_conv(features, filters, stride=stride)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_same_padding_puts_the_odd_row_after_the_image():
    """Four pixels, stride 2, three taps: one row of zeros, below. The taps of the second output are
    pixels 2, 3 and the zero.
    """
    column = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    filters = (
        jnp.zeros((3, 3, 1, 1))
        .at[:, 0]
        .set(jnp.asarray([100.0, 10.0, 1.0]).reshape(3, 1, 1))
        .at[:, 1]
        .set(0)
    )
    filters = jnp.roll(
        filters, 1, axis=1
    )  # the middle column: a map of width 1 is padded by one on both sides
    np.testing.assert_array_equal(depthwise_conv(column, filters, stride=2).ravel(), [123.0, 340.0])
    np.testing.assert_array_equal(
        depthwise_conv(column[:, :3], filters, stride=2).ravel(), [12.0, 230.0]
    )  # three pixels: a row on both sides


def test_blocks_of_lite0_and_lite4():
    blocks = block_configs(LITE0)
    assert [block.channels_out for block in blocks] == [
        16,
        24,
        24,
        40,
        40,
        80,
        80,
        80,
        112,
        112,
        112,
        192,
        192,
        192,
        192,
        320,
    ]
    assert np.prod([block.stride for block in blocks]) == 16  # the stem halves too
    wide = block_configs(efficientnet_lite_config("lite4"))
    assert [block.channels_out for block in wide[:2]] == [24, 32]
    assert (len(wide), wide[-1].channels_out) == (1 + 4 + 4 + 6 + 6 + 8 + 1, 448)


def test_refusals():
    with pytest.raises(
        ValueError, match="variant must be one of lite0, lite1, lite2, lite3, lite4, not 'b0'"
    ):
        efficientnet_lite_config("b0")
    with pytest.raises(ValueError, match="width must be a positive number below 100, not 0"):
        EfficientNetLiteConfig(width=0, depth=1.0, image=224)
    with pytest.raises(ValueError, match="depth must be"):
        EfficientNetLiteConfig(width=1.0, depth=float("nan"), image=224)
    with pytest.raises(
        ValueError, match=r"image must be a whole number of at least 32, not 224\.0"
    ):
        EfficientNetLiteConfig(width=1.0, depth=1.0, image=224.0)
    model = EfficientNetLite(LITE0)
    with pytest.raises(ValueError, match=r"not of shape \(1, 32, 32, 4\)"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)))
    with pytest.raises(TypeError, match="not uint8"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
