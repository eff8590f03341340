"""`show`: complete, one JSON object, true to the records."""

import argparse
import json

import pytest

from neupims import catalogue
from neupims.commands import show
from neupims.files import finite
from neupims.machine import config
from neupims.machine.costs import AreaCosts, EnergyCosts
from neupims.machine.hardware import Hardware
from neupims.machine.quantity import describe
from neupims.machine.units import compact


def shown(capsys, *words):
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    assert show.run(parser.parse_args(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("what", list(show.SUBJECTS))
def test_both_forms(capsys, what):
    assert isinstance(json.loads(shown(capsys, what, "--json")), dict)
    text = shown(capsys, what)
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("words", "record"),
    [
        (["hardware", "--hardware", "npu-pim"], lambda: catalogue.list_hardware("npu-pim")),
        (["models"], catalogue.list_models),
        (["systems"], catalogue.list_systems),
        (["constants"], catalogue.list_constants),
        (["memories"], catalogue.list_memories),
        (
            ["constants", "--hardware", "hbm3", "--set", "area.mac=0.01"],
            lambda: catalogue.list_constants("hbm3", {"area.mac": 0.01}),
        ),
        (["knobs"], catalogue.list_knobs),
    ],
)
def test_json_is_the_record_of_the_library(capsys, words, record):
    found = finite(record().to_dict())
    assert json.loads(json.dumps(found)) == json.loads(shown(capsys, *words, "--json"))


def test_hardware_lists_every_field(capsys):
    found = json.loads(shown(capsys, "hardware", "--json"))
    assert {each["name"] for each in found["fields"]} == {
        each.name for each in describe(Hardware())
    }
    assert all(each["unit"] and each["source"] for each in found["fields"])
    assert {each["name"] for each in found["configurations"]} == set(config.names("hardware"))
    text = " ".join(shown(capsys, "hardware", "--all").split())
    for field in describe(Hardware()):
        assert field.name in text
    assert all(f" {name} " in text for name in config.names("hardware"))
    assert shown(capsys, "hardware", "--all", "--json") == shown(capsys, "hardware", "--json")


def test_hardware_begins_with_one_screen(capsys, tmp_path):
    """Totals, what the file gives, and all values by group; the rest is behind --all."""
    text = shown(capsys, "hardware")
    assert len(text.splitlines()) < 50
    assert max(len(line) for line in text.splitlines()) <= 80
    places = [text.index(words) for words in ("hbm.bytes_per_second", "all values", "Named machi")]
    assert places == sorted(places)
    flat = " ".join(text.split())
    for field in describe(Hardware()):
        group, _, name = field.name.partition(".")
        assert (f"{name}={compact(field.value)}" in flat) == (group not in ("energy", "area"))
    assert "or --set gives" not in text
    file = tmp_path / "mine.toml"
    file.write_text('[hbm]\nclock_hz = "2 GHz"\ntrp_cycles = "14 ns"\n')
    text = shown(capsys, "hardware", "--hardware", str(file), "--set", "npu.num_arrays=4")
    flat = " ".join(text.split())
    assert "hbm.trp_cycles 28 memory cycles, 14 ns. mine.toml: 14 ns (default: 14)" in flat
    assert "npu.num_arrays 4 arrays. --set: 4 (default: 8)" in flat
    assert "npu.peak_flops_per_second 131.1 TFLOP/s" in flat


def test_a_machine_without_a_name_is_refused():
    with pytest.raises(ValueError, match="there is no machine ''"):
        shown(None, "hardware", "--hardware", "")


def test_a_name_is_not_read_as_markup(capsys, tmp_path):
    file = tmp_path / "[red]x.toml"
    file.write_text("[npu]\nnum_arrays = 4\n")
    assert "[red]x.toml" in "".join(shown(capsys, "hardware", "--hardware", str(file)).split())


def test_all_is_refused_where_there_is_no_more():
    with pytest.raises(ValueError, match="--all is for hardware: leave it out for models"):
        shown(None, "models", "--all")


def test_another_machine_shows_its_values(capsys):
    found = {
        each["name"]: each
        for each in json.loads(shown(capsys, "hardware", "--hardware", "npu-pim", "--json"))[
            "fields"
        ]
    }
    assert (found["pim.row_buffers"]["value"], found["pim.row_buffers"]["default"]) == (1, 2)
    assert (
        json.loads(shown(capsys, "constants", "--hardware", "npu-pim", "--json"))["area_mm2"][
            "row_buffers"
        ]
        == 0
    )


@pytest.mark.parametrize("what", ["models", "memories", "systems", "knobs"])
def test_a_machine_is_refused_where_it_changes_nothing(what):
    for name in ("npu-pim", "neupims"):
        with pytest.raises(ValueError, match=f"--hardware is for hardware and constants: {what}"):
            shown(None, what, "--hardware", name)


def test_constants_have_a_confidence(capsys):
    found = json.loads(shown(capsys, "constants", "--json"))
    assert {each["confidence"] for each in found["constants"]} == {
        "fitted",
        "published",
        "derived",
        "assumed",
    }
    names = {each["name"] for each in found["constants"]}
    for group, costs in (("energy", EnergyCosts()), ("area", AreaCosts())):
        assert {name for name in names if name.startswith(f"{group}.")} == {
            f"{group}.{each.name}" for each in describe(costs)
        }
    assert found["command_picojoules"]["read"] == pytest.approx(804)
    assert found["idle_watts"]["memory"] == pytest.approx(64 * 0.066)


def test_a_change_is_refused_where_it_changes_nothing():
    with pytest.raises(
        ValueError, match="--set is for hardware and constants: leave it out for models"
    ):
        shown(None, "models", "--set", "energy.mac=1")


def test_no_number_of_a_model_is_cut_off(capsys):
    text = shown(capsys, "models")
    assert "…" not in text[: text.index("sources")]


def test_models_and_systems(capsys):
    found = {each["name"]: each for each in json.loads(shown(capsys, "models", "--json"))["models"]}
    assert (found["llama3-8b"]["kv_heads"], found["gpt3-30b"]["pp"]) == (8, 2)
    systems = json.loads(shown(capsys, "systems", "--json"))
    assert [each["name"] for each in systems["systems"]] == [
        "neupims",
        "npu-pim",
        "npu-only",
        "gpu",
    ]
    assert systems["systems"][0]["stages_by_sub_batches"] == {"2": "ABCDEF", "1": "ABE"}


def test_knobs_name_fields_that_exist(capsys):
    found = json.loads(shown(capsys, "knobs", "--json"))
    assert {each["name"] for each in found["knobs"]} <= {each.name for each in describe(Hardware())}
    assert not {each["simulator"] for each in found["knobs"]} & set(found["without_effect"])
