"""The checkpoints of CVNet <-> the variables of `ggem_jax.models.resnet.ResNet`.

Published names are those of pycls behind a prefix, such as `encoder_q.s1.b1.f.a.weight`. The
published networks take BGR images; ours take RGB as all our models do, so the input channels of the
first convolution change their order on the way, in both directions.

References: Lee et al., "Correlation Verification for Image Retrieval", 2022, arXiv:2204.01458, and
its code: github.com/sungonce/CVNet; the names also in github.com/ShihaoShao-GH/SuperGlobal.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.files.safetensors_files import read_safetensors
from ggem_jax.files.torch_files import read_torch
from ggem_jax.weights.convert import Parameter, to_published, to_variables

Depths = tuple[int, int, int, int]

PREFIXES = ("encoder_q.", "globalmodel.")
_WRAPPERS = ("model_state", "state_dict", "model")
_PUBLISHED_DEPTHS: tuple[Depths, ...] = ((3, 4, 6, 3), (3, 4, 23, 3))

# Parts of CVNet that the global descriptor does not use: heads and pooling of its training, its
# reranker, the momentum encoder and its queue.
_UNUSED = (
    "seb1",
    "seb2",
    "sefc",
    "pool",
    "conv2ds",
    "cv_learner",
    "encoder_k",
    "queue",
    "queue_l",
    "queue_ptr",
)


def read_cvnet(path: Path | str, *, depths: Depths | None = None) -> tuple[Depths, dict[str, Any]]:
    """Returns the depths of the network of a published checkpoint, and its variables.

    Args:
        path: A `.safetensors` file, or one of PyTorch (`.pth`, `.pyth`).
        depths: Those that it must have; None finds out which published network it is.

    Raises:
        UnreadableWeights: The file cannot be read.
        MismatchedWeights: It holds another network.
    """
    checkpoint = read_safetensors(path) if Path(path).suffix == ".safetensors" else read_torch(path)
    if not isinstance(checkpoint, dict):
        raise MismatchedWeights(
            f"{path} holds a {type(checkpoint).__name__} where a state dictionary is needed"
        )
    arrays = cvnet_parameters(checkpoint)
    depths = depths or _found_depths(arrays, str(path))
    return depths, to_variables(arrays, cvnet_table(depths), source=str(path))


def cvnet_to_variables(
    checkpoint: Mapping[str, Any], *, depths: Depths, source: str = "the checkpoint"
) -> dict[str, Any]:
    """Returns Flax variables, `params` and `batch_stats`, in float32.

    Args:
        checkpoint: The parameters by their published names, as they were read.
        depths: Blocks of the four stages.
        source: The file, for messages.

    Raises:
        MismatchedWeights: Parameters are missing, surplus (beside those that `cvnet_parameters`
            leaves out) or wrongly shaped; the message lists all.
    """
    return to_variables(cvnet_parameters(checkpoint), cvnet_table(depths), source=source)


def variables_to_cvnet(
    variables: Mapping[str, Any], *, depths: Depths, prefix: str = PREFIXES[0]
) -> dict[str, np.ndarray]:
    """Returns parameters by their published names, for `write_torch` and `write_safetensors`.

    Args:
        variables: `params` and `batch_stats` of a `ResNet`.
        depths: Blocks of the four stages.
        prefix: The folder before the names; that of the published checkpoints by default.

    Returns:
        Arrays in the layout of PyTorch.

    Raises:
        MismatchedWeights: They are not the variables of this network.
    """
    return {
        prefix + name: array for name, array in to_published(variables, cvnet_table(depths)).items()
    }


def cvnet_parameters(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of the global network without their prefix.

    Parameters that the global descriptor does not use are left out: the counters
    `num_batches_tracked`, and the parts seb1, seb2, sefc, pool, conv2ds, cv_learner, encoder_k,
    queue, queue_l and queue_ptr, with or without the prefix.

    Args:
        checkpoint: A state dictionary, alone or inside one of the usual wrappers.

    Returns:
        The parameters by their names without a prefix.

    Raises:
        MismatchedWeights: Two parameters have the same name once the prefix is gone.
    """
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    prefix = next(
        (prefix for prefix in PREFIXES if any(str(name).startswith(prefix) for name in checkpoint)),
        "",
    )
    named: dict[str, Any] = {}
    for name, value in checkpoint.items():
        plain = str(name).removeprefix(prefix)
        if plain in named:
            raise MismatchedWeights(
                f"two parameters are called {plain}, with {prefix} before it and without"
            )
        named[plain] = value
    return {
        name: value
        for name, value in named.items()
        if name.partition(".")[0] not in _UNUSED and not name.endswith(".num_batches_tracked")
    }


def cvnet_table(depths: Depths) -> dict[str, Parameter]:
    """Returns published names, without a prefix, and where their parameters go.

    Args:
        depths: Blocks of the four stages, such as (3, 4, 6, 3) of the ResNet-50.
    """
    table = _conv("stem.conv", "stem/conv", (64, 3, 7, 7), reverse_inputs=True) | _norm(
        "stem.bn", "stem/norm", 64
    )
    inputs = 64
    for stage, (blocks, width) in enumerate(zip(depths, (256, 512, 1024, 2048), strict=True), 1):
        inner = width // 4
        for block in range(1, blocks + 1):
            theirs, ours = f"s{stage}.b{block}", f"s{stage}/b{block}"
            if block == 1:
                table |= _conv(f"{theirs}.proj", f"{ours}/skip", (width, inputs, 1, 1)) | _norm(
                    f"{theirs}.bn", f"{ours}/skip_norm", width
                )
            for letter, shape in (
                ("a", (inner, inputs, 1, 1)),
                ("b", (inner, inner, 3, 3)),
                ("c", (width, inner, 1, 1)),
            ):
                table |= _conv(f"{theirs}.f.{letter}", f"{ours}/{letter}", shape) | _norm(
                    f"{theirs}.f.{letter}_bn", f"{ours}/{letter}_norm", shape[0]
                )
            inputs = width
    table["head.fc.weight"] = Parameter(("params", "head", "fc", "kernel"), (2048, 2048), "dense")
    table["head.fc.bias"] = Parameter(("params", "head", "fc", "bias"), (2048,))
    table["head.pool.p"] = Parameter(("params", "head", "p"), (1,))
    return table


def _conv(
    theirs: str, ours: str, shape: tuple[int, ...], *, reverse_inputs: bool = False
) -> dict[str, Parameter]:
    return {
        f"{theirs}.weight": Parameter(
            ("params", *ours.split("/"), "kernel"), shape, "conv", reverse_inputs
        )
    }


def _norm(theirs: str, ours: str, channels: int) -> dict[str, Parameter]:
    names = {
        "weight": ("params", "scale"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    }
    return {
        f"{theirs}.{name}": Parameter((collection, *ours.split("/"), leaf), (channels,))
        for name, (collection, leaf) in names.items()
    }


def _found_depths(arrays: Mapping[str, Any], source: str) -> Depths:
    """The depths of the published network that has these blocks, or nearly these."""
    blocks = {tuple(name.split(".")[:2]) for name in arrays}
    counts = [
        sum((f"s{stage}", f"b{block}") in blocks for block in range(1, 100))
        for stage in (1, 2, 3, 4)
    ]
    if not any(counts):
        raise MismatchedWeights(
            f"{source} holds no network of CVNet: no parameter is called s1.b1..., with or without"
            f" {' or '.join(PREFIXES)}"
        )
    return min(_PUBLISHED_DEPTHS, key=lambda depths: abs(sum(depths) - sum(counts)))
