"""train/export.py and ggem_jax/weights/stablehlo.py: what is written runs elsewhere and answers as
the run does.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ggem_jax.files.preprocessing import Preprocessing
from ggem_jax.models.vit import MAP, GGeM, ViT, ViTConfig
from ggem_jax.pooling import avg_pool, cls_pool
from ggem_jax.weights.export import add_timm_facts, export_vit
from ggem_jax.weights.inference import make_infer
from ggem_jax.weights.load import LoadedViT, load_vit
from tests.conftest import ROOT, draw_variables, one_line
from train import export

SMALL = ViTConfig(patch=4, width=16, depth=1, heads=2, mlp_width=32, image=8)
HOW = Preprocessing(8, "centre", 1.25, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
RNG = np.random.default_rng(0)
GGEM = GGeM(groups=4)
SIDES = ((8, 8), (21, 30), (33, 14), (9, 17))  # of images, whose resized sides are odd and even
PIXELS = RNG.integers(0, 256, (3, 8, 8, 3), np.uint8)

# What another program does, which knows neither this package nor Flax.
ALONE = """
import json, sys
import numpy as np
from jax import export

folder, pixels, out = sys.argv[1:]
facts = json.load(open(f"{folder}/model.json"))
network = export.deserialize(bytearray(open(f"{folder}/model.stablehlo", "rb").read()))
outputs = network.call(np.load(pixels))
assert {name: len(each["shape"]) for name, each in facts["outputs"].items()} == {
    name: array.ndim for name, array in outputs.items()
}
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"ggem_jax", "train", "flax", "safetensors", "orbax"}, loaded
np.savez(out, **outputs)
"""


def trained(pooling=GGEM, *, classes=3, dim=0, config=SMALL) -> LoadedViT:
    """A network as a run gives it, with random parameters."""
    model = ViT(config, pooling, classes)
    variables = draw_variables(model, jnp.ones((1, 8, 8, 3)))
    projection = None
    if dim:
        kernel = RNG.normal(size=(16, dim)).astype(np.float32)
        projection = {"kernel": kernel, "bias": RNG.normal(size=dim).astype(np.float32)}
    names = tuple("abcdefg"[:classes]) if classes else None
    return LoadedViT(
        *(model, variables, HOW.mean, HOW.std, "a run", HOW), classes=names, projection=projection
    )


def as_folder(loaded, folder):
    export_vit(loaded, folder)
    return folder


def answers(loaded):
    infer, variables = make_infer(loaded)
    return jax.device_get(infer(variables, PIXELS))


@pytest.mark.parametrize(
    "loaded",
    [trained(), trained(MAP(), classes=0, dim=5), trained(cls_pool)],
    ids=["ggem-head", "map-projection", "cls-head"],
)
def test_stablehlo_answers_in_a_process_without_our_code(loaded, tmp_path, capsys):
    out = tmp_path / "out"
    export.main([str(as_folder(loaded, tmp_path / "run")), str(out), "--to", "stablehlo"])
    assert f"written to {out}/model.stablehlo and {out}/model.json" in capsys.readouterr().out
    np.save(tmp_path / "pixels.npy", PIXELS)
    arguments = [out, tmp_path / "pixels.npy", tmp_path / "outputs.npz"]
    command = [sys.executable, "-I", "-c", ALONE, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    want = answers(loaded)
    with np.load(tmp_path / "outputs.npz") as found:
        assert set(found.files) == set(want)
        for name in want:
            np.testing.assert_allclose(found[name], want[name], atol=1e-5)


def test_the_facts_beside_the_function_are_complete(tmp_path):
    out = tmp_path / "out"
    export.main([str(as_folder(trained(), tmp_path / "run")), str(out), "--to", "stablehlo"])
    facts = json.loads((out / "model.json").read_text())
    assert facts["input"] == {"shape": ["batch", 8, 8, 3], "dtype": "uint8"}
    assert facts["outputs"] == {
        "descriptor": {"shape": ["batch", 16], "dtype": "float32"},
        "probability": {"shape": ["batch", 3], "dtype": "float32"},
    }
    assert facts["classes"] == ["a", "b", "c"]
    assert facts["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    preprocessing = facts["preprocessing"]
    assert preprocessing["resize_shorter_side_to"] == 10
    assert (preprocessing["mean"], preprocessing["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (preprocessing["interpolation"], preprocessing["normalised"]) == ("bicubic", "inside")


@pytest.mark.parametrize("dim", [0, 5])
def test_safetensors_keep_everything(dim, tmp_path):
    loaded = trained(classes=0 if dim else 3, dim=dim)
    run, out = as_folder(loaded, tmp_path / "run"), tmp_path / "out"
    export.main([str(run), str(out), "--to", "safetensors"])
    again = load_vit(out)
    assert (again.preprocessing, again.classes) == (loaded.preprocessing, loaded.classes)
    assert again.model == loaded.model
    jax.tree.map(np.testing.assert_array_equal, answers(again), answers(loaded))


def test_timm_gets_the_projection_as_its_head_and_the_classes(tmp_path, capsys):
    run = as_folder(trained(avg_pool), tmp_path / "run")
    export.main([str(run), str(tmp_path / "out"), "--to", "timm"])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["label_names"] == ["a", "b", "c"]
    assert (settings["pretrained_cfg"]["crop_mode"], settings["global_pool"]) == ("center", "avg")
    assert settings["pretrained_cfg"]["crop_pct"] == 0.8
    embedder = trained(cls_pool, classes=0, dim=5)
    export.main([str(as_folder(embedder, tmp_path / "e")), str(tmp_path / "o"), "--to", "timm"])
    assert "note: the head is the projection: divide its output by its length" in (
        capsys.readouterr().out
    )
    again = load_vit(tmp_path / "o")
    images = (PIXELS / np.float32(255) - np.array(HOW.mean)) / np.array(HOW.std)
    logits = again.model.apply(again.variables, images.astype(np.float32)).logits
    unit = logits / np.linalg.norm(logits, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, answers(embedder)["descriptor"], atol=1e-5)


def test_timm_resizes_to_the_same_sides():
    """It divides the side by the share and rounds down; at 1.15 that is 257.6, and 258 here."""
    for side in (8, 224, 256, 384):
        for zoom in np.linspace(1, 2, 101):
            how = dataclasses.replace(HOW, side=side, zoom=float(zoom))
            settings = {"pretrained_cfg": {}}
            add_timm_facts(settings, dataclasses.replace(trained(cls_pool), preprocessing=how))
            assert int(side / settings["pretrained_cfg"]["crop_pct"]) == how.size(side, side)[0]


# network, pooling, outputs of the head, or of the projection
OF_TIMM = {
    "average": (SMALL, avg_pool, 3, 0),
    "class token, projection": (SMALL, cls_pool, 0, 5),
    "attention, projection": (dataclasses.replace(SMALL, class_token=False), MAP(), 0, 5),
    "sines": (dataclasses.replace(SMALL, class_token=False, position="sincos"), avg_pool, 3, 0),
    "registers, SwiGLU": (
        *(dataclasses.replace(SMALL, registers=2, layer_scale=0.1, mlp="swiglu"), avg_pool, 3, 0),
    ),
    "rotations": (
        dataclasses.replace(
            SMALL,
            position="rope",
            registers=2,
            layer_scale=0.1,
            norm_eps=1e-5,
            rope_dtype="float32",
        ),
        *(cls_pool, 3, 0),
    ),
}


@pytest.mark.filterwarnings("ignore")  # of timm and PyTorch
@pytest.mark.parametrize("name", OF_TIMM)
def test_timm_answers_as_the_run_does(name, tmp_path):
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    config, pooling, classes, dim = OF_TIMM[name]
    loaded = trained(pooling, classes=classes, dim=dim, config=config)
    run = as_folder(loaded, tmp_path / "run")
    export.main([str(run), str(tmp_path / "out"), "--to", "timm"])
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    images = [RNG.integers(0, 256, (height, width, 3), np.uint8) for height, width in SIDES]
    with torch.no_grad():
        inputs = torch.stack([transform(Image.fromarray(image)) for image in images])
        outputs = network(inputs).numpy()
    infer, variables = make_infer(loaded)
    want = jax.device_get(infer(variables, np.stack([HOW.square(image) for image in images])))
    if dim:
        unit = outputs / np.linalg.norm(outputs, axis=1, keepdims=True)
        np.testing.assert_allclose(unit, want["descriptor"], atol=1e-5)
    else:
        np.testing.assert_allclose(jax.nn.softmax(outputs), want["probability"], atol=1e-5)


def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path, capsys):
    run = as_folder(trained(), tmp_path / "run")
    out = tmp_path / "out"
    said = one_line(capsys, export.main, run, out, "--to", "timm")
    assert "timm has no pooling with learned exponents" in said
    (tmp_path / "there").mkdir()
    said = one_line(capsys, export.main, run, tmp_path / "there", "--to", "safetensors")
    assert "exists already: choose another folder" in said
    said = one_line(capsys, export.main, tmp_path / "there", out, "--to", "safetensors")
    assert "not the folder of a training run" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    run = as_folder(trained(), tmp_path / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ggem_jax.weights.stablehlo.write_text", full)
    said = one_line(capsys, export.main, run, tmp_path / "out", "--to", "stablehlo")
    assert said.endswith("out cannot be written: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_another_process_makes_meanwhile_is_left_alone(tmp_path, monkeypatch, capsys):
    run, out = as_folder(trained(), tmp_path / "run"), tmp_path / "out"

    def write(loaded, folder):
        out.mkdir()
        return ()

    monkeypatch.setattr(export, "write_stablehlo", write)
    said = one_line(capsys, export.main, run, out, "--to", "stablehlo")
    assert f"{out} was made by another process meanwhile" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert list(out.iterdir()) == []


KILLS = """
import json, sys
sys.path.insert(0, "tests")
from interruptions import before_writes, killed
from train import export
run, out = sys.argv[1:]
def fork(path, number):
    def work(dying):
        with before_writes(dying):
            export.main([run, path, "--to", "safetensors"])
    return killed(work, number)
