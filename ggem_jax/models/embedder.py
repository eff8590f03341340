"""Image -> unit vector: a ViT, its pooling and a projection, as descriptor learning trains them."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ggem_jax.models.vit import ViT
from ggem_jax.pooling import l2_normalize


class Embedder(nn.Module):
    """The descriptor of a `ViT`, projected and L2-normalised, in float32.

    Args:
        vit: The network, without a head.
        dim: Channels of the projection; 0 leaves it out.
    """

    vit: ViT
    dim: int = 0

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool = False
    ) -> Float[Array, "b d"]:
        """Returns the descriptors of images `(b, h, w, 3)`, `(b, dim)`, of length 1."""
        descriptor = self.vit(images, train=train).descriptor
        if self.dim:
            descriptor = nn.Dense(self.dim, name="projection", dtype=descriptor.dtype)(descriptor)
        return l2_normalize(descriptor.astype(jnp.float32))
