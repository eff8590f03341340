"""Compares poolings on frozen tokens, where only the pooling and a linear head are trained.

All arms of a seed see the same images in the same order: a seed draws four fifths of the training
images and the order of the batches. Intervals over seeds therefore hold for these training images
and this network. The pooled vector is standardised, channel by channel, before the head, so that no
arm profits from its scale: by the batch in training, by the training images in the test. Tokens are
`(n, tokens, d)` of patches; `cls` are the class tokens `(n, d)` of a network that has them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from eval.studies import diagnostics
from ggem_jax import pooling
from ggem_jax.descriptors.backbones import Network
from ggem_jax.files.images import RGB
from ggem_jax.models.vit import MAP, ViTConfig, used_exponents
from ggem_jax.optimizer import adamw


@dataclass(frozen=True)
class Tokens:
    """A data set as a frozen network sees it."""

    name: str  # of the data set, for messages
    train: np.ndarray  # (n, tokens, d), as `freeze` returns them
    train_labels: np.ndarray  # (n,)
    test: np.ndarray  # (m, tokens, d)
    test_labels: np.ndarray  # (m,)
    heads: int  # groups that the network's attention suggests; where it has none, an assumption
    train_cls: np.ndarray | None = None  # (n, d); None: the network has no class token
    test_cls: np.ndarray | None = None  # (m, d)

    @property
    def channels(self) -> int:
        """Number of channels of a token."""
        return self.train.shape[-1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_labels.max()) + 1


def freeze(
    network: Network, images: Sequence[RGB], *, channels: np.ndarray | None = None, batch: int = 50
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the tokens of images as a frozen network sees them, in float16.

    Args:
        network: Any backbone, as `load_network` returns it.
        images: Images `(h, w, 3)` uint8, all of one size.
        channels: Numbers `(d,)` of the channels to keep; class tokens are then left out. None keeps
            all.
        batch: Images that go through the network together.

    Returns:
        Tokens `(images, places, d)`, and class tokens `(images, d)` or None.
    """

    @jax.jit
    def describe(batch: Array) -> tuple[Array, Array | None]:
        tokens, cls = network.describe_tokens(batch)
        return (tokens, cls) if channels is None else (tokens[..., channels], None)

    parts = [
        describe(network.normalise(images[start : start + batch]))
        for start in range(0, len(images), batch)
    ]
    tokens = np.concatenate([np.asarray(part, np.float16) for part, _ in parts])
    if parts[0][1] is None:
        return tokens, None
    return tokens, np.concatenate([np.asarray(cls, np.float16) for _, cls in parts])


Pool = Callable[[Any, Float[Array, "b n d"]], Float[Array, "b d"]]


@dataclass(frozen=True)
class Arm:
    """A pooling with its first parameters."""

    pool: Pool  # (parameters, tokens (b, n, d)) -> pooled vectors (b, d)
    start: Any = field(default_factory=dict)  # first parameters; empty: nothing is learned
    exponent_lr: float = 10.0  # learning rate of p over that of the head
    takes_cls: bool = False  # whether it gets the class token (b, 1, d) instead of the patches


@dataclass(frozen=True)
class Probed:
    """One arm over all seeds."""

    correct: np.ndarray  # (seeds, test) bool
    p: np.ndarray  # (seeds, exponents); none where nothing is learned
    params: list[Any]  # of the pooling, for each seed

    @property
    def accuracy(self) -> np.ndarray:
        """Accuracy of each seed, `(seeds,)`."""
        return self.correct.mean(axis=1)


def gem(
    tokens: Float[Array, "b n d"], p: Array, order: np.ndarray | None = None
) -> Float[Array, "b d"]:
    """Pools tokens by GGeM whose groups are contiguous in a given order of the channels.

    Args:
        tokens: Tokens `(b, n, d)`.
        p: Exponents `(groups,)`; one exponent is GeM.
        order: Permutation `(d,)` of the channels. None takes them as they are.

    Returns:
        Pooled vectors `(b, d)`, in the original order of the channels.
    """
    if order is None:
        return pooling.ggem_pool(tokens, p)
    return pooling.ggem_pool(tokens[..., order], p)[..., np.argsort(order)]


