"""The page of a design-space exploration."""

from pathlib import Path
from typing import Any

import numpy as np

from neupims.envelope import describe_error
from neupims.exploration.ablation import Ablation
from neupims.exploration.designs import EliteMap
from neupims.exploration.explore import Exploration
from neupims.exploration.pareto import in_plane
from neupims.exploration.points import Objective, overall
from neupims.exploration.sobol import COLUMNS, Indices
from neupims.pages.report import write_report

MOST_ROWS = 500  # designs of the front in the table


def write_exploration(path: str | Path, found: Exploration) -> None:
    """Writes a page with the front, some other designs, and the sensitivities.

    Args:
        path: The HTML file.
        found: The result of `explore`.

    Raises:
        OSError: The page cannot be written.
        ImportError: Jinja is not installed.
    """
    first, *others = found.objectives
    sections = [_plane(found, first, other) for other in others]
    if found.elite_map is not None and found.elite_map.elites:
        sections.insert(0, _elite_map(found, found.elite_map))
    sections += [_front_table(found), _sensitivity_table(found)]
    if found.indices is not None:
        sections.append(_indices_table(found, found.indices))
    sections += [_ablation_table(each) for each in found.ablations]
    write_report(path, sections, title="Design space", facts=_facts(found))


def _plane(found: Exploration, first: Objective, other: Objective) -> dict[str, Any]:
    """The first objective against another one."""
    parts = (found.result.front, found.result.others)
    x, y = (
        np.concatenate([overall(part.metrics[each.name]) for part in parts])
        for each in (other, first)
    )
    best = in_plane(x, y, most_x=other.largest, most_y=first.largest)
    names = [str(place) for part in parts for place in part.place.tolist()]
    designs = zip(x.tolist(), y.tolist(), best.tolist(), names, strict=True)
    return {
        "kind": "pareto",
        "title": f"{first.name} against {other.name}",
        "text": (
            "The front of these two objectives, and some of the other designs that meet the"
            " constraints."
        ),
        "points": [dict(zip(("x", "y", "front", "name"), each, strict=True)) for each in designs],
        "x_name": other.name,
        "y_name": first.name,
        "log_x": True,
        "log_y": True,
    }


def _elite_map(found: Exploration, shown: EliteMap) -> dict[str, Any]:
    """The best design in each cell."""
    best = found.objectives[0]
    x, y = shown.axes
    return {
        "kind": "heat",
        "title": f"Best {best.name} by {x} and {y}",
        "text": (
            f"The best design in each cell: {len(shown.elites)} of {shown.size} cells have one that"
            " meets the constraints. The outermost cells are open."
        ),
        "cells": [
            {
                "x": each.cell[0],
                "y": each.cell[1],
                "value": each.design.metrics[best.name],
                "name": str(each.design.index),
            }
            for each in shown.elites
        ],
        "x_edges": shown.edges[0],
        "y_edges": shown.edges[1],
        "x_name": x,
        "y_name": y,
        "z_name": best.name,
        "log_x": shown.log[0],
        "log_y": shown.log[1],
        "largest": best.largest,
    }


def _front_table(found: Exploration) -> dict[str, Any]:
    rows = [
        [name, *design.knobs.values(), *design.metrics.values(), design.twins]
        for name, design in (
            *((str(each.index), each) for each in found.front[:MOST_ROWS]),
            ("base", found.base),
        )
    ]
    return {
        "kind": "table",
        "title": "Pareto front",
        "text": (
            f"{len(found.front)} designs, sorted by {found.objectives[0].name}; geometric means"
            f" over {', '.join(found.workloads)}. The last row is the base design."
        ),
        "columns": ["design", *found.base.knobs, *found.base.metrics, "equal designs"],
        "rows": rows,
    }


def _sensitivity_table(found: Exploration) -> dict[str, Any]:
    return {
        "kind": "table",
        "title": f"Sensitivity of {found.sensitivity_of}",
        "columns": ["knob", "elasticity at the base", "rank correlation", "share of variance"],
        "rows": [[name, *each] for name, each in found.sensitivities.items()],
    }


def _indices_table(found: Exploration, indices: Indices) -> dict[str, Any]:
    return {
        "kind": "table",
        "title": "Sobol indices",
        "text": indices.about,
        "columns": list(COLUMNS),
        "rows": indices.table(each.name for each in found.objectives),
    }


def _ablation_table(ablation: Ablation) -> dict[str, Any]:
    return {
        "kind": "table",
        "title": "Why is this design best?",
        "text": (
            f"Design {ablation.best.index} is the best by {ablation.objective}. Each row changes"
            " one of its knobs: to the value of the given machine, or to the next one of the space."
        ),
        "columns": list(ablation.titles),
        "rows": ablation.table(),
    }


def _reasons(found: Exploration) -> str:
    reasons = "; ".join(f"{count:,}: {why}" for why, count in found.flagged_by_reason.items())
    return f" ({reasons})" if reasons else ""


def _facts(found: Exploration) -> dict[str, Any]:
    facts = {
        "designs": (
            f"{found.points:,} by {found.method}, {found.kept:,} meet the constraints,"
            f" {found.flagged:,} are impossible{_reasons(found)}"
        ),
        "machine": f"{found.system}, {found.fidelity} fidelity",
        "workloads": ", ".join(found.workloads),
        "hypervolume": f"{found.hypervolume:.6g}, in units of the base design",
    }
    words = describe_error(found.expected_error.to_dict())
    return facts | {f"base design: {title}": text for title, text in words.items()}
