"""ggem_jax/descriptors/backbones.py: every file of weights is found, loaded and normalised by its
own family.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from flax import traverse_util
from test_weights_vit import CASES, file_of

from ggem_jax.descriptors import backbones
from ggem_jax.descriptors.backbones import (
    BACKBONES,
    PatchMap,
    identify,
    load_network,
    read_any_vit,
)
from ggem_jax.descriptors.extract import Extractor
from ggem_jax.descriptors.settings import DescriptorSettings, digest
from ggem_jax.files.images import normalise, resize
from ggem_jax.files.normalisation import HALF, IMAGENET, OPENAI
from ggem_jax.models.efficientnet_lite import EfficientNetLite, efficientnet_lite_config
from ggem_jax.models.resnet import ResNet, ResNetConfig
from ggem_jax.models.vit import ViT, ViTConfig
from ggem_jax.pooling import avg_pool
from ggem_jax.weights import (
    MismatchedWeights,
    UnreadableWeights,
    variables_to_cvnet,
    write_safetensors,
    write_torch,
)
from ggem_jax.weights.architecture import Given
from ggem_jax.weights.efficientnet_lite import variables_to_efficientnet_lite
from ggem_jax.weights.vit import FAMILIES, read_vit

# one recorded file for each family and layout, and the normalisation it was trained with
NORMALISED = {
    "timm-vit": HALF,
    "timm-mae-finetuned": IMAGENET,
    "timm-deit-distilled": IMAGENET,
    "timm-deit3": IMAGENET,
    "timm-dinov2-registers": IMAGENET,
    "hf-dinov2": IMAGENET,
    "timm-clip": OPENAI,
    "hf-clip": OPENAI,
    "openai-clip": OPENAI,
    "timm-siglip": HALF,
    "hf-siglip": HALF,
    "augreg": HALF,
    "big_vision-siglip": HALF,
    "hf-dinov2-swiglu": IMAGENET,
}
PLAIN = {"pooling": "average", "regional": False, "scales": 1, "scale_gem": False}


def image_of(seed=0, size=(160, 128)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", CASES)
def test_every_published_vit_is_identified_by_its_family(name, tmp_path):
    path, _ = file_of(name, tmp_path)
    found = identify(path)
    assert found.backbone == CASES[name][1]
    assert bool(found.note) == (CASES[name][1] in ("vit", "clip"))  # which files do not tell
    assert ("those of the image tower of CLIP" in found.note) == (CASES[name][1] == "clip")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if i in (0, 3, 6) else pytest.mark.slow)  # each normalisation
        for i, name in enumerate(NORMALISED)
    ],
)
def test_the_descriptor_is_the_mean_of_the_models_own_tokens(name, tmp_path):
    """The normalisation is that of its own family: another one gives a clearly different vector."""
    path, _ = file_of(name, tmp_path)
    settings = DescriptorSettings(weights=str(path), longest_side=160, **PLAIN)
    found = Extractor(settings).describe(image_of())
    published = read_vit(path)
    model = ViT(published.config, avg_pool)

    @jax.jit
    def describe(images):
        pooled = model.apply(published.variables, images).descriptor
        tokens = model.apply(published.variables, images).tokens
        mean = tokens[:, published.config.prefix_tokens :].mean(axis=1)
        assert pooled.shape == mean.shape
        return mean[0] / jnp.linalg.norm(mean[0])

    patch = published.config.patch
    sides = [round(side / patch) * patch for side in (160, 128)]

    def normalised(how):
        return jnp.asarray(normalise(resize(image_of(), *sides), mean=how[0], std=how[1]))[None]

    np.testing.assert_allclose(found, describe(normalised(NORMALISED[name])), atol=2e-6)
    others = {HALF, IMAGENET, OPENAI} - {NORMALISED[name]}
    for other in others:
        assert np.abs(found - describe(normalised(other))).max() > 1e-4


def test_every_family_has_a_row_and_its_own_normalisation():
    assert set(FAMILIES) <= set(BACKBONES)
    for family, each in FAMILIES.items():
        assert BACKBONES[family].normalisation == (each.normalised or HALF)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (
            "config.json",
            {
                "model_args": {"num_heads": 2, "act_layer": "quick_gelu"},
                "pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]},
            },
        ),
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}),
    ],
)
def test_a_file_of_settings_beside_the_weights_is_kept_in_the_record(tmp_path, file, settings):
    """The record of an index is enough to search it if that file is lost."""
    path, _ = file_of("timm-clip", tmp_path)
    plain = DescriptorSettings(weights=str(path)).record()
    assert not {"mean", "std"} & set(plain)
    (tmp_path / file).write_text(json.dumps(settings))
    record = DescriptorSettings(weights=str(path)).record()
    assert record == plain | {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
    (tmp_path / file).unlink()
    again = DescriptorSettings(**record | {"weights": str(path)})
    network = Extractor(again).network
    assert (network.mean, network.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    assert again.record() == record


def test_a_name_insists_where_the_file_does_not_tell(tmp_path):
    path, _ = file_of("timm-vit", tmp_path)
    assert (load_network(weights=path).mean, load_network("deit", path).mean) == (
        HALF[0],
        IMAGENET[0],
    )
    (tmp_path / "sub").mkdir()
    path, _ = file_of("openai-clip", tmp_path / "sub")
    with pytest.raises(
        MismatchedWeights, match=r"is the image tower of CLIP .*, not dinov2: leave"
    ):
        load_network("dinov2", path)
    with pytest.raises(
        MismatchedWeights,
        match=r"is not a ViT-S/16: patch 4 where 16 is needed, width 16 where 384",
    ):
        load_network("vit-S/16", path)


def test_sizes_alone_leave_the_normalisation_to_the_file(tmp_path, monkeypatch):
    path, _ = file_of("timm-vit", tmp_path)
    monkeypatch.setattr(backbones, "vit_config", lambda variant: read_vit(path).config)
    settings = DescriptorSettings("vit-S/16", str(path))
    assert (load_network("vit-S/16", path).mean, "mean" in settings.record()) == (HALF[0], False)
    beside = {
        "model_args": {"num_heads": 2},
        "pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]},
    }
    (tmp_path / "config.json").write_text(json.dumps(beside))
    network = load_network("vit-S/16", path)
    assert (network.mean, network.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    record = settings.record()
    assert (record["backbone"], record["mean"]) == ("vit-S/16", [0.4, 0.5, 0.6])


def own_file(path, config):
    vit = ViT(config, avg_pool, num_classes=3)
    size = (1, config.image, config.image, 3)
    params = draw_variables(vit, jnp.zeros(size))["params"]
    write_safetensors(path, traverse_util.flatten_dict({"params": params}, sep="/"))
    return vit, params


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False, "position": "sincos"},
        {"registers": 2, "layer_scale": 1e-5, "pre_norm": True},
        {"mlp": "swiglu", "patch_bias": False, "qkv_bias": False},
    ],
    ids=str,
)
def test_our_own_files_are_found_with_all_their_sizes(tmp_path, changes):
    config = ViTConfig(patch=8, width=24, depth=2, heads=3, mlp_width=40, image=16, **changes)
    _, params = own_file(tmp_path / "own.safetensors", config)
    assert identify(tmp_path / "own.safetensors") == ("vit-flax", None, "", Given(), {})
    network = load_network(weights=tmp_path / "own.safetensors")
    expected = config if changes.get("position") is None else dataclasses.replace(config, image=224)
    assert network.model.vit.config == expected
    assert (network.mean, network.std, network.stride, network.pads) == (*IMAGENET, 8, False)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    output = jax.jit(ViT(expected, avg_pool).apply)({"params": params}, images)
    tokens, cls = network.describe_tokens(images)
    np.testing.assert_allclose(tokens, output.tokens[:, config.prefix_tokens :], atol=1e-6)
    assert (cls is not None) == config.class_token
    published = read_any_vit(tmp_path / "own.safetensors")
    assert (published.family, published.normalised) == ("own", None)
    filled = published.fill(draw_variables(ViT(expected, avg_pool, 3), images, seed=2))
    np.testing.assert_array_equal(
        filled["params"]["blocks_1"]["mlp"]["in"]["kernel"],
        params["blocks_1"]["mlp"]["in"]["kernel"],
    )


def test_a_published_vit_of_the_wanted_sizes_is_a_patch_map(tmp_path):
    path, found = file_of("hf-dinov2-registers", tmp_path)
    network = load_network("dinov2", path)
    assert isinstance(network.model, PatchMap)
    tokens, cls = network.describe_tokens(jnp.asarray(found["images"]))
    prefix = network.model.vit.config.prefix_tokens
    assert network.heads == network.model.vit.config.heads
    assert tokens.shape[1] + prefix == found["tokens"].shape[1]
    assert cls.shape == (len(found["images"]), tokens.shape[2])


@pytest.mark.parametrize(
    "ending", ["pth", pytest.param("pyth", marks=pytest.mark.slow), "safetensors"]
)
def test_cvnets_files_are_found(tmp_path, ending):
    depths = (3, 4, 6, 3)
    variables = draw_variables(ResNet(ResNetConfig(depths)), jnp.zeros((1, 64, 64, 3)))
    path, arrays = tmp_path / f"cvnet.{ending}", variables_to_cvnet(variables, depths=depths)
    write_safetensors(path, arrays) if ending == "safetensors" else write_torch(path, arrays)
    assert identify(path) == ("resnet50", None, "", Given(), None)
    network = load_network(weights=path)
    assert (network.model.config.depths, network.mean, network.stride, network.pads) == (
        depths,
        IMAGENET[0],
        32,
        True,
    )
    with pytest.raises(MismatchedWeights, match="missing"):
        load_network("resnet101", path)
    with pytest.raises(MismatchedWeights, match="holds the ResNet-50 of CVNet, where a ViT is"):
        read_any_vit(path)


def test_the_names_of_a_resnet101_are_told_from_those_of_a_resnet50(tmp_path):
    names = ("s1.b1.f.a.weight", "s3.b1.f.a.weight", "s3.b23.f.a.weight")
    arrays = {f"encoder_q.{name}": np.zeros(1, np.float32) for name in names}
    write_safetensors(tmp_path / "r101.safetensors", arrays)
    assert identify(tmp_path / "r101.safetensors").backbone == "resnet101"


def test_efficientnet_lite0_is_read_from_a_file_too(tmp_path):
    config = efficientnet_lite_config("lite0")
    model = EfficientNetLite(config)
    variables = draw_variables(model, jnp.zeros((1, 64, 64, 3)), method="logits")
    arrays = variables_to_efficientnet_lite(variables, config=config)
    write_torch(tmp_path / "lite0.pth", arrays)
    network = load_network(weights=tmp_path / "lite0.pth")
    assert identify(tmp_path / "lite0.pth").backbone == "efficientnet-lite0"
    assert network.mean == (127 / 255,) * 3
    images = jax.random.normal(jax.random.key(1), (1, 64, 64, 3))
    np.testing.assert_allclose(
        jax.jit(network.model.apply)(network.variables, images),
        jax.jit(model.apply)(variables, images),
        atol=1e-6,
    )
    with pytest.raises(MismatchedWeights):
        load_network("resnet50", tmp_path / "lite0.pth")


def test_a_file_of_no_known_network_is_refused(tmp_path):
    write_safetensors(tmp_path / "other.safetensors", {"layer1.weight": np.zeros(3, np.float32)})
    for call in (identify, read_any_vit, lambda path: load_network(weights=path)):
        with pytest.raises(MismatchedWeights, match="no Vision Transformer of a known layout"):
            call(tmp_path / "other.safetensors")
        with pytest.raises(UnreadableWeights, match="absent"):
            call(Path(tmp_path / "absent.safetensors"))


def test_the_records_of_indexes_made_before_keep_their_meaning(tmp_path):
    """The names and keys of old records, and the networks that they name."""
    before = {
        "backbone": "efficientnet-lite0", "weights": None, "pooling": "gem+", "regional": True,
        "relup": True, "scales": 3, "scale_gem": True, "antialias": False, "sizes": "buckets",
        "longest_side": 320, "whitening": None,
    }  # fmt: skip
    assert DescriptorSettings().record() == DescriptorSettings(**before).record() == before
    config = ViTConfig(patch=16, width=192, depth=12, heads=3, mlp_width=768, image=32)
    own_file(tmp_path / "own.safetensors", config)
    network = load_network("vit-Ti/16", tmp_path / "own.safetensors")
    assert (network.model.vit.config, network.mean) == (config, IMAGENET[0])
    with pytest.raises(MismatchedWeights, match="wrongly shaped"):
        load_network("vit-Ti/8", tmp_path / "own.safetensors")


def settings_of_own(config, **data):
    return json.dumps({"model": dataclasses.asdict(config), "pool": {"kind": "avg"}, "data": data})


@pytest.mark.parametrize("backbone", [None, "vit-flax", "vit-S/16"])
@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_what_a_config_beside_our_own_file_says_outlives_it(
    tmp_path, ending, backbone, monkeypatch
):
    """Index with it, search without it: the vectors are the same."""
    config = ViTConfig(
        patch=8, width=24, depth=2, heads=3, mlp_width=40, image=16,
        gelu="quick", post_norm=True, norm_eps=1e-2, drop_path=0.5,
    )  # fmt: skip
    monkeypatch.setattr("ggem_jax.weights.own.vit_config", lambda variant: config)
    file = tmp_path / f"own.{ending}"
    _, params = own_file(tmp_path / "own.safetensors", config)
    if ending == "npz":
        np.savez(file, **traverse_util.flatten_dict({"params": params}, sep="/"))
    settings = DescriptorSettings(backbone, str(file), longest_side=160, **PLAIN)
    bare = Extractor(settings).describe(image_of())
    assert "network" not in settings.record() or backbone == "vit-S/16"
    beside = tmp_path / "config.json"
    beside.write_text(settings_of_own(config))
    before = Extractor(settings).describe(image_of())
    record = json.loads(json.dumps(settings.record()))
    np.testing.assert_array_equal(Extractor(settings.resolve()).describe(image_of()), before)
    if backbone != "vit-S/16":  # whose sizes are those of the stand-in above
        assert record["network"] == {"gelu": "quick", "post_norm": True, "norm_eps": 1e-2}
        assert np.abs(bare - before).max() > 1e-3
    for later in (None, settings_of_own(dataclasses.replace(config, gelu="tanh")), "{", "{}"):
        beside.unlink(missing_ok=True)
        if later is not None:
            beside.write_text(later)
        again = DescriptorSettings(**record | {"weights": str(file)})
        np.testing.assert_array_equal(Extractor(again).describe(image_of()), before)
        assert again.record() == record
    beside.unlink()
    old = {name: value for name, value in record.items() if name != "network"}
    old = DescriptorSettings(**old | {"weights": str(file)})  # of an index made before
    np.testing.assert_array_equal(Extractor(old).describe(image_of()), bare)


@pytest.mark.parametrize("backbone", [None, "dinov3"])
def test_the_base_of_a_rope_beside_the_weights_outlives_the_file(tmp_path, backbone):
    path, _ = file_of("hf-dinov3", tmp_path)
    beside = path.with_name("config.json")
    sizes = {"model_type": "dinov3_vit", "num_attention_heads": 2, "hidden_act": "gelu"}
    beside.write_text(json.dumps(sizes | {"rope_theta": 3, "layer_norm_eps": 1e-3}))
    settings = DescriptorSettings(backbone, str(path), longest_side=160, **PLAIN)
    before, record = Extractor(settings).describe(image_of()), settings.record()
    assert record["network"] == {"rope_base": 3.0}
    beside.unlink()
    again = DescriptorSettings(**record | {"weights": str(path)})
    np.testing.assert_array_equal(Extractor(again).describe(image_of()), before)
    assert again.record() == record


def test_a_network_recorded_for_another_file_is_refused(tmp_path):
    config = ViTConfig(patch=8, width=24, depth=2, heads=3, mlp_width=40, image=16)
    own_file(tmp_path / "own.safetensors", config)
    with pytest.raises(MismatchedWeights, match="network that is recorded"):
        load_network("vit-flax", tmp_path / "own.safetensors", network={"depths": 3})
    with pytest.raises(ValueError, match="network must be fields"):
        DescriptorSettings(weights=str(tmp_path / "own.safetensors"), network="quick")


def test_a_folder_stands_for_the_file_in_it(tmp_path):
    config = ViTConfig(patch=8, width=24, depth=2, heads=3, mlp_width=40, image=16)
    file = tmp_path / "model.safetensors"
    own_file(file, config)
    (tmp_path / "config.json").write_text(settings_of_own(config))
    settings = DescriptorSettings(weights=str(tmp_path))
    assert settings.weights == str(file)
    assert settings.record() == DescriptorSettings(weights=str(file)).record()
    assert digest(tmp_path) == digest(file)
    assert load_network(weights=tmp_path).model.vit.config == config
    file.unlink()
    with pytest.raises(UnreadableWeights, match=r"holds none of model\.safetensors, pytorch_mod"):
        DescriptorSettings(weights=str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UnreadableWeights, match="has no checkpoint yet: train it for longer"):
        DescriptorSettings(weights=str(tmp_path)).record()
