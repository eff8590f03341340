"""A model on all evaluation images."""

from dataclasses import dataclass

import jax
import numpy as np

from train.batches import Batch, eval_batches
from train.cli import Refused
from train.config import Config
from train.data import Images
from train.step import Steps


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of the readable evaluation images, in the order of their split."""

    index: np.ndarray  # (n,) number of the image in its split
    label: np.ndarray  # (n,)
    digest: np.ndarray  # (n,) of the images as they were read: the same ones have the same
    probability: np.ndarray  # (n, classes) float32

    def top(self, k: int) -> np.ndarray:
        """Returns whether the label is among the k most probable classes, `(n,)` bool.

        Ties and NaN count against the model.
        """
        own = np.take_along_axis(self.probability, self.label[:, None], axis=1)
        return ((self.probability >= own).sum(axis=1) <= k) & np.isfinite(self.probability).all(
            axis=1
        )

    def nll(self) -> float:
        """Returns the mean negative log-likelihood of the labels."""
        own = np.take_along_axis(self.probability, self.label[:, None], axis=1)
        return float(-np.log(np.maximum(own, 1e-30)).mean())


def evaluate(steps: Steps, params, images: Images, config: Config) -> Predictions:
    """Predicts every image once; all processes get all predictions.

    Args:
        steps: the compiled steps of the run.
        params: the parameters to evaluate.
        images: the split.
        config: the settings of the run.

    Raises:
        Refused: no image can be read.
    """
    whole = compute_outputs(steps, params, images, config)
    return Predictions(*(whole[name] for name in ("index", "label", "digest", "probability")))


def compute_outputs(steps: Steps, params, images: Images, config: Config) -> dict[str, np.ndarray]:
    """Returns the outputs of `steps.evaluate` for every readable image, in the order of the split.

    Args:
        steps: the compiled steps of the run.
        params: the parameters to evaluate.
        images: the split.
        config: the settings of the run.

    Returns:
        Arrays with a row for each image, by name; all processes get all of them.

    Raises:
        Refused: no image can be read.
    """
    parts = []
    for batch in eval_batches(
        images, config, process=jax.process_index(), processes=jax.process_count()
    ):
        parts.append(jax.device_get(steps.evaluate(params, put_on_devices(batch, steps))))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    kept = whole["weight"] > 0
    if not kept.any():
        raise Refused("no image of the evaluation split can be read")
    return {name: array[kept] for name, array in whole.items()}


def put_on_devices(batch: Batch, steps: Steps) -> dict[str, jax.Array]:
    """Puts this process's rows on its devices, as part of the batch of all processes."""
    return {
        name: jax.make_array_from_process_local_data(steps.batch_sharding, array)
        for name, array in batch.items()
    }
