"""DINOv3: the features of PyTorch from every naming, and the way back; what is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from test_weights_vit import assert_like_pytorch, file_of, recorded

from ggem_jax import load_vit
from ggem_jax.files.errors import AmbiguousWeights
from ggem_jax.files.normalisation import IMAGENET, SAT493M
from ggem_jax.models.vit import GGeM, ViT, ViTConfig
from ggem_jax.weights import MismatchedWeights, write_safetensors
from ggem_jax.weights.__main__ import main
from ggem_jax.weights.architecture import HEADS_OF_FAMILY, Given
from ggem_jax.weights.declared import Declared
from ggem_jax.weights.dinov3 import normalisation_of, rope_of
from ggem_jax.weights.own import read_own_vit
from ggem_jax.weights.vit import from_arrays, from_timm, read_vit, to_timm

# name -> layout, MLP, biases of queries and values, dtype of the periods
CASES = {
    "timm-dinov3": ("timm", "gelu", False, "float32"),
    "timm-dinov3-swiglu": ("timm", "swiglu", True, "float32"),
    "hf-dinov3": ("hf-dinov3", "gelu", True, "float32"),
    "hf-dinov3-swiglu": ("hf-dinov3", "swiglu", False, "float32"),
    "dinov3": ("dinov3", "gelu", True, "float32"),
    "dinov3-swiglu": ("dinov3", "swiglu", False, "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_features_are_those_of_pytorch(name, tmp_path):
    path, found = file_of(name, tmp_path)
    published = read_vit(path, heads=2)
    config = published.config
    facts = (published.layout, config.mlp, config.qkv_bias, config.rope_dtype)
    assert (published.family, *facts) == ("dinov3", *CASES[name])
    assert (config.position, config.rope_base, config.registers) == ("rope", 100.0, 4)
    assert (published.pooling, config.norm_eps, config.image) == ("cls", 1e-5, 224)
    assert_like_pytorch(published, found, tolerance=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_way_to_timm_and_back_changes_no_feature(name, tmp_path):
    path, found = file_of(name, tmp_path)
    published = read_vit(path, heads=2)
    arrays = to_timm(published)
    for again in (from_arrays(arrays, "again", given=Given(2)), from_timm(arrays, given=Given(2))):
        config = dataclasses.replace(again.config, rope_dtype=published.config.rope_dtype)
        assert config == published.config
        assert_like_pytorch(dataclasses.replace(again, config=config), found, tolerance=2e-5)
    if CASES[name][0] == "timm":
        given, _ = recorded(name)
        assert set(arrays) == set(given)
        for key, value in given.items():
            np.testing.assert_array_equal(arrays[key], value, err_msg=key)


def test_names_without_a_use_are_listed(tmp_path):
    published = read_vit(file_of("dinov3-swiglu", tmp_path)[0])
    assert set(published.unused) == {"mask_token", "local_cls_norm.weight", "local_cls_norm.bias"}
    published = read_vit(file_of("hf-dinov3", tmp_path)[0], heads=2)
    assert published.unused == ("embeddings.mask_token",)


def test_the_names_in_memory_of_hugging_face_are_read_too():
    weights, found = recorded("hf-dinov3-swiglu")
    inner = {re.sub(r"^layer\.", "model.layer.", name): value for name, value in weights.items()}
    assert_like_pytorch(from_arrays(inner, "file", given=Given(2)), found)


def test_a_mask_takes_biases_out():
    """The keys' biases of the recorded file are 0.5 and masked. A mask of zeros, as of the
    published files, leaves none."""
    weights, found = recorded("dinov3")
    assert np.all(weights["blocks.0.attn.qkv.bias"][32:64] == 0.5)
    masked = {
        name: np.zeros_like(value) if name.endswith("bias_mask") else value
        for name, value in weights.items()
    }
    published = from_arrays(masked, "file")
    attention = published.variables["params"]["blocks_0"]["attention"]
    assert not any(np.any(attention[part]["bias"]) for part in ("query", "value"))
    with pytest.raises(AssertionError):
        assert_like_pytorch(published, found)
    bare = {name: value for name, value in weights.items() if not name.endswith("bias_mask")}
    with pytest.raises(
        MismatchedWeights,
        match=r"file has biases of keys that are not 0.*: blocks\.0\.attn\.k\.bias",
    ):
        from_arrays(bare, "file")
    for odd in (np.full(96, np.nan, np.float32), np.ones(95, np.float32)):
        with pytest.raises(MismatchedWeights, match=r"file: blocks\.1.*bias_mask must hold a 0 or"):
            from_arrays(weights | {"blocks.1.attn.qkv.bias_mask": odd}, "file")


def test_heads_come_from_the_periods_and_otherwise_from_the_published_widths():
    weights, _ = recorded("dinov3")
    published = from_arrays(weights, "file")  # 4 periods: heads of 16 channels
    assert (published.config.heads, published.evidence["heads"]) == (
        2,
        "shape of the attention's periods",
    )
    for width, heads in ((384, 6), (768, 12), (1024, 16), (1280, 20)):
        published = from_arrays(stretched(width), "file")
        assert published.config.heads == heads
        assert published.evidence["rope"] == "the base of every published DINOv3"
    assert HEADS_OF_FAMILY["dinov3", 4096][0] == 32


def test_heads_that_are_not_known_or_do_not_agree_are_refused():
    weights, _ = recorded("timm-dinov3")
    with pytest.raises(AmbiguousWeights, match=r"how many attention heads .* 32 is .* --heads"):
        from_arrays(weights, "file")
    weights, _ = recorded("dinov3")
    with pytest.raises(MismatchedWeights, match="file has periods of 2 heads, not 4"):
        from_arrays(weights, "file", given=Given(4))
    periods = (100 ** (np.arange(3) / 3)).astype(np.float32)
    with pytest.raises(MismatchedWeights, match="12 channels, of which the width 32 is no multip"):
        from_arrays(weights | {"rope_embed.periods": periods}, "file")


def stretched(width):
    """timm's recorded names, of one block, with zeros of another width."""
    weights, _ = recorded("timm-dinov3")
    return {
        name: np.zeros([{32: width, 96: 3 * width}.get(length, length) for length in value.shape])
        for name, value in weights.items()
        if "blocks.1" not in name
    }


