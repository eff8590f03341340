"""Which fields of a machine change nothing in the results of a system.

`quantity` says of each field what it changes: the time, the energy alone, or nothing. A system
without PIM ignores the fields of PIM, and a GPU those of the NPU and its memory, and their costs.
"""

import numbers

from neupims.machine.hardware import Hardware
from neupims.machine.quantity import Field, describe
from neupims.machine.systems import Fidelity, System

# Groups of `Hardware` that a system does not have.
ABSENT: dict[System, tuple[str, ...]] = {
    "neupims": ("gpu",),
    "npu-pim": ("gpu",),
    "npu-only": ("gpu", "pim"),
    "gpu": ("npu", "hbm", "pim", "energy", "area"),
}
OF_GPU_AREA = ("area.dram_gigabyte",)  # a cost that a GPU has too; its board's power has the rest
# In `simulator` fidelity a vector unit takes a row a cycle, however many units and lanes there are.
VECTOR = ("npu.vector_units", "npu.vector_lanes")


def idle_reason(field: Field, system: System, fidelity: Fidelity) -> str:
    """Returns why a field changes nothing, or an empty string if it changes the results.

    Args:
        field: The field of a machine, as `describe` yields it.
        system: The system that runs.
        fidelity: "simulator" or "intended".
    """
    if field.effect == "none":
        return "no part of the model depends on it"
    if field.name.partition(".")[0] in ABSENT[system] and field.name not in OF_GPU_AREA:
        return f"the system {system} does not have it"
    if field.name in VECTOR[: 1 if system == "npu-only" else 2] and fidelity == "simulator":
        return "it matters in intended fidelity only"
    group = field.name.partition(".")[0]
    if field.effect in ("energy", "area") and group != field.effect:
        return f"it changes the {field.effect} alone"
    return ""


def idle_changes(hardware: Hardware, system: System, fidelity: Fidelity) -> list[str]:
    """Returns a sentence for each reason why fields that differ from their defaults change nothing.

    Args:
        hardware: The machine; arrays of a batch are not looked at.
        system: The system that runs.
        fidelity: "simulator" or "intended".
    """
    found: dict[str, list[str]] = {}
    for each in describe(hardware):
        changed = isinstance(each.value, numbers.Real) and each.value != each.default
        if changed and (reason := idle_reason(each, system, fidelity)):
            found.setdefault(reason, []).append(each.name)
    return [
        f"{', '.join(names)} {'differs' if len(names) == 1 else 'differ'} from the default without"
        f" effect on times: {reason}"
        for reason, names in found.items()
    ]
