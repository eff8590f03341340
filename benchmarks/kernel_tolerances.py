"""The largest errors of correct kernels on a GPU, with every approximate instruction at its worst.

The PTX ISA documents the largest errors of the instructions that the kernels use. The bounds here
follow from them, to first order, for tokens in random order. The error of a value is relative to
the value; that of a gradient is relative to the largest gradient of its row.
"""

import math

ROUNDED = 2.0**-24  # half a unit in the last place of float32: any sum or product
EX2 = 2.0**-22  # ex2.approx
LG2 = 2.0**-22  # lg2.approx: absolute for numbers from 1/2 to 2, else relative to the logarithm
DIVIDED = 2.0**-22  # div.full, two units in the last place; rcp.approx is allowed half of it
RSQRT = 2.0**-22.9  # rsqrt.approx
TOKENS = {"float32": 0.0, "bfloat16": 8e-3, "float16": 2e-3}  # what rounding to a dtype adds

# Ratio to the root, and its logarithm: p times this is the error of the power, and the root divides
# by p again. In the pooling, a power of two takes the place of the root and rounds nothing; the
# logarithm may then be 2 or 3 instead of 1, which adds less than the ratio would.
_LOGARITHM = DIVIDED + 2 * ROUNDED + math.log(2) * LG2

# Logarithms of ratios that are this near 1 come from a series, which adds no error to speak of.
_NEAR = 1 / 16


def value_error(operation: str, n: int, p: float, dtype: str) -> float:
    """Returns the largest relative error of a power mean.

    The mean of (x / top)^p is found from powers of x / largest, which are rescaled, and of
    largest / top: 2 + `rescaled_shares` times the error of a logarithm. Powers of two, sums and the
    product with 1 / count have errors that the root divides by p. The last power of two is that of
    log2(mean) / p, a logarithm of at most log2(n).

    Args:
        operation: "ggem" or "norm_ggem".
        n: Tokens of an image.
        p: Largest exponent.
        dtype: Dtype of the tokens.
    """
    powers = 2 * EX2 + DIVIDED + 2 * math.sqrt(n) * ROUNDED
    last = EX2 + ROUNDED + math.log(2) * math.log2(n) / p * (DIVIDED + 2 * ROUNDED)
    found = (2 + rescaled_shares(p)) * _LOGARITHM + powers / p + last
    return TOKENS[dtype] + found + _normed(operation)


def rescaled_shares(p: float) -> float:
    """Returns how often the whole sum is rescaled, at most.

    It is rescaled when a larger number comes, with the error of one more power. Each time counts
    with the share that the sum so far has of the final one. For a large p, a larger number leaves
    little of what was before it. `tests/test_kernel_tolerances.py` counts the shares for tokens in
    random order, for which this holds.

    Args:
        p: Exponent.
    """
    return 1 + 5 * min(1.0, 10 / p)


def slope_error(operation: str, n: int, p: float, dtype: str, *, of_p: bool = False) -> float:
    """Returns the largest error of a gradient.

    For float32 tokens, it is that of the formula at the root that the kernel found: the kernel
    returns that root, and the power p - 1 would turn its error into an error p times as large.
    For other dtypes, whose root is returned rounded, it includes p times the error of the root.

    The gradient is cotangent / count (x / root)^(p - 1). What 1 / root is rounded by is corrected
    to second order. Where the logarithm of the ratio is not a series, its error counts p - 1 times
    (`_power_error`).

    The gradient of p is cotangent root / p mean_n (x / root)^p log(x / root). The mean is about
    1 / p or more, and the error of a logarithm counts by itself: p times as much relative to it.

    Args:
        operation: "ggem" or "norm_ggem".
        n: Tokens of an image.
        p: Largest exponent.
        dtype: Dtype of the tokens.
        of_p: Whether it is the gradient of the exponents.
    """
    local = EX2 + DIVIDED + (8 + 2 * math.log2(n)) * ROUNDED + (p * DIVIDED) ** 2
    local += 2 * math.sqrt(n) * ROUNDED  # sums over the tokens, for p, scale and bias
    if dtype == "float32":
        local += _power_error(n, p)
    else:
        local += p * (_LOGARITHM + value_error("ggem", n, p, "float32"))
    # of the norm: three such terms are added, and z itself is raised to p - 1
    passes = 4 if operation == "norm_ggem" else 2
    logarithms = p * _LOGARITHM if of_p else 0.0
    return TOKENS[dtype] + passes * local + logarithms + p * _normed(operation)


def _power_error(n: int, p: float) -> float:
    """The error of (x / root)^(p - 1), relative to the largest one, outside of the series.

    A ratio above 1 is at most n^(1 / p). Smaller ratios have smaller powers.
    """
    highest = math.log2(n) / p
    beyond = highest > math.log2(1 + _NEAR)
    share = 1.0 if beyond else (1 - _NEAR) ** (p - 1)
    return (p - 1) * share * (math.log(2) * LG2 * max(1.0, highest) + 2 * ROUNDED)


def _normed(operation: str) -> float:
    """The relative error of a normalised token that counts, before it is raised to p.

    z = (x - mean) / deviation scale + bias, where the first term is at most twice as large as z in
    the tokens that count. That holds for many tokens of many channels. Of three tokens, all may be
    near zero, and of 8 channels, all may be near their mean: then the error is larger in any code.
    """
    return 2 * (RSQRT + 6 * ROUNDED) if operation == "norm_ggem" else 0.0
