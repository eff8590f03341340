"""Checks and times the kernels on an NVIDIA GPU in one call.

    python -m benchmarks.bench_kernels

The contestants of a group take turns on the same inputs: our function as users call it; XLA from
the formula as papers print it, under autodiff; XLA from our closed-form gradient; PyTorch, eager
and compiled, where it is installed; and a copy of as many bytes, which is the ceiling. Contestants
that cannot run, or that disagree with ours, are left out and named; the exit code is then 1.

A contestant works through buffers that together are at least four times the L2 cache, so that each
call finds its tokens in memory. They form one program. A timing covers at least 100 calls in a row,
from the first to the last. `host_share` is the share of that time after which the host had
submitted everything: where it is small, the device was timed; near 1, perhaps the host. PyTorch's
queue makes the host wait for the device when it is full, so a large share says nothing there.
`modelled_us` is what `benchmarks.model_kernels` had said of the same kernels before.

The last line sums up: checks that failed, and measured times over modelled ones. Several GPUs are
not tried.

Sections run in order of importance. A section that would start after --budget seconds is left out
and named; --sections runs it in another call. Rows go to benchmarks/results/ as soon as they are
measured; `benchmarks.plot_kernels` draws them.

Without a GPU, --dry goes through all of it on the CPU with small shapes, and --check runs the
numerics in Triton's interpreter (TRITON_INTERPRET=1).
"""

import argparse
import contextlib
import gc
import importlib.metadata
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
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

from benchmarks.kernel_numerics import basic_checks, default_checks, further_checks
from benchmarks.model_kernels import modelled_us
from benchmarks.record import RESULTS, append, machine
from ggem_jax.kernels import launch
from ggem_jax.models.vit import GGeM, ViT, vit_config
from ggem_jax.pooling import ggem_pool, norm_ggem_pool, superglobal_pool
from train.throughput import peak_flops, training_flops

