"""Named machines, models and memories, shipped as TOML files in `configs/`, and the user's files.

A machine's file has `about` and, in tables named as the groups of `Hardware`, the fields that
differ from their defaults: numbers, or text with a unit, such as "14 ns". With `base`, a named
machine or a file, it begins from that one; with `simulator`, a list of the public simulator's own
files, from those. In its table `energy`, `memory = "hbm3"` takes the energies of a kind of memory;
fields beside it come after them. A model's file is described in `neupims.machine.model_files`.
Files are TOML or JSON.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from neupims.files import SUFFIXES, parse_table, read_table
from neupims.machine.hardware import Hardware
from neupims.machine.hints import check_fields
from neupims.machine.model_files import BASE, ModelFile, own_fields, parse_model, parse_parallel
from neupims.machine.record import replace_all
from neupims.machine.simulator_files import is_simulator_json, read_simulator_files
from neupims.machine.workload import Decoder, Parallel

KINDS = {"hardware": "machine", "models": "model", "memory": "memory"}
CALLER = "--set"  # who gives a value that no file gives
MEMORY = "energy.memory"  # the name of a kind of memory, which stands for its energies


class Memory(NamedTuple):
    """The energies of a kind of memory."""

    about: str  # what it is, in one line
    values: dict[str, float]  # by field of `energy`
    sources: dict[str, str]  # by field: "published: ...", "derived: ..." or "assumed: ..."


def names(kind: str) -> tuple[str, ...]:
    """Returns the names of the configurations of a kind, sorted with numbers by size.

    Args:
        kind: "hardware", "models" or "memory".
    """
    files = (each.name for each in _folder(kind).iterdir())
    found = (name.removesuffix(".toml") for name in files if name.endswith(".toml"))

    def order(name: str) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", name)
        return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]

    return tuple(sorted(found, key=order))


class Given(NamedTuple):
    """A value that a file or the caller gives."""

    value: Any  # a number, or text with a unit
    by: str  # the file that it stands in, or CALLER


class Machine(NamedTuple):
    """A machine, and who gives which of its fields."""

    hardware: Hardware  # with all fields as numbers
    given: dict[str, Given]  # by dotted name; other fields have their defaults


def load_hardware(name_or_path: str | Path, changes: Mapping[str, Any] | None = None) -> Hardware:
    """Returns the machine of this name, or of this file.

    Args:
        name_or_path: A name, such as "neupims" (`python -m neupims show hardware` lists them), or a
            file: TOML or JSON with our fields, or a core JSON, memory JSON or DRAM ini of the
            public simulator.
        changes: Further fields, as for `set_fields`.

    Raises:
        ValueError: The name is unknown, or the file is malformed or holds an impossible value; the
            sentence names file and field.
        OSError: The file cannot be read.

    Example:
        >>> from neupims import load_hardware
        >>> load_hardware("npu-pim").pim.row_buffers
        1
    """
    return read_machine(name_or_path, changes).hardware


def read_machine(name_or_path: str | Path, changes: Mapping[str, Any] | None = None) -> Machine:
    """Returns a machine, and who gives which of its fields; see `load_hardware`.

    Times that are given for cycles are converted with the clock that results from file and changes.

    Args:
        name_or_path: A named machine, or a file.
        changes: Further fields, as for `set_fields`.

    Raises:
        ValueError: As for `load_hardware`.
        OSError: The file cannot be read.
    """
    values, file = _read_machine(name_or_path)
    with _name_file(file):
        hardware = set_fields(Hardware(), {name: each.value for name, each in values.items()})
    given = _expand_memory(values)
    if changes:
        given |= _expand_memory({name: Given(value, CALLER) for name, value in changes.items()})
        hardware = set_fields(Hardware(), {name: each.value for name, each in given.items()})
    return Machine(hardware, given)


def set_fields(hardware: Hardware, values: Mapping[str, Any]) -> Hardware:
    """Returns the machine with some fields changed together, checked again.

    Args:
        hardware: The machine.
        values: By dotted name: numbers, or text with a unit, such as "14 ns". `energy.memory`, the
            name of a kind of memory, sets all of its energies first, and the other fields come
            after it.

    Raises:
        ValueError: A field or the memory does not exist, or a value is impossible; the sentence
            names it.

    Example:
        >>> from neupims.machine.config import load_hardware, set_fields
        >>> changed = set_fields(load_hardware("neupims"), {"energy.memory": "hbm3"})
        >>> changed.energy.activate_kilobyte
        764.0
    """
    fields = {
        name: each.value
        for name, each in _expand_memory({n: Given(v, "") for n, v in values.items()}).items()
    }
    check_fields(fields, names("hardware"))
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"{name} must be a number or text with a unit, not {value!r}")
    return replace_all(hardware, fields)


def _read_machine(
    name_or_path: str | Path, *, is_base: bool = False
) -> tuple[dict[str, Given], str]:
    """Returns the fields that a named machine or a file gives, and the name of the file."""
    path = os.fspath(name_or_path)
    if path.lower().endswith(".ini"):
        return _read_simulator([path]), path
    values, file = _read("hardware", path)
    if is_simulator_json(values):
        return _read_simulator([path]), path
    below = _read_base(values.pop(BASE, None), file, is_base=is_base)
    listed = values.pop("simulator", [])
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise ValueError(f"{file}: simulator must be a list of files, not {listed!r}")
    below |= _read_simulator([os.path.join(os.path.dirname(file), each) for each in listed])
    with _name_file(file):
        own = {name: Given(value, file) for name, value in _flatten(values).items()}
        if MEMORY in own:  # its energies come after those of the base
            replaced = {f"energy.{field}" for field in load_memory(own[MEMORY].value).values}
            below = {name: each for name, each in below.items() if name not in replaced}
    return below | own, file


def _read_base(base: Any, file: str, *, is_base: bool) -> dict[str, Given]:
    """Returns the fields of the machine that a file begins from."""
    if base is None:
        return {}
    if is_base or not isinstance(base, str):
        raise ValueError(f"{file}: base must be a machine without a base of its own, not {base!r}")
    if base.lower().endswith((*SUFFIXES, ".ini")):
        base = os.path.join(os.path.dirname(file), base)
    return _read_machine(base, is_base=True)[0]


def _read_simulator(paths: list[str]) -> dict[str, Given]:
    return {name: Given(*each) for name, each in read_simulator_files(paths).items()}


def load_memory(name: str) -> Memory:
    """Returns the energies of a kind of memory, each with its source.

    Args:
        name: Its name, as `names("memory")` lists it.

    Raises:
        ValueError: There is no such memory.
    """
    if not isinstance(name, str) or name.lower() not in names("memory"):
        raise ValueError(
            f"there is no memory {name!r}; there are {', '.join(names('memory'))}, or give the"
            " energies themselves (`show constants` lists their names)"
        )
    tables, _ = _read("memory", name)
    return Memory(tables["about"], tables["energy"], tables["sources"])


def cost_sources(
    name_or_path: str | Path, changes: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Returns where the costs of a machine come from that are not the defaults.

    Args:
        name_or_path: As for `load_hardware`.
        changes: Fields that were changed after that, as for `set_fields`.

    Returns:
        By dotted name in the groups `energy` and `area`: the source of a kind of memory, or
        "given: FILE" or "given: --set".

    Raises:
        ValueError: As for `load_hardware`.
        OSError: The file cannot be read.
    """
    given, _ = _read_machine(name_or_path)
    changed = {name: Given(value, CALLER) for name, value in (changes or {}).items()}
    found: dict[str, str] = {}
    for values in (given, changed):
        if MEMORY in values:
            sources = load_memory(values[MEMORY].value).sources
            found |= {f"energy.{field}": source for field, source in sources.items()}
        costs = (name for name in values if name.startswith(("energy.", "area.")))
        found |= {name: f"given: {values[name].by}" for name in costs if name != MEMORY}
    return found


