"""ggem_jax/weights, conversion: parameters change names and layouts in both directions; errors list
what does not fit.
"""

import re

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same

from ggem_jax.models.resnet import resnet_config
from ggem_jax.weights import (
    MismatchedWeights,
    cvnet_to_variables,
    read_cvnet,
    variables_to_cvnet,
    write_safetensors,
    write_torch,
)
from ggem_jax.weights.convert import Parameter, check_parameters, to_published, to_variables
from ggem_jax.weights.cvnet import cvnet_table

RNG = np.random.default_rng(0)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

TABLE = {
    "conv.weight": Parameter(
        ("params", "conv", "kernel"), (4, 3, 2, 5), "conv", reverse_inputs=True
    ),
    "fc.weight": Parameter(("params", "fc", "kernel"), (6, 4), "dense"),
    "bn.running_mean": Parameter(("batch_stats", "bn", "mean"), (4,)),
}
PUBLISHED = {
    name: RNG.normal(size=parameter.shape).astype(np.float32) for name, parameter in TABLE.items()
}


def test_layouts_in_both_directions():
    variables = to_variables(PUBLISHED, TABLE)
    assert variables["params"]["conv"]["kernel"][1, 2, 0, 3] == PUBLISHED["conv.weight"][3, 2, 1, 2]
    assert variables["params"]["fc"]["kernel"][1, 2] == PUBLISHED["fc.weight"][2, 1]
    assert_same(to_published(variables, TABLE), PUBLISHED)
    halves = to_variables(
        {name: array.astype(BFLOAT16) for name, array in PUBLISHED.items()}, TABLE
    )
    assert halves["params"]["fc"]["kernel"].dtype == np.float32


def test_everything_that_does_not_fit_is_listed():
    found = {
        "conv.weight": np.ones((4, 3, 5, 2), np.float32),
        "bn.running_mean": np.arange(4),
        "other.weight": np.ones(7),
    }
    with pytest.raises(MismatchedWeights) as caught:
        to_variables(found, TABLE, source="net.pth")
    assert (
        str(caught.value)
        == "net.pth does not fit the network: 1 missing: fc.weight (6, 4); 1 surplus: other.weight"
        " (7,); 1 wrongly shaped: conv.weight (4, 3, 5, 2) where (4, 3, 2, 5) is needed; 1 not"
        " floating point: bn.running_mean int64"
    )
    nested: tuple = (1.0,)
    for _ in range(60):
        nested = nested, nested
    with pytest.raises(
        MismatchedWeights, match=re.escape("2 no array: fc.weight tuple, other list")
    ):
        to_variables(
            PUBLISHED | {"fc.weight": nested, "other": [nested], "more": np.ones(2)}, TABLE
        )
    variables = to_variables(PUBLISHED, TABLE)
    del variables["batch_stats"]
    variables["params"]["more"] = np.ones(2)
    with pytest.raises(
        MismatchedWeights,
        match=re.escape("1 missing: bn.running_mean (4,); 1 surplus: params/more (2,)"),
    ):
        to_published(variables, TABLE)


def test_what_is_no_array_is_named_by_its_type():
    nested = [1.0]
    for _ in range(60):
        nested = [nested, nested]
    with pytest.raises(MismatchedWeights, match="1 no array: w list"):
        check_parameters({"w": nested}, {"w": Parameter(("params", "w"), (2,))}, source="it")


# CVNet


TINY = (1, 1, 1, 1)


@pytest.fixture(scope="module")
def cvnet():
    return {
        name: np.full(parameter.shape, i % 7, np.float32)
        for i, (name, parameter) in enumerate(cvnet_table(TINY).items())
    }


