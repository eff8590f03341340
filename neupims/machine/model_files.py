"""What a file says of a model: our own fields, or the `config.json` of Hugging Face.

A file of ours has `about`, `source`, the fields of `Decoder`, and `tp` and `pp`: how many devices
share a layer, and into how many groups the layers are cut. With `base`, a named model or a file, it
needs only the fields that differ. A file with `model_type` is a `config.json`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from neupims.machine.hugging_face import read_config
from neupims.machine.model import Decoder
from neupims.machine.workload import Parallel

PARALLEL_FIELDS = ("tp", "pp")
TEXTS = ("about", "source")
BASE = "base"  # the model whose fields hold where a file does not name them
# Names that others use, and ours.
MEANT = {
    "experts_per_token": "active_experts",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "kv_bytes": "kv_bits, 8 for a byte",
    "num_attention_heads": "heads",
    "num_experts": "experts",
    "num_experts_per_tok": "active_experts",
    "num_hidden_layers": "layers",
    "num_key_value_heads": "kv_heads",
    "num_layers": "layers",
    "sliding_window": "window",
    "vocab_size": "vocabulary",
    "weight_bytes": "weight_bits, 8 for a byte",
}


class ModelFile(NamedTuple):
    """What a file says of a model."""

    model: Decoder  # its dimensions
    parallel: Parallel  # how it is spread over devices; one device where the file does not say
    about: str  # one line of text
    source: str  # where the dimensions come from
    notes: tuple[str, ...]  # what the file leaves open, and how it was read


def own_fields(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the values of a file by the names of our own fields, and notes by field.

    Args:
        values: The values by name, of our own fields or, with `model_type`, of a `config.json`.

    Raises:
        ValueError: A field is unknown, or a `config.json` cannot be read.
    """
    if "model_type" in values:
        return read_config(values)
    known = (*(each.name for each in fields(Decoder)), *PARALLEL_FIELDS, *TEXTS, BASE)
    for name in values:
        if name not in known:
            _refuse(name, known)
    return dict(values), {}


def parse_model(values: Mapping[str, Any], notes: Iterable[str] = ()) -> ModelFile:
    """Returns what the values of a file say of a model.

    Args:
        values: The values by the names of our own fields, as `own_fields` gives them.
        notes: What is already known to be left open.

    Raises:
        ValueError: A field is missing or its value is impossible; the sentence names it.
    """
    missing = [
        each.name for each in fields(Decoder) if each.default is MISSING and each.name not in values
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given")
    known = [each.name for each in fields(Decoder) if each.name in values]
    model = Decoder(**{name: check_number(name, values[name]) for name in known})
    about, source = (str(values.get(name, "")) for name in TEXTS)
    notes = (*notes, *_note_head(model, values))
    return ModelFile(model, parse_parallel(values), about, source, notes)


def parse_parallel(values: Mapping[str, Any]) -> Parallel:
    """Returns how the values of a file spread a model over devices; one device by default.

    Args:
        values: As for `parse_model`.

    Raises:
        ValueError: tp or pp is not a whole number of at least 1.
    """
    return Parallel(**{name: check_number(name, values.get(name, 1)) for name in PARALLEL_FIELDS})


def check_number(name: str, value: Any) -> Any:
    """Returns a value of a file that must be a number.

    Args:
        name: Its field, for the error.
        value: The value.

    Raises:
        ValueError: The value is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return value


def _refuse(name: str, known: tuple[str, ...]) -> None:
    if name in MEANT:
        raise ValueError(
            f"there is no field {name!r}; did you mean {MEANT[name]}? (a config.json of Hugging"
            " Face is read as one if it has its model_type)"
        )
    raise ValueError(f"there is no field {name!r}; there are {', '.join(known)}")


def _note_head(model: Decoder, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what to say of a head whose width was not given and is no power of two."""
    head = model.head_dim
    if values.get("head_dim") or not head & (head - 1):
        return ()
    return (
        f"head_dim is not given: width / heads, {head}; give head_dim where it is another"
        " (Qwen3 32B, for one, has heads of 128)",
    )
