"""Frozen records that JAX maps over."""

from dataclasses import dataclass, fields
from typing import TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree of its fields.

    Its `__post_init__` checks what a person makes; what JAX makes of one (arrays, tracers, the axes of a `vmap`) is not checked.
    """
    made = dataclass(frozen=True)(cls)
    names = tuple(field.name for field in fields(made))  # type: ignore[arg-type]

    def unflatten(_, leaves):
        new = object.__new__(made)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(new, name, leaf)
        return new

    def flatten(value):
        return [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names], None

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return made
