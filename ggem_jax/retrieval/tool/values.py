"""Texts of a command line -> values; a wrong text raises `argparse.ArgumentTypeError`."""

import argparse
import math
import re

from ggem_jax.retrieval.parts import Part

LARGEST = 1e6  # largest --beta and --alpha, as for beta in `superglobal_rerank`


def whole(text: str, least: int = 0, most: int = 2**31 - 1) -> int:
    """Returns a whole number.

    Args:
        text: Digits, and nothing else.
        least: The smallest number.
        most: The largest number.

    Raises:
        argparse.ArgumentTypeError: It is no such number.
    """
    if not re.fullmatch(r"[0-9]+", text) or int(text[:20]) < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, not {text!r}"
        )
    if len(text) > 20 or int(text) > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Returns whole numbers of at least 1.

    Args:
        text: The numbers with commas between them.

    Raises:
        argparse.ArgumentTypeError: One is no such number.
    """
    return tuple(whole(each, 1) for each in text.split(","))


def number(text: str) -> float:
    """Returns a number from 0 to `LARGEST`.

    Args:
        text: The number.

    Raises:
        argparse.ArgumentTypeError: It is no such number.
    """
    value = _float(text)
    if not 0 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {LARGEST:g}, not {text!r}")
    return value


def above_0(text: str, most: float) -> float:
    """Returns a number above 0.

    Args:
        text: The number.
        most: The largest number.

    Raises:
        argparse.ArgumentTypeError: It is no such number.
    """
    value = _float(text)
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(
            f"must be a number above 0 and at most {most:g}, not {text!r}"
        )
    return value


def box(text: str) -> tuple[float, float, float, float]:
    """Returns the corners (x1, y1, x2, y2) of a box, pixels.

    Args:
        text: The four numbers with commas between them.

    Raises:
        argparse.ArgumentTypeError: They are no box, or the box is empty.
    """
    corners = tuple(map(_float, text.split(",")))
    if len(corners) == 4 and math.isfinite(sum(corners)):
        x1, y1, x2, y2 = corners
        if x1 < x2 and y1 < y2:
            return x1, y1, x2, y2
    raise argparse.ArgumentTypeError(
        f"must be x1,y1,x2,y2 in pixels with x1 < x2 and y1 < y2, not {text!r}"
    )


def shard(text: str) -> str:
    """Returns a part of a folder, "I/N".

    Args:
        text: The part.

    Raises:
        argparse.ArgumentTypeError: It is no part.
    """
    try:
        return str(Part.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _float(text: str) -> float:
    """A number in plain digits, or NaN."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan
