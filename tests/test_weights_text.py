"""ggem_jax/weights/text.py: tokens and projections equal PyTorch's for every published naming, and
convert back to it; errors list faults by name.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_weights_vit import assert_like_pytorch, file_of, given_of, recorded

from ggem_jax.models.text import TextTransformer
from ggem_jax.weights import MismatchedWeights, UnreadableWeights, write_safetensors, write_torch
from ggem_jax.weights.architecture import Given
from ggem_jax.weights.text import from_published_names, holds_text, read_text, to_published_names
from ggem_jax.weights.vit import read_vit

# name -> layout, family
CASES = {
    "text-hf-clip": ("hf-clip", "clip"),
    "text-hf-siglip": ("hf-clip", "siglip"),
    "text-open_clip": ("clip", "clip"),
    "text-open_clip-siglip": ("clip", "siglip"),
    "text-big_vision": ("big_vision", "siglip"),
}
SCALES = {"logit_scale", "logit_bias", "params/t", "params/b"}
OTHER_TOWER = r"vision_model\..*|visual_projection\.weight|visual\..*|params/img/.*"


@functools.cache
def compiled(config, outputs, project_bias):
    return jax.jit(TextTransformer(config, outputs, project_bias).apply)


def assert_tower_like_pytorch(published, found):
    """Tokens and projections of the recorded texts: as long as the context, with padding after the
    end, and shorter ones.
    """
    apply = compiled(published.config, published.outputs, published.project_bias)
    for size in ("", "short_"):
        if f"{size}ids" in found:
            output = apply(published.variables, jnp.asarray(found[f"{size}ids"].astype(np.int32)))
            np.testing.assert_allclose(output.tokens, found[f"{size}tokens"], rtol=1e-4, atol=1e-4)
            if published.outputs:
                np.testing.assert_allclose(
                    output.projected, found[f"{size}projected"], rtol=1e-4, atol=1e-4
                )


def tower_of(weights):
    return {name: value for name, value in weights.items() if not re.fullmatch(OTHER_TOWER, name)}


def assert_same_arrays(got, want):
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_texts_are_those_of_pytorch(name, tmp_path):
    path, found = file_of(name, tmp_path)
    published = read_text(path)
    assert (published.layout, published.family) == CASES[name]
    assert_tower_like_pytorch(published, found)
    weights, _ = recorded(name)
    assert set(published.unused) == set(weights) - set(tower_of(weights))


@pytest.mark.parametrize("name", CASES)
def test_the_way_back_is_the_same_to_the_bit(name):
    weights, _ = recorded(name)
    published = from_published_names(weights, given=given_of(name))
    assert_same_arrays(to_published_names(published), tower_of(weights))


def test_the_way_back_takes_weights_that_were_trained_further():
    weights, _ = recorded("text-open_clip")
    published = from_published_names(weights, given=Given(2, "quick"))
    doubled = jax.tree.map(lambda leaf: 2 * jnp.asarray(leaf), published.variables)
    arrays = to_published_names(published, doubled)
    assert_same_arrays(
        arrays,
        {name: value if name in SCALES else 2 * value for name, value in tower_of(weights).items()},
    )
    for part, leaf in (("query", "kernel"), ("mlp", None)):
        other = jax.tree.map(np.asarray, published.variables)
        block = other["params"]["blocks_1"]
        if leaf is None:
            del block[part]
        else:
            del block["attention"][part][leaf]
        with pytest.raises(
            MismatchedWeights,
            match=r"mlp\.c_fc\.weight"
            if leaf is None
            else r"transformer\.resblocks\.1\.attn\.in_proj_weight",
        ):
            to_published_names(published, other)


@pytest.mark.parametrize("name", CASES)
def test_the_image_tower_of_the_same_file_is_read_too(name, tmp_path):
    path, found = file_of(name, tmp_path)
    published = read_vit(path, gelu="exact" if name == "text-open_clip-siglip" else None)
    assert published.family == CASES[name][1]
    assert holds_text(published.unused)
    if "images" in found:
        assert_like_pytorch(
            published,
            {
                key: value
                for key, value in found.items()
                if key in ("images", "logits", "descriptor")
            },
        )


def test_scale_and_bias_of_the_logits():
    for name, (scale, bias) in {
        "text-open_clip-siglip": ("logit_scale", "logit_bias"),
        "text-big_vision": ("params/t", "params/b"),
    }.items():
        weights, _ = recorded(name)
        published = from_published_names(weights, given=given_of(name))
        assert (published.logit_scale, published.logit_bias) == (
            float(weights[scale].item()),
            float(weights[bias].item()),
        )
    weights, _ = recorded("text-hf-clip")
    given = Given(2, "quick")
    published = from_published_names(weights, given=given)
    assert (published.logit_scale, published.logit_bias) == (float(weights["logit_scale"]), None)
    del weights["logit_scale"]
    assert from_published_names(weights, given=given).logit_scale is None


def test_folders_before_the_names_and_towers_alone(tmp_path):
    """open_clip's other class has the folder `text.`, Hugging Face's text models alone have none,
    and some of them no projection.
    """
    weights, found = recorded("text-open_clip")
    prefixed = {
        name if name == "logit_scale" else f"text.{name}": value
        for name, value in tower_of(weights).items()
    }
    published = from_published_names(prefixed, given=Given(2, "quick"))
    assert_tower_like_pytorch(published, found)
    assert_same_arrays(to_published_names(published), prefixed)
    weights, found = recorded("text-hf-clip")
    alone = {
        name.removeprefix("text_model."): value
        for name, value in weights.items()
        if name.startswith("text_model.")
    }
    published = from_published_names(alone, given=Given(2, "quick"))
    assert (published.outputs, published.family, published.model().outputs) == (0, "clip", 0)
    assert_tower_like_pytorch(published, found)
    assert_same_arrays(to_published_names(published), alone)
    weights, found = recorded("text-big_vision")
    for prefix in ("", "params/", "txt/"):
        alone = {
            prefix + name.removeprefix("params/txt/"): value
            for name, value in weights.items()
            if name.startswith("params/txt/")
        }
        scale = "params/t" if prefix == "params/" else "t"
        published = from_published_names(alone | {scale: np.full(1, 2.0, np.float32)})
        assert published.logit_scale == 2.0
        assert_tower_like_pytorch(published, found)
        assert_same_arrays(
            to_published_names(published), alone | {scale: np.full(1, 2.0, np.float32)}
        )


def test_blocks_of_a_scan_are_taken_apart_and_put_together(tmp_path):
    weights, found = recorded("text-big_vision")
    scan = {}
    for name, value in weights.items():
        if "Encoder_0/encoderblock_0/" in name:
            scan[name.replace("encoderblock_0", "encoderblock")] = np.stack(
                [value, weights[name.replace("block_0", "block_1")]]
            )
        elif "Encoder_0/encoderblock_1/" not in name:
            scan[name] = value
    np.savez(tmp_path / "scan.npz", **scan)
    published = read_text(tmp_path / "scan.npz")
    assert_tower_like_pytorch(published, found)
    assert_same_arrays(to_published_names(published), tower_of(scan))


def test_heads_of_two_towers_are_not_mixed_up(tmp_path):
    weights, _ = recorded("text-big_vision")
    other = {}
    for name, value in weights.items():
        if name.startswith("params/img/") and re.search(r"/(query|key|value)/", name):
            value = value.reshape(*value.shape[:-2], 4, 4)
        elif name.startswith("params/img/") and name.endswith("/out/kernel"):
            value = value.reshape(4, 4, 16)
        other[name] = value
    for order in (other, dict(reversed(other.items()))):
        np.savez(tmp_path / "two.npz", **order)
        assert read_vit(tmp_path / "two.npz").config.heads == 4
        assert read_text(tmp_path / "two.npz").config.heads == 2


def test_what_a_file_does_not_say_may_be_given(tmp_path):
    path, _ = file_of("text-hf-clip", tmp_path)
    usual = read_text(path).config
    assert (usual.heads, usual.gelu, usual.norm_eps, usual.end_id, usual.causal, usual.pooled) == (
        2,
        "quick",
        1e-5,
        None,
        True,
        "end",
    )
    given = read_text(path, heads=4, gelu="exact", norm_eps=1e-3, end_id=7).config
    assert given == dataclasses.replace(usual, heads=4, gelu="exact", norm_eps=1e-3, end_id=7)
    of_siglip = from_published_names(recorded("text-hf-siglip")[0], given=Given(2)).config
    assert (of_siglip.gelu, of_siglip.norm_eps, of_siglip.causal, of_siglip.pooled) == (
        "tanh",
        1e-6,
        False,
        "last",
    )
    wide = {
        name: np.zeros([1152 if length == 16 else length for length in value.shape])
        for name, value in recorded("text-hf-siglip")[0].items()
    }
    assert from_published_names(wide).config.heads == 16


def test_files_of_half_precision_and_of_pytorch(tmp_path):
    weights, found = recorded("text-open_clip")
    write_safetensors(
        tmp_path / "half.safetensors",
        {name: value.astype(np.float16) for name, value in weights.items()},
    )
    write_torch(tmp_path / "checkpoint.pt", weights)
    for name in ("half.safetensors", "checkpoint.pt"):
        assert_tower_like_pytorch(read_text(tmp_path / name, heads=2, gelu="quick"), found)


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def shaped(name, *shape):
    return lambda weights: weights | {name: np.ones(shape, np.float32)}


TORCH, FLAX = "transformer.resblocks.", "params/txt/Encoder_0/encoderblock_"
REFUSED = {
    "missing": (
        "text-open_clip",
        without(TORCH + "1.mlp.c_proj.bias"),
        "1 missing: transformer.resblocks.1.mlp.c_proj.bias",
    ),
    "no queries": (
        "text-open_clip",
        without(TORCH + "1.attn.in_proj_weight"),
        "missing: transformer.resblocks.1.attn.in_proj_weight (48, 16)",
    ),
    "no first layer": (
        "text-hf-clip",
        without("text_model.encoder.layers.0.mlp.fc1.weight"),
        "has no text_model.encoder.layers.0.mlp.fc1.weight",
    ),
    "no bias": ("text-hf-siglip", without("text_model.head.bias"), "missing: text_model.head.bias"),
    "no bias in Flax": (
        "text-big_vision",
        without("params/txt/head/bias"),
        "missing: params/txt/head/bias",
    ),
    "surplus": (
        "text-hf-siglip",
        shaped("text_model.pooler.weight", 3),
        "1 surplus: text_model.pooler.weight (3,)",
    ),
    "class token": ("text-open_clip-siglip", shaped("text.cls_emb", 16), "1 surplus: text.cls_emb"),
    "norm": (
        "text-open_clip",
        shaped("ln_final.weight", 3),
        "ln_final.weight (3,) where (16,) is needed",
    ),
    "attention": (
        "text-open_clip",
        shaped(TORCH + "0.attn.in_proj_bias", 47),
        "in_proj_bias (47,) where (48,) is needed",
    ),
    "heads": (
        "text-big_vision",
        shaped(FLAX + "1/MultiHeadDotProductAttention_0/key/bias", 16),
        "key/bias (16,) where (2, 8)",
    ),
    "axes": (
        "text-hf-clip",
        shaped("text_model.embeddings.position_embedding.weight", 8),
        "position_embedding.weight (8,) the number of axes",
    ),
    "scale": (
        "text-hf-clip",
        shaped("logit_scale", 2),
        "logit_scale must be one number, not of shape (2,)",
    ),
    "block": (
        "text-open_clip",
        shaped(TORCH + "999999999.ln_1.bias", 16),
        "surplus: transformer.resblocks.999999999.ln_1.bias",
    ),
    "other names": (
        "text-open_clip",
        lambda weights: {f"other_{key}": 1 for key in weights},
        "no text tower of a known layout",
    ),
    "nothing": ("text-open_clip", lambda weights: {}, "nowhere, there are none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(case):
    name, change, words = REFUSED[case]
    with pytest.raises(MismatchedWeights) as caught:
        from_published_names(change(recorded(name)[0]), given=given_of(name), source="this file")
    assert words in str(caught.value)
    assert "this file" in str(caught.value)


def test_impossible_sizes_and_damaged_files_are_refused(tmp_path):
    path, _ = file_of("text-hf-clip", tmp_path)
    with pytest.raises(MismatchedWeights, match="heads"):
        read_text(path, heads=3)
    with pytest.raises(MismatchedWeights, match="end_id"):
        read_text(path, end_id=30)
    content = path.read_bytes()
    for size in (0, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:size])
        with pytest.raises(UnreadableWeights, match="safetensors"):
            read_text(path)
