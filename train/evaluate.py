"""Evaluates a model on all evaluation images."""

from dataclasses import dataclass

import jax
import numpy as np

from train.batches import Batch, eval_batches
from train.cli import Refused
from train.config import Config
from train.images import Images
from train.step import Steps


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of the readable evaluation images, in the order of their split."""

    index: np.ndarray  # (n,) number of the image in its split
    # (n,) class of the image, from 0, or (n, classes) with 1 for each class that it shows
    label: np.ndarray
    digest: np.ndarray  # (n,) CRC-32 of the image as it was read
    probability: np.ndarray  # (n, classes) float32

    def top(self, k: int) -> np.ndarray:
        """Returns whether the label is among the k most probable classes, `(n,)` bool.

        Ties and NaN count against the model.

        Args:
            k: Number of classes that are looked at.
        """
        own = np.take_along_axis(self.probability, self.label[:, None], axis=1)
        return ((self.probability >= own).sum(axis=1) <= k) & np.isfinite(self.probability).all(
            axis=1
        )

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.label.ndim == 2

    def measures(self) -> dict[str, float]:
        """Returns "top1", "top5" and "nll"; "map" and "nll" where an image has several labels."""
        if self.several:
            return {"map": float(np.nanmean(self.precisions())), "nll": self.nll()}
        return {
            "top1": float(self.top(1).mean()),
            "top5": float(self.top(5).mean()),
            "nll": self.nll(),
        }

    def precisions(self) -> np.ndarray:
        """Returns the average precision of each class, `(classes,)`; NaN without an image of it.

        It is the sum over thresholds of precision times the gain of recall.
        """
        from sklearn.metrics import average_precision_score

        found = np.full(self.label.shape[1], np.nan)
        for i in np.flatnonzero(self.label.any(axis=0)):
            found[i] = average_precision_score(self.label[:, i], self.probability[:, i])
        return found

    def nll(self) -> float:
        """Returns the mean negative log-likelihood of the labels, or of the answers to all classes
        where an image may have several.
        """
        if self.several:
            right = np.where(self.label > 0, self.probability, 1 - self.probability)
            return float(-np.log(np.maximum(right, 1e-30)).mean())
        own = np.take_along_axis(self.probability, self.label[:, None], axis=1)
        return float(-np.log(np.maximum(own, 1e-30)).mean())


def evaluate(steps: Steps, params, images: Images, config: Config) -> Predictions:
    """Returns the predictions for every readable image; all processes get all of them.

    Args:
        steps: The compiled steps of the run.
        params: The parameters to evaluate.
        images: The evaluation images.
        config: The settings of the run.

    Raises:
        Refused: No image can be read.
    """
    whole = compute_outputs(steps, params, images, config)
    return Predictions(*(whole[name] for name in ("index", "label", "digest", "probability")))


def compute_outputs(steps: Steps, params, images: Images, config: Config) -> dict[str, np.ndarray]:
    """Returns the outputs of `steps.evaluate` for every readable image, in the order of the split.

    Args:
        steps: The compiled steps of the run.
        params: The parameters to evaluate.
        images: The evaluation images.
        config: The settings of the run.

    Returns:
        Arrays with a row for each image, by name; all processes get all of them.

    Raises:
        Refused: No image can be read.
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
    """Returns a batch on the devices, made of the rows of all processes.

    Args:
        batch: This process's rows, as NumPy arrays by name.
        steps: The compiled steps, whose layout of a batch is used.
    """
    return {
        name: jax.make_array_from_process_local_data(steps.batch_sharding, array)
        for name, array in batch.items()
    }
