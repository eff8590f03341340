"""Fine-tune a published ViT with GGeM pooling: python examples/fine_tune_vit.py [FILE]

FILE is a published checkpoint; without it, a tiny random one in timm's names is written. Replace
scikit-learn's digits by images `(b, h, w, 3)` in [0, 1] and labels `(b,)` of your own.
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from ggem_jax import GGeM, ViT, ViTConfig, adamw, cls_pool, load_vit
from ggem_jax.weights.export import export_vit
from ggem_jax.weights.load import LoadedViT


def write_tiny_vit(folder: str) -> str:
    config = ViTConfig(patch=2, width=64, depth=2, heads=1, mlp_width=128, image=8)
    model = ViT(config, cls_pool)
    variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    export_vit(LoadedViT(model, variables, None, None, "a tiny ViT"), folder, to="timm")
    return folder


def main(file: str) -> None:
    loaded = load_vit(file, pooling=GGeM(), num_classes=10)
    mean, std = (np.array(x or [0.5] * 3, np.float32) for x in (loaded.mean, loaded.std))
    digits, labels = load_digits(return_X_y=True)
    images = (np.repeat(digits.reshape(-1, 8, 8, 1), 3, axis=-1) / 16 - mean) / std
    images = jax.image.resize(images, (len(images), loaded.image, loaded.image, 3), "bilinear")
    optimizer = adamw(4e-3)

    def loss_of(variables, images, labels):
        logits = loaded.model.apply(variables, images).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(variables, state, images, labels):
        gradient = jax.grad(loss_of)(variables, images, labels)
        updates, state = optimizer.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state

    variables, state = loaded.variables, optimizer.init(loaded.variables)
    for i in [*range(0, 1536, 64)] * 4:
        variables, state = step(variables, state, images[i : i + 64], labels[i : i + 64])
    right = loaded.model.apply(variables, images[1536:]).logits.argmax(-1) == labels[1536:]
    print(f"accuracy on {len(right)} other images: {right.mean():.0%}")
    print("exponents:", variables["params"]["pool"]["p"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if sys.argv[1:] else write_tiny_vit(folder))
