"""A trained network as StableHLO: one function that runs with JAX alone, without this package.

    import json, jax, numpy as np
    from jax import export  # of JAX itself; this import is needed

    network = export.deserialize(bytearray(open("OUT/model.stablehlo", "rb").read()))
    network.call(np.zeros((2, 224, 224, 3), np.uint8))["probability"]  # any number of images

JAX needs the package flatbuffers beside it for this. `model.json` says how an image becomes those
pixels, what the outputs are, and the names of the classes. Weights, normalisation and pooling are
inside the function.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax import export as jax_export

from ggem_jax.files.atomic import replacing, write_text
from ggem_jax.weights.inference import make_infer, require_preprocessing
from ggem_jax.weights.load import LoadedViT

Platform = Literal["cpu", "cuda", "rocm", "tpu"]
PLATFORMS: tuple[Platform, ...] = ("cpu", "cuda", "rocm", "tpu")

MODEL_FILE, FACTS_FILE = "model.stablehlo", "model.json"
_MOST_BYTES = 2**31 - 2**24  # of weights: the serialized form, a flatbuffer, ends at 2 GiB


def write_stablehlo(
    loaded: LoadedViT, folder: Path, *, platforms: Sequence[Platform] = PLATFORMS
) -> tuple[Path, Path]:
    """Writes a network as StableHLO, and its facts beside it.

    The function takes pixels `(batch, side, side, 3)` uint8 for any batch, and returns the outputs
    of `ggem_jax.weights.inference.make_infer`.

    Args:
        loaded: The network, with its preprocessing.
        folder: A folder that exists. `model.stablehlo` and `model.json` are written there.
        platforms: Where the function can run.

    Returns:
        Both files.

    Raises:
        ValueError: Nothing says how images become inputs of the network, or its weights are more
            than the format holds.
        ModuleNotFoundError: The package flatbuffers is not installed.
        OSError: A file cannot be written.
    """
    if find_spec("flatbuffers") is None:  # which JAX imports to serialize
        raise ModuleNotFoundError(
            "writing StableHLO needs the package flatbuffers: pip install 'ggem-jax[train]'"
        )
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(loaded.variables))
    if size > _MOST_BYTES:
        raise ValueError(
            f"{loaded.source}: its weights take {size / 2**30:.1f} GiB, and a serialized function"
            " holds less than 2 GiB: write it as safetensors instead"
        )
    exported = _export(loaded, platforms)
    with replacing(folder / MODEL_FILE) as file:
        file.write_bytes(exported.serialize())
    facts = json.dumps(_describe(loaded, exported), indent=2)
    write_text(folder / FACTS_FILE, facts + "\n")
    return folder / MODEL_FILE, folder / FACTS_FILE


def _export(loaded: LoadedViT, platforms: Sequence[Platform]) -> jax_export.Exported:
    infer, variables = make_infer(loaded)
    side = require_preprocessing(loaded).side
    (batch,) = jax_export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8)

    def network(pixels):
        return infer(variables, pixels)

    return jax_export.export(jax.jit(network), platforms=platforms)(pixels)


def _describe(loaded: LoadedViT, exported: jax_export.Exported) -> dict[str, Any]:
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "format": "serialized by jax.export",
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "input": _shape(exported.in_avals[0]),
        "outputs": {name: _shape(each) for name, each in outputs.items()},
        # pixel * scale, less the mean, over the deviation: by the function itself
        "preprocessing": require_preprocessing(loaded).record() | {"normalised": "inside"},
        "classes": None if loaded.classes is None else list(loaded.classes),
        "several_labels": loaded.several_labels,
        "source": loaded.source,
    }


def _shape(aval: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return {"shape": shape, "dtype": str(aval.dtype)}