@pytest.mark.parametrize(
    ("width", "layout", "local", "expected"),
    [
        (384, "timm", False, IMAGENET),
        (1024, "timm", False, None),  # of LVD-1689M or of SAT-493M
        (4096, "hf-dinov3", False, None),
        (4096, "dinov3", True, None),  # both have the norm of small crops
        (1024, "dinov3", False, IMAGENET),
        (1024, "dinov3", True, SAT493M),
    ],
)
def test_images_of_two_kinds_are_told_apart_or_not_known(width, layout, local, expected):
    config = ViTConfig(patch=16, width=width, depth=1, heads=16, mlp_width=8, position="rope")
    unused = ("mask_token", *(["backbone.local_cls_norm.bias"] if local else []))
    assert normalisation_of(config, layout, unused) == expected
    if layout == "timm":
        assert from_arrays(stretched(width), "file").normalised == expected


def rope(periods):
    fields, where = rope_of(periods, Declared(), source="file")
    return fields["rope_base"], fields["rope_dtype"], where


def test_periods_of_another_base_and_wrong_ones():
    powers = np.arange(4) / 4
    assert rope(100**powers) == (100, "float32", "rope_embed.periods in the file")
    assert rope(None) == (100, "float32", "the base of every published DINOv3")
    assert rope(10000**powers)[0] == 10000
    assert rope(77.7**powers)[0] == pytest.approx(77.7, rel=1e-5)
    assert rope(np.ones(1))[0] == 100  # heads of 4 channels
    for odd in ([1, 2, 3, 4], [], [1, np.inf], [[1.0]], [0, 0], [1, -3]):
        with pytest.raises(MismatchedWeights, match=r"file: rope_embed\.periods must hold the pow"):
            rope(np.array(odd))
    weights, _ = recorded("dinov3")
    with pytest.raises(MismatchedWeights, match=r"powers of one base"):
        from_arrays(weights | {"rope_embed.periods": np.arange(1.0, 5.0)}, "file")


def publish(folder, name, **changes):
    """The recorded weights with the config.json that timm or Hugging Face wrote beside them."""
    weights, found = recorded(name)
    write_safetensors(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(json.loads(str(found["config"])) | changes))
    return folder / "model.safetensors", found


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("dinov3")])
def test_the_publishers_settings_are_evidence(name, tmp_path):
    path, found = publish(tmp_path, name)
    published = read_vit(path)
    assert published.evidence["heads"].startswith("config.json: num_")
    assert_like_pytorch(published, found, tolerance=2e-5)