_COLD_BYTES = (
    4 * 64 * 2**20
)  # four times the L2 cache of the largest of these GPUs: 50 MB of an H100, 60 MB of an H200
# Residuals of the norm and the formula are 24 bytes for each element, those of all JAX contestants
# 54: for so many bytes of bfloat16 34 GB. PyTorch keeps 10 GB. JAX takes at most three quarters of
# the 80 GB of an H100.
_MOST_BYTES = 1.25e9
_MOST_BUFFERS = 16  # in one program, which grows with them
_CALLS = 100  # at least so many in one timing
_BUDGET = 420  # the last group may take a minute: 8 minutes in all
_STAGES = ("forward", "backward", "both")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", help=f"some of {','.join(SECTIONS)}; all of them by default")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds; what would start later is left out and named ({_BUDGET} on a GPU)",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="timings of each contestant, at least 2 (%(default)s)"
    )
    parser.add_argument(
        "--dry", action="store_true", help="on the CPU, with small shapes; no row is kept"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="the numerics alone, in Triton's interpreter; no row is kept",
    )
    options = parser.parse_args()
    sections = (
        list(SECTIONS)
        if options.sections is None
        else [name.strip() for name in options.sections.split(",")]
    )
    if unknown := set(sections) - set(SECTIONS):
        sys.exit(
            f"--sections must be of {', '.join(SECTIONS)}, not"
            f" {', '.join(sorted(unknown)) or 'empty'}"
        )
    budget = (
        options.budget
        if options.budget is not None
        else math.inf
        if options.dry or options.check
        else _BUDGET
    )
    if not budget >= 0:
        sys.exit(f"--budget must be a number of seconds, 0 or more, not {budget}")
    if options.rounds < 2:
        sys.exit(f"--rounds must be at least 2, not {options.rounds}")
    if options.check and (options.dry or options.sections is not None):
        sys.exit("--check runs the numerics alone: not together with --dry or --sections")
    if options.check:
        try:
            launch.check("interpret")
        except NotImplementedError as error:
            sys.exit(f"--check: {error}")
        sections = ["basics", "numerics"]
    if options.dry or options.check:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(
                Path(folder),
                budget,
                2,
                dry=True,
                implementation="interpret" if options.check else "xla",
            )
            sys.exit(bench.run(sections))
    if not launch.runs_here():
        found = (
            f"jax-triton {'works' if launch.available() else 'is missing or finds no CUDA'} and JAX"
            f" runs on {jax.default_backend()}"
        )
        print(
            f"timing kernels needs an NVIDIA GPU, a JAX with CUDA and jax-triton; here {found}:"
            " --dry and --check need none",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(Bench(RESULTS, budget, options.rounds).run(sections))


class Bench:
    """One run of the benchmark, which knows where its rows go and how much time is left.

    Args:
        folder: Folder of the CSV files.
        budget: Seconds after which nothing new starts.
        rounds: Timings of each contestant that are kept.
        dry: Whether everything runs on the CPU with small shapes.
        implementation: Implementation that the numerics check, "triton", "interpret" or "xla".
    """

    def __init__(
        self,
        folder: Path,
        budget: float,
        rounds: int,
        *,
        dry: bool = False,
        implementation: str = "triton",
    ):
        self.folder, self.rounds, self.dry, self.implementation = (
            folder,
            rounds,
            dry,
            implementation,
        )
        self.ends, self.failed = time.monotonic() + budget, False
        self.checks: list[bool] = []  # whether each check has passed
        self.over_model: list[float] = []  # measured times over modelled ones
        self.about = (
            machine()
            | {"driver": _driver()}
            | {name: _version(name) for name in ("triton", "jax_triton", "torch")}
        )

    def run(self, sections: list[str]) -> int:
        """Runs sections in order.

        Args:
            sections: Names of `SECTIONS`.

        Returns:
            1 if a check failed, contestants disagreed or ours did not run, otherwise 0.
        """
        for name in sections:
            self.section = name
            began = time.monotonic()
            SECTIONS[name](self)
            print(f"section {name}: {time.monotonic() - began:.0f} s", flush=True)
        print(self.summary(), flush=True)
        return int(self.failed)

    def summary(self) -> str:
        """Returns how many checks failed, and how good the model of times was."""
        checks = f"{len(self.checks)} checks of numerics, {self.checks.count(False)} failed"
        if not self.over_model:
            return f"{checks}; no time to compare with the model"
        middle, ratios = statistics.median(self.over_model), sorted(self.over_model)
        return (
            f"{checks}; measured over modelled time: median {middle:.2f}, from {ratios[0]:.2f} to"
            f" {ratios[-1]:.2f} in {len(ratios)} comparisons"
        )

    def time_left(self, what: str) -> bool:
        """Returns whether there is time for more; otherwise prints what is left out."""
        if time.monotonic() < self.ends:
            return True
        print(f"no time left for {what}", flush=True)
        return False

    def attempted(self, what: str, function: Callable[[], Any], *, fails: bool = True) -> Any:
        """Returns what `function` returns, or prints the error that it raises and returns None.

        Args:
            what: Description of the attempt, for the message.
            function: The attempt.
            fails: Whether an error makes the whole run fail.
        """
        try:
            return function()
        except Exception as error:
            print(
                f"left out: {what}: {' '.join(f'{type(error).__name__}: {error}'.split())[:400]}",
                flush=True,
            )
            self.failed |= fails
            return None

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Appends a row to a CSV file, with the columns that all rows share."""
        append(table, self.about | row, self.folder)

    # Sections

    def numerics(self, checks: Callable[..., dict[str, Callable]]) -> None:
        """Runs checks of `benchmarks.kernel_numerics` and appends their rows."""
        for name, check in checks(self.implementation, small=self.dry).items():
            if self.time_left(name):
                self.check(name, check)

    def defaults(self) -> None:
        """Checks that calls that ask for no implementation are kernels, on a GPU."""
        if self.time_left("defaults"):
            self.check("defaults", partial(default_checks, kernels=not self.dry))

    def check(self, name: str, check: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Runs a check by name and appends its rows."""
        for row in self.attempted(name, lambda: list(check())) or []:
            self.checks.append(row["passed"])
            self.failed |= not row["passed"]
            self.add("kernel_numerics", row)

    def poolings(self, operation: str, cases: list[Case], compiled_torch: bool) -> None:
        """Times the contestants of an operation on each case: forward, backward and both."""
        for case in [DRY] if self.dry else cases:
            inputs = None
            for stage in _STAGES:
                about = {
                    "operation": operation,
                    "name": case.name,
                    "shape": (case.batch, case.tokens, case.channels),
                    "dtype": case.dtype,
                    "stage": stage,
                }
                if self.time_left(_named(about)):
                    inputs = inputs or Inputs.drawn(
                        operation, case, _buffers(case.token_bytes, self.dry)
                    )
                    makers = {
                        name: partial(make, inputs, stage)
                        for name, make in contestants(operation, compiled_torch, self.dry).items()
                    }
                    self.measure(
                        about, makers, moved_bytes(operation, stage, about["shape"], case.dtype)
                    )

    def maps(self) -> None:
        """Times maps of several images: 16 buffers of a single image would stay in the cache."""
        for shape in [(2, 6, 7, 8)] if self.dry else [(8, 32, 22, 2048), (64, 14, 14, 768)]:
            about = {
                "operation": "superglobal",
                "name": "map",
                "shape": shape,
                "dtype": "bfloat16",
                "stage": "forward",
            }
            if self.time_left(_named(about)):
                size = 2 * int(np.prod(shape))
                maps = [
                    jax.nn.relu(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16))
                    for i in range(_buffers(size, self.dry))
                ]
                makers = {
                    name: partial(
                        _over_buffers,
                        maps,
                        partial(superglobal_pool, implementation=implementation),
                    )
                    for name, implementation in (("ours", None), ("xla closed form", "xla"))
                }
                self.measure(about, makers, size + 4 * shape[0] * shape[-1])

    def training(self) -> None:
        """Times a step of ViT-B/16 and S/16 with a learned GGeM, AdamW and a thousand classes."""
        for variant in ("B/16", "S/16") if self.time_left("training") else ():
            self.training_of(variant)
            _freed()

    def training_of(self, variant: str) -> None:
        """Times training steps of a ViT with and without the kernels, in turns."""
        small = (
            {"image": 32, "width": 24, "depth": 1, "heads": 3, "mlp_width": 32}
            if self.dry
            else {"dtype": "bfloat16"}
        )
        config = vit_config(variant, **small)
        batch, steps = (4, 1) if self.dry else (256, 5)
        params = self.attempted(f"training of {variant}, parameters", partial(_parameters, config))
        calls = {}
        for name, (fused_norm, kernels) in {
            "fused norm and pooling": (True, True),
            "no kernel": (False, False),
            "pooling alone": (False, True),
        }.items():
            what = f"training of {variant}, {name}"
            make = partial(
                _training, config, params, batch, steps, fused_norm=fused_norm, kernels=kernels
            )
            call = params and self.time_left(what) and self.attempted(what, make)
            if call:
                calls[name] = call
        if not calls:
            return
        times = self.timed(f"training of {variant}", calls, rounds=min(self.rounds, 3))
        of = {name: statistics.median(s for s, _ in seconds) for name, seconds in times.items()}
        flops, peak = training_flops(config, 1000), peak_flops()[0]
        for name, middle in of.items():
            speed = steps * batch / middle
            self.add(
                "kernel_training",
                {
                    "model": f"ViT-{variant} at {config.image} px",
                    "dtype": config.dtype,
                    "batch": batch,
                    "contestant": name,
                    "ms": f"{1e3 * middle / steps:.2f}",
                }
                | {"images_per_s": f"{speed:.0f}", "mfu": f"{speed * flops / peak:.3f}"}
                | {
                    "over_no_kernel": f"{of['no kernel'] / middle:.4f}" if "no kernel" in of else ""
                },
            )

    # One group

    def measure(
        self, about: dict[str, Any], makers: dict[str, Callable[[], "_Call"]], moved: int
    ) -> None:
        """Times ours, the other contestants, and a copy of as many bytes.

        Args:
            about: Operation, name, shape, dtype and stage, which are columns of the rows.
            makers: Functions that make the call of each contestant, by name; ours is the first.
            moved: Bytes that the algorithm must read and write for one buffer.
        """
        what = _named(about)
        calls = self.ready(what, makers, 1e-3 if about["dtype"] == "float32" else 0.05)
        copies = calls and self.attempted(
            f"{what}, copies", partial(_copies, moved, _buffers(moved // 2, self.dry))
        )
        if copies:
            times = self.timed(what, calls | copies, 2 if self.dry else _CALLS)
            if {"ours", *copies} <= times.keys():
                self.add_times(about, times, moved, calls["ours"].count)
        del calls, copies
        _freed()

    def ready(
        self, what: str, makers: dict[str, Callable[[], "_Call"]], tolerance: float
    ) -> dict[str, "_Call"]:
        """Returns the contestants that have run once and agree with the first, which is ours.

        Args:
            what: Description of the group, for messages.
            makers: As in `measure`.
            tolerance: Largest difference, relative to the largest entry of an array.
        """
        calls: dict[str, _Call] = {}
        expected: list[np.ndarray] = []
        for name, make in makers.items():
            made = self.attempted(f"{what}, {name}", partial(_first_result, make), fails=not calls)
            if made is None and not calls:
                print(f"left out: {what}: there is nothing to compare with", flush=True)
                return {}
            if made is None:
                _freed()
                continue
            call, result = made
            expected = expected or result
            if difference := _difference(result, expected, tolerance):
                print(
                    f"left out: {what}, {name}: it does not agree with ours: {difference}",
                    flush=True,
                )
                self.failed = True
            else:
                calls[name] = call
        return calls

    def timed(
        self, what: str, calls: dict[str, "_Call"], least_calls: int = 1, rounds: int | None = None
    ) -> dict[str, list[tuple[float, float]]]:
        """Returns seconds per buffer and the host's share of them, for each round but the first.

        The contestants take turns.

        Args:
            what: Description of the group, for messages.
            calls: Calls by contestant.
            least_calls: Buffers in one timing, at least.
            rounds: Rounds that are kept; None takes those of the run.
        """
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range((rounds or self.rounds) + 1):
            for name in list(times):
                time_and_share = self.attempted(
                    f"{what}, {name}",
                    partial(_timing, calls[name], least_calls),
                    fails=not name.startswith(("xla", "torch")),
                )
                if time_and_share is None:
                    del times[name]
                else:
                    times[name].append(time_and_share)
        return {name: seconds[1:] for name, seconds in times.items()}

    def add_times(
        self,
        about: dict[str, Any],
        times: dict[str, list[tuple[float, float]]],
        moved: int,
        count: int,
    ) -> None:
        """Appends a row for each contestant of a group.

        Args:
            about: As in `measure`.
            times: Seconds per buffer and host's shares by contestant, as `timed` returns them.
            moved: As in `measure`.
            count: Buffers that a contestant works through.
        """
        of = {
            contestant: statistics.median(s for s, _ in seconds)
            for contestant, seconds in times.items()
        }
        ceiling = moved / min(of["copy"], of["negated copy"])
        name, images, dtype = about["name"], about["shape"][0], about["dtype"]
        model = modelled_us(
            self.about["device"], name, images, dtype, about["operation"], about["stage"]
        )
        if model is not None:
            measured = 1e6 * of["ours"]
            self.over_model.append(measured / model)
            print(
                f"{_named(about)}: measured {measured:.1f} us, modelled {model:.1f} us,"
                f" {measured / model:.2f} times the model",
                flush=True,
            )
        for contestant, seconds in times.items():
            low, middle, high = statistics.quantiles([s for s, _ in seconds], n=4)
            self.add(
                "kernels",
                {"section": self.section} | about | {"shape": " x ".join(map(str, about["shape"]))}
                | {"contestant": contestant, "buffers": count, "us": f"{1e6 * middle:.2f}",
                "spread": f"{(high - low) / middle:.3f}"}
                | {"host_share": f"{max(h for _, h in seconds):.2f}", "bytes": moved,
                "gb_per_s": f"{moved / middle / 1e9:.0f}"}
                | {"fraction_of_copy": f"{moved / middle / ceiling:.3f}",
                "over_ours": f"{middle / of['ours']:.3f}",
                "modelled_us": "" if model is None or contestant != "ours" else f"{model:.1f}"},
            )  # fmt: skip


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "defaults": Bench.defaults,
    "basics": partial(Bench.numerics, checks=basic_checks),
    "ggem": partial(Bench.poolings, operation="ggem", cases=[B16, L16], compiled_torch=True),
    "norm": partial(Bench.poolings, operation="norm_ggem", cases=[B16, L16], compiled_torch=True),
    "training": Bench.training,
    "shapes": lambda bench: [
        bench.poolings(operation, [case], compiled_torch=False)
        for case in (S16, L14_518, B16_384)
        for operation in ("ggem", "norm_ggem")
    ],
    "float32": lambda bench: [
        bench.poolings(operation, [B16_FLOAT32], compiled_torch=False)
        for operation in ("ggem", "norm_ggem")
    ],
    "maps": Bench.maps,
    "numerics": partial(Bench.numerics, checks=further_checks),
}


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


def _buffers(size: int, dry: bool = False) -> int:
    """Returns the number of buffers of a size that a contestant works through.

    From 17 MB each, the buffers have `_COLD_BYTES` together.
    """
    return 2 if dry else int(min(max(_MOST_BYTES // size, 1), _MOST_BUFFERS))


def _named(about: dict[str, Any]) -> str:
    return ", ".join(map(str, about.values()))


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
) -> dict[str, Callable[[Inputs, str], "_Call"]]:
    """Returns functions that make a call of inputs and a stage, by contestant; ours is the first.

    Args:
        operation: "ggem" or "norm_ggem".
        compiled_torch: Whether PyTorch also takes part compiled.
        dry: Whether PyTorch may run on the CPU.
    """
    makers: dict[str, Callable[[Inputs, str], _Call]] = {
        name: partial(_in_jax, pool) for name, pool in JAX_CONTESTANTS[operation].items()
    }
    torch = _torch(dry)
    if torch is not None:
        makers["torch eager"] = partial(_in_torch, torch, torch_pool)
        if compiled_torch:
            makers["torch compile"] = partial(_in_torch, torch, _compiled_torch_pool)
    return makers


@dataclass(frozen=True)
class _Call:
    """A call: `run` starts the work on `count` buffers, and `wait` waits for its results."""

    run: Callable
    count: int
    wait: Callable = jax.block_until_ready

    def __call__(self):
        return self.run()


def _over_buffers(buffers, function, *rest) -> _Call:
    """Returns one compiled program that takes each buffer once."""
    one = jax.jit(function)  # traced once for all of them
    program = jax.jit(lambda buffers, *rest: [one(buffer, *rest) for buffer in buffers])
    return _Call(partial(program, buffers, *rest), len(buffers))


def _in_jax(pool, inputs: Inputs, stage: str) -> _Call:
    def value_and_slopes(x, cotangent, *parameters):
        value, pull = jax.vjp(pool, x, *parameters)
        return value, pull(cotangent)

    match stage:
        case "forward":
            return _over_buffers(inputs.buffers, pool, *inputs.parameters)
        case "backward":
            pull_of = jax.jit(lambda x, *parameters: jax.vjp(pool, x, *parameters)[1])
            pulls = [pull_of(x, *inputs.parameters) for x in inputs.buffers]
            return _over_buffers(pulls, lambda pull, cotangent: pull(cotangent), inputs.cotangent)
        case _:
            return _over_buffers(
                inputs.buffers, value_and_slopes, inputs.cotangent, *inputs.parameters
            )


def _in_torch(torch, pool_of, inputs: Inputs, stage: str) -> _Call:
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
    return _Call({"forward": forward, "backward": backward, "both": both}[stage], len(xs), wait)


def _compiled_torch_pool(torch) -> Callable:
    # a function that was compiled for more than a few shapes would silently run as it is
    torch.compiler.reset()
    return torch.compile(torch_pool(torch), dynamic=False, fullgraph=True)


def _first_result(make: Callable[[], _Call]) -> tuple[_Call, list[np.ndarray]]:
    """Returns a call, and what it computes of the first buffer."""
    call = make()
    result = call()
    call.wait(result)
    leaves = jax.tree.leaves(result[0])
    return call, [
        np.asarray(a.float().cpu() if hasattr(a, "cpu") else a, np.float32) for a in leaves
    ]


def _difference(result: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> str:
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


def _copies(moved: int, count: int) -> dict[str, _Call]:
    """Returns copies that read and write `moved` bytes: by the driver, and by a kernel of XLA."""
    buffers = [jnp.full(max(moved // 4, 1), i, jnp.bfloat16) for i in range(count)]
    return {
        "copy": _over_buffers(buffers, jnp.copy),
        "negated copy": _over_buffers(buffers, jnp.negative),
    }


def _timing(call: _Call, least_calls: int) -> tuple[float, float]:
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


def _freed() -> None:
    """Frees the memory of a group, so that JAX and PyTorch can share a device."""
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


def _parameters(config):
    return jax.jit(ViT(config, GGeM(), 1000).init)(
        jax.random.key(0), jnp.ones((1, config.image, config.image, 3))
    )["params"]


def _training(
    config, params, batch: int, steps: int, *, fused_norm: bool, kernels: bool
) -> Callable:
    """Returns a call that takes a number of steps, after a first step, which compiles."""
    model, transform = ViT(config, GGeM(), 1000, fused_norm=fused_norm), optax.adamw(1e-3)
    images = jax.random.normal(
        jax.random.key(1), (batch, config.image, config.image, 3), config.dtype
    )
    labels = jnp.arange(batch) % 1000

    def loss_of(params, images, labels):
        logits = model.apply({"params": params}, images, train=True).logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels):
        loss, slopes = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = transform.update(slopes, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.copy, params)  # each step takes the memory of the last
    carry = [params, transform.init(params)]

    def call():
        with (
            contextlib.nullcontext()
            if kernels
            else mock.patch.object(launch, "available", return_value=False)
        ):  # matters when it is traced
            for _ in range(steps):
                *carry[:], loss = step(*carry, images, labels)
        return loss

    jax.block_until_ready(call())
    return _Call(call, 1)


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


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            query, capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
