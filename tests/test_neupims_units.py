"""Units: text with a unit is read exactly, slips are refused with the likely unit, and every field
has a range that its slips fall outside of.
"""

import json
import math
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims import Hardware, load_hardware, replace
from neupims.catalogue import list_hardware
from neupims.commands.common import parse_change
from neupims.exploration.space import make_space, parse_knob
from neupims.machine.case import select_system
from neupims.machine.config import read_machine
from neupims.machine.costs import AreaCosts, EnergyCosts
from neupims.machine.hardware import GPU, HBM, NPU, PIM
from neupims.machine.quantity import describe
from neupims.machine.record import replace_all
from neupims.machine.totals import derive_totals
from neupims.machine.units import compact, read_quantity, units_of

FIELDS = [pytest.param(each, id=each.name) for each in describe(Hardware())]


def value_of(hardware, name):
    group, _, field = name.partition(".")
    return getattr(getattr(hardware, group), field)


def write(path, text):
    path.write_text(text)
    return path


def values_in_range(field):
    """A few values of a field: near both ends, and between."""
    most = min(field.most, 1e15)
    for share in (0.01, 0.3, 0.5, 0.99):
        value = max(field.least, 1e-12) ** (1 - share) * most**share
        yield math.ceil(value) if field.whole else float(f"{value:.7g}")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_written_with_its_unit_equals_the_plain_number(field, tmp_path):
    """By every unit of its kind: in Python, in a file and by --set."""
    page = {"hbm.row_bytes": 2**20} if field.name == "pim.page_bytes" else {}
    small = {"pim.page_bytes": 32} if field.name == "hbm.row_bytes" else {}
    base = replace_all(Hardware(), page | small)
    for value in values_in_range(field):
        plain = value_of(replace(base, field.name, value), field.name)
        for unit, factor in {field.unit: Fraction(1), **units_of(field.unit)}.items():
            number = Fraction(repr(value)) / factor
            if number.denominator % 3 and Fraction(repr(float(number))) == number:
                text = f"{float(number)!r} {unit}"
                found = value_of(replace(base, field.name, text), field.name)
                assert found == plain, text
    group, _, name = field.name.partition(".")
    text = f"{plain!r} {field.unit}"
    tables = {group: {name: text}} | {
        key.partition(".")[0]: {key.partition(".")[2]: size} for key, size in page.items()
    }
    for key, size in small.items():
        tables.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = size
    file = write(tmp_path / "mine.json", json.dumps(tables))
    assert value_of(load_hardware(file), field.name) == plain
    changes = dict([parse_change(f"{field.name}={text}")]) | page | small
    assert value_of(select_system(changes=changes)[2], field.name) == plain


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("npu.clock_hz", "1.4 GHz", 1.4e9),
        ("npu.clock_hz", "1400MHz", 1.4e9),
        ("npu.scratchpad_bytes", "24 GiB", 24 * 2**30),
        ("npu.scratchpad_bytes", "24 GB", 24e9),
        ("gpu.bytes_per_second", "820 GB/s", 820e9),
        ("gpu.bytes_per_second", "1.6 TiB/s", 1.6 * 2**40),
        ("gpu.bytes_per_second", "800 Gb/s", 100e9),
        ("gpu.flops_per_second", "312 TFLOP/s", 312e12),
        ("gpu.flops_per_second", "312 TFLOPS", 312e12),
        ("gpu.board_watts", "0.4 kW", 400),
        ("link.latency_seconds", "1.5 us", 1.5e-6),
        ("link.latency_seconds", "1.5 µs", 1.5e-6),
        ("hbm.row_bytes", "2 KiB", 2048),
        ("hbm.bus_bits", "16 B", 128),
        ("hbm.num_channels", "8 channels", 8),
        ("energy.read_bit", "3.9 pJ/bit", 3.9),
        ("energy.read_bit", "3.9 pJ", 3.9),
        ("energy.read_bit", "0.0039 nJ/b", 3.9),
        ("energy.read_bit", "31.2 pJ/byte", 3.9),
        ("energy.activate_kilobyte", "0.1 pJ/bit", 819.2),
        ("energy.scratchpad_byte", "0.25 pJ/bit", 2),
        ("energy.standby_gigabyte", "125 mW/GB", 0.125 * 1.073741824),
        ("energy.npu_idle_square_millimetre", "15 W/cm²", 0.15),
        ("area.mac", "671 um^2", 671e-6),
        ("area.scratchpad_megabyte", "0.1 um2/bit", 0.8),
        ("area.dram_gigabyte", "10 mm2/Gbit", 10 * 8 * 1.073741824),
        ("area.uncore_share", "45 %", 0.45),
    ],
)
def test_units_by_hand(name, text, value):
    assert value_of(replace(Hardware(), name, text), name) == value


