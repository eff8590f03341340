"""Batched LLM inference on an NPU with processing-in-memory HBM, in JAX.

The public names load on first use: importing the package starts no device and loads no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neupims.exploration.compare import compare as compare
    from neupims.exploration.explore import explore as explore
    from neupims.exploration.goodput import ServedTrace as ServedTrace
    from neupims.machine.case import Case as Case
    from neupims.machine.case import make_case as make_case
    from neupims.machine.config import load_hardware as load_hardware
    from neupims.machine.config import load_model as load_model
    from neupims.machine.config import load_parallel as load_parallel
    from neupims.machine.hardware import Hardware as Hardware
    from neupims.machine.record import replace as replace
    from neupims.machine.traces import Requests as Requests
    from neupims.machine.traces import read_requests as read_requests
    from neupims.machine.traces import read_trace as read_trace
    from neupims.machine.workload import Batch as Batch
    from neupims.machine.workload import Decoder as Decoder
    from neupims.machine.workload import Parallel as Parallel
    from neupims.machine.workload import make_batch as make_batch
    from neupims.scheduling.decision import export_trace as export_trace
    from neupims.scheduling.findings import ScheduleSearch as ScheduleSearch
    from neupims.scheduling.schedule_search import search_schedule as search_schedule
    from neupims.serving.requests import Arrivals as Arrivals
    from neupims.serving.requests import read_arrivals as read_arrivals
    from neupims.serving.results import Serving as Serving
    from neupims.serving.serve import serve as serve
    from neupims.simulation import Simulation as Simulation
    from neupims.simulation import simulate_case as simulate_case
    from neupims.timing.fit import Fit as Fit
    from neupims.timing.fit import fit as fit
    from neupims.timing.iteration import Iteration as Iteration
    from neupims.timing.iteration import simulate as simulate
    from neupims.timing.prefill import prefill as prefill
    from neupims.validation import Validation as Validation
    from neupims.validation import validate as validate

# Public name -> the module that defines it.
_HOMES = {
    "Arrivals": "serving.requests",
    "Batch": "machine.workload",
    "Case": "machine.case",
    "Decoder": "machine.workload",
    "Fit": "timing.fit",
    "Hardware": "machine.hardware",
    "Iteration": "timing.iteration",
    "Parallel": "machine.workload",
    "Requests": "machine.traces",
    "ScheduleSearch": "scheduling.findings",
    "ServedTrace": "exploration.goodput",
    "Serving": "serving.results",
    "Simulation": "simulation",
    "Validation": "validation",
    "compare": "exploration.compare",
    "explore": "exploration.explore",
    "export_trace": "scheduling.decision",
    "fit": "timing.fit",
    "load_hardware": "machine.config",
    "load_model": "machine.config",
    "load_parallel": "machine.config",
    "make_batch": "machine.workload",
    "make_case": "machine.case",
    "prefill": "timing.prefill",
    "read_arrivals": "serving.requests",
    "read_requests": "machine.traces",
    "read_trace": "machine.traces",
    "replace": "machine.record",
    "search_schedule": "scheduling.schedule_search",
    "serve": "serving.serve",
    "simulate": "timing.iteration",
    "simulate_case": "simulation",
    "validate": "validation",
}
__all__ = list(_HOMES)


if not TYPE_CHECKING:  # with it, type checkers would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value  # so that it is looked up only once
        return value


def __dir__() -> list[str]:
    return sorted({*_HOMES, *(name for name in globals() if name.startswith("__"))})