def test_the_base_of_the_periods_is_that_of_the_settings(tmp_path):
    path, found = publish(tmp_path, "hf-dinov3", rope_theta=50.0)
    published = read_vit(path)
    assert (published.config.rope_base, published.evidence["rope"]) == (
        50.0,
        "config.json: rope_theta",
    )
    with pytest.raises(AssertionError):
        assert_like_pytorch(published, found)
    arguments = json.loads(str(recorded("timm-dinov3")[1]["config"]))["model_args"]
    path, _ = publish(tmp_path, "timm-dinov3", model_args=arguments | {"rope_temperature": 50})
    assert read_vit(path).config.rope_base == 50.0
    path, _ = publish(tmp_path, "hf-dinov3", rope_theta="100")
    with pytest.raises(MismatchedWeights, match="rope_theta must be a number above 0, not '100'"):
        read_vit(path)


def test_gates_with_another_activation_are_refused(tmp_path):
    path, _ = publish(tmp_path, "hf-dinov3-swiglu", hidden_act="gelu")
    with pytest.raises(
        MismatchedWeights,
        match=r"gated MLPs with the activation 'gelu' \(config\.json: hidden_act\), where ours",
    ):
        read_vit(path)


def test_fine_tuning_starts_from_the_files_weights(tmp_path):
    path, found = file_of("hf-dinov3", tmp_path)
    published = read_vit(path, heads=2)
    model = ViT(published.config, GGeM(), num_classes=7)
    images = jnp.asarray(found["images"])
    output = model.apply(published.fill(model.init(jax.random.key(0), images)), images)
    np.testing.assert_allclose(output.tokens, found["tokens"], rtol=1e-4, atol=1e-4)
    assert output.logits.shape == (2, 7)


def test_our_own_file_of_a_rope_vit(tmp_path):
    """Keys without a bias tell it; where there are no biases at all, one has to say it."""
    for name, biases in (("hf-dinov3", True), ("timm-dinov3", False)):
        published = read_vit(file_of(name, tmp_path)[0], heads=2)
        flat = traverse_util.flatten_dict(published.variables, sep="/")
        path = tmp_path / f"own-{name}.safetensors"
        write_safetensors(path, flat)
        if not biases:
            for read in (load_vit, read_own_vit):
                with pytest.raises(
                    MismatchedWeights, match=r"sincos and rope positions cannot be told apart: .*'"
                ):
                    read(path)
            assert read_own_vit(path, position="sincos")[0].config.position == "sincos"
        model, variables = read_own_vit(path, position=None if biases else "rope")
        expected = dataclasses.replace(published.config, norm_eps=1e-6)
        assert model.config == expected
        images = recorded(name)[1]["large_images"]
        np.testing.assert_array_equal(
            model.apply(variables, images).tokens,
            ViT(expected, published.model().pooling).apply(published.variables, images).tokens,
        )


def test_registers_may_be_none():
    weights, _ = recorded("hf-dinov3")
    weights["embeddings.register_tokens"] = np.zeros((1, 0, 32), np.float32)
    assert from_arrays(weights, "file", given=Given(2)).config.registers == 0


def test_a_network_without_positions_that_is_no_dinov3_is_refused():
    weights, _ = recorded("timm-dinov2-registers")
    del weights["pos_embed"]  # it has biases of keys, as RoPE-ViT, whose frequencies are others
    with pytest.raises(
        MismatchedWeights,
        match=r"has no pos_embed; of networks without learned positions only DINOv3 is read",
    ):
        from_timm(weights, given=Given(2))
    weights, _ = recorded("timm-dinov3")
    del weights["blocks.0.mlp.fc1.weight"]
    with pytest.raises(MismatchedWeights, match=r"file has no blocks\.0\.mlp\.fc1\.weight$"):
        from_arrays(weights, "file", given=Given(2))
    weights, _ = recorded("timm-dinov3-swiglu")
    del weights["blocks.1.mlp.fc1_g.bias"]
    with pytest.raises(MismatchedWeights, match=r"blocks\.1\.mlp\.fc1\.bias \(40,\) where \(80,\)"):
        from_arrays(weights, "file", given=Given(2))
    weights, _ = recorded("dinov3-swiglu")
    weights["blocks.1.mlp.w1.weight"] = weights["blocks.1.mlp.w1.weight"][:7]
    with pytest.raises(MismatchedWeights, match=r"file: gate and value must be of one shape, not"):
        from_arrays(weights, "file")


def timm_with(**extra):
    """The names of timm's plain ViT and more, dots as double underscores."""
    return recorded("timm-vit")[0] | {
        name.replace("__", "."): np.ones(shape, np.float32) for name, shape in extra.items()
    }


