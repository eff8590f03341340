"""ggem_jax/weights/export.py: files that other libraries load give the network that was written."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_weights_vit import file_of

from ggem_jax.files import atomic
from ggem_jax.models.vit import MAP, GGeM, ViT, ViTConfig
from ggem_jax.pooling import avg_pool, cls_pool, gem_pool, lse_pool, max_pool
from ggem_jax.weights import (
    MismatchedWeights,
    UnreadableWeights,
    read_safetensors,
    write_safetensors,
)
from ggem_jax.weights.__main__ import main
from ggem_jax.weights.export import export_vit
from ggem_jax.weights.load import LoadedViT, load_vit
from ggem_jax.weights.own import read_own_vit
from ggem_jax.weights.vit import read_vit

# recorded network -> the model of timm, and that of Hugging Face; None: refused
TARGETS = {
    "timm-vit": ("vit_base_patch16_224", "vit"),
    "timm-mae-finetuned": ("vit_base_patch16_224", None),
    "timm-deit-distilled": ("deit_base_distilled_patch16_224", "deit"),
    "timm-deit3": ("vit_base_patch16_224", None),
    "timm-dinov2-registers": ("vit_base_patch16_224", None),
    "timm-clip": ("vit_base_patch16_clip_quickgelu_224", None),
    "timm-siglip": ("vit_base_patch16_224", "siglip_vision_model"),
    "timm-no-bias": ("vit_base_patch16_224", None),
    "mae": ("vit_base_patch16_224", "vit_mae"),
    "timm-post-norm": ("vit_base_patch16_rpn_224", None),
    "timm-post-norm-token": ("vit_base_patch16_rpn_224", None),
    "hf-vit": ("vit_base_patch16_224", "vit"),
    "hf-dinov2": ("vit_base_patch16_224", "dinov2"),
    "hf-dinov2-registers": ("vit_base_patch16_224", "dinov2_with_registers"),
    "hf-clip": ("vit_base_patch16_clip_quickgelu_224", "clip_vision_model"),
    "openai-clip": ("vit_base_patch16_clip_quickgelu_224", "clip_vision_model"),
    "hf-siglip": ("vit_base_patch16_224", "siglip_vision_model"),
    "augreg": ("vit_base_patch16_224", "vit"),
    "big_vision-siglip": ("vit_base_patch16_224", "siglip_vision_model"),
    "timm-dinov3": ("vit_small_patch16_dinov3", "dinov3_vit"),
    "timm-dinov3-swiglu": ("vit_small_plus_patch16_dinov3_qkvb", "dinov3_vit"),
    "hf-dinov3": ("vit_small_patch16_dinov3_qkvb", "dinov3_vit"),
    "hf-dinov3-swiglu": ("vit_small_plus_patch16_dinov3", "dinov3_vit"),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", "dinov3_vit"),
    "timm-swiglu": ("vit_giant_patch14_dinov2", "dinov2"),
    "hf-dinov2-swiglu": ("vit_giant_patch14_dinov2", "dinov2"),
}
RNG = np.random.default_rng(0)
SMALL = ViTConfig(patch=4, width=16, depth=2, heads=2, mlp_width=32, image=16)


def recorded_vit(name, folder):
    path, found = file_of(name, folder)
    norm = "post" if "post-norm" in name else None
    return read_vit(path, norm=norm), found["images"]


def random_vit(pooling=avg_pool, classes=0, normalised=((0.5,) * 3, (0.25,) * 3), **changes):
    """A network of ours without the zeros of fresh variables, which would hide what is lost."""
    model = ViT(dataclasses.replace(SMALL, **changes), pooling, classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 16, 16, 3)))
    variables = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32) / 4, shapes)
    return LoadedViT(model, variables, *(normalised or (None, None)), "made here")


def read_again(folder):
    """The network of files that were written, by nothing but themselves."""
    return read_vit(folder / "model.safetensors")


def outputs(vit, images):
    model = vit.model() if callable(vit.model) and not isinstance(vit.model, ViT) else vit.model
    return jax.jit(model.apply)(vit.variables, images)


def assert_equal_variables(again, before):
    """Equal arrays; of the class token, only the sum with its position is known."""
    again, before = (dict(vit.variables["params"]) for vit in (again, before))
    assert set(again) == set(before)
    if "class_token" in before and "position" in before:
        sums = [tree.pop("class_token") + tree["position"][:1] for tree in (again, before)]
        np.testing.assert_array_equal(*sums)
        again["position"], before["position"] = again["position"][1:], before["position"][1:]
    jax.tree.map(np.testing.assert_array_equal, again, before)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("to", ["timm", "hf"])
def test_our_reader_finds_the_same_network(name, to, tmp_path):
    vit, _ = recorded_vit(name, tmp_path)
    wanted = TARGETS[name][to == "hf"]
    if wanted is None:
        with pytest.raises(MismatchedWeights, match="Hugging Face's models cannot express"):
            export_vit(vit, tmp_path / "out", to=to)
        assert not (tmp_path / "out").exists()
        return
    written = export_vit(vit, tmp_path / "out", to=to)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architecture" if to == "timm" else "model_type"] == wanted
    again = read_again(tmp_path / "out")
    assert_equal_variables(again, vit)
    free = {"position_filter": vit.config.position_filter, "layer_scale": vit.config.layer_scale}
    if (name, to) == ("hf-vit", "timm"):  # as the notes say
        free["norm_eps"] = vit.config.norm_eps
    assert dataclasses.replace(again.config, **free) == vit.config
    assert (again.num_classes, again.pooling) == (vit.num_classes, vit.pooling)
    assert again.evidence["heads"].startswith("config.json")
    for key, array in vit.rest.items():
        np.testing.assert_array_equal(again.rest[key], array)
    assert written.arrays == len(read_safetensors(written.files[0]))
    if vit.normalised is not None:
        assert again.normalised == vit.normalised


def test_the_settings_of_timm_say_what_names_and_shapes_do_not(tmp_path):
    vit, _ = recorded_vit("timm-dinov2-registers", tmp_path)
    export_vit(vit, tmp_path / "out", to="timm")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["model_args"] == {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 1.5,
        "qkv_bias": True,
        "class_token": True,
        "reg_tokens": 3,
        "no_embed_class": True,
        "pre_norm": False,
        "global_pool": "token",
        "fc_norm": False,
        "init_values": 1e-5,
        "act_layer": "gelu",
    }
    assert found["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    assert found["pretrained_cfg"]["input_size"] == [3, 16, 16]
    assert (found["num_classes"], found["num_features"]) == (3, 16)
    vit, _ = recorded_vit("timm-mae-finetuned", tmp_path)
    export_vit(vit, tmp_path / "mae", to="timm", head=False)
    found = json.loads((tmp_path / "mae" / "config.json").read_text())
    assert (found["global_pool"], found["model_args"]["fc_norm"]) == ("avg", True)
    assert found["num_classes"] == 0
    assert "head.weight" not in read_safetensors(tmp_path / "mae" / "model.safetensors")


@pytest.mark.parametrize(("width", "hidden"), [(1152, 4304), (768, 3072), (1408, 1414), (56, 61)])
def test_timm_makes_mlps_of_the_same_width(width, hidden, tmp_path):
    vit = random_vit(width=width, mlp_width=hidden, depth=1)
    export_vit(vit, tmp_path, to="timm")
    ratio = json.loads((tmp_path / "config.json").read_text())["model_args"]["mlp_ratio"]
    assert int(width * ratio) == hidden


def test_the_settings_of_hugging_face(tmp_path):
    vit, _ = recorded_vit("timm-deit-distilled", tmp_path)
    export_vit(vit, tmp_path / "out", to="hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "model_type": "deit",
        "architectures": ["DeiTForImageClassificationWithTeacher"],
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 3,
        "intermediate_size": 24,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    }
    images = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert images["image_mean"] == [0.485, 0.456, 0.406]
    assert images["size"] == {"height": 16, "width": 16}
    vit, _ = recorded_vit("openai-clip", tmp_path)
    export_vit(vit, tmp_path / "clip" / "image.safetensors", to="hf")
    found = json.loads((tmp_path / "clip" / "config.json").read_text())
    assert (found["hidden_act"], found["projection_dim"]) == ("quick_gelu", 5)
    names = {path.name for path in (tmp_path / "clip").iterdir()}
    assert names == {"image.safetensors", "config.json"}  # its images are not known


OWN = {
    "avg": (avg_pool, {"class_token": False, "gelu": "tanh"}),
    "cls": (cls_pool, {"norm_eps": 1e-5}),
    "map": (MAP(), {"layer_scale": 0.1}),
    "sincos": (cls_pool, {"position": "sincos"}),
    "ggem": (GGeM(groups=4, layout="interleaved"), {"pool_order": "pool-norm"}),
    "gem": (GGeM(groups=1, p_init=2.0, negatives="shift"), {"registers": 2}),
    "max": (max_pool, {"pre_norm": True}),
    "rope": (cls_pool, {"position": "rope", "rope_base": 50.0, "qkv_bias": False}),
    "lse": (partial(lse_pool, r=3.0), {"mlp": "swiglu", "mlp_width": 24}),
    "relu-avg": (partial(gem_pool, p=1.0, negatives="clamp"), {"gelu": "quick", "heads": 4}),
}


@pytest.mark.parametrize("name", OWN)
def test_our_own_files_keep_every_setting(name, tmp_path):
    pooling, changes = OWN[name]
    vit = random_vit(pooling, classes=3, **changes)
    export_vit(vit, tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        again = load_vit(path)
        assert again.model.config == vit.model.config
        assert (again.mean, again.std) == (vit.mean, vit.std)
        jax.tree.map(np.testing.assert_array_equal, again.variables, vit.variables)
        images = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
        np.testing.assert_array_equal(outputs(again, images).logits, outputs(vit, images).logits)
    bare, _ = read_own_vit(tmp_path / "out" / "model.safetensors")
    assert bare.config == vit.model.config


def test_settings_beside_of_another_network_are_refused(tmp_path):
    """Of files whose header has none, as those of `write_safetensors`."""
    export_vit(random_vit(gelu="tanh"), tmp_path / "one.safetensors")
    export_vit(random_vit(width=32), tmp_path / "out" / "two.safetensors")
    (tmp_path / "out" / "two.safetensors").rename(tmp_path / "two.safetensors")
    for name in ("one", "two"):
        file = tmp_path / f"{name}.safetensors"
        write_safetensors(file, read_safetensors(file))
    assert load_vit(tmp_path / "one.safetensors").model.config.gelu == "tanh"
    with pytest.raises(MismatchedWeights, match=r"config\.json is of another network .*width 16"):
        load_vit(tmp_path / "two.safetensors")
    (tmp_path / "config.json").rename(tmp_path / "kept.json")
    assert load_vit(tmp_path / "two.safetensors").model.config.gelu == "exact"
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')  # of another form
    assert load_vit(tmp_path / "two.safetensors").model.config.gelu == "exact"
    (tmp_path / "config.json").write_text('{"model": {')
    with pytest.raises(UnreadableWeights, match=r"config\.json is not readable JSON.*: remove it"):
        load_vit(tmp_path / "two.safetensors")
    (tmp_path / "kept.json").rename(tmp_path / "config.json")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["pool"]["kind"] = "gap"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnreadableWeights, match=r"config\.json does not hold .*gap"):
        load_vit(tmp_path / "one.safetensors")


ROPE = {"position": "rope", "layer_scale": 0.1, "norm_eps": 1e-5}
REFUSED = {
    "GGeM": (GGeM(groups=2), {}, "other libraries have no pooling GGeM"),
    "max": (max_pool, {}, "other libraries have no pooling"),
    "eps of timm": (cls_pool, {"norm_eps": 1e-5}, "epsilon of 1e-05, where timm's have 1e-06"),
    "bias": (cls_pool, {"pre_norm": True, "norm_eps": 1e-5}, "bias in (the|its) patch embedding"),
    "gated pooling": (MAP(), {"mlp": "swiglu", "class_token": False}, "gated MLP"),
    "map": (MAP(), {}, "has no attention pooling"),
    "norm": (cls_pool, {"pool_order": "pool-norm"}, "has its last norm before the pooling"),
    "registers": (avg_pool, {"class_token": False, "registers": 2}, "has no registers"),
    "head": (avg_pool, {}, r"has its head on the class token: leave it out \(--no-head, head=F"),
    "rope": (cls_pool, {"position": "rope", "layer_scale": 0.1}, "epsilon of 1e-06|no head on"),
    "gelu": (cls_pool, ROPE | {"gelu": "tanh"}, "its GELU is tanh"),
    "rope and map": (MAP(), ROPE, "attention pooling"),
    "rope without class token": (avg_pool, ROPE | {"class_token": False}, "class token"),
    "rope after the norm": (cls_pool, ROPE | {"pool_order": "pool-norm"}, "norm"),
    "gated": (cls_pool, {"mlp": "swiglu", "mlp_width": 20}, "no MLP of 20 channels"),
}  # fmt: skip
EXPRESSED = {("timm", "map"), ("timm", "norm"), ("timm", "registers"), ("timm", "head")} | {
    ("timm", "gated"), ("hf", "eps of timm"), ("hf", "gelu"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("to", ["timm", "hf"])
def test_what_a_library_cannot_compute_is_refused(case, to, tmp_path):
    pooling, changes, words = REFUSED[case]
    vit = random_vit(pooling, classes=0 if case == "gelu" else 3, **changes)
    if (to, case) in EXPRESSED:
        export_vit(vit, tmp_path / "out", to=to)
        return
    with pytest.raises(MismatchedWeights, match=words):
        export_vit(vit, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_a_pooling_without_a_name_is_refused(tmp_path):
    for pooling in (
        lambda tokens: tokens[:, 0],
        GGeM(groups=2, eps=1e-3),
        partial(gem_pool, p=2.0, negatives="clamp"),
    ):
        with pytest.raises(MismatchedWeights, match=r"config\.json has no name for the pooling"):
            export_vit(random_vit(pooling), tmp_path / "out")


def test_a_setting_that_no_library_is_known_to_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ggem_jax.weights.export._EXPRESSED", {"patch", "width", "heads", "image"})
    with pytest.raises(MismatchedWeights, match=r"it has depth=2, mlp_width=32, gelu='tanh'"):
        export_vit(random_vit(gelu="tanh"), tmp_path / "out", to="timm")


def test_sincos_positions_become_learned_ones(tmp_path):
    vit = random_vit(cls_pool, position="sincos", registers=2)
    images = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
    for to in ("timm", "hf"):
        export_vit(vit, tmp_path / to, to=to)
        again = read_again(tmp_path / to)
        np.testing.assert_allclose(
            outputs(again, images).tokens, outputs(vit, images).tokens, atol=1e-5
        )


def test_what_is_missing_is_said(tmp_path):
    vit = random_vit(avg_pool, normalised=None, norm_eps=1e-12)
    assert export_vit(vit, tmp_path / "timm", to="timm").notes == (
        "mean and deviation of the images are not known, and not written",
        "the norms of timm have an epsilon of 1e-06, not 1e-12",
    )
    written = export_vit(vit, tmp_path / "hf", to="hf")
    assert [path.name for path in written.files] == ["model.safetensors", "config.json"]
    assert "average the patches yourself" in written.notes[-1]
    vit, _ = recorded_vit("mae", tmp_path)
    assert "ViTMAEModel shuffles the patches" in export_vit(vit, tmp_path / "mae", to="hf").notes[0]
    vit, _ = recorded_vit("dinov3-swiglu", tmp_path)
    assert "rounded to bfloat16" in export_vit(vit, tmp_path / "dinov3", to="hf").notes[-1]
    vit, _ = recorded_vit("timm-deit-distilled", tmp_path)
    assert "second head" in export_vit(vit, tmp_path / "deit").notes[0]


def test_a_different_config_is_never_overwritten_unasked(tmp_path):
    vit = random_vit()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"config\.json is there and says something else"):
        export_vit(vit, tmp_path, to="timm")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    written = export_vit(vit, tmp_path, to="timm", overwrite=True)
    assert "bert" not in (tmp_path / "config.json").read_text()
    before = {path: path.stat().st_ino for path in written.files}
    written = export_vit(vit, tmp_path, to="timm")  # the same again
    assert set(before) == set(written.files)


def test_after_an_error_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for folder in ("there", "new/deeper"):
        for broken in ("write_text", "fsync"):
            with monkeypatch.context() as patch:
                if broken == "fsync":
                    patch.setattr(atomic.os, "fsync", full_disk)
                else:
                    patch.setattr("pathlib.Path.write_text", full_disk)
                with pytest.raises(OSError, match=r"No space left on device: '.*safetensors'"):
                    export_vit(random_vit(), tmp_path / folder, to="hf")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_odd_names_of_the_output_are_refused(tmp_path):
    for name in ("out.bin", "v1.5"):
        with pytest.raises(ValueError, match=r"ends in \.safetensors, or that of a folder"):
            export_vit(random_vit(), tmp_path / name)
    (tmp_path / "v1.5").mkdir()
    assert export_vit(random_vit(), tmp_path / "v1.5").files[0].parent.name == "v1.5"
    with pytest.raises(ValueError, match="to must be flax, timm or hf, not 'onnx'"):
        export_vit(random_vit(), tmp_path / "out", to="onnx")


def test_the_command_takes_published_files_and_our_own(tmp_path, capsys):
    path, _ = file_of("timm-vit", tmp_path)
    own, timm, again = (tmp_path / name for name in ("own", "timm", "again"))
    assert main(["convert", str(path), str(own), "--gelu", "tanh"]) == 0
    said = capsys.readouterr().out
    assert f"arrays written to {own / 'model.safetensors'}, with config.json beside it" in said
    assert main(["convert", str(own / "model.safetensors"), str(timm), "--to", "timm"]) == 0
    words = ["convert", str(own), str(again), "--to", "hf"]
    assert main([*words, "--no-head"]) == 0
    assert "note: mean and deviation of the images are not known" in capsys.readouterr().out
    before = load_vit(own)
    assert before.model.config.gelu == "tanh"
    assert_equal_variables(read_again(timm), before)
    assert read_again(again).num_classes == 0
    assert main([*words, "--gelu", "exact"]) == 1
    assert "leave out --gelu" in capsys.readouterr().err
    (again / "config.json").write_text("{}")
    assert main(words) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert main(["convert", str(timm), str(tmp_path / "both"), "--to", "hf"]) == 0
    assert main(["convert", str(own / "model.safetensors"), str(own)]) == 1
    assert "is the file that is converted" in capsys.readouterr().err


def test_the_command_takes_a_training_run(tmp_path, capsys):
    vit = random_vit(avg_pool, classes=3, gelu="tanh")  # with a class token
    settings = {
        "model": dataclasses.asdict(vit.model.config),
        "pool": {"kind": "avg", "groups": None, "p": 3.0, "r": 10.0},
        "data": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(settings))
    with ocp.CheckpointManager((run / "checkpoints").absolute()) as manager:
        state = {"step": np.int32(3), "params": vit.variables["params"], "ema": None}
        manager.save(3, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    assert main(["convert", str(run), str(tmp_path / "timm"), "--to", "timm"]) == 0
    found = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert (found["global_pool"], found["model_args"]["act_layer"]) == ("avg", "gelu_tanh")
    again = read_again(tmp_path / "timm")
    assert_equal_variables(again, vit)
    assert (again.pooling, again.evidence["pooling"]) == ("avg", "config.json: global_pool")
    assert main(["convert", str(run), str(tmp_path / "flax")]) == 0
    again = load_vit(tmp_path / "flax")
    assert (again.model.config, again.mean) == (vit.model.config, vit.mean)
    assert main(["convert", str(run), str(run)]) == 1
    assert "says something else" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text()) == settings


@pytest.fixture(scope="module")
def libraries():
    """PyTorch, timm and transformers, which `tests/record_vit.py` names as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        names = ("torch", "timm", "transformers")
        torch, timm, transformers = (pytest.importorskip(name) for name in names)
        with torch.no_grad():
            yield torch, timm, transformers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("head", [True, False], ids=["head", "no-head"])