def test_times_become_whole_cycles_of_the_clock_that_results(tmp_path):
    """14 ns are 36.4 cycles of 2.6 GHz and 14 of 1 GHz: delays are rounded up. 3.9 us, the longest
    time between refreshes, are 16,639.35 cycles of 4.2665 GHz: rounded down. In floats, 19 ns times
    3 GHz is more than 57.
    """
    text = '[hbm]\ntrp_cycles = "14 ns"\ntrefi_cycles = "3.9 us"\nclock_hz = "2.6 GHz"\n'
    file = write(tmp_path / "mine.toml", text)
    assert load_hardware(file).hbm.trp_cycles == 37
    assert load_hardware(file, {"hbm.clock_hz": 1e9}).hbm.trp_cycles == 14
    assert load_hardware(file, {"hbm.clock_hz": "4.2665 GHz"}).hbm.trefi_cycles == 16639
    assert load_hardware(file, {"hbm.trp_cycles": "30 ns"}).hbm.trp_cycles == 78
    assert 19e-9 * 3e9 > 57
    machine = replace_all(Hardware(), {"hbm.trp_cycles": "19 ns", "hbm.clock_hz": 3e9})
    assert machine.hbm.trp_cycles == 57
    assert read_machine(file).given["hbm.trp_cycles"].value == "14 ns"


SLIPS = [
    ("npu.clock_hz", 1.4, "1.4e9 (1.4 GHz)?"),
    ("npu.clock_hz", 1400, "1.4e9 (1400 MHz)?"),
    ("hbm.clock_hz", 2.6, "2.6e9 (2.6 GHz)?"),
    ("npu.scratchpad_bytes", 128, "1.28e8 (128 MB)?"),
    ("hbm.row_bytes", 2, "2048 (2 KiB)?"),
    ("pim.page_bytes", 1, "1024 (1 KiB)?"),
    ("hbm.trcd_read_cycles", 1.4e-8, '14 ns? write "14 ns" or 14 cycles'),
    ("hbm.tfaw_cycles", 3e-8, '30 ns? write "30 ns" or 30 cycles'),
    ("hbm.trefi_cycles", 3.9, '3.9 us? write "3.9 us" or 3900 cycles'),
    ("hbm.trefi_cycles", 3.9e-6, '3.9 us? write "3.9 us" or 3900 cycles'),
    ("hbm.trfc_cycles", 0.26, '260 ns? write "260 ns" or 260 cycles'),
    ("gpu.bytes_per_second", 820, "8.2e11 (820 GB/s)?"),
    ("gpu.bytes_per_second", 3.35, "3.35e12 (3.35 TB/s)?"),
    ("gpu.memory_bytes", 80, "8e10 (80 GB)?"),
    ("gpu.memory_bytes", 40_000, "4e10 (40000 MB)?"),
    ("gpu.flops_per_second", 312, "3.12e14 (312 TFLOP/s)?"),
    ("gpu.board_watts", 0.4, "400 (0.4 kW)?"),
    ("gpu.board_watts", 400_000, "400 (4e5 mW)?"),
    ("link.bandwidth_bytes_per_second", 64, "6.4e10 (64 GB/s)?"),
    ("link.latency_seconds", 5, "5e-6 (5 us)?"),
    ("energy.read_bit", 3900, "3.9 (3900 fJ/bit)?"),
    ("energy.read_bit", 0.0039, "3.9 (0.0039 nJ/bit)?"),
    ("energy.interface_bit", 8e-13, "0.8 (8e-13 J/bit)?"),
    ("energy.activate_kilobyte", 0.1, "819.2 (0.1 pJ/bit)?"),
    ("energy.scratchpad_byte", 1750, "1.75 (1750 fJ/byte)?"),
    ("energy.standby_gigabyte", 132, "0.132 (132 mW/GiB)?"),
    ("energy.npu_idle_square_millimetre", 15, "0.15 (15 W/cm2)?"),
    ("area.mac", 671, "0.000671 (671 um2)?"),
    ("area.uncore_share", 45, "0.45 (45 %)?"),
    ("gpu.die_mm2", 0.5, "50 (0.5 cm2)?"),
]


