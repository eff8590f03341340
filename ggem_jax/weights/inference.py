"""A loaded ViT as one function: the pixels of squares -> probabilities and unit descriptors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ggem_jax.files.normalisation import normalise_pixels
from ggem_jax.files.preprocessing import Preprocessing
from ggem_jax.pooling import l2_normalize
from ggem_jax.weights.load import LoadedViT

Outputs = dict[str, Float[Array, "b channels"]]
Infer = Callable[[Any, UInt8[Array, "b side side 3"]], Outputs]


def require_preprocessing(loaded: LoadedViT) -> Preprocessing:
    """Returns how images become inputs of a network.

    Args:
        loaded: The network.

    Raises:
        ValueError: Its file does not say it, as files that were not written from a run.
    """
    if loaded.preprocessing is None:
        raise ValueError(
            f"{loaded.source}: nothing says how images become its inputs; the folder of a training"
            " run does, and the files that python -m train.export writes from one"
        )
    return loaded.preprocessing


def make_infer(loaded: LoadedViT) -> tuple[Infer, dict[str, Any]]:
    """Returns a function from variables and pixels to the outputs of a network, and its variables.

    The function normalises the pixels itself. It returns "descriptor", `(b, dim)`, the unit vector
    of the pooled and perhaps projected tokens, and for a network with a head "probability",
    `(b, classes)`, the softmax of the logits, or their sigmoid where an image may have several
    labels, both in float32.

    Args:
        loaded: The network, with its preprocessing.

    Raises:
        ValueError: Nothing says how images become its inputs.
    """
    how, model = require_preprocessing(loaded), loaded.model
    probabilities = jax.nn.sigmoid if loaded.several_labels else jax.nn.softmax
    variables = {"vit": dict(loaded.variables), "projection": loaded.projection}

    def infer(variables: Any, pixels: UInt8[Array, "b side side 3"]) -> Outputs:
        images = normalise_pixels(pixels, how.mean, how.std)
        output: Any = model.apply(variables["vit"], images)
        found = {"descriptor": _describe(output.descriptor, variables["projection"])}
        if output.logits is not None:
            found["probability"] = probabilities(output.logits.astype(jnp.float32))
        return found

    return infer, variables


def _describe(pooled: Float[Array, "b d"], projection: Any) -> Float[Array, "b dim"]:
    """The pooled tokens as `Embedder` makes them a descriptor."""
    if projection is not None:
        kernel, bias = (projection[name].astype(pooled.dtype) for name in ("kernel", "bias"))
        pooled = pooled @ kernel + bias
    return l2_normalize(pooled.astype(jnp.float32))
