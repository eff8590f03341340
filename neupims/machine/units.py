"""Numbers as text with a unit, such as "14 ns", "1.4 GHz" or "24 GiB", read exactly.

A field of a machine has a unit of `UNITS`, in which its plain numbers are, or counts something
("channels"). Decimal prefixes are powers of 1000 (GB), binary ones powers of 1024 (GiB). A time
that is given for a number of clock cycles becomes whole cycles: delays are rounded up, as JEDEC's
data sheets ask for, and the interval between refreshes, which is a longest time, is rounded down.
"""

import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction

SHOWN = 40  # characters of a wrong value
LONGEST = 100  # characters of a number, and powers of ten in it, that are read
CYCLES = "memory cycles"
NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*", re.DOTALL)

LARGE = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
SMALL = {"": 1} | {
    prefix: Fraction(1, 1000**power)
    for power, prefixes in enumerate(("m", "uµμ", "n", "p"), start=1)
    for prefix in prefixes
}
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}


def _prefixed(unit: str, prefixes: Mapping[str, int | Fraction], each: Fraction | int = 1):
    """Returns the factor of a unit with each prefix."""
    return {f"{prefix}{unit}": Fraction(factor) * each for prefix, factor in prefixes.items()}


def _per(units: Mapping[str, Fraction], amounts: Mapping[str, Fraction | int], own: int = 1):
    """Returns the factor of each unit for each amount, where the field's is for `own` of them."""
    return {
        f"{unit}/{name}": factor * own / amount
        for unit, factor in units.items()
        for name, amount in amounts.items()
    }


WATTS = _prefixed("W", LARGE | {"m": Fraction(1, 1000), "u": Fraction(1, 10**6)})
JOULES = {f"{prefix}J": Fraction(1000) ** power for power, prefix in enumerate("fpnum", start=-1)}
JOULES |= {"J": Fraction(10**12)}  # picojoules
AREAS = {"mm2": Fraction(1), "um2": Fraction(1, 10**6), "cm2": Fraction(100)}
BITS = {"bit": 1, "b": 1, "byte": 8, "B": 8, "kB": 8000, "KiB": 8192}
GIGABITS = {"GB": 8 * 10**9, "GiB": 8 * 2**30, "Gbit": 10**9, "Gb": 10**9}
MEGABITS = {"MB": 8 * 10**6, "MiB": 8 * 2**20, "Mbit": 10**6, "Mb": 10**6, "bit": 1}
# Unit of a field -> how many of it each unit is that text may use. Our own table, because pint 0.25
# takes 0.5 s to load, reads "Gb" as gilbert and "1,4 GHz" as 14 GHz, and knows no FLOP.
UNITS: dict[str, dict[str, Fraction]] = {
    "Hz": _prefixed("Hz", LARGE),
    "s": _prefixed("s", SMALL),
    "bytes": _prefixed("B", LARGE | BINARY),
    "bytes/s": _prefixed("B/s", LARGE | BINARY)
    | _prefixed("bit/s", LARGE, Fraction(1, 8))
    | _prefixed("b/s", LARGE, Fraction(1, 8)),
    "bits": {"bit": Fraction(1), "B": Fraction(8)},
    "FLOP/s": _prefixed("FLOP/s", LARGE) | _prefixed("FLOPS", LARGE),
    "W": WATTS,
    CYCLES: {"cycles": Fraction(1)},
    # A cost for an amount is also read without it: "3.9 pJ" of a field in pJ/bit is for one bit.
    "pJ": JOULES,
    "pJ/bit": JOULES | _per(JOULES, BITS),
    "pJ/byte": JOULES | _per(JOULES, BITS, 8),
    "pJ/KiB": JOULES | _per(JOULES, BITS, 8192),
    "W/GiB": WATTS | _per(WATTS, GIGABITS, 8 * 2**30),
    "W/mm2": WATTS | _per(WATTS, AREAS),
    "mm2": AREAS,
    "mm2/MB": AREAS | _per(AREAS, MEGABITS, 8 * 10**6),
    "mm2/GiB": AREAS | _per(AREAS, GIGABITS, 8 * 2**30),
    "shares": {"%": Fraction(1, 100)},
}
# Units that are written in several ways, of which text can mean either.
AMBIGUOUS = {
    "kb": "kB is 1000 bytes, KiB 1024 bytes",
    "mb": "MB is 10^6 bytes, MiB 2^20 bytes",
    "gb": "GB is 10^9 bytes, GiB 2^30 bytes",
    "tb": "TB is 10^12 bytes, TiB 2^40 bytes",
}


