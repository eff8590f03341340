"""Compares the kernels with the same functions in float64, and with their own repeated results.

The functions in float64 run as plain JAX. Errors are relative to the largest entry of a row, and
allowed as far as `benchmarks.kernel_tolerances` derives them. Gradients of float32 tokens are those
at the root that was found: `_at_root`. Each row also has the error of plain JAX in float32.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_tolerances import TOKENS, slope_error, value_error
from ggem_jax.pooling import ggem_pool, norm_ggem_pool, superglobal_pool

MAPS = 5e-6  # relative error of regional GeM

# batch, tokens, channels, exponents
SHAPES = [(4, 196, 768, 12), (3, 257, 1024, 16), (5, 33, 100, 4), (2, 1369, 1152, 16)]
SMALL = [(2, 9, 12, 3), (1, 33, 20, 4)]
EXPONENTS = (1.0, 3.0, 100.0, 1000.0)
OPERATIONS = ("ggem", "norm_ggem")


def checks(implementation: str, small: bool) -> Iterator[dict[str, Any]]:
    """Yields a row for each check.

    Args:
        implementation: Implementation to check, "triton", "interpret" or "xla".
        small: Whether shapes are small, for the interpreter, which is slow.
    """
    for check in (
        basic_checks(implementation, small) | further_checks(implementation, small)
    ).values():
        yield from check()


def basic_checks(
    implementation: str, small: bool
) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """Returns the checks that must hold before anything is timed, by name.

    Each yields its rows. The arguments are those of `checks`.
    """
    shape = (SMALL if small else SHAPES)[0]
    cases = [
        (operation, shape, dtype, p)
        for operation in OPERATIONS
        for dtype in ("float32", "bfloat16")
        for p in (3.0, 1000.0)
    ]
    found = dict(_named(*case, implementation) for case in cases)
    for operation in OPERATIONS:
        found[f"{operation}, run again and again"] = partial(
            _the_same_every_time, operation, shape, implementation, runs=3 if small else 100
        )
    for dtype in ("float32", "bfloat16"):
        found[f"superglobal, {dtype}"] = partial(
            maps_against_float64,
            (1, 9, 11, 20) if small else (2, 32, 22, 2048),
            dtype,
            implementation,
        )
    return found


def further_checks(
    implementation: str, small: bool
) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """Returns the other checks by name: many elements, masks, sign rules, sizes, dtypes, p.

    Each yields its rows. The arguments are those of `checks`.
    """
    shape = (SMALL if small else SHAPES)[0]
    found: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {}
    few, copies = (shape, 3) if small else ((30, 1024, 768, 12), 100)
    for operation in OPERATIONS:
        found[f"{operation}, {copies} x {few[:3]}"] = partial(
            _many_copies, operation, few, copies, implementation
        )
    cases: list[tuple[str, tuple[int, ...], str, float, dict[str, Any]]] = []
    for operation in OPERATIONS:
        cases += [
            (operation, shape, dtype, 3.0, {"masked": True}) for dtype in ("float32", "bfloat16")
        ]
        rules = ("abs", "signed", "shift") if operation == "ggem" else ("abs", "signed")
        cases += [
            (operation, shape, "float32", 3.0, {"negatives": negatives}) for negatives in rules
        ]
        cases += [(operation, shape, "float16", 3.0, {})]
    for size in (
        1e37 if small else 1e38,
        1e30,
        1e-30,
    ):  # the reciprocal of 1e38 is below the normal numbers, which processes of XLA round to zero
        cases += [("ggem", shape, "float32", 3.0, {"size": size})]
    for shape in SMALL if small else SHAPES:
        for dtype in ("float32", "bfloat16"):
            cases += [
                (operation, shape, dtype, p, {})
                for p in (EXPONENTS[1::2] if small else EXPONENTS)
                for operation in OPERATIONS
            ]
    found |= dict(_named(*case, implementation, **options) for *case, options in cases)
    basic = basic_checks(implementation, small)
    return {name: check for name, check in found.items() if name not in basic}


def default_checks(kernels: bool) -> Iterator[dict[str, Any]]:
    """Yields a row for each pooling: whether a call that asks for nothing becomes a kernel.

    Args:
        kernels: Whether it should, as on an NVIDIA GPU.
    """
    for operation in OPERATIONS:
        arguments, _ = _arguments(operation, SMALL[0], "float32", 3.0)
        text = jax.jit(_pool_of(operation)).lower(*arguments).compile().as_text()
        found = 'custom_call_target="triton_kernel_call' in text
        what = f"without implementation=, {'a kernel' if found else 'plain JAX'} is compiled"
        about = {"shape": SMALL[0][:3], "dtype": "float32", "what": what}
        yield _row(operation, about, float(found != kernels), 0)


def _named(
    operation: str, shape: tuple[int, ...], dtype: str, p: float, implementation: str, **options
) -> tuple[str, Callable]:
    name = ", ".join(
        [
            operation,
            str(shape[:3]),
            dtype,
            f"p = {p:g}",
            *(f"{option} {value}" for option, value in options.items()),
        ]
    )
    return name, partial(against_float64, operation, shape, dtype, p, implementation, **options)


def _pool_of(operation: str, **options) -> Callable:
    return partial({"ggem": ggem_pool, "norm_ggem": norm_ggem_pool}[operation], **options)


def _arguments(
    operation: str, shape: tuple[int, ...], dtype: str, p: float, size: float = 1.0
) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws tokens and parameters as the kernel sees them, and a cotangent."""
    b, n, d, groups = shape
    rng = np.random.default_rng(b * n * d)
    tokens = np.array(jnp.asarray(size * np.clip(rng.normal(0.5, 1, (b, n, d)), -3, 3), dtype))
    exponents = np.asarray(p * np.linspace(1, 1.3, groups), np.float32)
    norm = (
        [rng.normal(1, 0.3, d).astype(np.float32), rng.normal(0.2, 0.3, d).astype(np.float32)]
        if operation == "norm_ggem"
        else []
    )
    return [tokens, *norm, exponents], np.array(jnp.asarray(rng.normal(size=(b, d)), dtype))


