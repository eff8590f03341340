"""Silicon area of one device: a sum over what is built.

Logic is scaled from the floorplan of Google's TPU v4i in 7 nm, whose parts are of the same kind:
128 x 128 arrays of 16-bit floats, vector units, a large scratchpad, HBM2. The area that PIM adds to
the memory comes from AttAcc's units and the NeuPIMs paper's row buffer. What each part costs is in
`hardware.area` (`neupims.machine.costs`).
"""

from neupims.machine.hardware import Hardware, banks, memory_bytes
from neupims.machine.record import Number, record

CHANNEL_BITS = 128  # of the channel whose interface has the area `memory_channel`
BANK_PRODUCTS = 16  # of the multipliers whose area is `pim_bank`


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


def area(hardware: Hardware, *, pim: bool = True) -> Area:
    """Returns the area of one device.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
        pim: Whether the memory has multipliers and further row buffers; False for "npu-only".

    Returns:
        Square millimetres by part.
    """
    npu, hbm, costs = hardware.npu, hardware.hbm, hardware.area
    arrays = costs.mac * npu.num_arrays * npu.array_width * npu.array_height
    vector = costs.vector_lane * npu.vector_units * npu.vector_lanes
    scratchpad = costs.scratchpad_megabyte * npu.scratchpad_bytes / 1e6
    interface = costs.memory_channel * hbm.num_channels * hbm.bus_bits / CHANNEL_BITS
    core = arrays + vector + scratchpad + interface
    dram = costs.dram_gigabyte * memory_bytes(hbm) / 2**30
    units = (
        costs.pim_bank * banks(hbm) * hardware.pim.macs_per_bank / BANK_PRODUCTS
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


def gpu_area(hardware: Hardware) -> Number:
    """Returns the area of the GPU and its memory, in square millimetres.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
    """
    return hardware.gpu.die_mm2 + hardware.area.dram_gigabyte * hardware.gpu.memory_bytes / 2**30
