"""Which fields of a machine change nothing in the results of a system.

`quantity` says of each field what it changes: the time, the energy alone, or nothing. A system
without PIM ignores the fields of PIM, and a GPU those of the NPU and its memory, and their costs.
"""

import numbers
from collections.abc import Iterable

from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import narrowest_product
from neupims.machine.model import Decoder
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
# Bits of products that are faster. Those of a GPU are not here: its data sheet has them, whatever
# the model.
FAST_PRODUCTS = {"npu.speedup_8_bit": 8, "npu.speedup_4_bit": 4}


def idle_reason(field: Field, system: System, fidelity: Fidelity, narrowest: int = 4) -> str:
    """Returns why a field changes nothing, or an empty string if it changes the results.

    Args:
        field: The field of a machine, as `describe` yields it.
        system: The system that runs.
        fidelity: "simulator" or "intended".
        narrowest: Bits of the narrowest product with weights of all models.
    """
    if field.effect == "none":
        return "no part of the model depends on it"
    if field.name.partition(".")[0] in ABSENT[system] and field.name not in OF_GPU_AREA:
        return f"the system {system} does not have it"
    if field.name in VECTOR[: 1 if system == "npu-only" else 2] and fidelity == "simulator":
        return "it matters in intended fidelity only"
    if FAST_PRODUCTS.get(field.name, 16) < narrowest:
        return f"no product of the model has numbers of {FAST_PRODUCTS[field.name]} bits"
    group = field.name.partition(".")[0]
    if field.effect in ("energy", "area") and group != field.effect:
        return f"it changes the {field.effect} alone"
    return ""


def idle_changes(
    hardware: Hardware, system: System, fidelity: Fidelity, models: Iterable[Decoder]
) -> list[str]:
    """Returns a sentence for each reason why fields that differ from their defaults change nothing.

    Args:
        hardware: The machine; arrays of a batch are not looked at.
        system: The system that runs.
        fidelity: "simulator" or "intended".
        models: The models that run.
    """
    narrowest = min(map(narrowest_product, models))
    found: dict[str, list[str]] = {}
    for each in describe(hardware):
        changed = isinstance(each.value, numbers.Real) and each.value != each.default
        if changed and (reason := idle_reason(each, system, fidelity, narrowest)):
            found.setdefault(reason, []).append(each.name)
    return [
        f"{', '.join(names)} {'differs' if len(names) == 1 else 'differ'} from the default without"
        f" effect on times: {reason}"
        for reason, names in found.items()
    ]
