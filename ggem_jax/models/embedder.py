"""Image -> unit vector: a ViT, its pooling, and a projection, as descriptor learning trains them
and retrieval uses them.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ggem_jax.models.vit import ViT
from ggem_jax.pooling import l2_normalize


class Embedder(nn.Module):
    """The descriptor of a `ViT` without a head, projected to `dim` channels (0: as it is) and
    L2-normalised, in float32.
    """

    vit: ViT
    dim: int = 0

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool = False
    ) -> Float[Array, "b d"]:
        descriptor = self.vit(images, train=train).descriptor
        if self.dim:
            descriptor = nn.Dense(self.dim, name="projection", dtype=descriptor.dtype)(descriptor)
        return l2_normalize(descriptor.astype(jnp.float32))
