"""Parts of a network that do not learn: `--freeze`."""

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp

EMBEDDING = ("patch_embedding", "class_token", "registers", "position")


def learning_mask(params: Any, freeze: int | Literal["all"]) -> Any:
    """Returns for each parameter whether it learns.

    Args:
        params: Parameters of a ViT, or of networks with ViTs among them.
        freeze: How many blocks of each ViT do not learn, with its embedding where this is above 0;
            "all" leaves its head alone to learn.

    Returns:
        Booleans with the structure of the parameters.
    """

    def learns(name: str) -> bool:
        if freeze == "all":
            return name == "head"
        block = re.fullmatch("blocks_([0-9]+)", name)
        return not freeze or (int(block[1]) >= freeze if block else name not in EMBEDDING)

    def fill(part: Any, value: bool) -> Any:
        return jax.tree.map(lambda _: value, part)

    def mask(inner: Any) -> Any:
        if not isinstance(inner, dict):
            return True
        if "patch_embedding" in inner:
            return {name: fill(part, learns(name)) for name, part in inner.items()}
        return {name: mask(part) for name, part in inner.items()}

    return mask(params)


def drop_frozen(tree: Any, freeze: int | Literal["all"]) -> Any:
    """Returns gradients or updates that are zero for the parts that do not learn.

    Args:
        tree: Arrays with the structure of the parameters.
        freeze: As for `learning_mask`.
    """
    if not freeze:
        return tree
    return jax.tree.map(
        lambda leaf, learns: leaf if learns else jnp.zeros_like(leaf),
        tree,
        learning_mask(tree, freeze),
    )
