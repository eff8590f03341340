"""Silicon area of one device and the power it can draw.

Logic is scaled from the floorplan of Google's TPU v4i in 7 nm, whose parts are of the same kind:
128 x 128 arrays of 16-bit floats, vector units, a large scratchpad, HBM2. The area that PIM adds to
the memory comes from AttAcc's units and the NeuPIMs paper's row buffer. The source of every cost
begins with its confidence, as in `neupims.costs.energy`.
"""

from jaxtyping import Array, Float

from neupims.costs.energy import Energy, EnergyCosts, command_energies
from neupims.machine.hardware import (
    Hardware,
    banks,
    burst_cycles,
    memory_bytes,
    peak_bytes_per_cycle,
)
from neupims.machine.record import check_quantities, quantity, record
from neupims.machine.workload import FLOAT16_BYTES

PICO = 1e-12
TPUV4I = (
    "Jouppi et al., Ten Lessons, ISCA 2021: TPU v4i, 7 nm, at the 400 mm2 that its die is below"
)
ATTACC = "published: Park et al., AttAcc, ASPLOS 2024, section 7.7: units in a 1z nm HBM3 die"


@record
class AreaCosts:
    """Square millimetres of the parts of a device."""

    mac: float = quantity(
        0.11 * 400 / (4 * 128 * 128),
        "mm2 of one processing element",
        f"published: {TPUV4I}; four arrays are 11 % of it",
    )
    vector_lane: float = quantity(
        0.0125,
        "mm2 of one lane",
        f"estimate: {TPUV4I}; 2048 lanes in the floorplan's vector unit, without its 16 MB",
    )
    scratchpad_megabyte: float = quantity(
        0.28 * 400 / 134.2, "mm2 of 10^6 bytes", f"published: {TPUV4I}; 128 MiB are 28 % of it"
    )
    memory_channel: float = quantity(
        1.6,
        "mm2 of controller and interface of one 128-bit channel",
        f"estimate: {TPUV4I}; read off its floorplan, 2 stacks",
    )
    uncore_share: float = quantity(
        0.45,
        "of the NPU: on-chip network, links, control",
        f"estimate: {TPUV4I}; what the floorplan's other parts leave",
    )
    dram_gigabyte: float = quantity(
        81.8,
        "mm2 of 2^30 bytes",
        "published: Cho et al., ISSCC 2018, 12.3: an 8 Gb die of HBM2; Sohn et al., 2016: 96",
    )
    pim_bank: float = quantity(0.094, "mm2 of 16 float16 multipliers and adders at a bank", ATTACC)
    pim_bank_group: float = quantity(0.036, "mm2 of the accumulator of a bank group", ATTACC)
    row_buffer_share: float = quantity(
        0.0311,
        "of the memory's area for a second row buffer",
        "published: NeuPIMs paper, CACTI 7.0, 22 nm",
    )

    def __post_init__(self):
        check_quantities(self, "costs")


@record
class Area:
    """Square millimetres of one device; arrays in a batch.

    The areas of the memory are those of all dies of all stacks, without the base dies.
    """

    arrays: float  # the systolic arrays
    vector: float  # the vector units
    scratchpad: float  # of the NPU
    memory_interface: float  # controllers and interfaces of the channels
    uncore: float  # on-chip network, links and control
    dram: float  # the memory without PIM
    pim_units: float  # multipliers and adders in the memory; 0 without PIM
    row_buffers: float  # row buffers beyond the first of a bank; 0 without PIM

    @property
    def npu(self) -> float:
        """The NPU's die."""
        return self.arrays + self.vector + self.scratchpad + self.memory_interface + self.uncore

    @property
    def pim(self) -> float:
        """The area that PIM adds to the memory."""
        return self.pim_units + self.row_buffers

    @property
    def total(self) -> float:
        """The NPU's die and the memory's dies."""
        return self.npu + self.dram + self.pim


