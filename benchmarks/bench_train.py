"""Compares the speed of `train.classify` with a minimal hand-written step of the same model.

    python -m benchmarks.bench_train

The model is a ViT-Ti/16 at 224 px. The script trains from PNG files with its log, its meters and
its input pipeline; the minimal loop is one jitted AdamW step on one batch that is already on the
device. The two take turns in one run. Rows go to benchmarks/results/train.csv; the target is a
ratio of at least 0.95.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from benchmarks.record import append, machine, median_and_spread, time_in_turns
from train.build import build_model
from train.classify import train
from train.cli import load_config
from train.config import Config
from train.log import read_metrics
from train.throughput import peak_flops, training_flops


def write_images(folder: Path, count: int) -> None:
    """Writes PNG files of noise in two classes; noise is the slowest to decode."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("train" if i < count - 4 else "test") / f"class{i % 2}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(path)


def minimal_loop(config: Config, steps: int):
    """Returns a call that takes `steps` steps of a minimal training loop and waits for them."""
    model, transform = build_model(config, 2), optax.adamw(1e-3)
    images = jax.random.normal(jax.random.key(1), (config.batch, 224, 224, 3))
    labels = jnp.arange(config.batch) % 2
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]

    def loss_of(params):
        logits = model.apply({"params": params}, images).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state):
        loss, slope = jax.value_and_grad(loss_of)(params)
        updates, state = transform.update(slope, state, params)
        return optax.apply_updates(params, updates), state, loss

    carry = (params, transform.init(params))

    def call():
        nonlocal carry
        for _ in range(steps):
            *carry, loss = step(*carry)
        jax.block_until_ready(loss)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=8, help="steps of each loop in a round (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", 68)
        speeds: list[float] = []

        def config_of(run: int) -> Config:
            flags = [
                "--data",
                f"folder:{folder}/images",
                "--variant",
                "Ti/16",
                "--batch",
                str(options.batch),
                "--pool.kind",
                "ggem",
            ]
            rhythm = [
                "--epochs",
                "100",
                "--log-every",
                str(options.steps),
                "--stop-after",
                str(options.steps + 1),
                "--eval-every",
                "100",
            ]
            return load_config(
                Config,
                [*flags, *rhythm, "--checkpoint-every", "100", "--out", f"{folder}/run{run}"],
                "bench",
            )

        def script():
            """Trains one step more than is counted: the script does not count the first."""
            config = config_of(len(speeds))
            train(config, quiet=True)
            speeds.append(read_metrics(config.out, "train")[-1]["images_per_second"])

        config = config_of(0)
        times = time_in_turns(
            {"minimal": minimal_loop(config, options.steps), "script": script}, options.rounds
        )
    minimal, minimal_spread = median_and_spread(times["minimal"])
    minimal_speed = options.steps * options.batch / (minimal / 1e3)
    script_time, script_spread = median_and_spread([1 / speed for speed in speeds[1:]])
    script_speed = 1e3 / script_time
    mfu = script_speed * training_flops(config.model, 2) / peak_flops()[0]
    append(
        "train",
        machine()
        | {
            "model": "ViT-Ti/16 at 224 px",
            "dtype": config.model.dtype,
            "batch": options.batch,
            "rounds": options.rounds,
            "steps": options.steps,
        }
        | {
            "minimal_images_per_s": f"{minimal_speed:.2f}",
            "minimal_spread": f"{minimal_spread:.3f}",
        }
        | {
            "script_images_per_s": f"{script_speed:.2f}",
            "script_spread": f"{script_spread:.3f}",
            "script_mfu": f"{mfu:.3f}",
        }
        | {"script_over_minimal": f"{script_speed / minimal_speed:.3f}"},
    )


if __name__ == "__main__":
    main()
