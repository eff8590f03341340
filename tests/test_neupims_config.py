"""Named configurations and the user's own files: they load, errors say what is wrong, and every
value of ours has its source.
"""

import json
import re
from importlib import resources

import pytest

from neupims.machine import config
from neupims.machine.config import (
    about,
    changes,
    load_hardware,
    load_model,
    load_parallel,
    names,
    read_model,
)
from neupims.machine.hardware import Hardware, memory_bytes, peak_bytes_per_cycle
from neupims.machine.model_size import layer_weight_bytes
from neupims.machine.quantity import describe
from neupims.machine.record import replace
from neupims.machine.workload import Decoder, Parallel, check_parallel, weight_bytes


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", names("hardware"))
def test_named_machines_load(name):
    assert isinstance(load_hardware(name), Hardware)
    assert about("hardware", name)


def test_the_papers_machine_is_the_default():
    assert load_hardware("neupims") == Hardware()
    assert changes("neupims") == {}
    assert load_hardware("NPU-PIM").pim.row_buffers == 1
    assert changes("npu-pim") == {"pim.row_buffers": 1}


def test_hbm3_has_its_published_bandwidth_and_capacity():
    """Two stacks of 1024 pins at 5.2 Gb/s are 1331 GB/s; 2 x 8 dies of 16 Gb are 32 GiB. Row cycle
    and refresh in ns stay near HBM2's.
    """
    hbm = load_hardware("hbm3").hbm
    assert peak_bytes_per_cycle(hbm) * hbm.clock_hz == pytest.approx(2 * 1024 * 5.2e9 / 8)
    assert memory_bytes(hbm) == 32 * 2**30
    assert (hbm.tras_cycles + hbm.trp_cycles) / hbm.clock_hz == pytest.approx(48e-9, rel=0.05)
    assert hbm.trefi_cycles / hbm.clock_hz == pytest.approx(3.9e-6)


@pytest.mark.parametrize("name", names("models"))
def test_named_models_are_spread_so_that_they_fit(name):
    model, parallel = load_model(name), load_parallel(name)
    check_parallel(model, parallel)
    assert model.layers % parallel.pp == 0
    assert weight_bytes(model) / parallel.tp / parallel.pp < memory_bytes(Hardware().hbm)
    assert about("models", name)


# Layers, width, heads, key and value heads, hidden channels and matrices of the MLP, as published
# (the files name the papers); tp, pp.
PUBLISHED = {
    "gpt3-7b": (32, 4096, 32, 32, 16384, 2, 4, 1),
    "gpt3-13b": (40, 5120, 40, 40, 20480, 2, 4, 1),
    "gpt3-30b": (48, 7168, 56, 56, 28672, 2, 4, 2),
    "gpt3-175b": (96, 12288, 96, 96, 49152, 2, 8, 4),
    "llama2-7b": (32, 4096, 32, 32, 11008, 3, 4, 1),
    "llama2-13b": (40, 5120, 40, 40, 13824, 3, 4, 1),
    "llama2-70b": (80, 8192, 64, 8, 28672, 3, 8, 1),
    "llama3-8b": (32, 4096, 32, 8, 14336, 3, 4, 1),
    "llama3-70b": (80, 8192, 64, 8, 28672, 3, 8, 1),
    "llama3-405b": (126, 16384, 128, 8, 53248, 3, 8, 6),
}


def test_named_models_are_the_published_ones():
    """Billions of parameters in the blocks: published sizes less embeddings."""
    assert set(PUBLISHED) <= set(names("models"))
    for name, (*numbers, tp, pp) in PUBLISHED.items():
        model = load_model(name)
        assert replace(model, "vocabulary", 0) == Decoder(*numbers)
        assert load_parallel(name) == Parallel(tp, pp)
    for name, billions in (
        ("gpt3-175b", 174),
        ("llama3-8b", 7.0),
        ("llama3-405b", 401),
        ("mistral-7b", 7.0),
        ("qwen2.5-7b", 6.5),
        ("qwen2.5-72b", 70),
    ):
        assert layer_weight_bytes(load_model(name)) / 2e9 == pytest.approx(billions, rel=0.015), (
            name
        )


