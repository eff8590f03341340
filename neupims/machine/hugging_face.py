"""Models from the `config.json` that Hugging Face keeps beside a model's weights.

`model_type` names the architecture (`neupims.machine.architectures`). A number that the file leaves
out and the architecture supplies is stated in a note; one that nobody supplies is an error.
"""

from collections.abc import Mapping
from typing import Any

from neupims.machine.architectures import DENSE
from neupims.machine.config_json import Config
from neupims.machine.expert_architectures import EXPERTS
from neupims.machine.quantization import read_bits

READERS = DENSE | EXPERTS  # by model_type
# Beside `text_config`, these describe the language model too.
SHARED = ("torch_dtype", "dtype", "quantization_config", "tie_word_embeddings")


def read_config(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the fields of a file of ours that say the same as a `config.json`, and notes.

    Args:
        values: The values of the file by name. A model with other parts, such as vision, has those
            of its language model in `text_config`.

    Returns:
        Fields of `Decoder`, `about` and `source`; and what the file leaves open, a sentence by the
        field that it is about.

    Raises:
        ValueError: The model_type is unknown; a number is missing; or the file names a quantization
            that this function does not know.
    """
    inner, notes = values, {}
    if isinstance(values.get("text_config"), Mapping):
        inner = {name: values[name] for name in SHARED if name in values} | values["text_config"]
        whole = values.get("model_type")
        notes["text_config"] = f"only the language model is read, not the rest of {whole}"
    kind = inner.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(
            f"the model_type {kind!r} is not known; known are {', '.join(sorted(READERS))}; a"
            " file of our own fields can describe others (`neupims show models` lists the fields)"
        )
    config = Config(inner)
    numbers = READERS[kind](config)
    bits, about_bits = read_bits(inner, experts="experts" in numbers)
    about = str(values.get("_name_or_path") or f"a model of type {kind}")
    texts = {"about": about, "source": "its config.json"}
    return texts | numbers | bits, notes | config.notes | about_bits
