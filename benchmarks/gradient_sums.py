"""What summing gradients over devices in bfloat16 changes: python -m benchmarks.gradient_sums

With `--precision bf16` a device computes gradients of weights in bfloat16, and XLA for GPUs and
TPUs sums them over devices as they are. Here the devices are parts of a batch of digits, and the
sums those of a ring, which adds one device after the other. Each line gives, relative to the length
of the gradient of the whole batch:

- the difference of the sum in bfloat16 from that in float32,
- the difference of the sum in float32 from the gradient that is computed in float32 throughout,
- the standard deviation of the gradient, because the batch is a sample.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.build import build_model
from train.cli import load_config
from train.config import Config
from train.data import digits
from train.step import make_steps, normalise

BATCH, SEED = 512, 0
DEVICES = (8, 64)
STEPS = (0, 300)  # of training before the gradient is taken
MEASURED = 2**32 - 1  # seed of the batch of the gradient, which no step trains on


def main() -> None:
    """Prints a line for each number of devices and of steps."""
    config = load_config(Config, ["--config", "digits", "--batch", str(BATCH)], "gradient_sums")
    for steps in STEPS:
        params = train(config, steps)
        whole = gradients(config, params, 1, "float32")[0]
        for devices in DEVICES:
            parts = gradients(config, params, devices, "bfloat16")
            exact = parts.mean(0)
            noise = parts.std(0, ddof=1) / np.sqrt(devices)
            print(
                f"after {steps} steps, {devices} devices:"
                f" sum {_relative(ring_mean(parts) - exact, exact):.2g},"
                f" products {_relative(exact - whole, whole):.2g},"
                f" sample {_relative(noise, whole):.2g}"
            )


def train(config: Config, steps: int) -> Any:
    """Returns the parameters after some steps of training, in float32.

    Args:
        config: The settings.
        steps: Number of steps.
    """
    functions = make_steps(config, 10, max(STEPS), devices=tuple(jax.devices()[:1]))
    state = functions.init(SEED)
    for step in range(steps):
        state, _ = functions.train(state, draw_batch(step), SEED)
    return state.params


def draw_batch(step: int) -> dict[str, np.ndarray]:
    """Returns random digits and their labels.

    Args:
        step: Seed of the draw.
    """
    data = digits()
    chosen = np.random.default_rng(step).choice(len(data), BATCH, replace=False)
    pairs = [data.load(int(i)) for i in chosen]
    images, labels = (np.array(each) for each in zip(*pairs, strict=True))
    return {"image": images, "label": labels.astype(np.int32)}


def gradients(config: Config, params: Any, devices: int, dtype: Any) -> np.ndarray:
    """Returns the gradient of each device's part of a batch, `(devices, parameters)` float32.

    Args:
        config: The settings.
        params: The parameters.
        devices: Number of parts.
        dtype: Of the computation.
    """
    model = build_model(
        dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype)), 10
    )

    def loss(params, images, labels):
        output: Any = model.apply({"params": params}, normalise(images, config.data))
        logits = output.logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    batch = draw_batch(MEASURED)
    parts = [np.split(batch[name], devices) for name in ("image", "label")]
    slope = jax.jit(jax.grad(loss))
    flat = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(slope(params, *part))])
        for part in zip(*parts, strict=True)
    ]
    return np.array(flat)


def ring_mean(parts: np.ndarray) -> np.ndarray:
    """Returns the mean over devices of gradients that are rounded to bfloat16 after each addition.

    Args:
        parts: Gradients, `(devices, parameters)`.
    """
    rounded = jnp.asarray(parts / len(parts)).astype(jnp.bfloat16)
    total = rounded[0]
    for each in rounded[1:]:
        total = total + each
    return np.asarray(total.astype(jnp.float32))


def _relative(difference: np.ndarray, whole: np.ndarray) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(whole))


if __name__ == "__main__":
    main()
