"""ggem_jax/weights/vit.py and vit_layouts.py: features equal PyTorch's for every published naming;
errors list the faults of a file by name.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ggem_jax.models.vit import GGeM, ViT, ViTConfig
from ggem_jax.pooling import avg_pool
from ggem_jax.weights import MismatchedWeights, UnreadableWeights, write_safetensors, write_torch
from ggem_jax.weights.architecture import Given
from ggem_jax.weights.vit import POOLINGS, from_timm, read_vit, to_timm
from ggem_jax.weights.vit_layouts import join_qkv
from ggem_jax.weights.vit_table import Style, vit_table

DATA = Path(__file__).parent / "data" / "vit"
# name -> layout, family
CASES = {
    "timm-vit": ("timm", "vit"),
    "timm-mae-finetuned": ("timm", "mae"),
    "timm-deit-distilled": ("timm", "deit"),
    "timm-deit3": ("timm", "deit3"),
    "timm-dinov2-registers": ("timm", "dinov2"),
    "timm-clip": ("timm", "clip"),
    "timm-siglip": ("timm", "siglip"),
    "timm-no-bias": ("timm", "vit"),
    "mae": ("timm", "mae"),
    "deit3": ("timm", "deit3"),
    "hf-vit": ("hf-vit", "vit"),
    "hf-dinov2": ("hf-dinov2", "dinov2"),
    "hf-dinov2-registers": ("hf-dinov2", "dinov2"),
    "hf-clip": ("hf-clip", "clip"),
    "openai-clip": ("clip", "clip"),
    "hf-siglip": ("hf-clip", "siglip"),
    "augreg": ("augreg", "augreg"),
    "big_vision-siglip": ("big_vision", "siglip"),
    "timm-swiglu": ("timm", "dinov2"),
    "dinov2-swiglu": ("timm", "dinov2"),
    "hf-dinov2-swiglu": ("hf-dinov2", "dinov2"),
}


def recorded(name):
    with np.load(DATA / f"{name}.npz") as file:
        found = {key: file[key] for key in file.files}
    weights = {
        key.removeprefix("weights/"): value.astype(np.float32)
        for key, value in found.items()
        if key.startswith("weights/")
    }
    return weights, found


# GELU of the recorded networks that names and shapes leave open, as Hugging Face writes it
OPEN_GELU = {
    "timm-clip": "quick_gelu",
    "hf-clip": "quick_gelu",
    "openai-clip": "quick_gelu",
    "timm-siglip": "gelu",
    "text-hf-clip": "quick_gelu",
    "text-open_clip": "quick_gelu",
}


def settings_of(name):
    """What a config.json must say of a recorded network: no publisher has one so small."""
    if name == "deit3":  # as a RoPE-ViT may be, by its names
        own = {"num_heads": 2, "embed_dim": 16, "patch_size": 4}
        return {"architecture": "deit3_small_patch16_224", "model_args": own}
    gelu = {"hidden_act": OPEN_GELU[name]} if name in OPEN_GELU else {}
    return {"num_attention_heads": 2} | gelu


def given_of(name):
    """The same as arguments."""
    return Given(2, {"quick_gelu": "quick", "gelu": "exact"}.get(OPEN_GELU.get(name)))


def file_of(name, path):
    """The recorded weights as their publisher's kind of file, with a config.json beside it."""
    weights, found = recorded(name)
    if "augreg" not in name and "big_vision" not in name:
        (path / "config.json").write_text(json.dumps(settings_of(name)))
    if "augreg" in name or "big_vision" in name:
        np.savez(path / "weights.npz", **weights)
        return path / "weights.npz", found
    write_safetensors(path / "weights.safetensors", weights)
    return path / "weights.safetensors", found


@functools.cache
def compiled(config, trained, num_classes):
    return jax.jit(ViT(config, POOLINGS[trained], num_classes).apply)


def assert_like_pytorch(published, found, tolerance=1e-4):
    """Tokens, descriptors and projections of the recorded images, of both sizes where the recorded
    network takes both.
    """
    apply = compiled(published.config, published.pooling, published.num_classes)
    compared = 0
    for size in ("", "large_"):
        if f"{size}images" in found:
            output = apply(published.variables, jnp.asarray(found[f"{size}images"]))
            for name in ("tokens", "descriptor", "logits"):
                if f"{size}{name}" in found:
                    np.testing.assert_allclose(
                        getattr(output, name),
                        found[f"{size}{name}"],
                        rtol=tolerance,
                        atol=tolerance,
                    )
                    compared += 1
    assert compared


