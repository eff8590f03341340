"""The page of a comparison of systems and machines."""

from pathlib import Path
from typing import Any

from neupims.exploration.compare import Comparison
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
    names = [f"{each.system} on {each.hardware}" for each in found.contenders]
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
            "text": "Geometric means over the workloads; those that are impossible win nothing.",
            "columns": ["system", "possible", *metrics],
            "rows": [
                [name, "no" if each.flagged else "yes", *each.metrics.values()]
                for name, each in zip(names, found.contenders, strict=True)
            ],
        },
    ]
    facts = {
        "workloads": ", ".join(found.workloads),
        "fidelity": found.fidelity,
        "designs": f"{len(found.contenders)}: each system on each machine",
    }
    if found.trace_notes:
        facts["requests"] = "; ".join(found.trace_notes)
    write_report(path, sections, title="Systems and machines", facts=facts)