def make_ggem_arm(
    groups: int, order: np.ndarray | None = None, *, p: float = 3.0, exponent_lr: float = 10.0
) -> Arm:
    """Returns an arm that pools by GGeM with learned exponents; one group is GeM.

    Args:
        groups: Number of exponents, a divisor of the channels.
        order: Permutation `(d,)` of the channels whose contiguous groups share an exponent. None:
            neighbouring channels share one.
        p: First value of all exponents.
        exponent_lr: Learning rate of the exponents over that of the head.
    """
    return Arm(
        lambda params, tokens: gem(tokens, used_exponents(params["p"]), order),
        {"p": np.full(groups, p, np.float32)},
        exponent_lr,
    )


def arms_of(tokens: Tokens) -> dict[str, Arm]:
    """Returns the poolings to compare, by name.

    The poolings before "GeM" learn nothing but the head.

    Args:
        tokens: The data set, whose channels, heads and class tokens decide which arms there are.
    """
    d, heads = tokens.channels, tokens.heads
    fixed: dict[str, Pool] = {
        "average": lambda _, x: pooling.avg_pool(x),
        "positive average": lambda _, x: pooling.gem_pool(x, 1.0),
        "max": lambda _, x: pooling.max_pool(x),
        "average + max": lambda _, x: (pooling.avg_pool(x) + pooling.max_pool(x)) / 2,
        "GeM, p = 3": lambda _, x: pooling.gem_pool(x, 3.0),
        "LSE, r = 10": lambda _, x: pooling.lse_pool(x, 10.0),
    }
    arms = {name: Arm(pool) for name, pool in fixed.items()}
    if tokens.train_cls is not None:
        arms = {"class token": Arm(lambda _, x: x[:, 0], takes_cls=True), **arms}
    arms["GeM"] = make_ggem_arm(1)
    arms["GGeM"] = make_ggem_arm(heads)
    arms["GGeM, interleaved"] = make_ggem_arm(heads, diagnostics.interleaved(d, heads).ravel())
    for draw in range(3):
        arms[f"GGeM, random groups {draw + 1}"] = make_ggem_arm(
            heads, diagnostics.random_blocks(d, heads, draw).ravel()
        )
    arms["GGeM, p learned slowly"] = make_ggem_arm(heads, exponent_lr=1.0)
    for groups in group_counts(d, heads):
        arms[f"GGeM, {groups} groups"] = make_ggem_arm(groups)
        arms[f"GGeM, {groups} random groups"] = make_ggem_arm(
            groups, diagnostics.random_blocks(d, groups, 0).ravel()
        )
    arms["GGeM, one p per channel"] = make_ggem_arm(d)
    arms["MAP"] = attention_pooling(d, heads)
    return arms


def group_counts(d: int, heads: int) -> list[int]:
    """Returns half, twice and four times the heads, those that are numbers of equal groups.

    Args:
        d: Number of channels.
        heads: Number of heads.
    """
    return [
        count for count in (heads // 2, 2 * heads, 4 * heads) if 1 < count < d and d % count == 0
    ]


def attention_pooling(d: int, heads: int) -> Arm:
    """Returns the arm of attention pooling (MAP) with its query, projections and MLP.

    Args:
        d: Channels of a token, which the pooling keeps.
        heads: Attention heads, a divisor of `d`.
    """
    config = ViTConfig(patch=1, image=1, width=d, depth=1, heads=heads, mlp_width=2 * d)
    module = MAP(config)
    start = jax.tree.map(
        np.asarray, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, d)))["params"]
    )

    def pool(params: Any, tokens: Array) -> Array:
        pooled: Any = module.apply({"params": params}, tokens)
        return pooled

    return Arm(pool, start)


@dataclass(frozen=True)
class Probe:
    """Settings of the training of the heads."""

    seeds: int = 10  # number of trainings
    epochs: int = 10  # of each training
    batch: int = 256  # images in a step
    lr: float = 1e-2  # first learning rate of the head; a cosine takes it to 0
    weight_decay: float = 1e-2  # of AdamW, for matrices only


