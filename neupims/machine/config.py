"""Named machines and models, shipped as TOML files in `configs/`, and the user's own in TOML or
JSON.

A machine's file has `about` and, in tables named as the groups of `Hardware`, the fields that
differ from their defaults. A model's file has `about`, the fields of `Decoder`, and `tp` and `pp`,
how many devices share a layer and the layers.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.workload import Decoder, Parallel

KINDS = {"hardware": "machine", "models": "model"}
SUFFIXES = (".toml", ".json")
PARALLEL_FIELDS = ("tp", "pp")
NOT_NEEDED = ("mlp_matrices",)


def names(kind: str) -> tuple[str, ...]:
    """The named configurations of a kind, "hardware" or "models"; numbers in names by size."""
    found = (
        each.name.removesuffix(".toml")
        for each in _folder(kind).iterdir()
        if each.name.endswith(".toml")
    )
    return tuple(
        sorted(
            found,
            key=lambda name: [
                (not part.isdigit(), int(part) if part.isdigit() else 0, part)
                for part in re.split(r"(\d+)", name)
            ],
        )
    )


def load_hardware(name_or_path: str | Path) -> Hardware:
    """The machine of this name, or of this TOML or JSON file.

    Raises:
        ValueError: there is no such name, or the file is none or says something impossible; the
            sentence names file and field.
        OSError: the file cannot be read.
    """
    values, file = _read("hardware", name_or_path)
    hardware = Hardware()
    with _naming(file):
        for name, value in _dotted(values).items():
            hardware = replace(hardware, name, _number(name, value))
    return hardware


def load_model(name_or_path: str | Path) -> Decoder:
    """The model of this name, or of this TOML or JSON file.

    Raises:
        ValueError: there is no such name, or the file is none or says something impossible; the
            sentence names file and field.
        OSError: the file cannot be read.
    """
    values, file = _read("models", name_or_path)
    known = [each.name for each in fields(Decoder)]
    with _naming(file):
        for name in values:
            if name not in (*known, *PARALLEL_FIELDS, "about"):
                raise ValueError(
                    f"there is no field {name!r}; there are"
                    f" {', '.join((*known, *PARALLEL_FIELDS, 'about'))}"
                )
        missing = [name for name in known if name not in values and name not in NOT_NEEDED]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given")
        return Decoder(**{name: _number(name, values[name]) for name in known if name in values})


def load_parallel(name_or_path: str | Path) -> Parallel:
    """How the model of this name or file is spread over devices: as its file says, else on one.

    Raises:
        ValueError: as `load_model`, or tp or pp is not a whole number of at least 1.
        OSError: the file cannot be read.
    """
    values, file = _read("models", name_or_path)
    with _naming(file):
        return Parallel(**{name: _number(name, values.get(name, 1)) for name in PARALLEL_FIELDS})


def about(kind: str, name: str) -> str:
    """What a named configuration is, in a line."""
    return str(_read(kind, name)[0].get("about", ""))


def changes(name: str) -> dict[str, Any]:
    """The fields, by dotted name, in which a named machine differs from the default one."""
    return _dotted(_read("hardware", name)[0])


def _dotted(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by dotted name from tables of them."""
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
    """The values of a configuration, and what to call its file in an error."""
    text, file = _text(kind, os.fspath(name_or_path))
    json_file = file.lower().endswith(".json")
    try:
        values = json.loads(text) if json_file else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not {'JSON' if json_file else 'TOML'}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold fields by name, not {values!r}")
    return values, file


def _text(kind: str, name: str) -> tuple[str, str]:
    if name.lower().endswith(SUFFIXES):
        try:
            return Path(name).read_text(encoding="utf-8-sig"), name
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not a text file") from None
    known = names(kind)
    if name.lower() not in known:
        raise ValueError(
            f"there is no {KINDS[kind]} {name!r}; there are {', '.join(known)}, or give a file that"
            " ends in .toml or .json"
        )
    file = f"{name.lower()}.toml"
    return _folder(kind).joinpath(file).read_text(encoding="utf-8"), f"configs/{kind}/{file}"


def _folder(kind: str):
    return resources.files("neupims") / "configs" / kind


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Puts the file's name before what is wrong in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return value