# Unit of a field -> units in which its number may have been typed instead.
SLIPS = {
    "W": ("kW", "mW"),
    "pJ": ("fJ", "nJ", "J"),
    "pJ/bit": ("fJ/bit", "nJ/bit", "J/bit"),
    "pJ/byte": ("fJ/byte", "nJ/byte", "J/byte"),
    "pJ/KiB": ("pJ/bit", "nJ/KiB", "fJ/KiB", "J/KiB"),
    "W/GiB": ("mW/GiB",),
    "W/mm2": ("mW/mm2", "W/cm2"),
    "mm2": ("um2", "cm2"),
    "mm2/MB": ("um2/MB", "um2/bit"),
    "mm2/GiB": ("um2/GiB", "cm2/GiB"),
    "shares": ("%",),
}


def read_quantity(text: str, unit: str, *, clock_hz: float | None, longest: bool = False):
    """Returns the number, in the unit of a field, that a text with a unit stands for.

    Args:
        text: A number and a unit, such as "14 ns".
        unit: The unit of the field: a key of `UNITS`, or what the field counts ("channels").
        clock_hz: The clock, in Hz, by which a time becomes cycles; None where it is not known.
        longest: Whether a time is a longest one, which is rounded down to whole cycles.

    Returns:
        A `Fraction`.

    Raises:
        ValueError: The text is not a number with a unit of the field's kind; the message is the end
            of a sentence that begins with the name of the field.
    """
    number, used = _split(text, unit)
    if used.removesuffix("s") == unit.removesuffix("s"):
        return number
    if used in (factors := units_of(unit)):
        return number * factors[used]
    if unit == CYCLES and used in UNITS["s"]:
        if clock_hz is None:
            raise ValueError(f"must be a plain number of cycles, not {text!r}: the clock varies")
        cycles = number * UNITS["s"][used] * Fraction(clock_hz)
        return Fraction(math.floor(cycles) if longest else math.ceil(cycles))
    raise ValueError(f"must be {describe_units(unit)}, not {text[:SHOWN]!r}{_advise(used, unit)}")


def units_of(unit: str) -> dict[str, Fraction]:
    """Returns how many of a field's unit each unit is that its text may use.

    Args:
        unit: The unit of the field.
    """
    return UNITS.get(unit, {})


def _split(text: str, unit: str) -> tuple[Fraction, str]:
    """Returns number and unit of a text."""
    found = NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    if not found or abs(Decimal(found[1]).adjusted()) > LONGEST:
        raise ValueError(f"must be {describe_units(unit)}, not {text[:SHOWN]!r}")
    return Fraction(Decimal(found[1])), re.sub(r"m\^?[2²]", "m2", found[2])


def describe_units(unit: str) -> str:
    """Returns what a field of this unit accepts as text, such as 'a number, or text such as "1.4
    GHz" (Hz, kHz, MHz, GHz, THz, PHz)'.

    Args:
        unit: The unit of the field.
    """
    examples = {"Hz": "1.4 GHz", "s": "2 us", "bytes": "24 GiB", "bytes/s": "820 GB/s"}
    examples |= {"FLOP/s": "312 TFLOP/s", "W": "400 W", CYCLES: "14 ns", "bits": "128 bit"}
    examples |= {"shares": "45 %"}
    example = examples.get(unit, f"8 {unit}")
    return f'a number of {unit}, or text with a unit such as "{example}"'


def _advise(used: str, unit: str) -> str:
    """Returns what a wrong unit was likely meant to be, or an empty string."""
    if not used:
        return ", which has no unit"
    known = [*units_of(unit), *(UNITS["s"] if unit == CYCLES else ())]
    if unit == "bytes" and used.casefold() in AMBIGUOUS:
        return f": {AMBIGUOUS[used.casefold()]}"
    close = [each for each in known if each.casefold() == used.casefold()]
    return f"; did you mean {close[0]}?" if close else ""


