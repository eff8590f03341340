"""Which images a batch holds: functions from a step to numbers of images.

A function depends on the seed of the run and the step alone, so that a run may resume anywhere.
The functions can be pickled with cloudpickle, for the processes that read images.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Draw = Callable[[int], np.ndarray]  # step, from 0 -> numbers of the images of its batch, `(batch,)`


def draw_distinct(size: int, batch: int, seed: int) -> Draw:
    """Returns a function that draws batches without an image twice.

    Each epoch has an order of its own, of which whole batches are taken: `size % batch` images are
    left out, others in every epoch.

    Args:
        size: Number of images, at least `batch`.
        batch: Images of a step.
        seed: Seed of the run.
    """
    steps = size // batch

    @_remember(2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(size)

    def draw(step: int) -> np.ndarray:
        epoch, place = divmod(step, steps)
        return order(epoch)[place * batch : (place + 1) * batch]

    return draw


def draw_balanced(labels: np.ndarray, batch: int, per_class: int, seed: int) -> Draw:
    """Returns a function that draws equally many images of each of some classes.

    A round shows every class, in an order of its own; where its last batch needs more classes, the
    first ones of the round come again. From round to round a class shows its next images, and all
    of them before one comes again, except in such a second visit, which draws at random.

    Args:
        labels: Labels of all images, `(n,)`.
        batch: Images of a step, a multiple of `per_class`.
        per_class: Images of each of batch / per_class classes; they repeat within a batch only
            where a class has fewer.
        seed: Seed of the run.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    classes, steps = batch // per_class, -(-len(members) // (batch // per_class))

    @_remember(2)
    def order(round_: int) -> np.ndarray:
        return np.random.default_rng((seed, 0, round_)).permutation(len(members))

    def next_images(label: int, round_: int) -> np.ndarray:
        own = members[label]
        epoch, place = divmod(round_, -(-len(own) // per_class))
        shuffled = np.random.default_rng((seed, 1, label, epoch)).permutation(own)
        return shuffled[(place * per_class + np.arange(per_class)) % len(own)]

    def any_images(label: int, step: int) -> np.ndarray:
        rng = np.random.default_rng((seed, 2, label, step))
        return rng.choice(members[label], per_class, replace=len(members[label]) < per_class)

    @_remember(64)  # each image of a batch asks for it
    def draw(step: int) -> np.ndarray:
        round_, place = divmod(step, steps)
        shown = order(round_)[place * classes : (place + 1) * classes]
        again = order(round_)[: classes - len(shown)]
        return np.concatenate(
            [next_images(label, round_) for label in shown.tolist()]
            + [any_images(label, step) for label in again.tolist()]
        )

    return draw


def steps_to_cover(labels: np.ndarray, batch: int, per_class: int) -> int:
    """Returns after how many steps `draw_balanced` has shown every image.

    Args:
        labels: Labels of all images, `(n,)`.
        batch: Images of a step.
        per_class: Images of each class in a batch.
    """
    counts = np.unique(labels, return_counts=True)[1]
    return int(-(-counts.max() // per_class)) * -(-len(counts) // (batch // per_class))


def draw_evenly(labels: np.ndarray, batch: int, seed: int) -> Draw:
    """Returns a function that draws every class equally often.

    Classes take turns in an order that is drawn anew for each turn, and a class shows all its
    images, in an order of their own, before one comes again.

    Args:
        labels: Labels of all images, `(n,)`.
        batch: Images of a step.
        seed: Seed of the run.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    @_remember(2)
    def order(turn: int) -> np.ndarray:
        return np.random.default_rng((seed, 0, turn)).permutation(len(members))

    @_remember(2 * len(members))
    def shuffled(label: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 1, label, epoch)).permutation(members[label])

    @_remember(64)
    def draw(step: int) -> np.ndarray:
        drawn = []
        for place in range(step * batch, (step + 1) * batch):
            turn, i = divmod(place, len(members))
            label = int(order(turn)[i])
            epoch, own = divmod(turn, len(members[label]))
            drawn.append(shuffled(label, epoch)[own])
        return np.array(drawn)

    return draw


def measure_coverage(draw: Draw, size: int, steps: int) -> float:
    """Returns the share of the images that the first steps show.

    Args:
        draw: The function that draws them.
        size: Number of images.
        steps: Number of steps.
    """
    shown = np.zeros(size, bool)
    for step in range(steps):
        shown[draw(step)] = True
    return float(shown.mean())


def _remember(size: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that keeps results; unlike that of functools, local functions stay picklable."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        results: dict[tuple[Any, ...], Any] = {}

        def look_up(*arguments: Any) -> Any:
            found = results.get(arguments)
            if found is None:
                found = function(*arguments)
                if len(results) >= size:
                    results.clear()
                results[arguments] = found
            return found

        return look_up

    return decorate
