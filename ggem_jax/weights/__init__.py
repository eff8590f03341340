"""Published weights <-> our parameters, and safe readers of the files they come in. Needs neither
PyTorch nor a device.

Read: `read_torch` (.pth), `read_safetensors`, `read_pickle` (plain data). Write: `write_torch`,
`write_safetensors`. CVNet's checkpoints, for `ggem_jax.models.resnet`: `read_cvnet`,
`cvnet_to_variables`, `variables_to_cvnet`. Published ViTs, for `ggem_jax.models.vit`, and text
towers, for `ggem_jax.models.text`: the modules `vit` and `text`, which are not imported here, as
they need the models.

Errors, each in one sentence and a `ValueError`: `UnreadableWeights` for a file that cannot be read,
among them `UnsafePickle` for one that asks for more than plain data, and `MismatchedWeights` for
weights of another network.
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
