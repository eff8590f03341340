"""Speed of a training beside the peak of the machine: images per second and FLOP utilisation.

Model FLOPs count the matrix products of the forward pass, two per multiply-add, and twice as much
for the backward pass; recomputation does not count (Chowdhery et al., "PaLM", 2022,
arXiv:2204.02311, appendix B).
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ggem_jax.models.text import TextConfig
from ggem_jax.models.vit import ViTConfig

# Dense bfloat16 peak of one device in FLOP/s, without sparsity, by the name JAX gives the device.
# Sources: the vendors' data sheets (NVIDIA H100/H200 SXM, A100, L4, V100 float16; Google Cloud TPU
# v4, v5e, v5p, v6e).
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def forward_flops(config: ViTConfig, outputs: int) -> float:
    """Returns the FLOPs of the forward pass of one image.

    Args:
        config: The Vision Transformer.
        outputs: Outputs that the head computes from the descriptor.
    """
    patches = (config.image // config.patch) ** 2
    embedding = patches * 3 * config.patch**2 * config.width
    return 2.0 * (embedding + config.width * outputs) + blocks_flops(
        config, patches + config.prefix_tokens
    )


def text_forward_flops(config: TextConfig, outputs: int) -> float:
    """Returns the FLOPs of the forward pass of one text of full length.

    Args:
        config: The text tower.
        outputs: Channels of its projection.
    """
    return 2.0 * config.width * outputs + blocks_flops(config, config.context)


def blocks_flops(config: ViTConfig | TextConfig, tokens: int) -> float:
    """Returns the FLOPs of the blocks of a tower: projections, attention and MLP.

    Args:
        config: The tower.
        tokens: Number of tokens of one image or text.
    """
    width = config.width
    projections = 4 * tokens * width**2
    attention = 2 * tokens**2 * width
    mlp = (3 if config.mlp == "swiglu" else 2) * tokens * width * config.mlp_width
    return 2.0 * config.depth * (projections + attention + mlp)


def training_flops(config: ViTConfig, num_classes: int) -> float:
    """Returns the FLOPs of one training step, per image.

    Args:
        config: The Vision Transformer.
        num_classes: Outputs of the head.
    """
    return 3 * forward_flops(config, num_classes)


@functools.cache
def peak_flops() -> tuple[float, str]:
    """Returns the FLOP/s of all devices together, and where the number comes from.

    It comes from the data sheet, or from a matrix product measured now.
    """
    kind = jax.devices()[0].device_kind
    if kind in PEAK_FLOPS:
        return PEAK_FLOPS[kind] * jax.device_count(), "bfloat16 peak of the data sheet"
    # virtual CPU devices share the same cores
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return _measure_matmul_flops() * devices, "float32 matrix product measured at the start"


def _measure_matmul_flops(side: int = 2048, repeats: int = 3) -> float:
    """FLOP/s of the fastest of a few products on the first device."""
    a = jnp.ones((side, side))
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


class Meter:
    """Speed since the last reading: steps and images per second, FLOP utilisation, input wait.

    The first step, which compiles, is not measured; a reading right after it is empty.

    Args:
        batch: Images of a step, over all devices.
        flops: FLOPs of training on one example.
    """

    def __init__(self, batch: int, flops: float):
        """Starts to measure."""
        self.batch, self.flops = batch, flops
        self.peak, self.peak_source = peak_flops()
        self.last: Any = None  # result of the last step
        self.restart()

    def restart(self) -> None:
        """Forgets the time since the last reading, which was spent on something else."""
        self.began, self.steps, self.waited = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Counts the time inside the block, unless the devices were busy all the while."""
        began = time.perf_counter()
        yield
        if self.last is None or self.last.is_ready():
            self.waited += time.perf_counter() - began

    def count(self, metrics: dict[str, jax.Array]) -> None:
        """Counts a step.

        Args:
            metrics: The result of the step; its "loss" tells when the devices have finished it.
        """
        first, self.last = self.last is None, metrics["loss"]
        self.steps += 1
        if first:
            jax.block_until_ready(self.last)
            self.restart()

    def read(self) -> dict[str, float]:
        """Returns the speeds by name, and starts again; empty where no step was counted.

        Returns:
            "steps_per_second", "images_per_second", "mfu" (share of the peak) and "input_wait"
            (share of the time).
        """
        if not self.steps:
            return {}
        jax.block_until_ready(self.last)
        seconds = max(time.perf_counter() - self.began, 1e-9)
        speed, waited = self.steps / seconds, self.waited / seconds
        self.restart()
        mfu = speed * self.batch * self.flops / self.peak
        return {
            "steps_per_second": speed,
            "images_per_second": speed * self.batch,
            "mfu": mfu,
            "input_wait": waited,
        }
