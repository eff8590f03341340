"""What the instructions compute, on arrays with one entry for each thread.

A register holds bits. An instruction reads them as its type says: `f32` as float32, `bf16x2` as two
bfloat16 in a last axis of length 2, the low half first.

Approximate instructions have the errors that the PTX ISA documents as their largest (version 8.8,
floating-point instructions). An `Error` says which part of it an instruction gets.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
from ptx.code import PtxError

TYPES: dict[str, type] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": getattr(np, f"uint{bits}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (16, 32, 64)},
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
}
PAIRS = {"f32x2": "f32", "f16x2": "f16", "bf16x2": "bf16"}
FLOATS = {"f16", "bf16", "f32"}

# Largest errors, relative to the result. That of lg2 is absolute for operands in (0.5, 2). One unit
# in the last place is at most 2^-23 of the result.
LARGEST_ERRORS = {
    "ex2.approx": 2.0**-22,
    "lg2.approx": 2.0**-22,
    "rcp.approx": 2.0**-23,
    "rsqrt.approx": 2.0**-22.9,
    "sqrt.approx": 2.0**-23,
    "div.full": 2.0**-22,
    "div.approx": 2.0**-22,
}
# From the name of an instruction and its exact results to parts of the largest error, -1 to 1.
Error = Callable[[str, np.ndarray], np.ndarray | float]
Read = Callable[[int, str], np.ndarray]  # operand by its position and type

SMALLEST = 2.0**-126  # normal float32


def no_error(name: str, exact: np.ndarray) -> float:
    """Results are correctly rounded."""
    return 0.0


def drawn(seed: int) -> Error:
    """Returns errors anywhere up to the largest ones, the same for the same result."""

    def error(name, exact):
        bits = np.ascontiguousarray(exact, np.float64).view(np.uint64)
        for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):  # as a hash mixes them
            bits = (bits ^ bits >> np.uint64(32) ^ np.uint64(seed)) * np.uint64(factor)
        return (bits >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1

    return error


def compute(opcode: tuple[str, ...], count: int, read: Read, error: Error) -> np.ndarray:
    """Returns the result of an instruction.

    Args:
        opcode: Its name, split at the dots.
        count: How many operands it has, the result among them.
        read: Returns operand i, as a type; operand 0 is the result.
        error: Errors of the approximate instructions.
    """
    head, kind = opcode[0], opcode[-1]
    if not _KNOWN.issuperset(opcode[1:]):  # a saturated sum would be computed as another one
        raise PtxError(f"unknown instruction {'.'.join(opcode)}")
    with np.errstate(all="ignore"):
        match head:
            case "cvt":
                return _convert(opcode, read)
            case "setp":
                return _compare(opcode, read(1, kind), read(2, kind))
            case "selp":
                return np.where(read(3, "pred"), read(1, _bits(kind)), read(2, _bits(kind)))
            case "mul" | "mad" if opcode[1] in ("wide", "lo", "hi"):
                return _multiply(opcode, [read(i, kind) for i in (1, 2)], read)
            case "shl" | "shr":
                return _shift(head, read(1, kind), read(2, "u32"))
            case "bfe":
                return _extract(read(1, kind), read(2, "u32"), read(3, "u32"))
            case "prmt":
                return _permute(*(read(i, "b32") for i in (1, 2, 3)))
        if PAIRS.get(kind, kind) in FLOATS:
            return _floats(opcode, count, read, error)
        operands = [read(i, kind) for i in range(1, count)]
        if head not in _INTEGERS:
            raise PtxError(f"unknown instruction {'.'.join(opcode)}")
        return _INTEGERS[head](*operands)


def _bits(kind: str) -> str:
    return "b" + kind[1:] if kind != "pred" else kind


_INTEGERS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
}

_COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}

# Parts of names that are taken into account, or change nothing.
_KNOWN = {
    *TYPES, *PAIRS, "rn", "rzi", "approx", "full", "ftz", "NaN", "xorsign", "abs", "wide", "lo",
    "hi", *_COMPARISONS, *(f"{name}u" for name in _COMPARISONS), "num", "nan",
}  # fmt: skip


def _compare(opcode, x, y):
    name, kind = opcode[1], opcode[-1]
    if PAIRS.get(kind, kind) not in FLOATS:
        return _COMPARISONS[name](x, y)
    if "ftz" in opcode:
        x, y = flush(x), flush(y)
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    holds = _COMPARISONS[name[:2]](x, y)
    return holds | unordered if name.endswith("u") else holds & ~unordered


def _convert(opcode, read):
    to, kind = opcode[-2:]
    if to in PAIRS:  # the first operand becomes the high half
        both = np.broadcast_arrays(read(2, kind), read(1, kind))
        return np.stack(both, axis=-1).astype(TYPES[PAIRS[to]])
    return read(1, kind).astype(TYPES[to])


def _multiply(opcode, factors, read):
    head, part, kind = opcode
    bits = int(kind[1:])
    wide = f"{kind[0]}{2 * bits}" if 2 * bits <= 64 else None
    if part == "lo":
        product, kind = factors[0] * factors[1], kind
    elif wide is None:
        raise PtxError(f"unknown instruction {'.'.join(opcode)}")
    else:
        product = factors[0].astype(TYPES[wide]) * factors[1].astype(TYPES[wide])
        if part == "wide":
            kind = wide
        else:
            product = (product >> bits).astype(TYPES[kind])
    return product + read(3, kind) if head == "mad" else product


def _shift(head, x, by):
    bits = 8 * x.dtype.itemsize
    near = np.minimum(by, bits - 1).astype(x.dtype)
    if head == "shl":
        return np.where(by < bits, x << near, x.dtype.type(0))
    signed = np.issubdtype(x.dtype, np.signedinteger)
    return x >> near if signed else np.where(by < bits, x >> near, x.dtype.type(0))


def _extract(x, first, length):
    """Bits `first` to `first + length - 1`. The last one is the sign where the type has signs."""
    bits = 8 * x.dtype.itemsize
    if np.any((length < 1) | (first + length > bits)):
        raise PtxError(f"bits to extract are not all among {bits}")
    above = (bits - first - length).astype(x.dtype)
    return x << above >> (bits - length).astype(x.dtype)


def _permute(x, y, selection):
    """Byte k of the result is the one of y:x that nibble k of `selection` names."""
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(both.shape, selection.shape), np.uint32)
    for k in range(4):
        nibble = (selection >> (4 * k)) & 15
        byte = (both >> (8 * (nibble & 7)).astype(np.uint64)) & 255
        sign = np.where(byte & 128, 255, 0)  # copied to the whole byte where bit 3 is set
        result |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * k)
    return result


def _floats(opcode, count, read, error):
    head, kind = opcode[0], opcode[-1]
    if opcode[-2] == "f32":  # add.rn.f32.bf16: the first operand is narrow
        operands = [read(1, kind).astype(np.float32), *(read(i, "f32") for i in range(2, count))]
    else:
        operands = [read(i, kind) for i in range(1, count)]
    if "ftz" in opcode:
        operands = [flush(x) for x in operands]
    name = ".".join((head, *{"approx", "full"} & {*opcode}))
    if name in LARGEST_ERRORS:
        result = _approximate(name, [x.astype(np.float64) for x in operands], error)
    elif name in ("max", "min"):
        result = _extreme(opcode, operands)
    elif name in _EXACT:
        result = _EXACT[name](*(x.astype(np.float64) for x in operands))
    else:
        raise PtxError(f"unknown instruction {'.'.join(opcode)}")
    result = result.astype(operands[0].dtype)
    return flush(result) if "ftz" in opcode else result


# In float64, then rounded once: a product of two float32 is exact, and a sum is rounded as if it
# were, but for a tie in 2^29.
_EXACT: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": lambda x, y, z: x * y + z,
    "neg": np.negative,
    "abs": np.abs,
}


def _extreme(opcode, operands):
    """The largest or smallest of two or, from sm_100 on, three numbers."""
    propagates = "NaN" in opcode
    choose = {
        ("max", True): np.maximum,
        ("max", False): np.fmax,
        ("min", True): np.minimum,
        ("min", False): np.fmin,
    }[opcode[0], propagates]
    sign = None
    if "xorsign" in opcode:
        sign = np.signbit(operands[0]) ^ np.signbit(operands[1])
    if "abs" in opcode:
        operands = [np.abs(x) for x in operands]
    result = operands[0]
    for other in operands[1:]:
        result = choose(result, other)
    return result if sign is None else np.where(sign, -result, result)


def _approximate(name, operands, error):
    x = operands[0]
    match name.split(".")[0]:
        case "ex2":
            exact = np.exp2(x)
        case "lg2":
            exact = np.log2(x)
        case "rcp":
            exact = 1 / x
        case "rsqrt":
            exact = 1 / np.sqrt(x)
        case "sqrt":
            exact = np.sqrt(x)
        case _:
            exact = x / operands[1]
    if name == "div.approx":  # whose reciprocal would be subnormal
        exact = np.where((np.abs(operands[1]) > 1 / SMALLEST) & np.isfinite(exact), 0.0, exact)
    size = np.abs(exact)
    if name == "lg2.approx":
        size = np.where((x > 0.5) & (x < 2), 1.0, size)
    moved = exact + error(name, exact) * LARGEST_ERRORS[name] * size
    return np.where(np.isfinite(exact), moved, exact)


def flush(x: np.ndarray) -> np.ndarray:
    """Returns float32 numbers with zeros for the subnormal ones."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(x.dtype.type(0), x), x)
