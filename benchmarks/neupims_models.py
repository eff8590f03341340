"""Compares the sizes of named models with published ones: parameters, bytes, cache, operations.

    python -m benchmarks.neupims_models

Published numbers are in benchmarks/published_models.csv, each with its source. Weights of 16 bits
take twice the published parameters in bytes, and a token takes two operations for each published
parameter that multiplies it. `cache_kib` comes from
sebastianraschka.com/llm-architecture-gallery (April 2026), which computes it from config.json.
"""

import csv
from pathlib import Path
from typing import NamedTuple

from neupims.machine.config import load_model
from neupims.machine.model import Decoder
from neupims.machine.model_size import (
    Parameters,
    flops_per_token,
    kv_cache_bytes,
    parameters,
    weight_bytes,
)

PUBLISHED = Path(__file__).with_name("published_models.csv")
GIB = 2**30
QUANTITIES = {  # and their units
    "parameters, B": 1e9,
    "active, B": 1e9,
    "weights, GB": 1e9,
    "FLOPs a token, G": 1e9,
    "cache a token, KiB": 1024,
}


class Comparison(NamedTuple):
    """One published number of a model beside ours."""

    model: str  # its name
    quantity: str  # one of QUANTITIES
    published: float  # a count, or bytes
    ours: float  # the same
    source: str  # of the published number
    why: str  # why they differ by more than 1 %, or ""

    @property
    def percent(self) -> float:
        """Ours over the published number, less one, in percent."""
        return 100 * (self.ours / self.published - 1)


def main() -> None:
    print("\n".join(table()))


def table() -> list[str]:
    """Returns the lines of the table: a row for each model, a column for each quantity."""
    found = compare()
    lines = [
        f"| model | {' | '.join(QUANTITIES)} | source |",
        f"| --- |{' ---: |' * len(QUANTITIES)} --- |",
    ]
    for name in dict.fromkeys(each.model for each in found):
        mine = {each.quantity: each for each in found if each.model == name}
        cells = [_cell(mine[each]) if each in mine else "" for each in QUANTITIES]
        (source,) = {each.source for each in mine.values()}
        lines.append(f"| {name} | {' | '.join(cells)} | {source} |")
    return lines


def _cell(each: Comparison) -> str:
    """Returns ours, and the difference from the published number."""
    unit = QUANTITIES[each.quantity]
    digits = 1 if unit == 1024 else 2
    difference = f"{each.percent:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")
    return f"{each.ours / unit:,.{digits}f} ({difference} %)"


def compare() -> list[Comparison]:
    """Returns every published number beside ours."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        return [found for line in csv.DictReader(file) for found in _compare(line)]


def _compare(line: dict[str, str]) -> list[Comparison]:
    """Returns the comparisons of one model."""
    model = load_model(line["model"])
    size = parameters(model)
    counted = float(line["parameters"])
    found = [("parameters, B", counted, _count(size, line["counts"]))]
    if line["active"]:
        found.append(
            ("active, B", float(line["active"]), _count(size, line["active_counts"], True))
        )
    if model.weight_bits == 16 and not line["checkpoint_bytes"]:
        stored = counted + (0 if line["counts"] == "all" else size.embeddings + size.lm_head)
        found.append(("weights, GB", 2 * stored, float(weight_bytes(model))))
    if line["checkpoint_bytes"]:
        stored = line["checkpoint_bytes"]
        published = float(stored.removesuffix("GiB")) * (GIB if stored.endswith("GiB") else 1)
        found.append(("weights, GB", published, float(weight_bytes(model))))
    if line["active"] or not model.experts:
        used = _multiplied(line, model)
        found.append(("FLOPs a token, G", 2 * used, float(flops_per_token(model))))
    if line["cache_kib"]:
        cache = 1024 * float(line["cache_kib"])
        found.append(("cache a token, KiB", cache, float(kv_cache_bytes(model, 1))))
    return [Comparison(line["model"], *each, line["source"], line["why"]) for each in found]


def _count(size: Parameters, counts: str, active: bool = False) -> float:
    """Returns our count of what a publication counts."""
    total = size.active if active else size.total
    left_out = {
        "all": 0,
        "without embeddings": size.embeddings + size.lm_head,
        "without input embeddings": size.embeddings,
    }
    return float(total - left_out[counts])


def _multiplied(line: dict[str, str], model: Decoder) -> float:
    """Returns the parameters, as published, that a token is multiplied with."""
    embeddings = float(model.vocabulary * model.width)
    which = ("active", "active_counts") if line["active"] else ("parameters", "counts")
    counted, counts = float(line[which[0]]), line[which[1]]
    if counts == "without embeddings":
        return counted + embeddings  # the LM head
    return counted - (embeddings if counts == "all" and not model.tied_embeddings else 0)


if __name__ == "__main__":
    main()
