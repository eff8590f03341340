"""What to write instead of a field that a machine does not have, such as a word of a data sheet."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from neupims.machine.hardware import HBM, Hardware, memory_bytes, peak_bytes_per_cycle
from neupims.machine.quantity import describe

# Words of data sheets, by group, and what they are in a machine's file. The first match counts.
SHEET: dict[str, tuple[tuple[str, str], ...]] = {
    "hbm": (
        ("capacity|size|memory|density", "{capacity}"),
        ("bandwidth|gbps|gb_s|gbs", "{bandwidth}"),
        ("type|generation|standard|kind", "{kind}"),
        ("rate|speed|pin", "a data rate is two transfers a cycle: hbm.clock_hz is half of it"),
        ("freq|mhz|ghz", 'write hbm.clock_hz = "1 GHz"'),
        ("width", "the bits of one channel's bus are hbm.bus_bits"),
        ("stack|die|chip", "stacks are counted by their channels: hbm.num_channels"),
        ("^banks?$", "banks of a channel are hbm.ranks x bank_groups x banks_per_group"),
        ("page|row_size", 'write hbm.row_bytes = "1 KiB"'),
    ),
    "npu": (
        ("flops|tops", "the rate follows from npu.num_arrays x array_width x array_height x 2"),
        ("sram|scratch|buffer|cache|spad", 'write npu.scratchpad_bytes = "32 MB"'),
        ("freq|mhz|ghz", 'write npu.clock_hz = "1 GHz"'),
    ),
    "gpu": (
        ("flops|tops", 'write gpu.flops_per_second = "312 TFLOP/s"'),
        ("capacity|size|memory", 'write gpu.memory_bytes = "40 GB"'),
        ("bandwidth|gbps", 'write gpu.bytes_per_second = "1555 GB/s"'),
        ("tdp|power|watt", 'write gpu.board_watts = "400 W"'),
    ),
    "link": (
        ("bandwidth|gbps|rate", 'write link.bandwidth_bytes_per_second = "64 GB/s"'),
        ("latency|delay", 'write link.latency_seconds = "1 us"'),
    ),
    "pim": (
        ("mac|flops|product", "PIM multiplies pim.macs_per_bank numbers at each bank"),
        ("page|row_size", 'write pim.page_bytes = "1 KiB"'),
    ),
}
UNITS = re.compile(r"_(bytes|[kmgt]i?b|[kmg]?hz|ns|us|cycles|seconds|watts?|bits?)$")


def check_fields(given: Mapping[str, Any], machines: tuple[str, ...]) -> None:
    """Raises unless a machine has all the fields; the sentence says what to write instead.

    Args:
        given: Values by dotted name.
        machines: Names of machines to begin from.

    Raises:
        ValueError: Fields are unknown.
    """
    known = [each.name for each in describe(Hardware())]
    groups = vars(Hardware())
    unknown = [name for name in given if name not in known and name not in groups]
    if not unknown:
        return  # a group that is named as a field is left to `replace_all`
    hints = [f"{name} ({_hint(name, given, known, machines)})" for name in unknown]
    there = "there is no field" if len(hints) == 1 else "there are no fields"
    raise ValueError(f"{there} {', '.join(hints)}; `show hardware --all` lists all")


def _hint(name: str, given: Mapping[str, Any], known: list[str], machines: tuple[str, ...]) -> str:
    """Returns what to write instead of one unknown field."""
    group, _, word = name.partition(".")
    if group not in vars(Hardware()):
        return f"the groups are {', '.join(vars(Hardware()))}"
    own = [each for each in known if each.startswith(f"{group}.")]
    if close := difflib.get_close_matches(name, own, n=1, cutoff=0.8):
        return f"did you mean {close[0]}?"
    for each in describe(Hardware()):
        if each.simulator and group == "hbm" and word.casefold() == each.simulator.casefold():
            return f"did you mean {each.name}?"
    for pattern, text in SHEET.get(group, ()):
        if re.search(pattern, word.casefold()):
            return text.format(
                capacity=_capacity(word, given) if "{capacity}" in text else "",
                bandwidth=_bandwidth(),
                kind="a type sets no numbers: write them, or change those of a named machine"
                f" (--hardware {' or '.join(machines)}) with --set",
            )
    if elsewhere := [each for each in known if each.partition(".")[2] == word]:
        return f"did you mean {elsewhere[0]}?"
    stem = UNITS.sub("", word)
    by_stem = {UNITS.sub("", each.partition(".")[2]): each for each in own}
    if close := difflib.get_close_matches(stem, list(by_stem), n=1, cutoff=0.6):
        return f"did you mean {by_stem[close[0]]}?"
    return f"{group} has {', '.join(each.partition('.')[2] for each in own)}"


def _capacity(word: str, given: Mapping[str, Any]) -> str:
    """Returns how a capacity is written, with the rows that the rest of the memory needs for it."""
    text, value = (
        "the capacity is hbm.num_channels x banks x rows x row_bytes",
        given[f"hbm.{word}"],
    )
    parts = [
        given.get(f"hbm.{name}", getattr(HBM(), name))
        for name in ("num_channels", "ranks", "bank_groups", "banks_per_group", "row_bytes")
    ]
    plain = all(isinstance(each, int | float) for each in (value, *parts))
    if not re.search("gi?b", word.casefold()) or not plain:
        return f"{text}, {memory_bytes(HBM()) / 2**30:g} GiB by default: set hbm.rows"
    rows = value * 2**30 / math.prod(parts)
    return f"{text}: for {value:g} GiB write hbm.rows = {math.ceil(rows)}"


def _bandwidth() -> str:
    """Returns how a bandwidth is written."""
    hbm = HBM()
    rate = peak_bytes_per_cycle(hbm) * hbm.clock_hz / 1e9
    return (
        "the bandwidth is hbm.num_channels x bus_bits x 2 x clock_hz / 8,"
        f" {rate:g} GB/s by default: set hbm.clock_hz"
    )
