"""Which network of a checkpoint is read, where training scripts keep several.

They stand in dictionaries of their own, `{"state_dict": ..., "state_dict_ema": ...}`, or in one
dictionary under names that begin with theirs, `student.backbone....` and `teacher.backbone....`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ggem_jax.files.errors import MismatchedWeights

Arrays = dict[str, np.ndarray]
Place = tuple[str, ...]  # names of nested dictionaries, the outermost first

# dictionaries that training scripts put around the parameters; of several, the first here is read
WRAPPERS = (
    "model", "state_dict", "teacher", "model_state", "params", "model_state_dict", "module",
    "network", "net", "weights", "student",
)  # fmt: skip
_DEPTH = 4  # levels of nesting that are searched
# Characters of a name that are looked at. A small file can give a long one to many dictionaries.
_LONGEST = 200


def choose_network(contents: Mapping, which: str | None) -> tuple[str, Arrays, tuple[str, ...]]:
    """Returns the place and the arrays of one network, and the places of the others.

    Args:
        contents: Of a checkpoint.
        which: A name in the place of the network, such as "ema" of "state_dict_ema"; "model" or
            None: the usual one.

    Returns:
        The place, such as "model.teacher", or "" for the top; the arrays; the other places.

    Raises:
        MismatchedWeights: There is no such network, or there are several; the message follows the
            name of the file.
    """
    networks = dict(_networks(contents, set())) or {(): arrays_of(_innermost(contents))}
    usual = _usual(networks)
    place = None if which is None else _find(which, networks)
    if place is None and usual is not None and which in (None, "model"):
        place = usual if which is None or not _folders(networks[usual], "model".__eq__) else None
    others = [".".join(each) for each in networks if each not in (place or usual, ())]
    if place is not None:
        arrays = networks[place]
    elif usual is None or which is None:
        places = ", ".join([".".join(each) for each in networks][:8])
        if which not in (None, "model"):
            raise MismatchedWeights(f"holds no network called {which}: it has {places}")
        raise MismatchedWeights(f"holds several networks: say which of {places} (--which)")
    else:  # one of several networks in one dictionary
        start, arrays, beside = _find_part(networks[usual], which, others)
        place, others = usual + start, beside + others
    return ".".join(place), arrays, tuple(others)


def arrays_of(found: Any) -> Arrays:
    """Returns the arrays of a dictionary by their names, without its other values.

    Args:
        found: The dictionary.

    Returns:
        The arrays; none where `found` is no dictionary.
    """
    if not isinstance(found, Mapping):
        return {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, np.ndarray)
    }


def _networks(found: Mapping, seen: set[int], place: Place = ()) -> Iterator[tuple[Place, Arrays]]:
    """Dictionaries that hold arrays with names of several parts, as the layers of a network have.

    States of optimizers and losses have names of one part. Each dictionary is gone through once.
    """
    seen.add(id(found))
    arrays = arrays_of(found)
    if any(re.search(r".[./].", name[:_LONGEST]) for name in arrays):
        yield place, arrays
    for name, value in found.items() if len(place) < _DEPTH else ():
        is_place = isinstance(name, str) and len(name) <= _LONGEST
        if is_place and isinstance(value, Mapping) and id(value) not in seen:
            yield from _networks(value, seen, (*place, name))


def _innermost(found: Mapping) -> Mapping:
    """What the usual dictionaries stand around."""
    for _ in range(_DEPTH):
        name = next((name for name in WRAPPERS if isinstance(found.get(name), Mapping)), None)
        if name is None:
            break
        found = found[name]
    return found


def _usual(networks: Mapping[Place, Arrays]) -> Place | None:
    """The network that the usual dictionaries stand around, or the only one."""
    place: Place = ()
    for _ in range(_DEPTH):
        inner = {at[len(place)] for at in networks if at[: len(place)] == place and at != place}
        name = next((name for name in WRAPPERS if name in inner), None)
        if name is None:
            break
        place = (*place, name)
    if place in networks:
        return place
    return next(iter(networks)) if len(networks) == 1 else None


def _find(which: str, networks: Mapping[Place, Arrays]) -> Place | None:
    """The network whose place is `which`, or has it as a part, or as a word; None where none is."""
    ways: tuple[Callable[[Place], Any], ...] = (
        lambda place: [".".join(place)],
        lambda place: place,
        lambda place: re.split("[._-]", ".".join(place)),
    )
    for names in ways:
        found = [place for place in networks if place and which in names(place)]
        if len(found) > 1:
            places = ", ".join([".".join(place) for place in found][:8])
            raise MismatchedWeights(f"holds several networks: say which of {places} (--which)")
        if found:
            return found[0]
    return None


def _find_part(arrays: Arrays, which: str, others: list[str]) -> tuple[Place, Arrays, list[str]]:
    """The start of the names of one network, its arrays, and the starts of the names beside it.

    Names begin as in "module.base_encoder.blocks.0...": with the network, or folders before it.
    """
    found = _folders(arrays, which.__eq__) or _folders(
        arrays, lambda part: which in part.split("_")
    )
    if len(found) != 1:
        held = sorted(each.rstrip("./") for each in found or {*others, *_folders(arrays, bool)})
        one = "several parts" if found else "no network"
        raise MismatchedWeights(f"holds {one} called {which}: it has {', '.join(held[:8])}")
    (start,) = found
    before = re.sub(r"[^./]*[./]$", "", start)
    inside = [name.removeprefix(before) for name in arrays if name.startswith(before)]
    beside = _folders([name for name in inside if re.match(r"[^./]+[./].*[./]", name)], bool)
    kept = {name: array for name, array in arrays.items() if name.startswith(start)}
    place = tuple(re.split("[./]", start)[:-1])
    return place, kept, sorted(before + each[:-1] for each in beside if before + each != start)


def _folders(names: Iterable[str], wanted: Callable[[str], bool]) -> set[str]:
    """The starts of names up to the first folder that is wanted, of those that have one."""
    found = set()
    for name in names:
        for part in re.finditer(r"[^./]+[./]", name):
            if wanted(part[0][:-1]):
                found.add(name[: part.end()])
                break
    return found