def hf_siglip_naflex():
    weights, _ = recorded("hf-siglip")
    name = next(name for name in weights if name.endswith("embeddings.patch_embedding.weight"))
    return weights | {name: weights[name].reshape(16, -1)}


def big_vision_naflex():
    weights, _ = recorded("big_vision-siglip")
    name = next(name for name in weights if name.endswith("embedding/kernel"))
    return weights | {name: weights[name].reshape(-1, 16)}


def hf_beit(table):
    return recorded("hf-vit")[0] | {table: np.ones((7, 2), np.float32)}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (hf_siglip_naflex, r"SigLIP 2 NaFlex, which resizes.*embeddings\.patch_embedding\.weight"),
        (big_vision_naflex, r"SigLIP 2 NaFlex, .*params/img/embedding/kernel"),
        (lambda: {"visual.trunk.embeds.proj.weight": np.ones((4, 4))}, r"NaFlexViT .*embeds\.proj"),
        (
            lambda: timm_with(blocks__0__attn__relative_position_bias_table=(9, 2)),
            r"BEiT or another network that adds a learned bias of every relative position.*_table",
        ),
        (
            lambda: timm_with(rel_pos_bias__relative_position_bias_table=(9, 2)),
            r"BEiT or another .*: rel_pos_bias\.relative_position_bias_table",
        ),
        (
            lambda: hf_beit(
                "beit.encoder.layer.0.attention.attention.relative_position_bias."
                "relative_position_bias_table"
            ),
            r"BEiT or another network",
        ),
        (lambda: hf_beit("vit.encoder.layer.0.lambda_1"), r"BEiT .*layer\.0\.lambda_1"),
        (
            lambda: timm_with(blocks__0__mlp__norm__weight=(24,)),
            r"EVA-02 or BEiT-3, which have norms inside.*: blocks\.0\.mlp\.norm\.weight",
        ),
        (
            lambda: timm_with(blocks__0__mlp__ffn_ln__weight=(24,), rope__freqs_cos=(4, 8)),
            r"EVA-02 .*mlp\.ffn_ln\.weight, rope\.freqs_cos",
        ),
        (
            lambda: timm_with(blocks__0__attn__q_bias=(16,), blocks__0__attn__v_bias=(16,)),
            r"EVA or a small EVA-02, .*: blocks\.0\.attn\.q_bias, pos_embed",
        ),
        (
            lambda: recorded("timm-clip")[0] | {"attn_pool.latent": np.ones((1, 1, 16))},
            r"Perception Encoder, which rotates .*: norm_pre\.weight, attn_pool\.latent",
        ),
        (
            lambda: recorded("dinov3")[0] | {"cls_norm.weight": np.ones(32, np.float32)},
            r"a DINOv3 with a norm of its own for the class token.*: cls_norm\.weight",
        ),
        (lambda: {"downsample_layers.0.0.weight": np.ones((4, 3, 4, 4))}, r"DINOv3 ConvNeXt"),
        (lambda: timm_with(rope__freqs=(2, 4, 8)), r"rotary positions of learned frequencies"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
def test_networks_that_compute_something_else_are_refused_with_the_reason(arrays, words, tmp_path):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, arrays())
    with pytest.raises(MismatchedWeights, match=words) as caught:
        read_vit(path, heads=2)
    message = str(caught.value)
    assert message.startswith(f"{path} is of ")
    assert "\n" not in message
    assert "it is not read, as its features would be wrong" in message


def test_a_rope_vit_with_the_names_of_deit3_is_told_by_its_settings(tmp_path):
    weights, _ = recorded("deit3")
    write_safetensors(tmp_path / "model.safetensors", weights)
    sizes = {"num_heads": 2, "embed_dim": 16, "patch_size": 4}
    settings = {"architecture": "vit_small_patch16_rope_ape_224", "model_args": sizes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        MismatchedWeights, match=r"is vit_small_patch16_rope_ape_224 \(config\.json.*a RoPE-ViT, "
    ):
        read_vit(tmp_path / "model.safetensors")


def test_inspect_tells_the_positions(tmp_path, capsys):
    path, _ = file_of("dinov3-swiglu", tmp_path)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "DINOv3 (Siméoni et al., 2025); names of layout dinov3" in printed
    assert "4 registers, rotary positions; pooled by cls" in printed
    assert "rope base 100 in bfloat16: rope_embed.periods in the file" in printed
    assert "heads 2: shape of the attention's periods" in printed
