"""The contestants of `benchmarks.bench_kernels`: poolings in JAX and PyTorch, and their calls.

A contestant works through several buffers, so that each call finds its tokens in memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ggem_jax.pooling import ggem_pool, norm_ggem_pool

_COLD_BYTES = (
    4 * 64 * 2**20
)  # four times the L2 cache of the largest of these GPUs: 50 MB of an H100, 60 MB of an H200
# Residuals of the norm and the formula are 24 bytes for each element, those of all JAX contestants
# 54: for so many bytes of bfloat16 34 GB. PyTorch keeps 10 GB. JAX takes at most three quarters of
# the 80 GB of an H100.
_MOST_BYTES = 1.25e9
_MOST_BUFFERS = 16  # in one program, which grows with them


@dataclass(frozen=True)
class Case:
    """Tokens of a published model at a batch size."""

    name: str  # of the model and its image size
    batch: int
    tokens: int  # of an image
    channels: int  # of a token
    groups: int  # exponents
    dtype: str = "bfloat16"

    @property
    def token_bytes(self) -> int:
        """Bytes of all tokens of a batch."""
        return self.batch * self.tokens * self.channels * jnp.dtype(self.dtype).itemsize


S16, B16, L16 = (
    Case("S/16 at 224 px", 256, 196, 384, 6),
    Case("B/16 at 224 px", 256, 196, 768, 12),
    Case("L/16 at 224 px", 256, 196, 1024, 16),
)
B16_384, L14_518 = (
    Case("B/16 at 384 px", 128, 576, 768, 12),
    Case("L/14 at 518 px", 64, 1369, 1024, 16),
)
B16_FLOAT32 = Case("B/16 at 224 px", 256, 196, 768, 12, "float32")
DRY = Case("dry", 4, 9, 12, 3)


def formula(tokens, p, eps=1e-6):
    """Returns GGeM as papers print it, with the powers in float32 as under mixed precision."""
    b, n, d = tokens.shape
    x = jnp.maximum(tokens.astype(jnp.float32), eps).reshape(b, n, len(p), -1)
    return (
        (jnp.mean(x ** p[:, None], axis=1) ** (1 / p[:, None])).reshape(b, d).astype(tokens.dtype)
    )


def normed(tokens, scale, bias):
    """Returns Flax's LayerNorm of the tokens, as ViTs end with it."""
    return nn.LayerNorm(epsilon=1e-6, dtype=tokens.dtype).apply(
        {"params": {"scale": scale, "bias": bias}}, tokens
    )


# Operation -> contestant -> function of tokens and parameters. The first one is ours as users call
# it.
JAX_CONTESTANTS: dict[str, dict[str, Callable]] = {
    "ggem": {
        "ours": ggem_pool,
        "xla formula": formula,
        "xla closed form": partial(ggem_pool, implementation="xla"),
    },
    "norm_ggem": {
        "ours": norm_ggem_pool,
        "xla formula": lambda x, scale, bias, p: formula(normed(x, scale, bias), p),
        "xla closed form": lambda x, scale, bias, p: ggem_pool(
            normed(x, scale, bias), p, implementation="xla"
        ),
        "xla norm, our pooling": lambda x, scale, bias, p: ggem_pool(normed(x, scale, bias), p),
    },
}


def torch_pool(torch) -> Callable:
    """Returns the formula in PyTorch, after the norm where there are a scale and a bias."""

    def pool(x, *parameters):
        *norm, p = parameters
        if norm:
            x = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], *norm, 1e-6).to(x.dtype)
        b, n, d = x.shape
        grouped = x.float().clamp(min=1e-6).view(b, n, len(p), -1)
        return grouped.pow(p[:, None]).mean(1).pow(1 / p[:, None]).reshape(b, d).to(x.dtype)

    return pool


