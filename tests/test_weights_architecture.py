"""ggem_jax/weights/architecture.py and declared.py: what shapes do not say comes from evidence, or
is asked for.
"""

import json
import re

import numpy as np
import pytest
from test_weights_vit import assert_like_pytorch, empty_network, recorded, settings_of

from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.files.errors import AmbiguousWeights
from ggem_jax.weights import MismatchedWeights, UnreadableWeights, write_safetensors
from ggem_jax.weights.architecture import HEADS, Given, has_fixed_positions
from ggem_jax.weights.hugging_face import to_hugging_face
from ggem_jax.weights.load import load_vit
from ggem_jax.weights.text import read_text
from ggem_jax.weights.vit import from_timm, read_vit

# recorded network -> the publisher's file, and what it settles
DECLARED = {
    "timm-clip-16-heads": ("config.json", {"heads": 16, "gelu": "exact"}),
    "timm-siglip-16-heads": ("config.json", {"heads": 16, "gelu": "tanh"}),
    "hf-siglip-16-heads": ("config.json", {"heads": 16, "gelu": "tanh"}),
    "hf-clip-exact": ("config.json", {"heads": 2, "gelu": "exact"}),
    "open_clip-exact": ("open_clip_config.json", {"heads": 2, "gelu": "exact"}),
    "timm-post-norm": ("config.json", {"heads": 2, "post_norm": True}),
    "timm-post-norm-token": ("config.json", {"heads": 2, "post_norm": True}),
}


def publish(folder, name):
    """The recorded weights with the publisher's file of settings beside them."""
    weights, found = recorded(name)
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", weights)
    file, _ = DECLARED[name]
    (folder / file).write_text(str(found["config"]))
    return folder / "model.safetensors", folder / file, found


@pytest.mark.parametrize("name", DECLARED)
def test_the_publishers_file_decides_and_features_are_those_of_pytorch(name, tmp_path):
    path, settings, found = publish(tmp_path, name)
    published = read_vit(path)
    for choice, value in DECLARED[name][1].items():
        assert getattr(published.config, choice) == value
    for choice in ("heads", "norm" if "post" in name else "gelu"):
        assert published.evidence[choice].startswith(f"{settings.name}: "), published.evidence
    assert_like_pytorch(published, found)
    elsewhere = settings.rename(tmp_path / "settings.json")
    with pytest.raises(AmbiguousWeights, match=r"how many attention heads .* --heads N"):
        read_vit(path)
    assert_like_pytorch(read_vit(path, architecture=elsewhere), found)
    assert load_vit(path, architecture=elsewhere).model.config == published.config


@pytest.mark.parametrize("name", DECLARED)
def test_another_choice_is_another_network(name, tmp_path):
    """The recordings can tell: each choice that a file declares changes the features."""
    path, _, found = publish(tmp_path, name)
    other = {"heads": 4} if "16" in name else {"norm": "pre"} if "post" in name else {}
    other = other or {"gelu": "quick"}
    with pytest.raises(AssertionError):
        assert_like_pytorch(read_vit(path, **other), found)


def clip(width=768, patch=4):
    return empty_network(width, patch, pre_norm=True, patch_bias=False)


