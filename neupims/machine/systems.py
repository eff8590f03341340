"""Names of the systems and fidelities, and how the validation files spell systems.

The module needs no JAX.
"""

from typing import Literal, NamedTuple

System = Literal["neupims", "npu-pim", "npu-only", "gpu"]
Fidelity = Literal["simulator", "intended"]
TimingPath = Literal["exact", "closed"]  # of attention in the memory
SYSTEMS: tuple[System, ...] = ("neupims", "npu-pim", "npu-only", "gpu")
PIM_SYSTEMS: tuple[System, ...] = ("neupims", "npu-pim")  # attention runs in the memory
FIDELITIES: tuple[Fidelity, ...] = ("simulator", "intended")
# The question that each fidelity answers.
FIDELITY_ANSWERS: dict[Fidelity, str] = {
    "simulator": "what the authors' public simulator would print; what it lacks, such as experts or"
    " an LM head, follows its rules",
    "intended": "what the machine of the paper would do; nobody has measured it",
}


class Setting(NamedTuple):
    """A system with its number of sub-batches and row buffers."""

    system: System  # one of SYSTEMS
    sub_batches: int  # 1, or 2 interleaved ones
    row_buffers: int  # of a bank, 1 or 2


SPELLINGS = {
    "neupims_sbi": Setting("neupims", 2, 2),
    "neupims_nosbi": Setting("neupims", 1, 2),
    "npu+pim": Setting("npu-pim", 1, 1),
    "npu-only": Setting("npu-only", 1, 2),
    "main_newton_nosbi": Setting("neupims", 1, 1),
}
