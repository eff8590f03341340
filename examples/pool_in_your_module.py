"""GGeM pooling inside a Flax NNX module of your own, with exponents that learn.

`ggem_pool` is a pure function, so that it goes into any network: here the exponents are an
`nnx.Param` called `p`, which `ggem_jax.adamw` gives a learning rate of its own and no decay. The
task is to find the largest value of each channel among the tokens, so the exponents must grow.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ggem_jax import adamw, ggem_pool


class Pooler(nnx.Module):
    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.p = nnx.Param(jnp.full(groups, 3.0))
        self.scale = nnx.Linear(channels, channels, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        pooled = ggem_pool(tokens, jnp.maximum(self.p[...], 1.0))
        return pooled + self.scale(pooled)


def main() -> None:
    tokens = jax.random.uniform(jax.random.key(0), (64, 20, 8))
    model = Pooler(8, groups=4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamw(1e-3, exponent_lr=200.0), wrt=nnx.Param)

    @nnx.jit
    def step(model: Pooler, optimizer: nnx.Optimizer) -> jax.Array:
        def loss_of(model: Pooler) -> jax.Array:
            return optax.l2_loss(model(tokens), tokens.max(axis=1)).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print("exponents 3.0 ->", " ".join(f"{p:.1f}" for p in model.p[...]))


if __name__ == "__main__":
    main()