@pytest.mark.parametrize("prefix", ["encoder_q.", "globalmodel.", ""])
@pytest.mark.parametrize("wrapper", ["model_state", "state_dict", None])
def test_cvnet_checkpoints_by_prefix_and_wrapper(cvnet, prefix, wrapper):
    checkpoint = {prefix + name: array for name, array in cvnet.items()}
    unused = [
        "encoder_k.stem.conv.weight",
        "conv2ds.0.weight",
        "cv_learner.x",
        "queue",
        f"{prefix}seb1.weight",
        f"{prefix}stem.bn.num_batches_tracked",
    ]
    checkpoint |= {name: np.ones(3, np.float32) for name in unused}
    variables = cvnet_to_variables(
        {wrapper: checkpoint, "epoch": 3} if wrapper else checkpoint, depths=TINY
    )
    assert_same(
        variables_to_cvnet(variables, depths=TINY, prefix=prefix),
        {prefix + name: array for name, array in cvnet.items()},
    )


def test_other_checkpoints_of_cvnet_are_listed(cvnet, tmp_path):
    checkpoint = {f"encoder_q.{name}": array for name, array in cvnet.items()} | {
        "encoder_q.extra.weight": np.ones(2),
        "stem.conv.weight": np.ones(3),
    }
    del checkpoint["encoder_q.head.pool.p"]
    with pytest.raises(
        MismatchedWeights,
        match=re.escape("1 missing: head.pool.p (1,); 1 surplus: extra.weight (2,)"),
    ):
        cvnet_to_variables(
            {name: array for name, array in checkpoint.items() if name != "stem.conv.weight"},
            depths=TINY,
        )
    with pytest.raises(MismatchedWeights, match=r"two parameters are called stem\.conv\.weight"):
        cvnet_to_variables(checkpoint, depths=TINY)
    write_torch(tmp_path / "net.pth", {"features.weight": np.ones(2, np.float32)})
    with pytest.raises(MismatchedWeights, match="no network of CVNet"):
        read_cvnet(tmp_path / "net.pth")


@pytest.mark.parametrize("variant", ["50", "101"])
def test_published_depths_are_found(variant, tmp_path):
    depths = resnet_config(variant).depths
    small = {f"encoder_q.{name}": np.zeros(1, np.float32) for name in cvnet_table(depths)}
    write_torch(tmp_path / "net.pth", small)
    with pytest.raises(MismatchedWeights) as caught:
        read_cvnet(tmp_path / "net.pth")
    assert "missing" not in str(caught.value)
    assert "surplus" not in str(caught.value)
    del small["encoder_q.s4.b3.f.a.weight"]
    write_torch(tmp_path / "net.pth", small)
    with pytest.raises(
        MismatchedWeights, match=re.escape("1 missing: s4.b3.f.a.weight (512, 2048, 1, 1)")
    ):
        read_cvnet(tmp_path / "net.pth")


def test_cvnet_files_in_both_forms(cvnet, tmp_path):
    published = variables_to_cvnet(cvnet_to_variables(cvnet, depths=TINY), depths=TINY)
    write_torch(tmp_path / "net.pth", published)
    write_safetensors(tmp_path / "net.safetensors", published)
    for name in ("net.pth", "net.safetensors"):
        depths, variables = read_cvnet(tmp_path / name, depths=TINY)
        assert depths == TINY
        assert_same(variables_to_cvnet(variables, depths=TINY, prefix=""), cvnet)


def test_the_channels_of_the_first_convolution_change_their_order():
    """Published networks take BGR, ours RGB: the same pixels meet the same weights."""
    depths = (1, 1, 1, 1)
    rng = np.random.default_rng(0)
    published = {
        name: rng.random(parameter.shape).astype(np.float32)
        for name, parameter in cvnet_table(depths).items()
    }
    variables = cvnet_to_variables(published, depths=depths)
    kernel = variables["params"]["stem"]["conv"]["kernel"]  # (7, 7, in, out)
    np.testing.assert_array_equal(
        kernel, published["stem.conv.weight"].transpose(2, 3, 1, 0)[:, :, ::-1]
    )
    again = variables_to_cvnet(variables, depths=depths, prefix="")
    assert all(np.array_equal(again[name], published[name]) for name in published)
