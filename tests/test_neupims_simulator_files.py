"""The public simulator's own configuration files as machines; the tests write such files."""

import json

import pytest

from neupims import Hardware, load_hardware
from neupims.__main__ import main
from neupims.machine.config import read_machine

CORE = {
    "num_cores": 1, "core_type": "systolic_ws", "core_freq": 1000, "core_width": 128,
    "core_height": 128, "sram_size": 134218, "vector_core_count": 8, "vector_core_width": 128,
    "systolic_array_count": 8, "exp_latency": 1, "icnt_type": "simple", "icnt_freq": 2000,
    "precision": 2,
}  # fmt: skip
MEMORY = {
    "dram_type": "neupims", "dram_freq": 1000, "pim_config_path": "../extern/sim/dual.ini",
    "dram_channels": 32, "dram_req_size": 64, "dram_page_size": 1024, "dram_banks_per_ch": 32,
    "pim_comp_coverage": 16,
}  # fmt: skip
INI = {
    "dram_structure": {
        "protocol": "HBM", "bankgroups": 4, "banks_per_group": 4, "rows": 32768, "columns": 64,
        "device_width": 128, "BL": 4, "pim_type": "DUAL",
    },
    "timing": {
        "tCK": 1, "CL": 14, "CWL": 4, "tRCDRD": 14, "tRCDWR": 14, "tRP": 14, "tRAS": 34,
        "tRFC": 260, "tREFI": 3900, "tRRD_S": 4, "tRRD_L": 6, "tFAW": 30, "tWR": 16, "tCCD_S": 1,
        "tCCD_L": 2, "tWTR_S": 6, "tWTR_L": 8, "tRTP_S": 4, "tRTP_L": 6,
    },
    "power": {"VDD": 1.2, "IDD0": 65},
    "system": {"channel_size": 1024, "channels": 32, "bus_width": 128},
}  # fmt: skip


def write_ini(path, changes=()):
    """Writes the DRAM file with changes by name; None removes a field."""
    changes = dict(changes)
    lines = []
    for section, items in INI.items():
        lines.append(f"[{section}]")
        for name, value in items.items():
            value = changes.pop(name, value)
            if value is not None:
                lines.append(f"{name} = {value}")
    lines += [f"{name} = {value}" for name, value in changes.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def simulator(tmp_path):
    """A folder as that of the simulator; returns its core, memory and DRAM file."""
    return (
        write_json(tmp_path / "configs" / "core.json", CORE),
        write_json(tmp_path / "configs" / "memory" / "neupims.json", MEMORY),
        write_ini(tmp_path / "extern" / "sim" / "dual.ini"),
    )


def test_each_file_of_the_default_machine_gives_the_default(simulator):
    for file in simulator:
        assert load_hardware(file) == Hardware(), file
    assert "hbm.trp_cycles" in read_machine(simulator[1]).given  # of the ini that it names


def test_a_machine_joins_files_and_changes_them(simulator, tmp_path):
    write_json(simulator[0], CORE | {"core_width": 64, "core_freq": 1400})
    write_json(simulator[1], MEMORY | {"dram_channels": 16, "dram_freq": 2000})
    write_ini(simulator[2], {"tFAW": 16, "channels": 16, "channel_size": 512, "rows": 32768})
    write_json(simulator[1], MEMORY | {"dram_channels": 16, "dram_banks_per_ch": 16})
    (tmp_path / "mine.toml").write_text(
        'simulator = ["configs/core.json", "configs/memory/neupims.json"]\n'
        '[hbm]\ntrp_cycles = "20 ns"\n'
    )
    machine, given = read_machine(tmp_path / "mine.toml")
    assert (machine.npu.array_width, machine.npu.clock_hz) == (64, 1.4e9)
    assert (machine.hbm.num_channels, machine.hbm.ranks, machine.hbm.tfaw_cycles) == (16, 1, 16)
    assert machine.hbm.trp_cycles == 20
    assert given["hbm.trp_cycles"].by.endswith("mine.toml")
    assert given["hbm.tfaw_cycles"].by.endswith("dual.ini")


def test_the_layout_of_the_memory_is_computed_as_in_the_simulator(tmp_path):
    """8 groups of 4 banks of 32768 rows of 1 KiB are 1024 MiB: one rank of a channel of that size.
    A rank of four devices of 16 bits has rows of four times 64 x 16 bits.
    """
    hbm = load_hardware(write_ini(tmp_path / "a.ini", {"bankgroups": 8})).hbm
    assert (hbm.ranks, hbm.bank_groups, hbm.row_bytes) == (1, 8, 1024)
    hbm = load_hardware(
        write_ini(tmp_path / "b.ini", {"device_width": 16, "bus_width": 64, "columns": 1024})
    ).hbm
    assert (hbm.row_bytes, hbm.bus_bits) == (8192, 64)
    assert load_hardware(write_ini(tmp_path / "c.ini", {"tCK": 0.5})).hbm.clock_hz == 2e9
    assert load_hardware(write_ini(tmp_path / "d.ini", {"pim_type": "SINGLE"})).pim.row_buffers == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tXYZ": 3}, "dual.ini: tXYZ is no field of the simulator that we know"),
        ({"tWTR_S": 4}, "dual.ini: tWTR_S = 4 is not modelled, only 6"),
        ({"protocol": "GDDR6"}, "dual.ini: protocol = GDDR6 is not modelled, only HBM or HBM2"),
        ({"pim_type": "TRIPLE"}, "dual.ini: pim_type = TRIPLE is not modelled"),
        ({"tRP": None}, "dual.ini is no DRAM file of the public simulator: it lacks tRP"),
        ({"tRP": "fast"}, "dual.ini: tRP must be a number, not 'fast'"),
        ({"tRP": 0.5}, r"dual.ini: hbm.trp_cycles must be 0 or from 1"),
        ({"bankgroups": 2, "channel_size": 1024}, None),
    ],
)
def test_what_is_wrong_with_a_dram_file_is_one_sentence(simulator, changes, sentence):
    write_ini(simulator[2], changes)
    if sentence is None:
        assert load_hardware(simulator[2]).hbm.ranks == 4
        return
    with pytest.raises(ValueError, match=sentence) as caught:
        load_hardware(simulator[2])
    assert "\n" not in str(caught.value)