found, dead = [], True
while dead:
    dead = fork(f"{out}/{len(found)}", len(found))
    found.append(dead)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_kills(tmp_path):
    """A kill before each call that changes files: there is no folder, or a complete one."""
    run, out = as_folder(trained(), tmp_path / "run"), tmp_path / "many"
    out.mkdir()
    command = [sys.executable, "-c", KILLS, str(run), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    dead = json.loads(done.stdout.splitlines()[-1])
    complete = [(out / str(number)).exists() for number in range(len(dead))]
    assert len(dead) > 5
    assert complete == sorted(complete)  # only kills after the last rename leave a folder
    assert (dead[-1], complete[0], complete[-1]) == (False, False, True)
    for number in np.flatnonzero(complete):
        assert load_vit(out / str(number)).classes == ("a", "b", "c")
    hidden = [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert all(name.endswith(".part") for name in hidden)


def test_timm_is_told_that_an_image_may_have_several_classes(tmp_path):
    several = dataclasses.replace(trained(cls_pool), several_labels=True)
    (note,) = export_vit(several, tmp_path / "several", to="timm").notes
    assert "the sigmoid of the outputs, not the softmax" in note
    assert not export_vit(several, tmp_path / "headless", to="timm", head=False).notes
    assert not export_vit(trained(cls_pool), tmp_path / "one", to="timm").notes