@pytest.mark.parametrize("name", CASES)
def test_features_are_those_of_pytorch(name, tmp_path):
    path, found = file_of(name, tmp_path)
    published = read_vit(path)
    assert (published.layout, published.family) == CASES[name]
    assert_like_pytorch(published, found)


@pytest.mark.parametrize("name", CASES)
def test_the_way_to_timm_and_back_changes_no_feature(name, tmp_path):
    path, found = file_of(name, tmp_path)
    published = read_vit(path, heads=2)
    arrays = to_timm(published)
    again = from_timm(arrays, given=Given(2, published.config.gelu, published.config.norm_eps))
    kept = dataclasses.replace(
        again,
        config=dataclasses.replace(again.config, position_filter=published.config.position_filter),
    )
    assert_like_pytorch(kept, found)
    if CASES[name][0] == "timm":
        given = {
            re.sub(r"gamma_(\d)", r"ls\1.gamma", key): value
            for key, value in recorded(name)[0].items()
            if key not in published.unused
        }
        given = {
            key.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): value
            for key, value in given.items()
        }
        assert set(arrays) == set(given)
        for key, value in given.items():
            if "distilled" not in name or key not in (
                "dist_token",
                "pos_embed",
            ):  # only their sum is known
                np.testing.assert_array_equal(arrays[key], value, err_msg=key)


def test_another_pooling_and_head_keep_the_weights(tmp_path):
    path, found = file_of("timm-dinov2-registers", tmp_path)
    published = read_vit(path, heads=2)
    images = jnp.asarray(found["images"])
    model = ViT(published.config, GGeM(), num_classes=7)
    fresh = model.init(jax.random.key(0), images)
    variables = published.fill(fresh)
    output = model.apply(variables, images)
    np.testing.assert_allclose(output.tokens, found["tokens"], rtol=1e-4, atol=1e-4)
    assert output.logits.shape == (2, 7)
    assert variables["params"]["pool"]["p"].tolist() == [3.0, 3.0]
    other = ViT(published.config.__class__(**vars(published.config) | {"registers": 1}), avg_pool)
    with pytest.raises(MismatchedWeights, match="registers"):
        published.fill(other.init(jax.random.key(0), images))


def test_files_of_pytorch_and_bfloat16(tmp_path, monkeypatch):
    weights, found = recorded("mae")
    write_torch(tmp_path / "checkpoint.pth", weights)
    published = read_vit(tmp_path / "checkpoint.pth", heads=2)
    assert published.unused == (
        "mask_token",
        "decoder_embed.weight",
        "decoder_blocks.0.norm1.weight",
    )
    assert_like_pytorch(published, found)
    monkeypatch.setattr(
        "ggem_jax.files.arrays.read_torch",
        lambda path: {"epoch": 3, "model": {"state_dict": weights | {"steps": 7}}},
    )
    assert_like_pytorch(read_vit("training.pt", heads=2), found)
    monkeypatch.setattr("ggem_jax.files.arrays.read_torch", lambda path: [1, 2])
    with pytest.raises(MismatchedWeights, match=r"training.pt holds a list"):
        read_vit("training.pt")
    google, found = recorded("augreg")
    np.savez(
        tmp_path / "short.npz",
        **{
            f"opt/target/{name}": value.astype(ml_dtypes.bfloat16).view("V2")
            for name, value in google.items()
        },
    )
    short = read_vit(tmp_path / "short.npz", heads=2)
    assert_like_pytorch(short, found, tolerance=0.1)
    with pytest.raises(AssertionError):
        assert_like_pytorch(short, found)


def test_blocks_of_a_scan_are_taken_apart(tmp_path):
    weights, found = recorded("big_vision-siglip")
    stacked = {}
    for name, value in weights.items():
        if "encoderblock_0/" in name:
            stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(
                [value, weights[name.replace("block_0", "block_1")]]
            )
        elif "encoderblock_1/" not in name:
            stacked[name] = value
    np.savez(tmp_path / "scan.npz", **stacked)
    assert_like_pytorch(read_vit(tmp_path / "scan.npz", heads=2), found)


def test_a_vit_of_big_vision_is_not_called_siglip(tmp_path):
    weights, found = recorded("big_vision-siglip")
    np.savez(
        tmp_path / "plain.npz",
        **{name: value for name, value in weights.items() if "MAPHead" not in name},
    )
    published = read_vit(tmp_path / "plain.npz")
    assert (published.family, published.pooling, published.config.heads) == ("big_vision", "avg", 2)
    del found["descriptor"]
    assert_like_pytorch(published, found)