def against_float64(
    operation: str,
    shape: tuple[int, ...],
    dtype: str,
    p: float,
    implementation: str,
    *,
    negatives: str = "clamp",
    masked: bool = False,
    size: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Yields a row for the value and for each gradient of a pooling.

    Args:
        operation: One of `OPERATIONS`.
        shape: Images, tokens, channels and exponents.
        dtype: Dtype of the tokens.
        p: The lowest exponent; the highest is 1.3 times as large.
        implementation: As in `checks`.
        negatives: The sign rule.
        masked: Whether about 3 of 10 tokens are left out.
        size: Factor of the tokens.
    """
    arguments, cotangent = _arguments(operation, shape, dtype, p, size)
    if size > 1e36:
        cotangent *= cotangent.dtype.type(
            1e-3
        )  # else the gradient of p, a sum over images and channels, would exceed float32
    mask = None
    if masked:
        mask = np.random.default_rng(1).random(shape[:2]) < 0.7
        mask[:, 0] = True
    options = {"negatives": negatives, "eps": 1e-36 if size < 1 else 1e-6}

    def result(name, arguments, cotangent):
        return _numbers(
            _value_and_slopes(operation, implementation=name, **options)(arguments, mask, cotangent)
        )

    doubles = [np.asarray(argument, np.float64) for argument in arguments]

    def exact_at(found):
        """Value and gradients in float64; for float32 tokens, gradients at the root found."""
        with jax.enable_x64(True):
            exact = result("xla", doubles, np.asarray(cotangent, np.float64))
            if dtype != "float32" or negatives == "shift":
                return exact
            scaled, by_p = _at_root(
                exact[0], found[0], np.repeat(doubles[-1], shape[2] // shape[3]), cotangent
            )
            _, *slopes = result("xla", doubles, scaled)
        by_root = by_p.reshape(shape[0], shape[3], -1).sum(axis=(0, 2))
        return [exact[0], *slopes[:-1], slopes[-1] + by_root]

    ours, plain = result(implementation, arguments, cotangent), result("xla", arguments, cotangent)
    exact, exact_of_plain = exact_at(ours), exact_at(plain)
    largest_p = 1.3 * p
    for i, name in enumerate(
        ["value", "tokens", *(["scale", "bias"] if operation == "norm_ggem" else []), "p"]
    ):
        about_tokens = operation, shape[1], largest_p, dtype
        allowed = slope_error(*about_tokens, of_p=name == "p") if i else value_error(*about_tokens)
        about = {
            "shape": shape[:3],
            "dtype": dtype,
            "negatives": negatives,
            "masked": masked,
            "p": p,
            "size": size,
        }
        yield _row(
            operation,
            about | {"what": name},
            _error(ours[i], exact[i]),
            allowed,
            _error(plain[i], exact_of_plain[i]),
        )


def _at_root(
    exact: np.ndarray, found: np.ndarray, p: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what makes gradients at the exact root those at the root that was found.

    Those of the tokens are cotangent / count (x / root)^(p - 1): (exact / found)^(p - 1) as large.
    Those of p, cotangent root / p mean (x / root)^p log(x / root), are too, and the logarithm adds
    cotangent exact / p log(exact / found).

    Args:
        exact: The exact roots, `(b, d)` in float64.
        found: The roots that were found, `(b, d)`.
        p: Exponents, `(d,)`.
        cotangent: Cotangents of the roots, `(b, d)`.

    Returns:
        The cotangents with that factor, and what is added to the gradient of p, `(b, d)` both.
    """
    some = (exact != 0) & (found != 0)
    ratio = np.where(some, np.abs(exact), 1.0) / np.where(some, np.abs(found), 1.0)
    scaled = cotangent * ratio ** (p - 1)
    return scaled, scaled * exact / p * np.log(ratio)


@cache
def _value_and_slopes(operation: str, **options) -> Callable:
    """Returns a program that is compiled once for each shape, for every p."""

    @jax.jit
    def program(arguments, mask, cotangent):
        value, pull = jax.vjp(_pool_of(operation, mask=mask, **options), *arguments)
        return value, *pull(cotangent)

    return program


def _numbers(arrays) -> list[np.ndarray]:
    return [np.asarray(array, np.float64) for array in arrays]


def _error(ours: np.ndarray, exact: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest entry of its row; NaN is infinite."""
    ours, exact = (
        array.reshape(len(array), -1) if array.ndim > 1 else array[None] for array in (ours, exact)
    )
    largest = np.maximum(np.max(np.abs(exact), axis=1, keepdims=True), 1e-300)
    return float(np.nan_to_num(np.max(np.abs(ours - exact) / largest), nan=np.inf))


def _the_same_every_time(
    operation: str, shape: tuple[int, ...], implementation: str, runs: int
) -> Iterator[dict[str, Any]]:
    arguments, cotangent = _arguments(operation, shape, "bfloat16", 3.0)
    pool = _pool_of(operation, implementation=implementation)
    step = jax.jit(
        lambda *arrays: jax.value_and_grad(
            lambda *a: jnp.sum(pool(*a) * cotangent), tuple(range(len(arrays)))
        )(*arrays)
    )
    first, others = step(*arguments), [step(*arguments) for _ in range(runs - 1)]
    pairs = [
        (a, b)
        for other in others
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    ]
    different = sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)
    yield _row(
        operation,
        {"shape": shape[:3], "dtype": "bfloat16", "what": f"{runs} runs, arrays that differ"},
        different,
        0,
    )


def maps_against_float64(
    shape: tuple[int, ...], dtype: str, implementation: str
) -> Iterator[dict[str, Any]]:
    """Yields a row for SuperGlobal's pooling of maps `(images, h, w, d)`, as after a ReLU."""
    maps = np.array(jnp.asarray(np.maximum(np.random.default_rng(0).normal(size=shape), 0), dtype))
    with jax.enable_x64(True):
        exact = np.asarray(superglobal_pool(np.asarray(maps, np.float64), implementation="xla"))
    ours, plain = (
        np.asarray(jax.jit(partial(superglobal_pool, implementation=name))(maps), np.float64)
        for name in (implementation, "xla")
    )
    yield _row(
        "superglobal",
        {"shape": shape, "dtype": dtype, "what": "value"},
        _error(ours, exact),
        MAPS + TOKENS[dtype],
        _error(plain, exact),
    )


def _many_copies(
    operation: str, shape: tuple[int, ...], copies: int, implementation: str
) -> Iterator[dict[str, Any]]:
    """Checks more than 2^31 elements.

    Repeated images must give the same bits each time, and up to rounding what they give alone: the
    fused norm adds up the tokens of few images in another order, shared by several programs.
    """
    arguments, cotangent = _arguments(operation, shape, "bfloat16", 3.0)
    pool = _pool_of(operation, implementation=implementation)

    def value_and_slope(tokens, *parameters):
        value, pull = jax.vjp(lambda x: pool(x, *parameters), tokens)
        return value, pull(jnp.tile(cotangent, (len(tokens) // len(cotangent), 1)))[0]

    @jax.jit
    def alone_first_and_different(tokens, *parameters):
        one = value_and_slope(tokens, *parameters)
        many = [
            a.reshape(copies, *b.shape)
            for a, b in zip(
                value_and_slope(jnp.tile(tokens, (copies, 1, 1)), *parameters), one, strict=True
            )
        ]
        return one, [a[0] for a in many], [jnp.any(a != a[:1]) for a in many]

    alone, first, different = alone_first_and_different(*arguments)
    about = {"shape": (copies * shape[0], *shape[1:3]), "dtype": "bfloat16", "p": 3.0}
    for name, limit, a, b, differs in zip(
        ("value", "tokens"),
        (value_error, slope_error),
        alone,
        first,
        different,
        strict=True,
    ):
        yield _row(
            operation,
            about | {"what": f"{name}, a copy that differs from the first"},
            float(differs),
            0,
        )
        error = _error(*_numbers([b, a]))
        yield _row(
            operation,
            about | {"what": f"{name}, the first copy against {shape[0]} images"},
            error,
            limit(operation, shape[1], 1.3 * 3.0, "bfloat16"),
        )


def _row(
    operation: str,
    about: dict[str, Any],
    error: float,
    allowed: float,
    plain_error: float | None = None,
) -> dict[str, Any]:
    columns = {
        "operation": operation,
        "shape": "",
        "dtype": "",
        "negatives": "clamp",
        "masked": False,
        "p": "",
        "size": 1.0,
        "what": "",
    } | about
    columns["shape"] = " x ".join(map(str, columns["shape"]))
    shown = {
        "error": f"{error:.2e}",
        "xla_error": "" if plain_error is None else f"{plain_error:.2e}",
        "allowed": f"{allowed:.2e}",
    }
    return columns | shown | {"passed": error <= allowed}
