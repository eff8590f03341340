"""Published weights <-> our parameters, and safe readers of their files.

Neither PyTorch nor a device is required. Readers are `read_torch` (.pth), `read_safetensors` and
`read_pickle` (plain data), writers `write_torch` and `write_safetensors`. CVNet's checkpoints, for
`ggem_jax.models.resnet`, have `read_cvnet`, `cvnet_to_variables` and `variables_to_cvnet`. The
modules `vit` and `text`, for published ViTs and text towers, `export`, for files that other
libraries load, and `hub`, for weights by name, are not imported here, as they import the models or
need a package of their own.

Errors are a `ValueError` with one sentence: `UnreadableWeights` for a file that cannot be read,
among them `UnsafePickle` for one that asks for more than plain data; `MismatchedWeights` for
weights of another network, among them `AmbiguousWeights` (of `ggem_jax.files.errors`) for weights
that fit networks which compute different things.
"""

from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights, UnsafePickle
from ggem_jax.files.pickles import read_pickle
from ggem_jax.files.safetensors_files import read_safetensors, write_safetensors
from ggem_jax.files.torch_files import read_torch, write_torch
from ggem_jax.weights.cvnet import cvnet_to_variables, read_cvnet, variables_to_cvnet

__all__ = [
    "MismatchedWeights",
    "UnreadableWeights",
    "UnsafePickle",
    "cvnet_to_variables",
    "read_cvnet",
    "read_pickle",
    "read_safetensors",
    "read_torch",
    "variables_to_cvnet",
    "write_safetensors",
    "write_torch",
]
