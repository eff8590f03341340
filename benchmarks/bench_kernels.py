"""Checks and times the kernels on an NVIDIA GPU in one call: python -m benchmarks.bench_kernels

In each group, taking turns on the same inputs: our function as users call it; XLA from the formula as papers print it, under autodiff; XLA from our
closed-form gradient; PyTorch, eager and compiled, where it is installed; and a copy of as many bytes, which is the ceiling. A contestant works
through buffers that together are four times the L2 cache and more, so that each call finds its tokens in memory; a timing is that of at least 100
calls, handed to the device in a row, from the first to the last. `host_share` is the part of it that the host took to hand them over: near 1 would
mean that the host was timed and not the device. Rows go to benchmarks/results/, each as soon as it is there; `benchmarks.plot_kernels` draws them.

Without a GPU: --dry goes through all of it on the CPU with small shapes, --check runs the numerics in Triton's interpreter (TRITON_INTERPRET=1).
"""

import argparse
import contextlib
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room, too
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.kernel_numerics import checks
from benchmarks.record import RESULTS, append, machine
from ggem_jax.kernels import launch
from ggem_jax.models.vit import GGeM, ViT, vit_config
from ggem_jax.pooling import ggem_pool, norm_ggem_pool, superglobal_pool
from train.throughput import peak_flops, training_flops

_COLD_BYTES = 4 * 64 * 2**20  # four times the L2 cache of the largest of these GPUs: 50 MB of an H100, 60 MB of an H200
_CALLS = 100  # at least so many in one timing


@dataclass(frozen=True)
class Case:
    """Tokens of a published model at a batch size."""

    name: str
    batch: int
    tokens: int
    channels: int
    groups: int
    dtype: str = "bfloat16"

    @property
    def token_bytes(self) -> int:
        return self.batch * self.tokens * self.channels * jnp.dtype(self.dtype).itemsize


S16, B16, L16 = Case("S/16 at 224 px", 256, 196, 384, 6), Case("B/16 at 224 px", 256, 196, 768, 12), Case("L/16 at 224 px", 256, 196, 1024, 16)
B16_384, L14_518 = Case("B/16 at 384 px", 128, 576, 768, 12), Case("L/14 at 518 px", 64, 1369, 1024, 16)
B16_FLOAT32 = Case("B/16 at 224 px", 256, 196, 768, 12, "float32")
DRY = Case("dry", 4, 9, 12, 3)


def formula(tokens, p, eps=1e-6):
    """GGeM as papers print it, with the powers in float32 as under mixed precision."""
    b, n, d = tokens.shape
    x = jnp.maximum(tokens.astype(jnp.float32), eps).reshape(b, n, len(p), -1)
    return (jnp.mean(x ** p[:, None], axis=1) ** (1 / p[:, None])).reshape(b, d).astype(tokens.dtype)


def normed(tokens, scale, bias):
    """Flax's LayerNorm, as ViTs end with it."""
    return nn.LayerNorm(epsilon=1e-6, dtype=tokens.dtype).apply({"params": {"scale": scale, "bias": bias}}, tokens)


# By operation and contestant: functions of tokens and parameters. The first is ours as users call it.
JAX_CONTESTANTS: dict[str, dict[str, Callable]] = {
    "ggem": {"ours": ggem_pool, "xla formula": formula, "xla closed form": partial(ggem_pool, implementation="xla")},
    "norm_ggem": {
        "ours": norm_ggem_pool,
        "xla formula": lambda x, scale, bias, p: formula(normed(x, scale, bias), p),
        "xla closed form": lambda x, scale, bias, p: ggem_pool(normed(x, scale, bias), p, implementation="xla"),
        "xla norm, our pooling": lambda x, scale, bias, p: ggem_pool(normed(x, scale, bias), p),
    },
}


def torch_pool(torch, operation: str) -> Callable:
    """The formula in PyTorch."""

    def pool(x, *parameters):
        *norm, p = parameters
        if norm:
            x = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], *norm, 1e-6).to(x.dtype)
        b, n, d = x.shape
        grouped = x.float().clamp(min=1e-6).view(b, n, len(p), -1)
        return grouped.pow(p[:, None]).mean(1).pow(1 / p[:, None]).reshape(b, d).to(x.dtype)

    return pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, in this order: %(default)s")
    parser.add_argument("--budget", type=float, default=480, help="seconds; what would start later is left out and named")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with small shapes; no row is kept")
    parser.add_argument("--check", action="store_true", help="the numerics alone, in Triton's interpreter; no row is kept")
    options = parser.parse_args()
    sections = options.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        sys.exit(f"--sections must be of {', '.join(SECTIONS)}, not {', '.join(sorted(unknown))}")
    if options.dry or options.check:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), options.budget, 2, dry=True, implementation="interpret" if options.check else "xla")
            sys.exit(bench.run(["numerics"] if options.check else sections))
    if not launch.runs_here():
        found = f"jax-triton {'works' if launch.available() else 'is missing or finds no CUDA'} and JAX runs on {jax.default_backend()}"
        print(f"timing kernels needs an NVIDIA GPU, a JAX with CUDA and jax-triton; here {found}: --dry and --check need none", file=sys.stderr)
        sys.exit(2)
    sys.exit(Bench(RESULTS, options.budget, options.rounds).run(sections))