def test_a_gated_mlp_is_told_by_its_shapes(tmp_path):
    for name, mlp, width in (
        ("timm-swiglu", "swiglu", 24),
        ("dinov2-swiglu", "swiglu", 24),
        ("timm-deit3", "gelu", 24),
    ):
        config = read_vit(file_of(name, tmp_path)[0], heads=2).config
        assert (config.mlp, config.mlp_width) == (mlp, width)
    weights, _ = recorded("timm-swiglu")
    weights["blocks.1.mlp.fc1.weight"] = weights["blocks.1.mlp.fc1.weight"][:24]  # of a GELU
    with pytest.raises(
        MismatchedWeights,
        match=(
            r"1 wrongly shaped: blocks\.1\.mlp\.fc1\.weight \(24, 16\) where \(48, 16\) is needed"
        ),
    ):
        from_timm(weights, given=Given(2))


def empty_network(width=16, patch=4, **changes):
    """timm's names with zeros, of one block."""
    config = ViTConfig(
        patch=patch, width=width, depth=1, heads=1, mlp_width=8, image=patch, **changes
    )
    shapes = {
        name: parameter.shape for name, parameter in vit_table(config, Style(1), "cls", 0).items()
    }
    return join_qkv({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("width", "heads"),
    [(192, 3), (768, 12), (1152, 16), (1280, 16), (1408, 16), (1664, 16), (1792, 16)],
)
def test_heads_are_those_of_the_published_sizes(width, heads):
    assert from_timm(empty_network(width)).config.heads == heads


def test_families_with_layer_scale_are_told_apart():
    """By positions of the class token, patches and registers; what timm has beside is no family."""

    def family(positions=1, unused=(), **changes):
        arrays = empty_network(layer_scale=1e-5, **changes)
        if not positions:
            arrays["pos_embed"] = arrays["pos_embed"][:, 1:]
        return from_timm(arrays, given=Given(2), unused=unused).family

    assert family(patch=14) == "dinov2"
    assert family(patch=16, registers=4) == "dinov2"
    assert family(patch=16, unused=("mask_token",)) == "dinov2"
    assert family(patch=16, positions=0) == "deit3"
    assert family(patch=14, positions=0) == "deit3"  # deit3_huge_patch14
    assert family(patch=16) == "vit"  # vit_base_patch16_plus
    assert family(patch=14, registers=1) == "vit"  # TIPS v2
    assert family(patch=16, registers=4, class_token=False) == "vit"  # vit_betwixt_patch16_reg4_gap


def test_an_average_is_of_mae_only_with_a_class_token():
    def family(width, patch, **changes):
        arrays = empty_network(width, patch, **changes)
        for leaf in ("weight", "bias"):
            arrays[f"fc_norm.{leaf}"] = arrays.pop(f"norm.{leaf}")
        return from_timm(arrays).family

    assert family(768, 16) == "mae"
    assert family(1408, 14, class_token=False) == "vit"  # I-JEPA
    assert family(1024, 14) == "vit"  # eva_large_patch14


def test_a_file_without_its_first_layer_is_refused_by_name():
    for name in ("timm-deit3", "timm-swiglu", "timm-vit"):
        weights, _ = recorded(name)
        del weights["patch_embed.proj.weight"]
        with pytest.raises(MismatchedWeights, match=r"has no patch_embed\.proj\.weight"):
            from_timm(weights, given=Given(2))


def test_norms_of_a_layout_and_of_a_family(tmp_path):
    for name, norm_eps in (("hf-vit", 1e-12), ("hf-clip", 1e-5), ("timm-vit", 1e-6)):
        path = file_of(name, tmp_path)[0]
        assert read_vit(path).config.norm_eps == norm_eps
        assert read_vit(path, heads=2, norm_eps=1e-3).config.norm_eps == 1e-3


def test_the_pictures_of_timms_config(tmp_path):
    path, _ = file_of("timm-vit", tmp_path)
    assert read_vit(path, heads=2).normalised is None
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_args": {"num_heads": 2},
                "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.25]},
            }
        )
    )
    assert read_vit(path, heads=2).normalised == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.25))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda w: w | {"blocks.0.mlp.w12.weight": np.ones((4, 4), np.float32)},
            "blocks.0.mlp.w12.weight",
        ),
        (
            lambda w: {k: v for k, v in w.items() if k != "blocks.1.mlp.fc2.bias"},
            "1 missing: blocks.1.mlp.fc2.bias",
        ),
        (
            lambda w: {k: v for k, v in w.items() if k != "blocks.0.mlp.fc2.weight"},
            "has no blocks.0.mlp.fc2.weight",
        ),
        (
            lambda w: w | {"blocks.1.norm1.weight": np.ones(3, np.float32)},
            "blocks.1.norm1.weight (3,) where (16,) is needed",
        ),
        (
            lambda w: w | {"blocks.1.attn.qkv.weight": np.ones((47, 16), np.float32)},
            "blocks.1.attn.qkv.weight",
        ),
        (
            lambda w: w | {"pos_embed": np.ones((1, 14, 16), np.float32)},
            "14 positions are no square",
        ),
        (
            lambda w: w | {"patch_embed.proj.weight": np.ones((16, 1, 4, 4), np.float32)},
            "patch_embed.proj.weight must be",
        ),
        (
            lambda w: w | {"blocks.0.mlp.fc1.weight": np.float32(1)},
            "no arrays of real numbers: blocks.0.mlp.fc1.weight float32 ()",
        ),
        (
            lambda w: w | {"blocks.0.mlp.fc2.weight": np.float32(1)},
            "no arrays of real numbers: blocks.0.mlp.fc2.weight float32 ()",
        ),
        (
            lambda w: {f"other_{k}": v for k, v in w.items()},
            "no Vision Transformer of a known layout",
        ),
        (lambda w: {}, "nowhere, there are none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    write_safetensors(tmp_path / "w.safetensors", change(recorded("timm-vit")[0]))
    with pytest.raises(MismatchedWeights) as caught:
        read_vit(tmp_path / "w.safetensors", heads=2)
    assert words in str(caught.value)
    assert str(tmp_path / "w.safetensors") in str(caught.value)


def test_damaged_files_are_refused(tmp_path):
    for name, ending in (("timm-vit", "safetensors"), ("augreg", "npz")):
        path, _ = file_of(name, tmp_path)
        content = path.read_bytes()
        for size in (0, 10, len(content) // 2, len(content) - 5):
            path.write_bytes(content[:size])
            with pytest.raises(UnreadableWeights, match=ending):
                read_vit(path)
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    (tmp_path / "weights.h5").write_bytes(b"")
    for name in ("objects.npz", "one.npz", "weights.h5", "absent.npz"):
        with pytest.raises(UnreadableWeights, match=name):
            read_vit(tmp_path / name)
    with pytest.raises(MismatchedWeights, match="heads"):
        read_vit(file_of("timm-vit", tmp_path)[0], heads=3)


def test_a_class_token_of_big_vision_is_pooled(tmp_path):
    weights, _ = recorded("big_vision-siglip")
    plain = {name: value for name, value in weights.items() if "MAPHead" not in name}
    np.savez(tmp_path / "plain.npz", **plain)
    assert read_vit(tmp_path / "plain.npz").pooling == "avg"
    width = plain["embedding/bias"].shape[0] if "embedding/bias" in plain else 16
    prefix = next(name for name in plain if name.endswith("embedding/bias"))[
        : -len("embedding/bias")
    ]
    np.savez(
        tmp_path / "token.npz", **plain, **{f"{prefix}cls": np.ones((1, 1, width), np.float32)}
    )
    published = read_vit(tmp_path / "token.npz")
    assert (published.pooling, published.config.class_token) == ("cls", True)


def test_a_head_behind_another_layer_is_left_out(tmp_path):
    """Of AugReg before fine-tuning: logits without that layer would be others."""
    weights, _ = recorded("augreg")
    assert "head/kernel" in weights
    layer = {
        f"pre_logits/{leaf}": np.ones(shape, np.float32)
        for leaf, shape in (("kernel", (16, 16)), ("bias", 16))
    }
    np.savez(tmp_path / "w.npz", **weights, **layer)
    published = read_vit(tmp_path / "w.npz")
    assert published.num_classes == 0
    assert {"head/kernel", "head/bias", "pre_logits/kernel"} <= set(published.unused)


def test_only_the_decoder_of_a_mae_makes_a_mae(tmp_path):
    weights, _ = recorded("hf-vit")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    for name, family in (("decoder_layers.0.bias", "mae"), ("0.weight", "vit")):
        beside = {f"decoder.{name}": np.ones((2, 2), np.float32)}
        write_safetensors(tmp_path / "w.safetensors", weights | beside)
        assert read_vit(tmp_path / "w.safetensors").family == family


def test_small_files_that_tell_of_large_networks_are_refused_at_once(tmp_path):
    from ggem_jax.weights.vit_layouts import MOST_BLOCKS, unstack_blocks

    name = "Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"
    many = np.empty((2 * 10**9, 0), np.float32)
    assert list(unstack_blocks({name: many})) == [name]
    assert len(unstack_blocks({name: many[:MOST_BLOCKS]})) == MOST_BLOCKS
    long = "a." * 20_000 + "blocks.0.norm1.weight"
    write_safetensors(tmp_path / "long.safetensors", {long: np.ones(2, np.float32)})
    with pytest.raises(MismatchedWeights, match="names of over 500 letters"):
        read_vit(tmp_path / "long.safetensors")
