"""Does one exponent per group find what its channels need? An experiment with a known answer.

    python -m eval.studies.planted

Tokens are noise with planted evidence. The channels have two halves, which say two independent
things about the label:

- sparse half: one token of the image carries a strong bump in the channels of its class, and the
  others carry nothing. This needs a large p, close to the maximum.
- dense half: every token carries a weak bump in the channels of its class. This needs a p near 1,
  the average.

There is no backbone. The pooling and a linear head are trained on fresh draws at every step. All
seeds of an arm train in one `vmap`, and all arms see the same draws, in training and in test. GGeM
with one group per half can give each half its own p; GeM has to compromise. There are three
controls: the average of positive values (what the clamp of GeM alone is worth), GGeM whose two
groups are drawn at random (two exponents without the right groups), and GeM with one p per channel,
which can do everything that GGeM can and has to find it channel by channel.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eval import statistics
from ggem_jax import pooling
from ggem_jax.models.vit import used_exponents
from ggem_jax.optimizer import adamw
from train.cli import Refused, one_sentence, parse


@dataclass(frozen=True)
class Planted:
    """Does one exponent per group find what its channels need? The answer is known."""

    seeds: int = 8  # trainings of each arm
    steps: int = 600  # of each training
    batch: int = 128  # images in a step
    test: int = 4096  # test images
    tokens: int = 49  # tokens of an image
    channels: int = 32  # half of them sparse, half dense
    classes: int = 8  # classes that each half separates; a label is a pair of them
    bump: float = 4.0  # height of the sparse evidence, in standard deviations of the noise
    shift: float = 0.35  # height of the dense evidence, in the same unit
    lr: float = 5e-2  # learning rate of the head and of p
    json: bool = False  # print one JSON object


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment."""
    with one_sentence("eval.studies.planted"):
        config = parse(Planted, argv, "eval.studies.planted", default=Planted())
        check_config(config)
        started = time.perf_counter()
        results = run(config)
        if config.json:
            print(
                json.dumps(
                    {
                        "seconds": time.perf_counter() - started,
                        "config": dataclasses.asdict(config),
                        "arms": summarise(results),
                    }
                )
            )
        else:
            show(results, config, time.perf_counter() - started)


def check_config(config: Planted) -> None:
    """Raises `Refused` for settings that no experiment can be made of.

    Args:
        config: Settings of the experiment.

    Raises:
        Refused: There are fewer than 2 seeds, the channels are not a multiple of 4, a count is
            below 1, or a number is not finite.
    """
    if config.seeds < 2 or config.channels < 4 or config.channels % 4:
        raise Refused(
            f"--seeds must be at least 2 and --channels a multiple of 4, not {config.seeds} and"
            f" {config.channels}"
        )
    for name in ("steps", "batch", "test", "tokens", "classes"):
        if getattr(config, name) < 1:
            raise Refused(f"--{name} must be at least 1, it is {getattr(config, name)}")
    for name in ("bump", "shift", "lr"):
        if not math.isfinite(getattr(config, name)):
            raise Refused(f"--{name} must be finite, it is {getattr(config, name)}")


@dataclass(frozen=True)
class Result:
    """One arm over all seeds."""

    correct: np.ndarray  # (seeds, test) bool: whether the answer is right
    p: np.ndarray  # (seeds, groups); no groups where nothing is learned

    @property
    def accuracy(self) -> np.ndarray:
        """Accuracy of each seed, `(seeds,)`."""
        return self.correct.mean(axis=1)


def run(config: Planted) -> dict[str, Result]:
    """Trains and tests every arm, and returns its results by name.

    Args:
        config: Settings of the experiment, as `check_config` accepts them.
    """
    seeds = jnp.arange(config.seeds)
    results = {}
    for name, (start, pool) in make_arms(config).items():
        correct, p = jax.jit(
            jax.vmap(functools.partial(train_and_test, config=config, start=start, pool=pool))
        )(seeds)
        results[name] = Result(np.asarray(correct), np.asarray(p))
    return results


def make_arms(config: Planted) -> dict[str, tuple[list[float], Callable[..., Array]]]:
    """Returns each arm's first exponents and its pooling (tokens, p, key of the seed), by name.

    The exponents are in the order of the channels, sparse half first.

    Args:
        config: Settings of the experiment.
    """

    def in_random_groups(tokens, p, key):
        order = jax.random.permutation(jax.random.fold_in(key, 1), config.channels)
        return pooling.ggem_pool(tokens[..., order], p)

    return {
        "average": ([], lambda tokens, p, key: pooling.avg_pool(tokens)),
        "positive average": ([], lambda tokens, p, key: pooling.gem_pool(tokens, 1.0)),
        "maximum": ([], lambda tokens, p, key: pooling.max_pool(tokens)),
        "GeM": ([3.0], lambda tokens, p, key: pooling.ggem_pool(tokens, p)),
        "GeM, p per channel": (
            [3.0] * config.channels,
            lambda tokens, p, key: pooling.gem_pool(tokens, p),
        ),
        "GGeM, random groups": ([3.0, 3.0], in_random_groups),
        "GGeM": ([3.0, 3.0], lambda tokens, p, key: pooling.ggem_pool(tokens, p)),
    }


