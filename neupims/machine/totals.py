"""Peak rates and sizes that follow from the fields of a machine."""

from typing import NamedTuple

from neupims.machine.hardware import (
    Hardware,
    memory_bytes,
    peak_bytes_per_cycle,
    pim_bytes_per_second,
)
from neupims.machine.workload import FLOAT16_BYTES


class Total(NamedTuple):
    """One number that follows from the fields of a machine."""

    name: str  # what it is
    value: float  # in `unit`
    unit: str  # its unit
    formula: str  # how it follows from the fields


def derive_totals(hardware: Hardware) -> tuple[Total, ...]:
    """Returns the peak rates and sizes of a machine, to compare with its data sheet.

    Args:
        hardware: The machine.
    """
    npu, hbm, gpu = hardware.npu, hardware.hbm, hardware.gpu
    arithmetic = 2.0 * npu.num_arrays * npu.array_width * npu.array_height * npu.clock_hz
    bandwidth = peak_bytes_per_cycle(hbm) * hbm.clock_hz
    operands = pim_bytes_per_second(hardware)
    found = (
        (
            "npu.peak_flops_per_second",
            arithmetic,
            "FLOP/s",
            "2 x num_arrays x array_width x array_height x clock_hz",
        ),
        (
            "hbm.bytes_per_second",
            bandwidth,
            "bytes/s",
            "num_channels x bus_bits / 8 x 2 x clock_hz",
        ),
        (
            "hbm.memory_bytes",
            memory_bytes(hbm),
            "bytes",
            "num_channels x ranks x bank_groups x banks_per_group x rows x row_bytes",
        ),
        (
            "pim.bytes_per_second",
            operands,
            "bytes/s",
            "2 x hbm.num_channels x banks x macs_per_bank, each burst, tCCD_S or product_cycles",
        ),
        (
            "pim.peak_flops_per_second",
            2 * operands / FLOAT16_BYTES,
            "FLOP/s",
            "one multiplication and one addition for each of these numbers",
        ),
        (
            "npu.ridge_flops_per_byte",
            arithmetic / bandwidth,
            "FLOP/byte",
            "npu.peak_flops_per_second / hbm.bytes_per_second",
        ),
        (
            "gpu.ridge_flops_per_byte",
            gpu.flops_per_second / gpu.bytes_per_second,
            "FLOP/byte",
            "gpu.flops_per_second / gpu.bytes_per_second",
        ),
    )
    return tuple(Total(name, float(value), unit, formula) for name, value, unit, formula in found)