@pytest.mark.parametrize(("name", "value", "hint"), SLIPS)
def test_a_number_in_another_unit_is_refused_everywhere_with_the_likely_unit(
    name, value, hint, tmp_path
):
    group, _, field = name.partition(".")
    classes = {"npu": NPU, "hbm": HBM, "pim": PIM, "gpu": GPU}
    classes |= {"energy": EnergyCosts, "area": AreaCosts}
    file = write(tmp_path / "mine.toml", f"[{group}]\n{field} = {value}\n")
    ways = [
        lambda: replace(Hardware(), name, value),
        lambda: load_hardware(file),
        lambda: select_system(changes=dict([parse_change(f"{name}={value}")])),
        lambda: make_space(dict([parse_knob(f"{name}={value}")])),
    ]
    if group in classes:
        ways.append(lambda: Hardware(**{group: classes[group](**{field: value})}))
    for way in ways:
        with pytest.raises(ValueError, match=f"{name} must be ") as caught:
            way()
        assert str(caught.value).endswith(f"did you mean {hint}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpu.board_watts", "400 kW", "from 1 to 1e5 W, not '400 kW'; did you mean 400 W?"),
        ("npu.clock_hz", "1.4 THz", "not '1.4 THz'; did you mean 1.4 GHz?"),
        ("hbm.trp_cycles", "14 s", "not '14 s'; did you mean 14 ns?"),
        ("gpu.board_watts", "-4 W", "not '-4 W'"),
    ],
)
def test_a_text_that_is_out_of_range_is_shown_as_it_was_written(name, text, words):
    for way in (
        lambda: replace(Hardware(), name, text),
        lambda: make_space(dict([parse_knob(f"{name}={text}")])),
    ):
        with pytest.raises(ValueError, match=f"{name} must be ") as caught:
            way()
        assert str(caught.value).endswith(words)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_a_range_that_its_slips_fall_outside_of(field):
    assert field.allows(field.default)
    assert field.least < field.most
    assert field.unit
    for factor in {"Hz": (1e-9, 1e-6), "FLOP/s": (1e-12,), "bytes/s": (1e-9,)}.get(field.unit, ()):
        assert math.isinf(field.default) or not field.allows(field.default * factor)
    if field.unit == "memory cycles":
        for factor in (1e-9, 1e-6, 1e-3):  # seconds, milliseconds, microseconds
            assert field.default == 0 or not field.allows(field.default * factor)
        assert field.allows(0) == field.zero
    if field.name.startswith(("energy.", "area.")):
        factors = {"p": (1e-3, 1e3), "W": (1e3,), "m": (1e6,), "s": (100,)}  # fJ, nJ, mW, um2, %
        for factor in factors[field.unit[0]]:
            assert not field.allows(field.default * factor)
        assert field.allows(0)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("hbm.trp_cycles", "14 NS", "did you mean ns?"),
        ("hbm.trp_cycles", "14", "'14', which has no unit"),
        ("hbm.trp_cycles", "14 GHz", "such as \"14 ns\", not '14 GHz'"),
        ("hbm.trp_cycles", "1,4 ns", "not '1,4 ns'"),
        ("hbm.trp_cycles", "14 ns * 3", "not '14 ns * 3'"),
        ("hbm.trp_cycles", "nan ns", "not 'nan ns'"),
        ("hbm.trp_cycles", "1e999999999 ns", "not '1e999999999 ns'"),
        ("hbm.trp_cycles", "9" * 999 + " ns", "not '9999"),
        ("hbm.trp_cycles", "", "not ''"),
        ("hbm.trp_cycles", "-3 ns", "0 or from 1 to 1e5 memory cycles"),
        ("npu.clock_hz", "1.4 Ghz", "did you mean GHz?"),
        ("npu.clock_hz", "14 ns", 'a number of Hz, or text with a unit such as "1.4 GHz"'),
        ("npu.scratchpad_bytes", "24 gb", "GB is 10^9 bytes, GiB 2^30 bytes"),
        ("npu.scratchpad_bytes", "1 KB", "kB is 1000 bytes, KiB 1024 bytes"),
        ("gpu.bytes_per_second", "24 GB", 'such as "820 GB/s"'),
        ("hbm.num_channels", "8.5 channels", "a whole number of channels"),
        ("hbm.num_channels", "8 ranks", 'such as "8 channels"'),
        ("energy.read_bit", "3.9 pj/bit", "did you mean pJ/bit?"),
        ("energy.read_bit", "3.9 ns", 'a number of pJ/bit, or text with a unit such as "8 pJ/bit"'),
        ("area.uncore_share", "45 pct", 'such as "45 %"'),
    ],
)
def test_a_text_of_another_kind_is_refused(name, text, words, tmp_path):
    group, _, field = name.partition(".")
    file = write(tmp_path / "mine.json", json.dumps({group: {field: text}}))
    with pytest.raises(ValueError, match=f"mine.json: {name} must be") as caught:
        load_hardware(file)
    assert words in str(caught.value)