class Bench:
    """One run: where its rows go and how much time is left."""

    def __init__(self, folder: Path, budget: float, rounds: int, *, dry: bool = False, implementation: str = "triton"):
        self.folder, self.rounds, self.dry, self.implementation = folder, rounds, dry, implementation
        self.ends, self.failed = time.monotonic() + budget, False
        self.about = machine() | {"driver": _driver()} | {name: _version(name) for name in ("triton", "jax_triton", "torch")}

    def run(self, sections: list[str]) -> int:
        """Exit code: 1 if a check failed."""
        for name in sections:
            self.section = name
            began = time.monotonic()
            SECTIONS[name](self)
            print(f"section {name}: {time.monotonic() - began:.0f} s", flush=True)
        return int(self.failed)

    def time_left(self, what: str) -> bool:
        if time.monotonic() < self.ends:
            return True
        print(f"no time left for {what}", flush=True)
        return False

    def add(self, table: str, row: dict[str, Any]) -> None:
        append(table, self.about | row, self.folder)

    # Sections

    def numerics(self) -> None:
        for row in checks(self.implementation, small=self.dry):
            self.failed |= not row["passed"]
            self.add("kernel_numerics", row)

    def poolings(self, operation: str, cases: list[Case], compiled_torch: bool) -> None:
        for case in [DRY] if self.dry else cases:
            if not self.time_left(f"{operation}, {case.name}, {case.dtype}"):
                continue
            for stage, calls, count in pooling_calls(operation, case, compiled_torch, self.dry):
                self.measure(operation, case.name, (case.batch, case.tokens, case.channels), case.dtype, stage, calls, count)

    def maps(self) -> None:
        shapes = [(2, 6, 7, 8)] if self.dry else [(1, 32, 22, 2048), (8, 32, 22, 2048), (64, 14, 14, 768)]
        for shape in shapes:
            if not self.time_left(f"maps {shape}"):
                continue
            maps = [
                jax.nn.relu(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)) for i in range(_buffers(2 * int(np.prod(shape)), self.dry))
            ]
            moved = 2 * int(np.prod(shape)) + 4 * shape[0] * shape[-1]
            calls = {
                name: _over_buffers(maps, partial(superglobal_pool, implementation=implementation))
                for name, implementation in (("ours", None), ("xla closed form", "xla"))
            }
            self.measure("superglobal", "map", shape, "bfloat16", "forward", calls, len(maps), moved)

    def training(self) -> None:
        """One step of ViT-B/16 with a learned GGeM, AdamW and a thousand classes."""
        config = vit_config("B/16", dtype="bfloat16") if not self.dry else vit_config("Ti/16", image=32, width=24, depth=1, heads=3, mlp_width=32)
        batch, steps = (4, 1) if self.dry else (256, 10)
        calls = {
            "fused norm and pooling": _training(config, batch, steps, fused_norm=True, kernels=True),
            "pooling alone": _training(config, batch, steps, fused_norm=False, kernels=True),
            "no kernel": _training(config, batch, steps, fused_norm=False, kernels=False),
        }
        times = _timed(calls, self.rounds)
        flops, peak = training_flops(config, 1000), peak_flops()[0]
        for name, seconds in times.items():
            middle = statistics.median(s for s, _ in seconds)
            speed = steps * batch / middle
            self.add(
                "kernel_training",
                {"model": "ViT-B/16 at 224 px", "dtype": config.dtype, "batch": batch, "contestant": name, "ms": f"{1e3 * middle / steps:.2f}"}
                | {"images_per_s": f"{speed:.0f}", "mfu": f"{speed * flops / peak:.3f}"}
                | {"over_no_kernel": f"{statistics.median(s for s, _ in times['no kernel']) / middle:.4f}"},
            )

    # One group

    def measure(
        self,
        operation: str,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        stage: str,
        calls: dict[str, Callable],
        count: int,
        moved: int | None = None,
    ) -> None:
        """Times contestants that each take `count` buffers in a call, and a copy of as many bytes."""
        moved = moved or moved_bytes(operation, stage, shape, dtype)
        times = _timed(calls | _copies(moved, _buffers(moved // 2, self.dry)), self.rounds, 2 if self.dry else _CALLS)
        of = {contestant: statistics.median(s for s, _ in seconds) for contestant, seconds in times.items()}
        ceiling = moved / min(of["copy"], of["negated copy"])
        for contestant, seconds in times.items():
            low, middle, high = statistics.quantiles([s for s, _ in seconds], n=4)
            self.add(
                "kernels",
                {"section": self.section, "operation": operation, "name": name, "shape": " x ".join(map(str, shape)), "dtype": dtype, "stage": stage}
                | {"contestant": contestant, "buffers": count, "us": f"{1e6 * middle:.2f}", "spread": f"{(high - low) / middle:.3f}"}
                | {"host_share": f"{max(h for _, h in seconds):.2f}", "bytes": moved, "gb_per_s": f"{moved / middle / 1e9:.0f}"}
                | {"fraction_of_copy": f"{moved / middle / ceiling:.3f}", "over_ours": f"{middle / of['ours']:.3f}"},
            )


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "numerics": Bench.numerics,
    "ggem": partial(Bench.poolings, operation="ggem", cases=[B16, L16], compiled_torch=True),
    "norm": partial(Bench.poolings, operation="norm_ggem", cases=[B16, L16], compiled_torch=True),
    "training": Bench.training,
    "shapes": lambda bench: [
        bench.poolings(operation, [case], compiled_torch=False) for case in (S16, L14_518, B16_384) for operation in ("ggem", "norm_ggem")
    ],
    "float32": lambda bench: [bench.poolings(operation, [B16_FLOAT32], compiled_torch=False) for operation in ("ggem", "norm_ggem")],
    "maps": Bench.maps,
}


def moved_bytes(operation: str, stage: str, shape: tuple[int, ...], dtype: str) -> int:
    """What the algorithm must read and write: the tokens once forward; tokens and their slopes once backward; roots, and statistics of the norm."""
    b, n, d = shape
    tokens, per_channel, per_token = b * n * d * jnp.dtype(dtype).itemsize, 4 * b * d, 4 * b * n * 2 * (operation == "norm_ggem")
    forward = tokens + per_channel + per_token
    backward = 2 * tokens + per_channel * (5 if operation == "norm_ggem" else 3) + per_token
    return {"forward": forward, "backward": backward, "both": forward + backward}[stage]


def _buffers(size: int, dry: bool = False) -> int:
    """How many buffers of so many bytes a contestant works through."""
    if dry:
        return 2
    return min(max(-(-_COLD_BYTES // max(size, 1)), 4), 128)


def pooling_calls(operation: str, case: Case, compiled_torch: bool, dry: bool) -> Iterator[tuple[str, dict[str, Callable], int]]:
    """Stage by stage: its name, calls by contestant, and through how many buffers each goes. All compute the same, or it is an error."""
    count = _buffers(case.token_bytes, dry)
    shape = (case.batch, case.tokens, case.channels)
    draw = jax.jit(lambda i: 0.5 + jax.random.normal(jax.random.key(i), shape, case.dtype))
    buffers = [draw(i) for i in range(count)]
    p, norm = jnp.linspace(2.5, 4, case.groups), [jnp.linspace(0.8, 1.2, case.channels), jnp.linspace(-0.1, 0.4, case.channels)]
    parameters = [*(norm if operation == "norm_ggem" else []), p]
    cotangent = jax.random.normal(jax.random.key(1), (case.batch, case.channels), case.dtype)
    stages = {name: _stages_in_jax(pool, buffers, parameters, cotangent) for name, pool in JAX_CONTESTANTS[operation].items()}
    torch = _torch()
    if torch is not None:
        stages["torch eager"] = _stages_in_torch(torch, torch_pool(torch, operation), buffers, parameters, cotangent)
        if compiled_torch and torch.cuda.is_available():
            pool = torch.compile(torch_pool(torch, operation), dynamic=False)
            stages["torch compile"] = _stages_in_torch(torch, pool, buffers, parameters, cotangent)
    _agree({name: of["both"]() for name, of in stages.items()}, 0.05 if case.dtype == "bfloat16" else 1e-3)
    for stage in ("forward", "backward", "both"):
        yield stage, {name: of[stage] for name, of in stages.items()}, count


def _over_buffers(buffers, function, *rest) -> Callable:
    """A call of one compiled program that takes each buffer once; it returns at once, with results that will be there."""
    program = jax.jit(lambda buffers, *rest: [function(buffer, *rest) for buffer in buffers])
    return _Call(partial(program, buffers, *rest), len(buffers))


@dataclass(frozen=True)
class _Call:
    """`run` starts the work on `count` buffers."""

    run: Callable
    count: int
    wait: Callable = jax.block_until_ready

    def __call__(self):
        return self.run()


def _stages_in_jax(pool, buffers, parameters, cotangent) -> dict[str, Callable]:
    pulls = jax.jit(lambda buffers, *rest: [jax.vjp(pool, x, *rest)[1] for x in buffers])(buffers, *parameters)

    def value_and_slopes(x, cotangent, *rest):
        value, pull = jax.vjp(pool, x, *rest)
        return value, pull(cotangent)

    return {
        "forward": _over_buffers(buffers, pool, *parameters),
        "backward": _over_buffers(pulls, lambda pull, cotangent: pull(cotangent), cotangent),
        "both": _over_buffers(buffers, value_and_slopes, cotangent, *parameters),
    }


def _stages_in_torch(torch, pool, buffers, parameters, cotangent) -> dict[str, Callable]:
    to_torch = torch.from_dlpack if torch.cuda.is_available() else lambda a: torch.tensor(np.asarray(a, np.float32)).to(getattr(torch, a.dtype.name))
    xs, rest, g = ([to_torch(a).detach().requires_grad_() for a in arrays] for arrays in (buffers, parameters, [cotangent]))
    kept = [pool(x, *rest) for x in xs]
    slopes = torch.autograd.grad

    def forward():
        with torch.no_grad():
            return [pool(x, *rest) for x in xs]

    def backward():
        return [slopes(value, (x, *rest), g[0], retain_graph=True) for value, x in zip(kept, xs, strict=True)]

    def both():
        values = [pool(x, *rest) for x in xs]
        return [(value.detach(), slopes(value, (x, *rest), g[0])) for value, x in zip(values, xs, strict=True)]

    wait = (lambda _: torch.cuda.synchronize()) if torch.cuda.is_available() else (lambda _: None)
    return {stage.__name__: _Call(stage, len(xs), wait) for stage in (forward, backward, both)}


def _agree(results: dict[str, Any], tolerance: float) -> None:
    """Values and slopes of the first buffer must agree before anything is timed."""

    def numbers(result) -> list[np.ndarray]:
        value, slopes = result[0]
        return [np.asarray(a.float().cpu() if hasattr(a, "cpu") else a, np.float32) for a in (value, *slopes)]

    expected = numbers(results["ours"])
    for name, result in results.items():
        for i, (a, b) in enumerate(zip(numbers(result), expected, strict=True)):
            if not np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b)):
                raise ArithmeticError(f"{name} and ours differ in result {i}: {np.max(np.abs(a - b))} of {np.max(np.abs(b))}")


def _copies(moved: int, count: int) -> dict[str, Callable]:
    """Copies that read and write `moved` bytes together: as the driver does them, and by a kernel of XLA."""
    buffers = [jnp.full(max(moved // 4, 1), i, jnp.bfloat16) for i in range(count)]
    return {"copy": _over_buffers(buffers, jnp.copy), "negated copy": _over_buffers(buffers, jnp.negative)}


def _timed(calls: dict[str, Callable], rounds: int, least_calls: int = 1) -> dict[str, list[tuple[float, float]]]:
    """Seconds per buffer and the host's share in them, round by round; contestants take turns, and the first round is thrown away."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            repeats = -(-least_calls // call.count)
            call.wait(call())
            began = time.perf_counter()
            for _ in range(repeats):
                result = call()
            handed_over = time.perf_counter()
            call.wait(result)
            ended = time.perf_counter()
            del result
            times[name].append(((ended - began) / (repeats * call.count), (handed_over - began) / (ended - began)))
    return {name: seconds[1:] for name, seconds in times.items()}


def _training(config, batch: int, steps: int, *, fused_norm: bool, kernels: bool) -> Callable:
    """A call that takes so many steps."""
    model, transform = ViT(config, GGeM(), 1000, fused_norm=fused_norm), optax.adamw(1e-3)
    images = jax.random.normal(jax.random.key(1), (batch, config.image, config.image, 3), config.dtype)
    labels = jnp.arange(batch) % 1000
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]

    def loss_of(params):
        logits = model.apply({"params": params}, images, train=True).logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        loss, slopes = jax.value_and_grad(loss_of)(params)
        updates, state = transform.update(slopes, state, params)
        return optax.apply_updates(params, updates), state, loss

    carry = [params, transform.init(params)]

    def call():
        with contextlib.nullcontext() if kernels else mock.patch.object(launch, "available", return_value=False):  # matters when it is traced
            for _ in range(steps):
                *carry[:], loss = step(*carry)
        return loss

    return _Call(call, 1)


def _torch():
    try:
        import torch
        import torch._functorch.config
    except ImportError:
        return None
    torch._functorch.config.donated_buffer = False  # the backward pass is timed again and again on the same graph
    return torch


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