@pytest.mark.parametrize("kind", ["hardware", "models"])
def test_every_value_that_ships_has_its_source(kind):
    """A comment on its line, or, in a model's file, `source`."""
    for name in names(kind):
        text = (resources.files("neupims") / "configs" / kind / f"{name}.toml").read_text()
        if kind == "models":
            source = read_model(name).source
            assert re.search(r"arXiv:\d{4}\.\d{5}|huggingface.co/\S+, config.json", source), name
            assert "#" in text, name  # where tp and pp come from
        else:
            for line in text.splitlines():
                assert not re.match(r"\w+ = [\d.]", line) or "#" in line, line


def test_own_files(tmp_path):
    toml = write(
        tmp_path / "mine.toml",
        'about = "mine"\n[hbm]\nnum_channels = 16\n[npu]\nclock_hz = 9.0e8\n',
    )
    as_json = write(
        tmp_path / "mine.json", json.dumps({"hbm": {"num_channels": 16}, "npu": {"clock_hz": 9e8}})
    )
    assert load_hardware(toml) == load_hardware(str(as_json))
    assert load_hardware(toml).hbm.num_channels == 16
    own = write(
        tmp_path / "own.toml", "layers = 2\nwidth = 64\nheads = 4\nkv_heads = 2\nmlp_width = 128\n"
    )
    assert load_model(own).mlp_matrices == 2
    assert (load_parallel(own).tp, load_parallel(own).pp) == (1, 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[hbm]\nbanks_per_group = 0\n",
            r"mine.toml: hbm.banks_per_group must be a whole number of banks from 1 to 256, not 0",
        ),
        (
            "[hbm]\ntrp_cycles = -3\n",
            r"mine.toml: hbm.trp_cycles must be 0 or from 1 to 1e5 memory cycles, not -3",
        ),
        (
            "[hbm]\ntrp_cycles = nan\n",
            r"mine.toml: hbm.trp_cycles must be 0 or from 1 to 1e5 memory cycles, not nan",
        ),
        (
            "[hbm]\nranks = inf\n",
            r"mine.toml: hbm.ranks must be a whole number of ranks from 1 to 256, not inf",
        ),
        (
            "[hbm]\ntfaw_cycles = 2e30\n",
            r"mine.toml: hbm.tfaw_cycles must be 0 or from 1 to 1e5 memory cycles, not 2e30",
        ),
        (
            "[hbm]\nranks = 1.5\n",
            r"mine.toml: hbm.ranks must be a whole number of ranks from 1 to 256, not 1.5",
        ),
        (
            '[hbm]\nranks = "two"\n',
            r"mine.toml: hbm.ranks must be a number of ranks, or text .*, not 'two'",
        ),
        (
            "[hbm]\nranks = true\n",
            r"mine.toml: hbm.ranks must be a number or text with a unit, not True",
        ),
        (
            "[hbm]\nranks = [1, 2]\n",
            r"mine.toml: hbm.ranks must be a number or text with a unit, not \[1, 2\]",
        ),
        (
            "[hbm]\nchanels = 2\n",
            r"mine.toml: there is no field hbm.chanels \(did you mean hbm.num_channels\?\)",
        ),
        (
            "[dram]\nranks = 2\n",
            r"mine.toml: there is no field dram.ranks \(the groups are npu, hbm, pim, link, gpu,",
        ),
        ("hbm = 3\n", r"mine.toml: hbm must be a table of fields"),
        (
            "[hbm.ranks]\nx = 1\n",
            r"mine.toml: hbm.ranks must be a number or text with a unit, not {'x': 1}",
        ),
        ("hbm {", r"mine.toml is not TOML"),
    ],
)
def test_what_is_wrong_with_a_machine_is_one_sentence(tmp_path, text, sentence):
    file = write(tmp_path / "mine.toml", text)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_hardware(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"layers": 0}, r"own.json: layers must be a whole number of at least 1, not 0"),
        ({"heads": 5}, r"own.json: heads must divide the width, 64, but is 5"),
        ({"kv_heads": 3}, r"own.json: kv_heads must divide the heads, 4, but is 3"),
        ({"hidden_size": 3}, r"no field 'hidden_size'; did you mean width\? .* its model_type"),
        ({"depth": 3}, r"own.json: there is no field 'depth'; there are layers, width"),
        ({"layers": "two"}, r"own.json: layers must be a number, not 'two'"),
        ({"layers": True}, r"own.json: layers must be a number, not True"),
        ({"layers": None}, r"own.json: layers must be a number, not None"),
    ],
)
def test_what_is_wrong_with_a_model_is_one_sentence(tmp_path, values, sentence):
    model = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "mlp_width": 128} | values
    with pytest.raises(ValueError, match=sentence):
        load_model(write(tmp_path / "own.json", json.dumps(model)))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(
        ValueError,
        match=(
            r"there is no machine 'tpu'; there are a100, a100-80, gddr6-aim, .*, neupims, npu-pim,"
            r" or give a file"
        ),
    ):
        load_hardware("tpu")
    with pytest.raises(
        ValueError,
        match=r"there is no model 'mpt'; there are deepseek-v2, .*, gpt3-7b, gpt3-13b, ",
    ):
        load_model("mpt")
    with pytest.raises(ValueError, match=r"'llama-3-8b'; did you mean llama3-8b, "):
        load_model("llama-3-8b")
    with pytest.raises(
        ValueError, match=r"own.toml: width, heads, kv_heads, mlp_width must be given"
    ):
        load_model(write(tmp_path / "own.toml", "layers = 2\n"))
    with pytest.raises(ValueError, match=r"own.json must hold fields by name, not 3"):
        load_model(write(tmp_path / "own.json", "3"))
    with pytest.raises(ValueError, match=r"own.json is not JSON"):
        load_model(write(tmp_path / "own.json", "{"))
    with pytest.raises(
        ValueError, match=r"own.toml: tp must be a whole number of at least 1, not 0"
    ):
        load_parallel(write(tmp_path / "own.toml", "tp = 0\n"))
    (tmp_path / "picture.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"picture.toml is not a text file"):
        load_hardware(tmp_path / "picture.toml")
    with pytest.raises(FileNotFoundError):
        load_hardware(tmp_path / "none.toml")


def test_a_machine_begins_from_its_base(tmp_path):
    """A field is the file's own, else that of its base; times are converted with the last clock."""
    base = '[hbm]\nnum_channels = 16\ntrp_cycles = "14 ns"\n[energy]\nmac = 2\n'
    base += 'memory = "hbm2"\ninterface_bit = 9\n'
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "base.toml", base)
    head = 'about = "faster"\nbase = "parts/base.toml"\n'
    file = write(tmp_path / "mine.toml", f'{head}[hbm]\nclock_hz = "2 GHz"\nranks = 1\n')
    machine = load_hardware(file)
    assert machine.hbm.num_channels == 16
    assert machine.hbm.ranks == 1
    assert machine.hbm.trp_cycles == 28
    assert (machine.energy.mac, machine.energy.interface_bit) == (2, 9)
    given = config.read_machine(file).given
    assert given["hbm.ranks"].by == str(file)
    assert given["hbm.trp_cycles"].by == str(tmp_path / "parts/base.toml")
    assert config.cost_sources(file)["energy.mac"] == f"given: {tmp_path / 'parts/base.toml'}"

    other = write(tmp_path / "other.toml", f'{head}[energy]\nmemory = "hbm3"\n')
    energies = config.load_memory("hbm3").values  # the file's memory, not the base's energies
    assert load_hardware(other).energy.interface_bit == energies["interface_bit"]
    assert load_hardware(other).energy.mac == 2
    assert load_hardware(write(tmp_path / "named.toml", 'base = "hbm3"\n')) == load_hardware("hbm3")


def test_what_is_wrong_with_a_base_is_one_sentence(tmp_path):
    write(tmp_path / "second.toml", 'base = "third.toml"\n')
    for text, sentence in (
        ('base = "second.toml"\n', "second.toml: base must be a machine without a base of its own"),
        ("base = 3\n", "mine.toml: base must be a machine without a base of its own, not 3"),
        ('base = "hmb3"\n', "there is no machine 'hmb3'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_hardware(write(tmp_path / "mine.toml", text))
    with pytest.raises(FileNotFoundError):
        load_hardware(write(tmp_path / "mine.toml", 'base = "none.toml"\n'))


def test_every_field_is_described():
    described = {each.name: each for each in describe(Hardware())}
    assert described["hbm.num_channels"].value == 32
    assert described["hbm.num_channels"].whole
    for each in described.values():
        assert each.unit, each.name
        assert each.source, each.name


def test_named_files_stay_inside_their_folder():
    with pytest.raises(ValueError, match="there is no machine"):
        config.load_hardware("../models/gpt3-7b")