def moved_bytes(operation: str, stage: str, shape: tuple[int, ...], dtype: str) -> int:
    """Returns the bytes that the algorithm must read and write.

    These are the tokens once in the forward pass, the tokens and their gradients once in the
    backward pass, the roots, and the statistics of the norm.

    Args:
        operation: "ggem" or "norm_ggem".
        stage: "forward", "backward" or "both".
        shape: Batch, tokens and channels.
        dtype: Of the tokens and their gradients.
    """
    b, n, d = shape
    tokens, per_channel, per_token = (
        b * n * d * jnp.dtype(dtype).itemsize,
        4 * b * d,
        4 * b * n * 2 * (operation == "norm_ggem"),
    )
    forward = tokens + per_channel + per_token
    backward = 2 * tokens + per_channel * (5 if operation == "norm_ggem" else 3) + per_token
    return {"forward": forward, "backward": backward, "both": forward + backward}[stage]


def count_buffers(size: int, dry: bool = False) -> int:
    """Returns the number of buffers of a size that a contestant works through.

    From 17 MB each, the buffers have `_COLD_BYTES` together.
    """
    return 2 if dry else int(min(max(_MOST_BYTES // size, 1), _MOST_BUFFERS))


@dataclass(frozen=True)
class Inputs:
    """The inputs that all contestants of a group share."""

    buffers: list[jax.Array]  # tokens (batch, tokens, channels) each
    parameters: list[jax.Array]  # scale and bias of the norm, if there is one, and exponents
    cotangent: jax.Array  # (batch, channels)

    @classmethod
    def drawn(cls, operation: str, case: Case, count: int) -> "Inputs":
        """Draws `count` buffers of tokens, with the parameters of the operation and a cotangent."""
        shape = (case.batch, case.tokens, case.channels)
        draw = jax.jit(lambda i: 0.5 + jax.random.normal(jax.random.key(i), shape, case.dtype))
        norm = (
            [jnp.linspace(0.8, 1.2, case.channels), jnp.linspace(-0.1, 0.4, case.channels)]
            if operation == "norm_ggem"
            else []
        )
        cotangent = jax.random.normal(jax.random.key(1), (case.batch, case.channels), case.dtype)
        return cls(
            [draw(i) for i in range(count)], [*norm, jnp.linspace(2.5, 4, case.groups)], cotangent
        )


def contestants(
    operation: str, compiled_torch: bool, dry: bool
) -> dict[str, Callable[[Inputs, str], "Call"]]:
    """Returns functions that make a call of inputs and a stage, by contestant; ours is the first.

    Args:
        operation: "ggem" or "norm_ggem".
        compiled_torch: Whether PyTorch also takes part compiled.
        dry: Whether PyTorch may run on the CPU.
    """
    makers: dict[str, Callable[[Inputs, str], Call]] = {
        name: partial(_in_jax, pool) for name, pool in JAX_CONTESTANTS[operation].items()
    }
    torch = _torch(dry)
    if torch is not None:
        makers["torch eager"] = partial(_in_torch, torch, torch_pool)
        if compiled_torch:
            makers["torch compile"] = partial(_in_torch, torch, _compiled_torch_pool)
    return makers


@dataclass(frozen=True)
class Call:
    """A call: `run` starts the work on `count` buffers, and `wait` waits for its results."""

    run: Callable
    count: int
    wait: Callable = jax.block_until_ready

    def __call__(self):
        return self.run()


def over_buffers(buffers, function, *rest) -> Call:
    """Returns one compiled program that takes each buffer once."""
    one = jax.jit(function)  # traced once for all of them
    program = jax.jit(lambda buffers, *rest: [one(buffer, *rest) for buffer in buffers])
    return Call(partial(program, buffers, *rest), len(buffers))


def _in_jax(pool, inputs: Inputs, stage: str) -> Call:
    def value_and_slopes(x, cotangent, *parameters):
        value, pull = jax.vjp(pool, x, *parameters)
        return value, pull(cotangent)

    match stage:
        case "forward":
            return over_buffers(inputs.buffers, pool, *inputs.parameters)
        case "backward":
            pull_of = jax.jit(lambda x, *parameters: jax.vjp(pool, x, *parameters)[1])
            pulls = [pull_of(x, *inputs.parameters) for x in inputs.buffers]
            return over_buffers(pulls, lambda pull, cotangent: pull(cotangent), inputs.cotangent)
        case _:
            return over_buffers(
                inputs.buffers, value_and_slopes, inputs.cotangent, *inputs.parameters
            )


def _in_torch(torch, pool_of, inputs: Inputs, stage: str) -> Call:
    on_gpu = torch.cuda.is_available()
    to_torch = (
        torch.from_dlpack
        if on_gpu
        else lambda a: torch.tensor(np.asarray(a, np.float32)).to(getattr(torch, a.dtype.name))
    )
    xs, parameters, (g,) = (
        [to_torch(a).detach().requires_grad_() for a in arrays]
        for arrays in (inputs.buffers, inputs.parameters, [inputs.cotangent])
    )
    pool, slopes = pool_of(torch), torch.autograd.grad
    kept = [(x, pool(x, *parameters)) for x in xs] if stage == "backward" else []

    def forward():
        with torch.no_grad():
            return [pool(x, *parameters) for x in xs]

    def backward():
        return [slopes(value, (x, *parameters), g, retain_graph=True) for x, value in kept]

    def value_and_slopes(x):
        value = pool(x, *parameters)
        return value.detach(), slopes(value, (x, *parameters), g)

    def both():
        return [value_and_slopes(x) for x in xs]

    wait = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    return Call({"forward": forward, "backward": backward, "both": both}[stage], len(xs), wait)


def _compiled_torch_pool(torch) -> Callable:
    # a function that was compiled for more than a few shapes would silently run as it is
    torch.compiler.reset()
    return torch.compile(torch_pool(torch), dynamic=False, fullgraph=True)


def first_result(make: Callable[[], Call]) -> tuple[Call, list[np.ndarray]]:
    """Returns a call, and what it computes of the first buffer."""
    call = make()
    result = call()
    call.wait(result)
    leaves = jax.tree.leaves(result[0])
    return call, [
        np.asarray(a.float().cpu() if hasattr(a, "cpu") else a, np.float32) for a in leaves
    ]


def find_difference(result: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> str:
    """Returns where arrays differ by more than `tolerance` of the largest entry, if they do."""
    if [a.shape for a in result] != [a.shape for a in expected]:
        return f"shapes {[a.shape for a in result]} and not {[a.shape for a in expected]}"
    pairs = [
        (np.max(np.abs(a - b)), np.max(np.abs(b))) for a, b in zip(result, expected, strict=True)
    ]
    return "; ".join(
        f"result {i} by {error:.3g} of {largest:.3g}"
        for i, (error, largest) in enumerate(pairs)
        if not error <= tolerance * largest
    )


def make_copies(moved: int, count: int) -> dict[str, Call]:
    """Returns copies that read and write `moved` bytes: by the driver, and by a kernel of XLA."""
    buffers = [jnp.full(max(moved // 4, 1), i, jnp.bfloat16) for i in range(count)]
    return {
        "copy": over_buffers(buffers, jnp.copy),
        "negated copy": over_buffers(buffers, jnp.negative),
    }


def time_call(call: Call, least_calls: int) -> tuple[float, float]:
    """Returns seconds per buffer, and the share after which the host had submitted everything."""
    repeats = -(-least_calls // call.count)
    call.wait(call())
    began = time.perf_counter()
    for _ in range(repeats):
        result = call()
    handed_over = time.perf_counter()
    call.wait(result)
    ended = time.perf_counter()
    return (ended - began) / (repeats * call.count), (handed_over - began) / (ended - began)


@cache
def _torch(dry: bool):
    """Returns PyTorch, or None where it is missing or cannot work here, which is printed once."""
    try:
        import torch
        import torch._functorch.config
    except (ImportError, OSError) as error:
        print(f"without PyTorch: {' '.join(str(error).split())[:400]}", flush=True)
        return None
    if not dry and not torch.cuda.is_available():
        print("without PyTorch: it finds no GPU", flush=True)
        return None
    if hasattr(torch._functorch.config, "donated_buffer"):
        torch._functorch.config.donated_buffer = (
            False  # the backward pass is timed again and again on the same graph
        )
    return torch
