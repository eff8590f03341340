"""Energy of one device from the commands and operations that it runs.

The energy of DRAM commands follows from the supply currents of the simulator's memory, by the
arithmetic of the simulator. The rest (arithmetic, scratchpad, interface, link) comes from published
tables of 7 nm logic. The source of every cost begins with its confidence: "data sheet", "published"
(a table of a paper) or "estimate". Leakage and clocks of the NPU are in none of these tables and
are left out, so energies of an idle NPU are too low.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from neupims.machine.hardware import HBM, Hardware, banks, burst_bytes, burst_cycles
from neupims.machine.record import check_quantities, quantity, record
from neupims.machine.workload import FLOAT16_BYTES

PICO = 1e-12
NANO = 1e9  # nanoseconds of a second
IDD_BUS_BITS = 128  # of the channel whose currents these are
IDD_ROW_BYTES = 1024
# Operand bytes of the command that takes four reads' energy: 32 banks, 16 float16 numbers each.
PIM_REFERENCE_BYTES = 1024
INI = "data sheet: HBM2_8Gb_x128_dualpim.ini of the simulator"
NEWTON = (
    "published: a product in all banks takes four times a read's power (Newton, He et al., MICRO"
    " 2020), as in the simulator's InitPowerParams"
)
TPUV4I = "published: Jouppi et al., Ten Lessons, ISCA 2021, table 2, 7 nm"
FINE_GRAINED = "published: O'Connor et al., Fine-Grained DRAM, MICRO 2017, table 3, HBM2"


@record
class Counts:
    """Commands and operations of one device. Every field is a float array; a batch adds an axis."""

    npu_macs: Float[Array, "..."]  # products of the model; those with padding do not count
    vector_operations: Float[Array, "..."]  # on one element
    scratchpad_bytes: Float[Array, "..."]  # written to it and read from it
    read_bytes: Float[Array, "..."]  # over the interface of the memory
    write_bytes: Float[Array, "..."]  # over the interface of the memory
    activations: Float[Array, "..."]  # of one row, for reads and writes
    group_activations: Float[Array, "..."]  # of as many rows as one PIM command opens
    gwrites: Float[Array, "..."]  # of one page into the buffer of the vector
    comps: Float[Array, "..."]  # products in all banks of a channel
    result_reads: Float[Array, "..."]  # of one number of each bank of a channel
    refreshes: Float[Array, "..."]  # of one rank
    elapsed_cycles: Float[Array, "..."]  # core cycles
    link_bytes: Float[Array, "..."]  # sent to other devices


@record
class EnergyCosts:
    """Supply currents of the memory, and the energy of everything else in picojoules."""

    supply_volts: float = quantity(1.2, "V, VDD of the memory", INI)
    activate_milliamperes: float = quantity(
        65.0, "mA, IDD0: opens and closes rows back to back", INI
    )
    precharged_milliamperes: float = quantity(40.0, "mA, IDD2N: all rows closed", INI)
    active_milliamperes: float = quantity(55.0, "mA, IDD3N: rows open", INI)
    read_milliamperes: float = quantity(390.0, "mA, IDD4R: reads back to back", INI)
    write_milliamperes: float = quantity(500.0, "mA, IDD4W: writes back to back", INI)
    refresh_milliamperes: float = quantity(250.0, "mA, IDD5AB: refreshes back to back", INI)
    comp_reads: float = quantity(4.0, "reads whose energy a product in all banks takes", NEWTON)
    interface_bit: float = quantity(
        0.80, "pJ of one bit between the stack and the NPU, both ends", FINE_GRAINED
    )
    mac: float = quantity(
        0.34 + 0.38,
        "pJ of one float16 product and one float32 sum",
        f"{TPUV4I}: arithmetic alone, without registers and clock",
    )
    vector_operation: float = quantity(
        0.38, "pJ of one float32 sum", f"{TPUV4I}; a division or an exponential takes more"
    )
    scratchpad_byte: float = quantity(
        14 / 8,
        "pJ of one byte",
        f"{TPUV4I}: 14 pJ for 64 bits of a memory of 1 MB; wires of a larger one are extra",
    )
    link_bit: float = quantity(
        10.0,
        "pJ of one bit to another device",
        "published: Arunkumar et al., MCM-GPU, ISCA 2017, table 2, over a board",
    )

    def __post_init__(self):
        check_quantities(self, "costs")


@record
class Energy:
    """Joules by the part that spends them."""

    npu: Float[Array, "..."]  # products in the arrays
    vector: Float[Array, "..."]  # operations of the vector units
    scratchpad: Float[Array, "..."]  # bytes in and out
    dram_array: Float[Array, "..."]  # rows opened, read and written for the NPU
    dram_interface: Float[Array, "..."]  # reads, writes and PIM's results that cross it
    pim: Float[Array, "..."]  # activations, products, GWRITEs and results
    refresh: Float[Array, "..."]  # of all ranks
    background: Float[Array, "..."]  # standby of the memory
    link: Float[Array, "..."]  # bytes to other devices

    @property
    def total(self) -> Float[Array, "..."]:
        """The sum of all parts."""
        parts = (
            self.npu,
            self.vector,
            self.scratchpad,
            self.dram_array,
            self.dram_interface,
            self.pim,
            self.refresh,
            self.background,
            self.link,
        )
        return sum(parts[1:], start=parts[0])


class CommandEnergies(NamedTuple):
    """Picojoules of each command of the memory; arrays for a batch of designs."""

    activation: float  # of one row
    read: float  # of one burst
    write: float  # of one burst
    group_activation: float  # of the rows that one PIM command opens
    gwrite: float  # of one page into the buffer of the vector
    comp: float  # products in all banks of a channel
    result_read: float  # of one number of each bank of a channel
    refresh: float  # of one rank
    active_cycle: float  # of a rank that waits one memory cycle with rows open


def command_energies(hardware: Hardware, costs: EnergyCosts) -> CommandEnergies:
    """Returns the energy of the memory's commands, in picojoules.

        picojoules = volts * milliamperes above standby * nanoseconds

    For the default memory the numbers are the simulator's. For other memories the energy of an
    activation grows with the row, that of a burst with the bus, and that of a product with the
    operands of all banks.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
        costs: The supply voltage and currents.

    Reference:
        InitPowerParams in extern/NewtonSim/src/configuration.cc of the public simulator.
    """
    hbm, pim = hardware.hbm, hardware.pim
    volts = costs.supply_volts
    row = (hbm.tras_cycles + hbm.trp_cycles) * costs.activate_milliamperes
    standby = (
        hbm.tras_cycles * costs.active_milliamperes + hbm.trp_cycles * costs.precharged_milliamperes
    )
    activation = volts * (row - standby) * _nanoseconds(hbm) * hbm.row_bytes / IDD_ROW_BYTES
    burst = volts * burst_cycles(hbm) * _nanoseconds(hbm) * hbm.bus_bits / IDD_BUS_BITS
    read = burst * (costs.read_milliamperes - costs.active_milliamperes)
    results = FLOAT16_BYTES * banks(hbm)
    operands = banks(hbm) * pim.macs_per_bank * FLOAT16_BYTES
    return CommandEnergies(
        activation=activation,
        read=read,
        write=burst * (costs.write_milliamperes - costs.active_milliamperes),
        group_activation=pim.banks_per_activation * activation,
        gwrite=pim.page_bytes / burst_bytes(hbm) * read,
        comp=costs.comp_reads * read * operands / PIM_REFERENCE_BYTES,
        result_read=results / burst_bytes(hbm) * read,
        refresh=volts
        * (costs.refresh_milliamperes - costs.active_milliamperes)
        * hbm.trfc_cycles
        * _nanoseconds(hbm),
        active_cycle=volts * costs.active_milliamperes * _nanoseconds(hbm),
    )


def energy(counts: Counts, hardware: Hardware, costs: EnergyCosts | None = None) -> Energy:
    """Returns the energy that one device spends.

    Rows count as open all the time. A second row buffer, where PIM uses it, takes the standby
    current again, as in the simulator.

    Args:
        counts: The commands and operations of the device.
        hardware: The machine.
        costs: The energy of each action (default: `EnergyCosts()`).

    Returns:
        Joules by part.
    """
    costs = EnergyCosts() if costs is None else costs
    each, hbm = command_energies(hardware, costs), hardware.hbm
    moved = (
        counts.read_bytes + counts.write_bytes + counts.result_reads * FLOAT16_BYTES * banks(hbm)
    )
    bursts = each.read * counts.read_bytes / burst_bytes(
        hbm
    ) + each.write * counts.write_bytes / burst_bytes(hbm)
    gathered = each.gwrite * counts.gwrites + each.result_read * counts.result_reads
    memory_cycles = counts.elapsed_cycles * (hbm.clock_hz / hardware.npu.clock_hz)
    buffers = jnp.where(counts.group_activations > 0, hardware.pim.row_buffers, 1)
    return Energy(
        npu=PICO * costs.mac * counts.npu_macs,
        vector=PICO * costs.vector_operation * counts.vector_operations,
        scratchpad=PICO * costs.scratchpad_byte * counts.scratchpad_bytes,
        dram_array=PICO * (each.activation * counts.activations + bursts),
        dram_interface=PICO * 8 * costs.interface_bit * moved,
        pim=PICO
        * (each.group_activation * counts.group_activations + each.comp * counts.comps + gathered),
        refresh=PICO * each.refresh * counts.refreshes,
        background=PICO
        * each.active_cycle
        * memory_cycles
        * hbm.ranks
        * hbm.num_channels
        * buffers,
        link=PICO * 8 * costs.link_bit * counts.link_bytes,
    )


def _nanoseconds(hbm: HBM) -> float:
    """Returns the nanoseconds of one memory cycle."""
    return NANO / hbm.clock_hz