def read_model(name_or_path: str | Path) -> ModelFile:
    """Returns what the file of a model says: its dimensions, devices, description and notes.

    Args:
        name_or_path: A name, such as "gpt3-7b" (`python -m neupims show models` lists them), or a
            file that ends in .toml or .json: of our own fields, or Hugging Face's `config.json`,
            or its folder.

    Raises:
        ValueError: The name is unknown, or the file is malformed or holds an impossible value; the
            sentence names file and field.
        OSError: The file cannot be read.

    Example:
        >>> from neupims.machine.config import read_model
        >>> read_model("mixtral-8x7b").about
        'Mixtral 8x7B, 8 experts, 4 devices'
    """
    values, file, notes = _read_fields(name_or_path)
    with _name_file(file):
        return parse_model(values, notes.values())


def load_model(name_or_path: str | Path) -> Decoder:
    """Returns the model of this name, or of this TOML or JSON file.

    A file with `model_type` is read as the `config.json` of Hugging Face; `read_model` also gives
    notes on what such a file leaves open.

    Args:
        name_or_path: As for `read_model`.

    Raises:
        ValueError: As for `read_model`.
        OSError: The file cannot be read.

    Example:
        >>> from neupims import load_model
        >>> load_model("llama3-8b").kv_heads
        8
    """
    return read_model(name_or_path).model


