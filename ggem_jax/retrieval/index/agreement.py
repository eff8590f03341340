"""Settings of an index and of a caller: they must be equal."""

import json
from pathlib import Path
from typing import Any

from ggem_jax.retrieval.index.store import Facts, IndexRefused


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as they come back from JSON: tuples become lists, keys text.

    Args:
        settings: A dictionary of JSON values.

    Raises:
        IndexRefused: The settings are not such a dictionary.
    """
    try:
        return dict(json.loads(json.dumps(settings)))
    except (TypeError, ValueError) as error:
        raise IndexRefused(f"settings must be a dictionary of JSON values: {error}") from None


def refuse_other_settings(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises `IndexRefused`, which lists all differences, unless the settings are equal.

    Args:
        folder: Folder of the index, which the error names.
        there: Settings of the index.
        here: Settings of the caller, a dictionary of JSON values.
    """
    flat_there, flat_here = _flat(there), _flat(as_json(here))
    names = [
        name
        for name in flat_there | flat_here
        if flat_there.get(name, "not set") != flat_here.get(name, "not set")
    ]
    if names:
        told = "; ".join(
            f"{name} is {flat_there.get(name, 'not set')} there, {flat_here.get(name, 'not set')}"
            " here"
            for name in names
        )
        raise IndexRefused(
            f"{folder} was made with other settings ({told}): use those, or build an index of its"
            " own for these"
        )


def refuse_other_build(folder: Path, there: Facts, here: Facts) -> None:
    """Raises `IndexRefused` unless settings, dtype, folder of the images and part are equal.

    Args:
        folder: Folder of the index, which the error names.
        there: Facts of the index, or of an interrupted build.
        here: Facts of the caller.
    """
    facts_there, facts_here = (
        {**facts.settings, "dtype": facts.dtype, "folder": facts.root, "shard": facts.part}
        for facts in (there, here)
    )
    refuse_other_settings(folder, facts_there, facts_here)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"pooling": {"p": 3}} -> {"pooling.p": "3"}"""
    flat: dict[str, str] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{name}": json.dumps(value, ensure_ascii=False)}
        )
    return flat