def likely_slip(
    value: float, unit: str, fits, default: float, clock_hz: float | None, *, binary: bool = False
) -> str:
    """Returns which unit an impossible number was likely typed in, such as "1.4e9 (1.4 GHz)?".

    Of the units in which the number would fit, it is the one that comes nearest to the default.

    Args:
        value: The number.
        unit: The unit of the field.
        fits: Function that says whether a number is in the range of the field.
        default: The field's default; where it is 0 or infinite, the first unit that fits is taken.
        clock_hz: The clock, in Hz, by which a time becomes cycles; None where it is not known.
        binary: Whether the field counts powers of two, so that KiB is meant rather than kB.

    Returns:
        An empty string if no unit explains the number.
    """
    if not math.isfinite(value) or value <= (1 if unit == "shares" else 0):
        return ""

    def distance(candidate: tuple[str, float]) -> float:
        return abs(math.log(candidate[1] / default)) if 0 < default < math.inf else 0.0

    found = [each for each in _candidates(value, unit, clock_hz, binary) if fits(each[1])]
    if not found:
        return ""
    name, number = min(found, key=distance)
    if unit == CYCLES:
        return _time_slip(value, name, number)
    return f"{compact(number)} ({compact(value)} {name})?"


def _candidates(
    value: float, unit: str, clock_hz: float | None, binary: bool
) -> Iterator[tuple[str, float]]:
    """Yields units other than the field's own, and the number in the field's unit."""
    if unit == CYCLES:
        for name in ("ns", "us", "ms", "s", "ps") if clock_hz else ():
            cycles = _exact(value) * UNITS["s"][name] * Fraction(clock_hz or 1)
            yield name, float(math.ceil(cycles))
        return
    order = {"Hz": "GMkT", "s": "unm", "bytes": "GMkT", "bytes/s": "GTMk", "FLOP/s": "TPGM"}
    symbol = {"bytes": "B", "bytes/s": "B/s"}.get(unit, unit)
    for name in SLIPS.get(unit, ()):
        yield name, float(_exact(value) * units_of(unit)[name])
    for prefix in order.get(unit, ""):
        name = f"{prefix.upper()}i{symbol}" if binary else f"{prefix}{symbol}"
        if name in units_of(unit):
            yield name, float(_exact(value) * units_of(unit)[name])


def _time_slip(value: float, name: str, cycles: float) -> str:
    """Returns a time that was typed for cycles, as text with a unit and as cycles."""
    seconds = _exact(value) * UNITS["s"][name]
    for unit in ("s", "ms", "us", "ns", "ps"):
        if seconds >= UNITS["s"][unit]:
            name, value = unit, float(seconds / UNITS["s"][unit])
            break
    return f'{compact(value)} {name}? write "{compact(value)} {name}" or {compact(cycles)} cycles'


def text_slip(text: str, unit: str, fits, default: float, clock_hz: float | None) -> str:
    """Returns which unit the number of an impossible text likely has, such as "400 W?".

    Args:
        text: A number with a unit that `read_quantity` reads, but that is out of range.
        unit: The unit of the field.
        fits: Function that says whether a number is in the range of the field.
        default: The field's default; the unit that comes nearest to it is taken, or the first one.
        clock_hz: The clock, in Hz, by which a time becomes cycles; None where it is not known.

    Returns:
        An empty string if the number fits with no unit.
    """
    used, found = _split(text, unit)[1], {}
    number = NUMBER.fullmatch(text)[1]  # type: ignore[index]
    for name in UNITS["s"] if unit == CYCLES and used in UNITS["s"] else units_of(unit):
        value = float(read_quantity(f"{number} {name}", unit, clock_hz=clock_hz))
        if value > 0 and fits(value):
            found[name] = abs(math.log(value / default)) if 0 < default < math.inf else 0.0
    return f"{number} {min(found, key=found.__getitem__)}?" if found else ""


def describe_range(least: float, most: float, unit: str, *, whole: bool, zero: bool) -> str:
    """Returns the values that a field allows, such as "from 1e6 to 1e11 Hz".

    Args:
        least: The smallest value.
        most: The largest value; infinite for none.
        unit: The unit of the field.
        whole: Whether values are whole numbers.
        zero: Whether 0 is allowed beside the range.
    """
    ends = (
        f"from {compact(least)} to {compact(most)}"
        if most < math.inf
        else f"at least {compact(least)}"
    )
    if whole:
        return f"a whole number of {unit} {ends}"
    return f"{'0 or ' if zero else ''}{ends} {unit}"


def _exact(value: float) -> Fraction:
    """Returns the decimal number that a float was read from."""
    return Fraction(repr(float(value)))


def compact(number: float) -> str:
    """Returns a number as short text with up to nine digits, such as "1.4e9" or "65536".

    Args:
        number: The number.
    """
    text = f"{number:.9g}"
    if "e" not in text and abs(number) >= 1e5 and not number % 1e4:
        text = f"{number:.8e}"
        mantissa, power = text.split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return re.sub(r"e([+-])0*", lambda found: f"e{found[1].removeprefix('+')}", text)
