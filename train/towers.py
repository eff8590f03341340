"""An image tower and a text tower with a shared space: `train.contrastive`."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ggem_jax.models.text import TextTransformer
from ggem_jax.models.vit import ViT
from ggem_jax.pooling import l2_normalize


@dataclass(frozen=True)
class Towers:
    """The two towers, and the scale and bias that join them.

    Parameters are {"image", "image_head", "text", "log_scale"}, and "bias" with the sigmoid loss.
    """

    image: ViT  # without a head
    text: TextTransformer  # with its projection
    first_scale: float  # first factor of the similarities
    first_bias: float | None  # first bias of the sigmoid loss; None: a softmax has none
    max_scale: float  # largest factor of the similarities

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Returns fresh parameters.

        Args:
            key: Source of the random numbers.
        """
        image_key, head_key, text_key = jax.random.split(key, 3)
        side, width = self.image.config.image, self.image.config.width
        head = jax.nn.initializers.normal(width**-0.5)(head_key, (width, self.text.outputs))
        params = {
            "image": self.image.init(image_key, jnp.zeros((1, side, side, 3)))["params"],
            "image_head": {"kernel": head},
            "text": self.text.init(text_key, jnp.zeros((1, self.text.config.context), jnp.int32))[
                "params"
            ],
            "log_scale": jnp.log(jnp.float32(self.first_scale)),
        }
        return (
            params if self.first_bias is None else params | {"bias": jnp.float32(self.first_bias)}
        )

    def describe_images(
        self, params, images: Float[Array, "b h w 3"], **options: Any
    ) -> Float[Array, "b embed"]:
        """Returns the unit vectors of images in the shared space.

        Args:
            params: The parameters of both towers.
            images: Normalised images, `(b, h, w, 3)`.
            **options: Options of the call of the image tower, such as `train=True` with `rngs`.

        Returns:
            The vectors, `(b, embed)` float32.
        """
        output: Any = self.image.apply({"params": params["image"]}, images, **options)
        kernel = params["image_head"]["kernel"].astype(output.descriptor.dtype)
        return l2_normalize((output.descriptor @ kernel).astype(jnp.float32))

    def describe_texts(
        self, params, ids: Int[Array, "b n"], **options: Any
    ) -> Float[Array, "b embed"]:
        """Returns the unit vectors of texts in the shared space.

        Args:
            params: The parameters of both towers.
            ids: Ids of the texts, `(b, n)`, n up to the context.
            **options: Options of the call of the text tower, such as `train=True` with `rngs`.

        Returns:
            The vectors, `(b, embed)` float32.
        """
        output: Any = self.text.apply({"params": params["text"]}, ids, **options)
        return l2_normalize(output.projected.astype(jnp.float32))

    def scale(self, params) -> Float[Array, ""]:
        """Returns the factor of the similarities, at most `max_scale`.

        Args:
            params: The parameters of both towers, which hold its logarithm.
        """
        return jnp.exp(clip_from_above(params["log_scale"], math.log(self.max_scale)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clip_from_above(x: Float[Array, ""], high: float) -> Float[Array, ""]:
    """Returns min(x, high) with the gradient of a value that is cut after each step.

    Above `high` only gradients that lead back below it pass.

    Args:
        x: A scalar.
        high: The largest value that is returned.
    """
    return jnp.minimum(x, high)


clip_from_above.defvjp(
    lambda x, high: (jnp.minimum(x, high), x),
    lambda high, x, slope: (jnp.where((x < high) | (slope > 0), slope, 0.0),),
)
