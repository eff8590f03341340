"""Counts the bytes that XLA's own program for an H200 moves: plain JAX beside the kernels.

    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 PYTHONPATH=.venv/cuda:.venv/pjrt \\
        python -m benchmarks.xla_traffic

It needs no GPU: XLA's GPU compiler runs on any machine (`benchmarks.ahead_of_time`). A step of the
program reads its operands from memory and writes its result there. Nothing is timed. Rows are
appended to benchmarks/results/xla_traffic.csv.
"""

import argparse
import math
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks import ahead_of_time
from benchmarks.record import append
from ggem_jax.pooling import ggem_pool, norm_ggem_pool

SHAPES = {"B/16, 256 images": (256, 196, 768), "L/16, 256 images": (256, 196, 1024)}
GROUPS = 16
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_STEP = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)")
_NO_STEPS = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")


def pool_by_formula(tokens, p):
    """Returns (mean_n x^p)^(1/p) as one would write it, `(b, d)`, for the autodiff of JAX.

    Args:
        tokens: The tokens, `(b, n, d)`.
        p: One exponent for each group of channels, `(groups,)`.
    """
    p = jnp.repeat(p, tokens.shape[-1] // p.size)
    x = jnp.maximum(tokens.astype(jnp.float32), 1e-6)
    return (jnp.mean(x**p, axis=1) ** (1 / p)).astype(tokens.dtype)


def normalise_by_formula(tokens, scale, bias):
    """Returns the layer-normalised tokens in float32.

    Args:
        tokens: The tokens, `(b, n, d)`.
        scale: Factor of the normalised tokens, `(d,)`.
        bias: Added to them, `(d,)`.
    """
    x = tokens.astype(jnp.float32)
    far = x - x.mean(-1, keepdims=True)
    return far * jax.lax.rsqrt(jnp.square(far).mean(-1, keepdims=True) + 1e-6) * scale + bias


def norm_and_pool_by_formula(tokens, scale, bias, p):
    """Returns `pool_by_formula` of the layer-normalised tokens.

    Args:
        tokens: As in `normalise_by_formula`, like scale and bias.
        scale: Factor of the normalised tokens.
        bias: Added to them.
        p: One exponent for each group of channels, `(groups,)`.
    """
    return pool_by_formula(normalise_by_formula(tokens, scale, bias), p).astype(tokens.dtype)


def norm_by_xla_and_pool(tokens, scale, bias, p):
    """Returns our pooling, a kernel, of tokens that XLA normalises and rounds to their dtype.

    Args:
        tokens: As in `normalise_by_formula`, like scale and bias.
        scale: Factor of the normalised tokens.
        bias: Added to them.
        p: One exponent for each group of channels, `(groups,)`.
    """
    return ggem_pool(normalise_by_formula(tokens, scale, bias).astype(tokens.dtype), p)


# By name: a function of tokens, `channels` arrays `(d,)`, and exponents; the number `channels`.
FUNCTIONS: dict[str, tuple[Callable, int]] = {
    "ggem, kernels": (ggem_pool, 0),
    "ggem, plain JAX": (lambda *arrays: ggem_pool(*arrays, implementation="xla"), 0),
    "ggem, formula": (pool_by_formula, 0),
    "norm_ggem, kernels": (norm_ggem_pool, 2),
    "norm_ggem, plain JAX": (lambda *arrays: norm_ggem_pool(*arrays, implementation="xla"), 2),
    "norm_ggem, formula": (norm_and_pool_by_formula, 2),
    "norm_ggem, XLA's norm and the kernels of ggem": (norm_by_xla_and_pool, 2),
}


def value_and_gradient(name: str, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns the bytes that value and gradient move on an H200, and the steps of the program.

    Args:
        name: A key of `FUNCTIONS`.
        shape: Shape of the tokens, `(b, n, d)`, in bfloat16.
    """
    function, channels = FUNCTIONS[name]
    place = SingleDeviceSharding(ahead_of_time.devices(1)[0])

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def both(*arrays):
        value, pull = jax.vjp(function, *arrays)
        return value, pull(value)

    vectors = [array((shape[-1],), "float32")] * channels
    text = ahead_of_time.compiled(
        jax.jit(both), array(shape, "bfloat16"), *vectors, array((GROUPS,), "float32")
    )
    return count(text)


def count(program: str) -> tuple[int, int]:
    """Returns the bytes that the steps of a program read and write, and their number.

    Args:
        program: The text of a compiled program.
    """
    shapes: dict[str, str] = {}
    moved = steps = 0
    for line in program[program.index("\nENTRY") :].splitlines():
        if found := _STEP.match(line):
            name, shape, operation, operands = found.groups()
            shapes[name] = shape
            if operation not in _NO_STEPS:
                read = set(re.findall(r"%([\w.\-]+)", operands))
                moved += sum(_size(shapes.get(operand, "")) for operand in read) + _size(shape)
                steps += 1
    return moved, steps


def _size(shapes: str) -> int:
    """The bytes of all arrays in a shape as XLA writes it, such as `(f32[2,3]{1,0}, pred[])`."""
    arrays = re.findall(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]", shapes)
    return sum(
        _BYTES[kind] * math.prod(map(int, filter(None, sides.split(",")))) for kind, sides in arrays
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for label, shape in SHAPES.items():
        for name in FUNCTIONS:
            moved, steps = value_and_gradient(name, shape)
            append(
                "xla_traffic",
                {
                    "date": time.strftime("%Y-%m-%d"),
                    "compiled_for": "H200, not present",
                    "jax": jax.__version__,
                    "shape": label,
                    "function": name,
                    "MB": round(moved / 1e6),
                    "steps": steps,
                },
            )


if __name__ == "__main__":
    main()