def test_arrays_of_a_batch_and_tracers_are_not_checked():
    rows = jnp.array([1.4, 1e9])
    assert replace(Hardware(), "npu.clock_hz", rows).npu.clock_hz is rows
    found = jax.jit(lambda hz: replace(Hardware(), "npu.clock_hz", hz).npu.clock_hz * 2)(1.4)
    assert float(found) == pytest.approx(2.8)
    mapped = jax.vmap(lambda pages: replace(Hardware(), "pim.page_bytes", pages).pim.page_bytes)
    assert mapped(jnp.array([64, 4096])).tolist() == [64, 4096]
    with pytest.raises(ValueError, match=r"1.4 GHz"):
        replace(Hardware(), "npu.clock_hz", np.float64(1.4))


def test_a_page_is_at_most_a_row(tmp_path):
    with pytest.raises(ValueError, match=r"pim.page_bytes must be at most hbm.row_bytes, 1024"):
        replace(Hardware(), "pim.page_bytes", 2048)
    with pytest.raises(ValueError, match=r"at most hbm.row_bytes, 512.* not 1024"):
        select_system(changes={"hbm.row_bytes": 512})
    both = {"pim.page_bytes": "2 KiB", "hbm.row_bytes": "2 KiB"}
    assert select_system(changes=both)[2].pim.page_bytes == 2048
    assert select_system(changes=dict(reversed(both.items())))[2].hbm.row_bytes == 2048
    file = write(tmp_path / "mine.toml", "[pim]\npage_bytes = 4096\n")
    with pytest.raises(ValueError, match=r"mine.toml: pim.page_bytes must be at most"):
        load_hardware(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[hbm]\ntype = "HBM3E"\ncapacity_gb = 48\n', ("hbm.type", "hbm3", "hbm.rows = 49152")),
        ("[hbm]\nnum_channels = 16\ncapacity_gb = 16\n", ("hbm.rows = 32768",)),
        ("[hbm]\nchanels = 2\n", ("did you mean hbm.num_channels?",)),
        ("[hbm]\ntRP = 14\n", ("did you mean hbm.trp_cycles?",)),
        ("[hbm]\nbandwidth_gbps = 820\n", ("1024 GB/s by default",)),
        ("[hbm]\ndata_rate = 5.2\n", ("two transfers a cycle",)),
        ("[npu]\nfrequency_ghz = 1.4\n", ('npu.clock_hz = "1 GHz"',)),
        ("[npu]\nnum_channels = 32\n", ("did you mean hbm.num_channels?",)),
        ("[gpu]\ntdp = 700\n", ("gpu.board_watts",)),
        ("[gpu]\ntflops = 990\n", ("gpu.flops_per_second",)),
        ("[link]\nbandwidth_gbs = 64\n", ("link.bandwidth_bytes_per_second",)),
        ("[dram]\nranks = 2\n", ("the groups are npu, hbm, pim, link, gpu, energy, area",)),
        ("[hbm]\nxyzzy = 2\n", ("hbm has num_channels, ranks",)),
    ],
)
def test_a_word_of_a_data_sheet_is_answered_with_the_field_to_write(text, words, tmp_path):
    with pytest.raises(ValueError, match=r"mine.toml: there (is|are) no field") as caught:
        load_hardware(write(tmp_path / "mine.toml", text))
    assert all(word in str(caught.value) for word in words), caught.value