def test_files_that_contradict_each_other_are_refused(simulator, tmp_path):
    write_ini(simulator[2], {"channels": 16})
    with pytest.raises(ValueError, match=r"contradict each other: hbm.num_channels"):
        load_hardware(simulator[1])
    write_ini(simulator[2])
    write_json(simulator[1], MEMORY | {"dram_banks_per_ch": 16})
    with pytest.raises(ValueError, match=r"dram_banks_per_ch = 16 contradicts .*, which gives 32"):
        load_hardware(simulator[1])
    write_json(simulator[1], MEMORY | {"dram_type": "newton"})
    with pytest.raises(ValueError, match=r"contradict each other: pim.row_buffers"):
        load_hardware(simulator[1])
    simulator[2].unlink()
    with pytest.raises(ValueError, match=r"names the DRAM file .*dual.ini, which is not there"):
        load_hardware(simulator[1])


@pytest.mark.parametrize("text", ["[a\nb", "= 3", "\x00", ""])
def test_a_broken_ini_is_one_sentence(tmp_path, text):
    (tmp_path / "x.ini").write_text(text)
    with pytest.raises(ValueError, match=r"x.ini is no") as caught:
        load_hardware(tmp_path / "x.ini")
    assert "\n" not in str(caught.value)


def test_simulator_must_be_a_list_of_its_files(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('simulator = "core.json"\n')
    with pytest.raises(ValueError, match=r"mine.toml: simulator must be a list of files"):
        load_hardware(file)
    file.write_text('simulator = ["other.json"]\n')
    write_json(tmp_path / "other.json", {"npu": {}})
    with pytest.raises(ValueError, match=r"other.json is no core or memory file"):
        load_hardware(file)


def test_the_tool_reads_them(simulator, capsys):
    assert main(["show", "hardware", "--hardware", str(simulator[1]), "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["fields"]}
    assert found["hbm.tfaw_cycles"]["given_by"].endswith("dual.ini")
    assert found["npu.clock_hz"]["given_by"] is None