def train_and_test(
    seed: Int[Array, ""], *, config: Planted, start: list[float], pool
) -> tuple[Array, Array]:
    """Returns right or wrong for each test image, and the learned exponents, of one seed.

    Args:
        seed: Seed of codes, draws and random groups.
        config: Settings of the experiment.
        start: First exponents; an empty list learns none.
        pool: Function (tokens `(b, n, d)`, p, key of the seed) -> descriptors `(b, d)`.

    Returns:
        Answers `(test,)` bool, and exponents `(exponents,)`.
    """
    key = jax.random.key(seed)
    code_key, test_key, train_key = jax.random.split(key, 3)
    codes = draw_codes(code_key, config)
    params = {
        "p": jnp.array(start),
        "kernel": jnp.zeros((config.channels, config.classes**2)),
        "bias": jnp.zeros(config.classes**2),
    }
    schedule = optax.cosine_decay_schedule(config.lr, config.steps)
    transform = adamw(schedule, weight_decay=0.0, exponent_lr=1.0)

    def logits(params: Any, tokens):
        return pool(tokens, used_exponents(params["p"]), key) @ params["kernel"] + params["bias"]

    def step(carry, key):
        params, state = carry
        tokens, labels = draw(key, config.batch, codes, config)
        slope = jax.grad(
            lambda params: optax.softmax_cross_entropy_with_integer_labels(
                logits(params, tokens), labels
            ).mean()
        )(params)
        updates, state = transform.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(
        step, (params, transform.init(params)), jax.random.split(train_key, config.steps)
    )
    tokens, labels = draw(test_key, config.test, codes, config)
    return logits(params, tokens).argmax(-1) == labels, used_exponents(params["p"])


def draw_codes(key: PRNGKeyArray, config: Planted) -> Float[Array, "2 classes channels"]:
    """Returns the channels that show the evidence of each half and class, as 0 and 1.

    Each code has a quarter of the half's channels, which are half of all.

    Args:
        key: Source of the random numbers.
        config: Settings of the experiment.

    Returns:
        Codes `(2, classes, channels / 2)`, the sparse half first.
    """
    half = config.channels // 2

    def code(key):
        return (jax.random.permutation(key, half) < half // 4).astype(jnp.float32)

    return jax.vmap(jax.vmap(code))(jax.random.split(key, (2, config.classes)))


def draw(
    key: PRNGKeyArray, count: int, codes: Array, config: Planted
) -> tuple[Float[Array, "b n d"], Int[Array, " b"]]:
    """Returns images and their labels.

    Args:
        key: Source of the random numbers.
        count: Number of images.
        codes: Channels of the evidence, as `draw_codes` returns them.
        config: Settings of the experiment.

    Returns:
        Tokens `(count, tokens, channels)`, the sparse half of the channels first, and labels
        `(count,)`.
    """
    noise_key, class_key, place_key = jax.random.split(key, 3)
    sparse, dense = jax.random.randint(class_key, (2, count), 0, config.classes)
    here = jax.nn.one_hot(jax.random.randint(place_key, (count,), 0, config.tokens), config.tokens)
    evidence = jnp.concatenate(
        [
            config.bump * here[:, :, None] * codes[0][sparse][:, None, :],
            jnp.broadcast_to(
                config.shift * codes[1][dense][:, None, :],
                (count, config.tokens, config.channels // 2),
            ),
        ],
        axis=-1,
    )
    return evidence + jax.random.normal(noise_key, evidence.shape), sparse * config.classes + dense


def summarise(results: dict[str, Result]) -> dict[str, Any]:
    """Returns the entry of each arm in the object that `--json` prints.

    Args:
        results: Results by arm, as `run` returns them.
    """
    ggem = results["GGeM"]
    return {
        name: {
            "accuracy": dataclasses.asdict(statistics.mean(result.accuracy)),
            "p": [dataclasses.asdict(statistics.mean(p)) for p in result.p.T],
            "ggem_less_this": dataclasses.asdict(statistics.mean(ggem.accuracy - result.accuracy)),
            "accuracy_by_seed": result.accuracy.tolist(),
            "p_by_seed": result.p.tolist(),
        }
        for name, result in results.items()
    }


def show(results: dict[str, Result], config: Planted, seconds: float) -> None:
    """Prints the results as a table; for exponents per channel it prints the mean of each half.

    Args:
        results: Results by arm, as `run` returns them.
        config: Settings of the experiment.
        seconds: Duration of the experiment.
    """
    print(
        f"{config.seeds} seeds, {config.steps} steps of {config.batch} images, {config.test} test"
        " images; mean over seeds [95 % interval]"
    )
    for name, result in results.items():
        p = "   ".join(
            f"p {i.value:.2f} [{i.low:.2f}, {i.high:.2f}]"
            for i in map(statistics.mean, average_halves(result.p))
        )
        print(f"{name:20}  accuracy {statistics.mean(result.accuracy)}   {p}")
    print("groups of GGeM: sparse half, dense half. Same draws for all arms:")
    for name, result in results.items():
        if name != "GGeM":
            print(
                f"GGeM less {name:20} "
                f" {statistics.mean(results['GGeM'].accuracy - result.accuracy)}"
            )
    print(f"{seconds:.0f} s")


def average_halves(p: np.ndarray) -> np.ndarray:
    """Returns the exponents as `(groups, seeds)`; of more than two groups the mean of each half.

    Args:
        p: Exponents `(seeds, groups)`, in the order of the channels.
    """
    return p.T if p.shape[1] <= 2 else p.reshape(len(p), 2, -1).mean(axis=2).T


if __name__ == "__main__":
    main()
