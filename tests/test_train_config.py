"""train/cli.py and config.py: configs and files of settings, and what goes over what."""

import pytest

from ggem_jax.models.vit import vit_config
from train.cli import Refused, configs_of, from_dict, known_configs, load_config, to_dict
from train.config import Config


def test_broken_config_files_are_refused(tmp_path):
    for name, text, sentence in (
        ("a.toml", "batch = ", "is not TOML"),
        ("a.json", "{", "is not JSON"),
        ("d.json", "[1]", "is not JSON: settings by name are needed, not a list"),
        (
            "b.toml",
            "[model]\nwidht = 3",
            "in the config file .*b.toml: Unrecognized options: --model.widht",
        ),
        ("c.toml", 'variant = "XXL/4"', "variant must be one of"),
        ("e.toml", "variant = [3]", "variant must be one of"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(Refused, match=sentence):
            load_config(Config, ["--config-file", str(tmp_path / name)], "test")


def test_defaults_then_config_then_file_then_variant_then_flags(tmp_path):
    lines = (
        'variant = "S/2"',
        "batch = 96",
        "[optimizer]",
        "clip = 2.0",
        "[augment]",
        "flip = true",
        "[data]",
        "mean = [0.1, 0.2, 0.3]",
    )
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    config = load_config(
        Config,
        [
            "--config",
            "digits",
            "--config-file",
            str(tmp_path / "mine.toml"),
            "--batch",
            "32",
            "--model.depth",
            "5",
        ],
        "test",
    )
    assert (config.model.width, config.model.depth, config.model.image) == (384, 5, 8)
    assert (config.batch, config.optimizer.clip, config.optimizer.lr, config.augment.flip) == (
        32,
        2.0,
        3e-3,
        True,
    )
    assert config.data.mean == (0.1, 0.2, 0.3)
    other = load_config(
        Config,
        [
            "--config-file",
            str(tmp_path / "mine.toml"),
            "--variant",
            "B/16",
            "--augment.no-flip",
            "--optimizer.clip",
            "None",
        ],
        "test",
    )
    assert (other.model, other.augment.flip, other.optimizer.clip) == (
        vit_config("B/16"),
        False,
        None,
    )
    assert from_dict(Config, to_dict(other)) == other


def test_layers_only_have_to_fit_together(tmp_path):
    config = load_config(
        Config, ["--config", "digits", "--variant", "S/16", "--model.image", "224"], "test"
    )
    assert (config.model, config.data.source) == (vit_config("S/16"), "digits")
    (tmp_path / "mine.toml").write_text("[model]\nimage = 30\n")
    assert (
        load_config(
            Config, ["--config-file", str(tmp_path / "mine.toml"), "--model.patch", "5"], "test"
        ).model.image
        == 30
    )
    with pytest.raises(
        Refused, match="image must be a multiple of patch, not 8 with patches of 16"
    ) as caught:
        load_config(Config, ["--config", "digits", "--variant", "S/16"], "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", known_configs(Config))
def test_every_config_loads_and_says_its_command_and_what_to_expect(name):
    config = load_config(Config, ["--config", name], "test")
    assert isinstance(config, Config)
    header = (configs_of(Config) / f"{name}.toml").read_text()
    assert f"python -m train.classify --config {name}" in header
    assert "Expect" in header


def test_without_any_choice_of_data_the_config_is_digits():
    assert load_config(Config, [], "test") == load_config(Config, ["--config", "digits"], "test")
    assert load_config(Config, ["--variant", "Ti/4"], "test").data.source == "digits"
    for flags in (["--data", "folder:x"], ["--data=folder:x"], ["--data.source", "folder:x"]):
        assert load_config(Config, flags, "test").model == vit_config("Ti/16")


def test_precision_is_a_short_name_of_the_dtype_of_the_computation():
    assert load_config(Config, ["--precision", "bf16"], "test").model.dtype == "bfloat16"
    assert load_config(Config, ["--precision=fp32"], "test").model.param_dtype == "float32"
    with pytest.raises(Refused, match="--precision must be fp32 or bf16, not fp16"):
        load_config(Config, ["--precision", "fp16"], "test")


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(Refused, match=r"soap.*'adamw', 'lion', 'muon', 'sgd'") as caught:
        load_config(Config, ["--optimizer.name", "soap"], "test")
    assert "\n" not in str(caught.value)