def test_knobs_take_units_and_refuse_times_where_the_clock_varies():
    knobs = dict(
        [parse_knob("npu.clock_hz=0.7 GHz:1.5 GHz:log"), parse_knob("hbm.trp_cycles=14 ns,18 ns")]
    )
    space = make_space(knobs)
    assert (space.knobs[0].low, space.knobs[0].high) == (0.7e9, 1.5e9)
    assert space.knobs[1].values == (14, 18)
    with pytest.raises(
        ValueError, match=r"a plain number of cycles, not '14 ns': the clock varies"
    ):
        make_space({"hbm.clock_hz": [1e9, 2e9], "hbm.trp_cycles": ["14 ns", "18 ns"]})
    for name in ("npu.num_cores", "hbm.twr_cycles"):
        with pytest.raises(ValueError, match=f"{name} has no effect in this model"):
            make_space({name: [1, 2]})


def test_a_share_in_per_cent_is_not_taken_for_a_slip():
    with pytest.raises(ValueError, match=r"from 0 to 0.99 shares, not '100 %'$"):
        replace(Hardware(), "area.uncore_share", "100 %")


def rows_of_page(fields):
    for each in fields:
        zero = "0 or " if each["zero"] else ""
        ends = f"{zero}{compact(each['least'])} to {compact(each['most'])}"
        yield f"| `{each['name']}` | {each['unit']} | {compact(each['default'])} | {ends} |"


def test_the_pages_list_every_field_as_show_does():
    pages = Path(__file__).parent.parent / "docs" / "accelerator"
    fields = list_hardware().fields
    costs = [each for each in fields if each["name"].startswith(("energy.", "area."))]
    others = [each for each in fields if each not in costs]
    pairs = zip(rows_of_page(others), others, strict=True)
    rows = [f"{row} {each['effect']} |" for row, each in pairs]
    assert (pages / "units.md").read_text().endswith("\n".join(rows) + "\n")
    assert "\n".join(rows_of_page(costs)) + "\n" in (pages / "costs.md").read_text()


def test_totals_by_hand():
    """8 arrays of 128 x 128 at 1 GHz; 32 channels of 32 bytes a cycle; 32 banks of 32 channels, 16
    numbers of 2 bytes each 2 cycles.
    """
    found = {each.name: each.value for each in derive_totals(Hardware())}
    assert found == {
        "npu.peak_flops_per_second": 2 * 8 * 128 * 128 * 1e9,
        "hbm.bytes_per_second": 1024e9,
        "hbm.memory_bytes": 32 * 2**30,
        "pim.bytes_per_second": 16 * 1024e9,
        "pim.peak_flops_per_second": 16 * 1024e9,
        "npu.ridge_flops_per_byte": 256,
        "gpu.ridge_flops_per_byte": pytest.approx(312e12 / 1555e9),
    }


@pytest.mark.parametrize(
    ("number", "text"),
    [(1.4e9, "1.4e9"), (65536, "65536"), (1e5, "1e5"), (0.26, "0.26"), (1.4e-8, "1.4e-8")],
)
def test_compact_numbers(number, text):
    assert compact(number) == text
    assert float(text) == number


def test_a_longest_time_is_rounded_down():
    assert read_quantity("1.5 ns", "memory cycles", clock_hz=1e9) == 2
    assert read_quantity("1.5 ns", "memory cycles", clock_hz=1e9, longest=True) == 1