def load_parallel(name_or_path: str | Path) -> Parallel:
    """Returns how the model of this name or file is spread over devices; one device by default.

    Args:
        name_or_path: As for `read_model`.

    Raises:
        ValueError: As for `read_model`; or tp or pp is not a whole number of at least 1.
        OSError: The file cannot be read.
    """
    values, file, _ = _read_fields(name_or_path)
    with _name_file(file):
        return parse_parallel(values)


def _read_fields(
    name_or_path: str | Path, *, is_base: bool = False
) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Returns the fields of a model's file over those of its base, its name, and notes by field."""
    values, file = _read("models", name_or_path)
    with _name_file(file):
        found, notes = own_fields(values)
        base = found.pop(BASE, None)
        if base is None:
            return found, file, notes
        if is_base or not isinstance(base, str):
            raise ValueError(f"base must be a model without a base of its own, not {base!r}")
    if base.lower().endswith(SUFFIXES):
        base = os.path.join(os.path.dirname(file), base)
    below, _, notes = _read_fields(base, is_base=True)
    still_open = {name: note for name, note in notes.items() if name not in found}
    return below | found, file, still_open


def about(kind: str, name: str) -> str:
    """Returns the one-line description of a named configuration, or "" if it has none.

    Args:
        kind: "hardware", "models" or "memory".
        name: Its name, as `names` lists it.

    Raises:
        ValueError: The name is unknown.
    """
    return str(_read(kind, name)[0].get("about", ""))


def changes(name: str) -> dict[str, Any]:
    """Returns the fields, by dotted name, in which a named machine differs from the default.

    Args:
        name: Name of the machine, as `names("hardware")` lists it.

    Raises:
        ValueError: The name is unknown.
    """
    return _flatten(_read("hardware", name)[0])


def _expand_memory(given: Mapping[str, Given]) -> dict[str, Given]:
    """Returns the fields with the energies of a kind of memory before them, instead of its name."""
    if MEMORY not in given:
        return dict(given)
    energies = load_memory(given[MEMORY].value).values
    others = {name: each for name, each in given.items() if name != MEMORY}
    by = given[MEMORY].by
    return {f"energy.{name}": Given(value, by) for name, value in energies.items()} | others


def _flatten(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by dotted name from tables of fields."""
    found = {}
    for group, table in tables.items():
        if group == "about":
            continue
        if not isinstance(table, Mapping):
            raise ValueError(
                f"{group} must be a table of fields, such as [hbm] with num_channels = 32, not"
                f" {table!r}"
            )
        found.update({f"{group}.{name}": value for name, value in table.items()})
    return found


def _read(kind: str, name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """Returns the values of a configuration, and what to call its file in an error."""
    name = os.fspath(name_or_path)
    if kind == "models" and os.path.isdir(name):
        name = os.path.join(name, "config.json")
    if name.lower().endswith(SUFFIXES):
        return read_table(name), name
    known = names(kind)
    if name.lower() not in known:
        close = ", ".join(get_close_matches(name.lower(), known))
        meant = f" did you mean {close}?" if close else ""
        raise ValueError(
            f"there is no {KINDS[kind]} {name!r};{meant} there are {', '.join(known)}, or give a"
            " file that ends in .toml or .json"
        )
    file = f"{name.lower()}.toml"
    text = _folder(kind).joinpath(file).read_text(encoding="utf-8")
    return parse_table(text, f"configs/{kind}/{file}"), f"configs/{kind}/{file}"


def _folder(kind: str):
    return resources.files("neupims") / "configs" / kind


@contextmanager
def _name_file(file: str) -> Iterator[None]:
    """Puts the name of the file before an error in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
