"""Models from the `config.json` that Hugging Face keeps beside a model's weights.

`model_type` names the architecture (`neupims.machine.architectures`). A number that the file leaves
out and the architecture supplies is stated in a note; one that nobody supplies is an error.
"""

from collections.abc import Mapping
from typing import Any

from neupims.machine.architectures import READERS
from neupims.machine.config_json import Config
from neupims.machine.model import Decoder
from neupims.machine.quantization import read_bits

# Beside `text_config`, these describe the language model too.
SHARED = ("torch_dtype", "dtype", "quantization_config", "tie_word_embeddings")


def read_config(values: Mapping[str, Any]) -> tuple[Decoder, tuple[str, ...]]:
    """Returns the model of a `config.json`, and notes on what the file leaves open.

    Args:
        values: The values of the file by name. A model with other parts, such as vision, has those
            of its language model in `text_config`.

    Raises:
        ValueError: The model_type is unknown; a number is missing or impossible; or the file names
            a quantization that this function does not know.
    """
    inner, notes = values, []
    if isinstance(values.get("text_config"), Mapping):
        inner = {name: values[name] for name in SHARED if name in values} | values["text_config"]
        notes.append(f"only the language model is read, not the rest of {values.get('model_type')}")
    kind = inner.get("model_type")
    if kind not in READERS:
        raise ValueError(
            f"the model_type {kind!r} is not known; known are {', '.join(sorted(READERS))}; a"
            " file of our own fields can describe others (`neupims show models` lists the fields)"
        )
    config = Config(inner)
    numbers = READERS[kind](config)
    bits, about_bits = read_bits(inner, experts="experts" in numbers)
    return Decoder(**numbers, **bits), (*notes, *config.notes, *about_bits)