def siglip(width, patch, side=1):
    """timm's names of an image tower of SigLIP, with zeros."""
    arrays = empty_network(width, patch, class_token=False)
    arrays["pos_embed"] = np.zeros((1, side * side, width), np.float32)
    shapes = {"latent": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    for layer, inner, outer in (
        ("q", width, width), ("kv", width, 2 * width), ("proj", width, width),
        ("mlp.fc1", width, 8), ("mlp.fc2", 8, width),
    ):  # fmt: skip
        shapes |= {f"{layer}.weight": (outer, inner), f"{layer}.bias": (outer,)}
    return arrays | {f"attn_pool.{n}": np.zeros(shape, np.float32) for n, shape in shapes.items()}


def choices(arrays, **how):
    config = from_timm(arrays, **how).config
    return config.heads, config.gelu


def test_published_sizes_have_their_heads():
    for width, heads in {192: 3, 1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}.items():
        assert HEADS[width][0] == heads
        assert choices(empty_network(width)) == (heads, "exact")
    assert choices(empty_network(1536, 14, layer_scale=1.0)) == (24, "exact")  # DINOv2-g
    assert choices(siglip(1536, 16)) == (16, "tanh")  # SigLIP 2 giant-opt
    for patch, side, gelu in ((16, 1, "exact"), (16, 32, "tanh")):  # images of 16 and 512 pixels
        assert choices(siglip(1024, patch, side)) == (16, gelu)
    assert choices(siglip(1152, 14)) == (16, "exact")
    assert choices(siglip(1152, 16)) == (16, "tanh")


AMBIGUOUS = {
    "an unknown width": (empty_network(64), {}, "heads", "width 64 is known"),
    "12, 16 or 24 heads": (empty_network(1536), {}, "heads", "12, 16 or 24"),
    "a GELU of CLIP": (clip(), {}, "gelu", "which GELU"),
    "a GELU of SigLIP": (siglip(768, 14), {}, "gelu", "which GELU"),
    "an order of norms": (
        {
            name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
            for name, value in empty_network(768, class_token=False, qkv_bias=False).items()
        },
        {},
        "norm",
        "before or after",
    ),
    "timm's gap": (empty_network(768, class_token=False), {}, "heads", "12 or 16 in timm"),
}
SETTLED = {"heads": 16, "gelu": "tanh", "norm": "post"}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_several_networks_fit_is_asked_for_with_the_flag_that_settles_it(case):
    arrays, how, choice, words = AMBIGUOUS[case]
    with pytest.raises(AmbiguousWeights, match=re.escape(words)) as caught:
        from_timm(arrays, **how)
    assert f"--{choice} " in str(caught.value)
    assert f"{choice}=" in str(caught.value)
    given = Given(16, "tanh", None, "post")._replace(
        **{name: None for name in ("heads", "gelu", "norm") if name != choice}
    )
    published = from_timm(arrays, given=given)
    assert published.evidence[choice] == "given"
    found = vars(published.config) | {"norm": "post" if published.config.post_norm else "pre"}
    assert found[choice] == SETTLED[choice]


def test_files_of_openai_are_known_by_their_buffers(tmp_path):
    weights, found = recorded("openai-clip")
    buffers = {name: np.array(7) for name in ("input_resolution", "context_length", "vocab_size")}
    write_safetensors(tmp_path / "w.safetensors", weights | buffers)
    published = read_vit(tmp_path / "w.safetensors", heads=2)
    assert published.config.gelu == "quick"
    assert "OpenAI" in published.evidence["gelu"]
    assert_like_pytorch(published, found)


HUGGING = {"model_type": "clip", "vision_config": {"num_attention_heads": 4, "hidden_size": 16}}
BESIDE = {
    "Hugging Face": ({"config.json": HUGGING}, (4, "quick")),  # the default of its class
    "one tower in the file": (
        {"config.json": {"model_type": "clip", "num_attention_heads": 4}},
        (4, "quick"),
    ),
    "an act of its own": (
        {"config.json": {"num_attention_heads": 4, "hidden_act": "gelu_pytorch_tanh"}},
        (4, "tanh"),
    ),
    "open_clip": (
        {
            "open_clip_config.json": {
                "model_cfg": {
                    "quick_gelu": True,
                    "vision_cfg": {"width": 16, "layers": 2, "head_width": 8},
                }
            }
        },
        (2, "quick"),
    ),
    "timm's name": (
        {
            "config.json": {
                "architecture": "vit_base_patch32_clip_quickgelu_224",
                "model_args": {"num_heads": 8, "embed_dim": 16, "patch_size": 4},
            }
        },
        (8, "quick"),
    ),
    "another name of timm": (
        {
            "config.json": {
                "architecture": "vit_base_patch32_clip_224",
                "model_args": {"num_heads": 8, "embed_dim": 16, "patch_size": 4},
            }
        },
        (8, "exact"),
    ),
    "two that agree": (
        {
            "config.json": {"num_attention_heads": 2, "hidden_act": "gelu"},
            "open_clip_config.json": {"model_cfg": {"vision_cfg": {"width": 16, "head_width": 8}}},
        },
        (2, "exact"),
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_files_beside_the_weights_of_a_clip(case, tmp_path):
    files, expected = BESIDE[case]
    write_safetensors(tmp_path / "w.safetensors", recorded("timm-clip")[0])
    for name, settings in files.items():
        (tmp_path / name).write_text(json.dumps(settings))
    config = read_vit(tmp_path / "w.safetensors").config
    assert (config.heads, config.gelu) == expected


def test_a_file_of_another_network_is_no_evidence(tmp_path):
    weights, _ = recorded("timm-clip")
    write_safetensors(tmp_path / "w.safetensors", weights)
    other = {"num_attention_heads": 12, "hidden_act": "gelu", "hidden_size": 768}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(AmbiguousWeights, match="hidden_size 768 where the weights have 16"):
        read_vit(tmp_path / "w.safetensors")
    with pytest.raises(MismatchedWeights, match=r"is not the network that .*config.json describes"):
        read_vit(tmp_path / "w.safetensors", architecture=tmp_path)
    for without in ("[1]", '{"some": 1}'):
        (tmp_path / "config.json").write_text(without)
        with pytest.raises(AmbiguousWeights):
            read_vit(tmp_path / "w.safetensors")
    for broken in ('{"num_attention_heads": 2,}', "{", "[" * 99999):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(UnreadableWeights, match=r"config.json is not readable JSON.* remove"):
            read_vit(tmp_path / "w.safetensors")
    with pytest.raises(UnreadableWeights, match="not readable JSON"):
        read_vit(tmp_path / "w.safetensors", architecture=tmp_path / "config.json")
    with pytest.raises(UnreadableWeights, match="is not a file of settings"):
        read_vit(tmp_path / "w.safetensors", architecture=tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1 to 65535"),
        ({"num_attention_heads": "2"}, "num_attention_heads must be a whole number"),
        ({"num_attention_heads": 2, "hidden_act": "silu"}, "the activation 'silu'"),
        ({"num_attention_heads": 2, "hidden_act": 3}, "hidden_act must be the name of a GELU"),
        ({"num_attention_heads": 2, "layer_norm_eps": 2}, "layer_norm_eps must be a number above"),
        ({"num_attention_heads": 3}, "width must be a multiple of heads"),
        ({"hidden_size": [384]}, r"hidden_size must be a number, not \[384\]"),
        ({"num_attention_heads": 2, "image_size": [8, 16]}, r"image_size \[8, 16\] is not square"),
        ({"architecture": "a", "model_args": {"img_size": [8, 16]}}, "img_size .* is not square"),
        (
            {"architecture": "a", "pretrained_cfg": {"input_size": [3, 8, 16]}},
            "input_size .* is not square",
        ),
        (
            {"pretrained_cfg": {"mean": [123.675, 116.28, 103.53], "std": [58.4, 57.1, 57.4]}},
            "must be of images in",
        ),
    ],
)
def test_a_file_that_says_what_cannot_be_is_refused(settings, words, tmp_path):
    write_safetensors(tmp_path / "w.safetensors", recorded("timm-vit")[0])
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(MismatchedWeights, match=words):
        read_vit(tmp_path / "w.safetensors")


def test_two_files_that_contradict_each_other_are_refused(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", recorded("timm-clip")[0])
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": {"width": 16, "head_width": 8}}})
    )
    with pytest.raises(MismatchedWeights, match=r"contradict each other \(4 and 2\)"):
        read_vit(tmp_path / "w.safetensors")
    assert read_vit(tmp_path / "w.safetensors", architecture=tmp_path / "config.json", gelu="quick")


def test_the_text_tower_is_declared_apart_from_the_image_tower(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", recorded("text-hf-clip")[0])
    settings = {
        "vision_config": {"num_attention_heads": 4, "hidden_act": "gelu"},
        "text_config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    path = tmp_path / "w.safetensors"
    text, image = read_text(path), read_vit(path)
    assert (text.config.heads, text.config.gelu) == (2, "quick")
    assert (image.config.heads, image.config.gelu) == (4, "exact")
    assert text.evidence["heads"] == "config.json: num_attention_heads"
    (tmp_path / "config.json").unlink()
    for tower in (read_text, read_vit):
        with pytest.raises(AmbiguousWeights, match="heads"):
            tower(path)
        with pytest.raises(AmbiguousWeights, match="GELU"):
            tower(path, heads=2)


def test_heads_that_the_kernels_tell_are_not_overruled(tmp_path):
    np.savez(tmp_path / "w.npz", **recorded("augreg")[0])
    assert read_vit(tmp_path / "w.npz").evidence["heads"] == "shape of the attention's kernels"
    with pytest.raises(MismatchedWeights, match="has kernels of 2 heads, not 4"):
        read_vit(tmp_path / "w.npz", heads=4)


def test_deit_iii_and_rope_vit_are_told_apart_by_a_name(tmp_path):
    weights, found = recorded("deit3")
    path = tmp_path / "w.safetensors"
    write_safetensors(path, weights)
    with pytest.raises(AmbiguousWeights, match="may be DeiT III or a RoPE-ViT"):
        read_vit(path, heads=2)
    with pytest.raises(MismatchedWeights, match="deit3_small_patch16_224, which has width 384"):
        read_vit(path, heads=2, architecture="deit3_small_patch16_224")
    (tmp_path / "config.json").write_text(json.dumps(settings_of("deit3")))
    published = read_vit(path)
    assert published.family == "deit3"
    assert published.declared.architecture == published.architecture == "deit3_small_patch16_224"
    assert_like_pytorch(published, found)
    (tmp_path / "config.json").unlink()
    with pytest.raises(MismatchedWeights, match="vit_odd_rope_ape_224"):
        read_vit(path, heads=2, architecture="vit_odd_rope_ape_224")


def test_a_name_is_that_of_a_network_of_this_size():
    wide = clip(1024, 14)
    large = "vit_large_patch14_clip_quickgelu_224.openai"
    given = Given(architecture=large)
    assert from_timm(wide, given=given).config.gelu == "quick"
    with pytest.raises(MismatchedWeights, match="which has width 1024 where the weights have 768"):
        from_timm(clip(768, 14), given=given)
    with pytest.raises(MismatchedWeights, match="patches of 14 where the weights have 16"):
        from_timm(clip(1024, 16), given=given)


def test_a_word_that_is_no_name_is_taken_for_a_missing_file(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", recorded("timm-clip")[0])
    with pytest.raises(UnreadableWeights, match="my_config is not a file of settings"):
        read_vit(tmp_path / "w.safetensors", heads=2, architecture="my_config")
    with pytest.raises(ValueError, match="architecture must be the name of a ViT in timm"):
        DescriptorSettings(weights=str(tmp_path / "w.safetensors"), architecture="config.json")


@pytest.mark.parametrize("key", ["act_kwargs", "norm_kwargs"])
def test_settings_of_open_clip_that_are_no_object_are_refused(tmp_path, key):
    write_safetensors(tmp_path / "w.safetensors", recorded("timm-clip")[0])
    settings = {"model_cfg": {"vision_cfg": {"width": 16, "head_width": 8, key: [1]}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(MismatchedWeights, match=f"{key} must hold settings by name"):
        read_vit(tmp_path / "w.safetensors")


def beside(folder, arrays, settings, file="config.json"):
    """A file of weights with a file of settings beside it."""
    write_safetensors(folder / "w.safetensors", arrays)
    (folder / file).write_text(json.dumps(settings))
    return folder / "w.safetensors"


def hugging_face(arrays, gelu=None):
    return to_hugging_face(from_timm(arrays, given=Given(gelu=gelu)))[0]


def test_settings_of_another_model_of_the_same_sizes_are_no_evidence(tmp_path):
    of_vit = {"model_type": "vit", "num_attention_heads": 12, "hidden_size": 768}
    path = beside(tmp_path, hugging_face(clip(), "quick"), of_vit)
    with pytest.raises(
        AmbiguousWeights, match=r"which GELU.*config.json says model_type vit where"
    ):
        read_vit(path)
    published = read_vit(path, gelu="quick")
    assert published.config.norm_eps == 1e-5
    assert "model_type vit" in published.evidence["ignored"]
    with pytest.raises(MismatchedWeights, match=r"describes: config.json says model_type vit"):
        read_vit(path, architecture=tmp_path)

    path = beside(tmp_path, hugging_face(empty_network(768)), {"model_type": "clip_vision_model"})
    images = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    published = read_vit(path)
    assert (published.config.gelu, published.config.norm_eps) == ("exact", 1e-12)
    assert published.normalised is None  # that file is of the other network too
    path = beside(tmp_path, empty_network(768), {"model_type": "siglip_vision_model"})
    assert read_vit(path).config.gelu == "exact"
    path = beside(tmp_path, hugging_face(empty_network(768)), {"hidden_act": "gelu_new"})
    assert read_vit(path).config.gelu == "tanh"  # without a model_type
    other = {"model_type": "vit", "intermediate_size": 5, "hidden_act": "gelu_new"}
    assert read_vit(beside(tmp_path, empty_network(768), other)).config.gelu == "exact"


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "vit_base_patch16_gap_224"])
def test_names_of_networks_without_a_class_token_are_no_evidence_for_one_with_it(name, tmp_path):
    path = beside(tmp_path, empty_network(768, 16), {"architecture": name})
    published = read_vit(path)
    assert (published.config.heads, published.config.post_norm) == (12, False)
    assert "class_token False where the weights have True" in published.evidence["ignored"]
    with pytest.raises(MismatchedWeights, match="class_token False"):
        read_vit(path, architecture=name)


def test_a_name_of_timm_is_of_the_family(tmp_path):
    for arrays, name in (
        (clip(768, 16), "vit_base_patch16_224"),
        (siglip(768, 16), "vit_base_patch16_224"),
        (empty_network(768, 16), "vit_base_patch16_clip_quickgelu_224"),
        (empty_network(768, 16), "vit_base_patch16_siglip_224"),
    ):
        with pytest.raises(MismatchedWeights, match="which has"):
            from_timm(arrays, given=Given(gelu="exact", architecture=name))
    for arrays, own in (
        (siglip(768, 16), {"global_pool": "map", "act_layer": "gelu"}),
        (clip(768, 16), {"pre_norm": True, "act_layer": "gelu"}),
    ):  # what overrules a name, as our own export has it
        settings = {"architecture": "vit_base_patch16_224", "model_args": own | {"num_heads": 8}}
        assert read_vit(beside(tmp_path, arrays, settings)).config.heads == 8


def test_a_byte_order_mark_before_settings_is_read_over(tmp_path):
    path = beside(tmp_path, recorded("timm-vit")[0], {})
    (tmp_path / "config.json").write_text('\ufeff{"num_attention_heads": 4}', encoding="utf-8")
    assert read_vit(path).config.heads == 4


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"pool_type": "avg", "no_ln_pre": True}, "pool_type 'avg', no_ln_pre True"),
        ({"no_ln_pre": True}, "no_ln_pre True"),
        ({"final_ln_after_pool": True}, "final_ln_after_pool True"),
        ({"attentional_pool": "parallel"}, "attentional_pool 'parallel'"),
        ({"timm_model_name": "vit_base_patch16_clip_224"}, "timm_model_name"),
        ({"image_size": [8, 16]}, "image_size .* is not square"),
    ],
)
def test_options_of_open_clip_that_change_the_network_are_refused(option, words, tmp_path):
    vision = {"width": 16, "head_width": 8} | option
    settings = {"model_cfg": {"vision_cfg": vision}}
    path = beside(tmp_path, recorded("openai-clip")[0], settings, "open_clip_config.json")
    with pytest.raises(MismatchedWeights, match=words):
        read_vit(path)


def test_a_file_that_may_be_a_clipa_is_asked_about(tmp_path):
    arrays = {k: v for k, v in recorded("openai-clip")[0].items() if "ln_pre" not in k}
    write_safetensors(tmp_path / "w.safetensors", arrays)
    with pytest.raises(AmbiguousWeights, match="may be a CLIPA"):
        read_vit(tmp_path / "w.safetensors", heads=2, gelu="exact")
    settings = {"model_cfg": {"vision_cfg": {"width": 16, "head_width": 8, "no_ln_pre": True}}}
    path = beside(tmp_path, arrays, settings, "open_clip_config.json")
    assert not read_vit(path).config.pre_norm


def fixed_positions(width, side, fast_first):
    """Sines and cosines as MoCo v3 (or MAE) makes them, and a class token's zeros."""
    table = np.zeros((1, 1 + side * side, width))
    for place in range(side * side):
        axes = divmod(place, side)[:: -1 if fast_first else 1]
        for k in range(width // 4):
            for n, axis in enumerate(axes):
                angle = axis / 10000 ** (k / (width / 4))
                table[0, 1 + place, n * width // 2 + k] = np.sin(angle)
                table[0, 1 + place, n * width // 2 + width // 4 + k] = np.cos(angle)
    return table.astype(np.float32)


def test_small_networks_with_other_heads_than_their_width_says_are_asked_about(tmp_path):
    for fast_first in (False, True):
        table = fixed_positions(384, 3, fast_first)
        assert has_fixed_positions(table)
        assert not has_fixed_positions(table + 0.01)
        moco = empty_network(384) | {"pos_embed": table}
        with pytest.raises(AmbiguousWeights, match="12 in MoCo v3"):
            from_timm(moco)
        assert from_timm(moco, given=Given(heads=12)).config.heads == 12
    write_safetensors(
        tmp_path / "w.safetensors", {f"visual.{k}": v for k, v in empty_network(384).items()}
    )
    with pytest.raises(AmbiguousWeights, match="12 in SLIP"):
        read_vit(tmp_path / "w.safetensors")
    with pytest.raises(AmbiguousWeights, match="12 in MAE-Lite"):
        from_timm(empty_network(192), unused=("decoder_embed.weight",))
    old = empty_network(768, 16)
    block = {k.removeprefix("blocks.0."): v for k, v in old.items() if k.startswith("blocks.0.")}
    block |= {
        "mlp.fc1.weight": np.zeros((2304, 768), np.float32),
        "mlp.fc1.bias": np.zeros(2304, np.float32),
        "mlp.fc2.weight": np.zeros((768, 2304), np.float32),
    }
    old |= {f"blocks.{i}.{k}": v for i in range(8) for k, v in block.items()}
    with pytest.raises(AmbiguousWeights, match="old vit_small_patch16_224"):
        from_timm(old)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_normalize": False}, "do_normalize is false"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"image_mean": [float("nan")] * 3, "image_std": [0.5] * 3}, "images in"),
        ({"image_mean": [123.675] * 3, "image_std": [58.4] * 3}, "images in"),
    ],
)
def test_images_that_are_prepared_otherwise_are_refused(settings, words, tmp_path):
    path = beside(tmp_path, empty_network(768), settings, "preprocessor_config.json")
    with pytest.raises(MismatchedWeights, match=words):
        read_vit(path)


def test_the_normalisation_of_a_clip_is_known_of_openais_files_only():
    buffers = ("input_resolution", "context_length", "vocab_size")
    assert from_timm(clip(), given=Given(gelu="exact")).normalised is None
    assert from_timm(clip(), unused=buffers).normalised is not None
