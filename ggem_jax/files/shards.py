"""Checkpoints in several files: shards in one folder, with or without an index of their names.

Hugging Face writes `model-00001-of-00002.safetensors` and so on, and beside them
`model.safetensors.index.json`, whose `weight_map` says in which file each array lies.

Reference: "Sharded checkpoints" in the documentation of transformers.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ggem_jax.files.errors import UnreadableWeights

_SHARD = r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.safetensors|\.bin)"
INDEX = ".index.json"


def find_shards(path: Path) -> list[Path]:
    """Returns the files of a checkpoint in several files, or none for any other file.

    Args:
        path: Any one shard, or the index.

    Returns:
        All shards, in order.

    Raises:
        UnreadableWeights: The index cannot be read, or a shard is missing.
    """
    shard = re.fullmatch(_SHARD, path.name)
    if path.name.endswith(INDEX):
        names = sorted(set(_weight_map(path).values()))
    elif shard:
        count = int(shard["count"])
        names = [
            f"{shard['stem']}-{i:05}-of-{count:05}{shard['ending']}" for i in range(1, count + 1)
        ]
    else:
        return []
    shards = [path.with_name(name) for name in names]
    if missing := [each.name for each in shards if not each.is_file()]:
        raise UnreadableWeights(
            f"{path} is part of a checkpoint in {len(shards)} files, of which"
            f" {missing[0]} is not beside it: bring all of them"
        )
    return shards


def read_shards(
    path: Path, shards: list[Path], read: Callable[[Path], Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the arrays of all shards by their names.

    Args:
        path: The shard or the index that was given.
        shards: As `find_shards` returns them.
        read: Reads one of them.

    Returns:
        The arrays, of the first shard first.

    Raises:
        UnreadableWeights: A name stands in two shards, or the index has a name that no shard has.
    """
    arrays: dict[str, Any] = {}
    for shard in shards:
        found = read(shard)
        if twice := [name for name in found if name in arrays]:
            raise UnreadableWeights(f"{shard} holds {twice[0]}, which another shard holds too")
        arrays |= found
    if path.name.endswith(INDEX) and (lost := [n for n in _weight_map(path) if n not in arrays]):
        raise UnreadableWeights(f"{path} names {lost[0]}, which no shard holds")
    return arrays


def _weight_map(path: Path) -> dict[str, str]:
    """Name of an array -> name of its file, which must lie in the folder of the index."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UnreadableWeights(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UnreadableWeights(f"{path} is not readable JSON: {error}") from None
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names:
        raise UnreadableWeights(f"{path} is no index of shards: it has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.(safetensors|bin)", name):
            raise UnreadableWeights(
                f"{path} must name .safetensors or .bin files beside it, not {str(name)[:100]!r}"
            )
    return names