def probe(tokens: Tokens, arm: Arm, how: Probe) -> Probed:
    """Trains and tests one arm, seed by seed.

    Args:
        tokens: Training and test tokens of a frozen network.
        arm: The pooling.
        how: Number of seeds, and settings of the training.

    Returns:
        Right and wrong answers, learned exponents, and parameters of the pooling for each seed.
    """
    splits = [_tokens(tokens, arm, split) for split in ("train", "test")]
    if not arm.start:  # nothing to learn: pooled once
        splits = [_in_parts(partial(_compile(arm), {}), split) for split in splits]
        arm = Arm(lambda _, x: x)
    train, test = (jnp.asarray(split) for split in splits)
    labels = jnp.asarray(tokens.train_labels)
    run = jax.jit(
        partial(_train, arm=arm, how=how, channels=tokens.channels, classes=tokens.classes)
    )
    found = [
        run(train, labels, jnp.asarray(_plan(len(labels), how, seed))) for seed in range(how.seeds)
    ]
    describe = _compile(arm)
    correct, kept = [], []
    for params in found:
        mine, others = (
            _in_parts(partial(describe, params["pool"]), array) for array in (train, test)
        )
        standard = (others - mine.mean(axis=0)) / (mine.std(axis=0) + 1e-6)
        logits = standard @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
        correct.append(logits.argmax(axis=1) == tokens.test_labels)
        kept.append(jax.tree.map(np.asarray, params["pool"]))
    p = [
        np.asarray(used_exponents(params["p"])) if "p" in params else np.zeros(0) for params in kept
    ]
    return Probed(np.array(correct), np.array(p), kept)


def pool_test_images(tokens: Tokens, arm: Arm, params: Any) -> np.ndarray:
    """Returns the pooled test images, `(n, d)` in float32, before they are standardised.

    Args:
        tokens: The data set.
        arm: The pooling.
        params: Parameters of the pooling, such as one entry of `Probed.params`. Empty where it has
            none.
    """
    return _in_parts(partial(_compile(arm), params), _tokens(tokens, arm, "test"))


def _compile(arm: Arm) -> Pool:
    return jax.jit(lambda params, tokens: arm.pool(params, tokens.astype(jnp.float32)))


def _plan(n: int, how: Probe, seed: int) -> np.ndarray:
    """Numbers of the images of each step, `(steps, batch)`, out of four fifths of all."""
    rng = np.random.default_rng((7, seed))
    mine = rng.permutation(n)[: max(4 * n // 5, 1)]
    batch = min(how.batch, len(mine))
    return np.concatenate(
        [
            rng.permutation(mine)[: len(mine) // batch * batch].reshape(-1, batch)
            for _ in range(how.epochs)
        ]
    )


def _train(
    train: Array, labels: Array, plan: Array, *, arm: Arm, how: Probe, channels: int, classes: int
) -> Any:
    params = {
        "pool": jax.tree.map(jnp.asarray, arm.start),
        "kernel": jnp.zeros((channels, classes)),
        "bias": jnp.zeros(classes),
    }
    schedule = optax.cosine_decay_schedule(how.lr, len(plan))
    transform = adamw(schedule, weight_decay=how.weight_decay, exponent_lr=arm.exponent_lr)

    def loss_of(params: Any, indices: Array) -> Array:
        pooled = arm.pool(params["pool"], train[indices].astype(jnp.float32))
        standard = (pooled - pooled.mean(axis=0)) / (pooled.std(axis=0) + 1e-6)
        logits = standard @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[indices]).mean()

    def step(carry: Any, indices: Array) -> Any:
        params, state = carry
        updates, state = transform.update(jax.grad(loss_of)(params, indices), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, transform.init(params)), plan)
    return params


def _tokens(tokens: Tokens, arm: Arm, split: str) -> np.ndarray:
    if arm.takes_cls:
        return getattr(tokens, f"{split}_cls")[:, None]
    return getattr(tokens, split)


def _in_parts(function: Callable[[Array], Array], array: Any, part: int = 1000) -> np.ndarray:
    return np.concatenate(
        [np.asarray(function(array[start : start + part])) for start in range(0, len(array), part)]
    ).astype(np.float32)
