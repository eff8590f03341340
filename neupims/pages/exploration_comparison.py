"""The page of a comparison of systems and machines."""

from pathlib import Path
from typing import Any

from neupims.exploration.compare import Comparison
from neupims.machine.systems import FIDELITY_ANSWERS
from neupims.pages.report import write_report


def write_comparison(path: str | Path, found: Comparison) -> None:
    """Writes a page with the winner by each objective, and all metrics of each contender.

    Args:
        path: The HTML file.
        found: The result of `compare`.

    Raises:
        OSError: The page cannot be written.
        ImportError: Jinja is not installed.
    """
    names = [each.name for each in found.contenders]
    metrics = list(found.contenders[0].metrics)
    sections: list[dict[str, Any]] = [
        {
            "kind": "table",
            "title": "Winners",
            "text": "The lead is over the next one by the same objective.",
            "columns": ["objective", "best", "value", "lead, %"],
            "rows": [
                [
                    each.objective,
                    ", ".join(names[place] for place in each.best) or "none",
                    each.value,
                    None if each.lead is None else 100 * each.lead,
                ]
                for each in found.winners
            ],
        },
        {
            "kind": "table",
            "title": "Systems and machines",
            "text": "Geometric means over the workloads; those that are left out win nothing.",
            "columns": ["system", *metrics],
            "rows": [
                [each.name, *(None if each.flagged else value for value in each.metrics.values())]
                for each in found.contenders
            ],
        },
        {
            "kind": "table",
            "title": "How far to trust each",
            "text": f"{found.fidelity} fidelity: {FIDELITY_ANSWERS[found.fidelity]}.",
            "columns": ["system", "fidelity", "expected error of a layer, or left out"],
            "rows": [[each.name, each.fidelity, each.trust] for each in found.contenders],
        },
    ]
    if found.warnings:
        warnings = [[each] for each in found.warnings]
        sections.append(
            {"kind": "table", "title": "Warnings", "columns": ["warning"], "rows": warnings}
        )
    facts = {
        "workloads": ", ".join(found.workloads),
        "fidelity": found.fidelity,
        "designs": f"{len(found.contenders)}: each system on each machine",
    }
    if found.flagged:
        reasons = "; ".join(f"{count}: {why}" for why, count in found.flagged_by_reason.items())
        facts["left out"] = f"{found.flagged} ({reasons})"
    if found.trace_notes:
        facts["requests"] = "; ".join(found.trace_notes)
    write_report(path, sections, title="Systems and machines", facts=facts)