@record
class Power:
    """Watts of every part at full speed; arrays in a batch.

    No workload draws them all at once.
    """

    arrays: float  # the systolic arrays
    vector: float  # the vector units
    scratchpad: float  # operands that stream into and out of the arrays
    memory: float  # reads at the peak of the buses, with interface and standby
    pim: float  # products in all banks of all channels

    @property
    def npu(self) -> float:
        """The power of the NPU's die."""
        return self.arrays + self.vector + self.scratchpad

    @property
    def total(self) -> float:
        """The power of the NPU's die and the memory."""
        return self.npu + self.memory + self.pim


def area(hardware: Hardware, costs: AreaCosts | None = None, *, pim: bool = True) -> Area:
    """Returns the area of one device.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
        costs: The area of each part (default: `AreaCosts()`).
        pim: Whether the memory has multipliers and further row buffers; False for "npu-only".

    Returns:
        Square millimetres by part.
    """
    costs = AreaCosts() if costs is None else costs
    npu, hbm = hardware.npu, hardware.hbm
    arrays = costs.mac * npu.num_arrays * npu.array_width * npu.array_height
    vector = costs.vector_lane * npu.vector_units * npu.vector_lanes
    scratchpad = costs.scratchpad_megabyte * npu.scratchpad_bytes / 1e6
    interface = costs.memory_channel * hbm.num_channels
    core = arrays + vector + scratchpad + interface
    dram = costs.dram_gigabyte * memory_bytes(hbm) / 2**30
    units = (
        costs.pim_bank * banks(hbm) * hardware.pim.macs_per_bank / 16
        + costs.pim_bank_group * hbm.ranks * hbm.bank_groups
    )
    present = 1.0 if pim else 0.0
    return Area(
        arrays=arrays,
        vector=vector,
        scratchpad=scratchpad,
        memory_interface=interface,
        uncore=core * costs.uncore_share / (1 - costs.uncore_share),
        dram=dram,
        pim_units=present * units * hbm.num_channels,
        row_buffers=present * costs.row_buffer_share * dram * (hardware.pim.row_buffers - 1),
    )


def peak_power(hardware: Hardware, costs: EnergyCosts | None = None) -> Power:
    """Returns the power of one device whose parts all work at their peak.

    Leakage and clocks of the NPU are left out, as in `neupims.costs.energy`.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
        costs: The energy of each action (default: `EnergyCosts()`).

    Returns:
        Watts by part.
    """
    costs = EnergyCosts() if costs is None else costs
    npu, hbm = hardware.npu, hardware.hbm
    each = command_energies(hardware, costs)
    # Bytes into and out of the arrays in one cycle.
    streamed = npu.num_arrays * FLOAT16_BYTES * (npu.array_width + npu.array_height)
    read = (
        each.read / (hbm.bus_bits / 8 * hbm.burst_length)
        + 8 * costs.interface_bit
        + each.activation / hbm.row_bytes
    )
    standby = (
        each.active_cycle * hbm.ranks * hbm.num_channels * hbm.clock_hz * hardware.pim.row_buffers
    )
    return Power(
        arrays=PICO
        * costs.mac
        * npu.num_arrays
        * npu.array_width
        * npu.array_height
        * npu.clock_hz,
        vector=PICO * costs.vector_operation * npu.vector_units * npu.vector_lanes * npu.clock_hz,
        scratchpad=PICO * costs.scratchpad_byte * streamed * npu.clock_hz,
        memory=PICO * (read * peak_bytes_per_cycle(hbm) * hbm.clock_hz + standby),
        pim=PICO * each.comp / burst_cycles(hbm) * hbm.clock_hz * hbm.num_channels,
    )


def average_power_watts(energy: Energy, seconds) -> Float[Array, "..."]:
    """Returns the mean power of one device.

    Args:
        energy: The energy that the device spends, in joules.
        seconds: The time in which it spends it.
    """
    return energy.total / seconds