@pytest.mark.parametrize("name", TARGETS)
def test_timm_computes_the_same(name, head, tmp_path, libraries):
    torch, timm, _ = libraries
    vit, images = recorded_vit(name, tmp_path)
    export_vit(vit, tmp_path / "out", to="timm", head=head)
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    ours, theirs = outputs(vit, images), network.forward_features(pixels)
    after_pooling = vit.config.pool_order == "pool-norm"
    close(theirs, ours.tokens_before_norm if after_pooling else ours.tokens)
    if "distilled" in name:  # whose two heads are averaged there
        close(network.head(theirs[:, 0]), ours.logits if head else theirs[:, 0])
    else:
        close(network.forward_head(theirs, pre_logits=True), ours.descriptor)
        close(network(pixels), ours.logits if head and vit.num_classes else ours.descriptor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("head", [True, False], ids=["head", "no-head"])
@pytest.mark.parametrize("name", [name for name, (_, model) in TARGETS.items() if model])
def test_hugging_face_computes_the_same(name, head, tmp_path, libraries):
    torch, _, transformers = libraries
    vit, images = recorded_vit(name, tmp_path)
    export_vit(vit, tmp_path / "out", to="hf", head=head)
    network, loading = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    unknown = ("pooler.dense", "embeddings.mask_token")  # of theirs, which take no part in tokens
    assert all(key.startswith(unknown) for key in loading["missing_keys"])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    in_order = {"noise": torch.arange(16.0).expand(len(images), 16)} if name == "mae" else {}
    ours, theirs = outputs(vit, images), network.eval()(pixels, **in_order)
    norm = getattr(network, "post_layernorm", None) if "clip" in name else None
    tokens = theirs.last_hidden_state
    close(tokens if norm is None else norm(tokens), ours.tokens)
    if vit.pooling == "map":
        close(theirs.pooler_output, ours.descriptor)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    whole = getattr(transformers, settings["architectures"][0]).from_pretrained(tmp_path / "out")
    if head and vit.num_classes:
        found = whole.eval()(pixels)
        logits = next(key for key in ("cls_logits", "logits", "image_embeds") if key in found)
        close(found[logits], ours.logits)
    if vit.normalised is not None:
        images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
        assert tuple(images.image_mean) == vit.normalised[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    "kind", ["no class token", "map", "sincos", "gated", "rope", "mae in order"]
)
def test_networks_of_our_own_are_computed_the_same(kind, tmp_path, libraries):
    torch, timm, transformers = libraries
    pooling, changes = {
        "no class token": (avg_pool, {"class_token": False, "gelu": "tanh", "qkv_bias": False}),
        "map": (MAP(), {"class_token": False, "patch_bias": False, "qkv_bias": False}),
        "sincos": (cls_pool, {"position": "sincos", "registers": 2}),
        "gated": (cls_pool, {"mlp": "swiglu", "mlp_width": 24, "patch_bias": False}),
        "rope": (cls_pool, ROPE | {"rope_base": 50.0, "patch_bias": False, "registers": 1}),
        "mae in order": (avg_pool, {}),
    }[kind]
    vit = random_vit(pooling, **changes)
    images = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
    pixels, ours = torch.from_numpy(images).permute(0, 3, 1, 2), outputs(vit, images)
    export_vit(vit, tmp_path / "timm", to="timm")
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    close(network.forward_features(pixels), ours.tokens)
    close(network(pixels), ours.descriptor)
    if kind == "mae in order":
        mae, images = recorded_vit("mae", tmp_path)
        export_vit(mae, tmp_path / "hf", to="hf")
        vit, pixels = mae, torch.from_numpy(images).permute(0, 3, 1, 2)
        ours = outputs(mae, images)
        network = transformers.ViTModel.from_pretrained(tmp_path / "hf")
    else:
        export_vit(vit, tmp_path / "hf", to="hf")
        network = transformers.AutoModel.from_pretrained(tmp_path / "hf")
    close(network.eval()(pixels).last_hidden_state, ours.tokens)


def close(theirs, ours):
    np.testing.assert_allclose(np.asarray(theirs), np.asarray(ours), rtol=1e-4, atol=1e-4)


def test_a_file_of_our_own_keeps_its_settings_without_the_config_beside_it(tmp_path):
    """Its header has them: a file that is moved alone is not another network."""
    config = ViTConfig(
        patch=4, width=16, depth=1, heads=2, mlp_width=24, image=8, gelu="quick", norm_eps=1e-3
    )
    model = ViT(config, GGeM(groups=2), 3)
    variables = model.init(jax.random.key(0), np.ones((1, 8, 8, 3)))
    export_vit(LoadedViT(model, variables, None, None, ""), tmp_path / "a", to="flax")
    moved = (tmp_path / "a" / "model.safetensors").rename(tmp_path / "moved.safetensors")
    assert load_vit(moved).model == model
    assert read_own_vit(moved)[0].config == config


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        (lambda text: text[:-9], UnreadableWeights, "header of .*, is damaged, and holds"),
        (lambda text: "[]", UnreadableWeights, "must hold model and pool"),
        (lambda text: text.replace('"pool"', '"pooled"'), UnreadableWeights, "model and pool"),
        (
            lambda text: text.replace('"heads": 2', '"heads": 4'),
            MismatchedWeights,
            "header of .* another network: heads 4 where the weights have 2; write the file again",
        ),
        (
            lambda text: text.replace('"image": 16', '"image": 32'),
            MismatchedWeights,
            "another network: image 32 where the weights have 16",
        ),
    ],
    ids=["cut", "list", "no pool", "heads", "image"],
)
def test_a_header_that_fails_is_never_replaced_by_defaults(change, error, what, tmp_path):
    export_vit(random_vit(gelu="quick"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    text = change(json.dumps(json.loads((tmp_path / "out" / "config.json").read_text())))
    write_safetensors(file, read_safetensors(file), metadata={"ggem_jax": text})
    for read in (load_vit, read_own_vit):
        with pytest.raises(error, match=what) as caught:
            read(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_a_file_leaves_everything_as_it_was(tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=rf"{name} is a folder: move it"):
            export_vit(random_vit(), tmp_path / name, overwrite=True)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]


def test_after_a_late_error_the_settings_are_those_of_before(tmp_path, monkeypatch):
    export_vit(random_vit(gelu="tanh"), tmp_path)
    before = (tmp_path / "config.json").read_text()
    replace = type(tmp_path).replace

    def fail(self, target):
        if target.suffix == ".safetensors":
            full_disk()
        return replace(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        export_vit(random_vit(), tmp_path, overwrite=True)
    assert (tmp_path / "config.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_rope_without_registers_is_refused_by_timm(tmp_path):
    with pytest.raises(MismatchedWeights, match="rotary positions without registers"):
        export_vit(random_vit(cls_pool, **ROPE), tmp_path / "out", to="timm")
    export_vit(random_vit(cls_pool, registers=1, **ROPE), tmp_path / "out", to="timm")
    assert read_again(tmp_path / "out").config.position == "rope"


@pytest.mark.parametrize("out", ["out", "out/vit.safetensors"])
def test_the_normalisation_is_beside_every_file_of_hugging_face(out, tmp_path):
    stale = tmp_path / "out" / "preprocessor_config.json"
    stale.parent.mkdir()
    stale.write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    for to, known in (("hf", True), ("hf", False), ("timm", False)):
        vit = random_vit(cls_pool, **({} if known else {"normalised": None}))
        before = stale.read_text()
        with pytest.raises(ValueError, match=r"is there and says something else"):
            export_vit(vit, tmp_path / out, to=to)
        assert stale.read_text() == before
        written = export_vit(vit, tmp_path / out, to=to, overwrite=True)
        assert stale.exists() == known
        again = read_vit(written.files[0])
        assert again.normalised == (((0.5,) * 3, (0.25,) * 3) if known else None)
        stale.write_text(before)
    stale.unlink()
    (stale.parent / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"open_clip_config\.json is there, and would count"):
        export_vit(vit, tmp_path / out, to="hf", overwrite=True)
