"""Power of a device at full speed, and of all devices of a model in the mean."""

from neupims.costs.energy import PICO, command_energies, idle_watts
from neupims.machine.hardware import (
    Hardware,
    peak_bytes_per_cycle,
    product_cycles,
)
from neupims.machine.record import Number, record
from neupims.machine.systems import PIM_SYSTEMS, System
from neupims.machine.workload import FLOAT16_BYTES


@record
class Power:
    """Watts of every part at full speed; arrays in a batch.

    No workload draws them all at once, so their sum is what supply and cooling must stand.
    """

    arrays: float  # products in the systolic arrays
    vector: float  # operations of the vector units
    scratchpad: float  # operands that stream into and out of the arrays
    npu_idle: float  # leakage and clocks of the NPU
    memory: float  # reads at the peak of the buses, with interface, refresh and standby
    pim: float  # products in all banks of all channels, their leakage and the second row buffers

    @property
    def npu(self) -> float:
        """The power of the NPU's die."""
        return self.arrays + self.vector + self.scratchpad + self.npu_idle

    @property
    def total(self) -> float:
        """The power of the NPU's die and the memory."""
        return self.npu + self.memory + self.pim


def peak_power(hardware: Hardware, *, pim: bool = True) -> Power:
    """Returns the power of one device whose parts all work at their peak.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
        pim: Whether the memory multiplies; False for "npu-only".

    Returns:
        Watts by part.
    """
    npu, hbm, costs = hardware.npu, hardware.hbm, hardware.energy
    each, idle = command_energies(hardware), idle_watts(hardware, pim=pim)
    present = 1.0 if pim else 0.0
    # Bytes into and out of the arrays in one cycle.
    streamed = npu.num_arrays * FLOAT16_BYTES * (npu.array_width + npu.array_height)
    lanes = npu.vector_units * npu.vector_lanes
    macs = npu.num_arrays * npu.array_width * npu.array_height
    read_byte = 8 * (costs.read_bit + costs.interface_bit) + each.activation / hbm.row_bytes
    refreshes = hbm.clock_hz / hbm.trefi_cycles * hbm.ranks * hbm.num_channels
    products = 1.0 * hbm.clock_hz * hbm.num_channels / product_cycles(hardware)
    second_buffers = idle.memory * (hardware.pim.row_buffers - 1)
    return Power(
        arrays=PICO * costs.mac * macs * npu.clock_hz,
        vector=PICO * costs.vector_operation * lanes * npu.clock_hz,
        scratchpad=PICO * costs.scratchpad_byte * streamed * npu.clock_hz,
        npu_idle=idle.npu,
        memory=PICO
        * (read_byte * peak_bytes_per_cycle(hbm) * hbm.clock_hz + each.refresh * refreshes)
        + idle.memory,
        pim=present * (PICO * each.comp * products + second_buffers) + idle.pim,
    )


def peak_watts(hardware: Hardware, system: System) -> Number:
    """Returns the greatest power of one device: of all its parts, or of the GPU's board.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
        system: "neupims", "npu-pim", "npu-only" or "gpu".
    """
    if system == "gpu":
        return 1.0 * hardware.gpu.board_watts
    return peak_power(hardware, pim=system in PIM_SYSTEMS).total


def power_metrics(
    hardware: Hardware,
    system: System,
    *,
    joules: Number,
    seconds: Number,
    tokens: Number,
    devices: Number,
) -> dict[str, Number]:
    """Returns power and energy by token, of all devices of a model together.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
        system: "neupims", "npu-pim", "npu-only" or "gpu".
        joules: Energy of one device in one iteration.
        seconds: Time of that iteration.
        tokens: Tokens of the batch in that time.
        devices: Devices of the model.

    Returns:
        `power_watts`, the mean over the iteration; `peak_power_watts`, all parts at full speed;
        `energy_joules_per_token`; and `tokens_per_joule`.
    """
    spent = joules * devices
    return {
        "power_watts": spent / seconds,
        "peak_power_watts": peak_watts(hardware, system) * devices,
        "energy_joules_per_token": spent / tokens,
        "tokens_per_joule": tokens / spent,
    }
