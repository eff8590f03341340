"""Energy of one device from the commands and operations that it runs.

Three kinds of energy add up: that of actions, which counts them; that of refresh, which counts
refreshes; and that of waiting, a power times the elapsed time (standby of the memory, leakage and
clocks of the NPU, leakage of the multipliers in the memory). What each costs is in
`hardware.energy` (`neupims.machine.costs`).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from neupims.costs.area import area
from neupims.machine.hardware import Hardware, banks, burst_bytes, memory_bytes
from neupims.machine.record import record
from neupims.machine.workload import FLOAT16_BYTES

PICO = 1e-12
KILOBYTE = 1024
GIGABYTE = 2**30
REFRESHES = 8192  # commands that refresh all rows of a rank: JEDEC, tREFI = 32 ms / 8192


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
class Energy:
    """Joules by the part that spends them."""

    npu: Float[Array, "..."]  # products in the arrays
    vector: Float[Array, "..."]  # operations of the vector units
    scratchpad: Float[Array, "..."]  # bytes in and out
    npu_idle: Float[Array, "..."]  # leakage and clocks of the NPU, all the time
    dram_array: Float[Array, "..."]  # rows opened, read and written for the NPU
    dram_interface: Float[Array, "..."]  # reads, writes and PIM's results that cross it
    pim: Float[Array, "..."]  # activations, products, GWRITEs and results
    pim_idle: Float[Array, "..."]  # leakage of the multipliers in the memory, all the time
    refresh: Float[Array, "..."]  # of all ranks
    background: Float[Array, "..."]  # standby of the memory, all the time
    link: Float[Array, "..."]  # bytes to other devices

    @property
    def total(self) -> Float[Array, "..."]:
        """The sum of all parts."""
        parts = tuple(vars(self).values())
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


class Idle(NamedTuple):
    """Watts of the parts of a device that wait; arrays for a batch of designs."""

    npu: float  # leakage and clocks
    memory: float  # standby, for one row buffer of each bank
    pim: float  # leakage of the multipliers


def command_energies(hardware: Hardware) -> CommandEnergies:
    """Returns the energy of the memory's commands, in picojoules.

    Each is a number of bits, or of 1024 bytes, times its cost. No clock enters: a faster memory
    moves the same charge in less time.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.

    Reference:
        InitPowerParams in extern/NewtonSim/src/configuration.cc of the public simulator, whose
        numbers these are for the default memory.
    """
    hbm, pim, each = hardware.hbm, hardware.pim, hardware.energy
    activation = each.activate_kilobyte * hbm.row_bytes / KILOBYTE
    rank_bytes = memory_bytes(hbm) / hbm.num_channels / hbm.ranks
    return CommandEnergies(
        activation=activation,
        read=8 * burst_bytes(hbm) * each.read_bit,
        write=8 * burst_bytes(hbm) * each.write_bit,
        group_activation=pim.banks_per_activation * activation,
        gwrite=8 * pim.page_bytes * each.read_bit,
        comp=8 * FLOAT16_BYTES * banks(hbm) * pim.macs_per_bank * each.pim_bit,
        result_read=8 * FLOAT16_BYTES * banks(hbm) * each.read_bit,
        refresh=each.refresh_kilobyte * rank_bytes / REFRESHES / KILOBYTE,
    )


def idle_watts(hardware: Hardware, *, pim: bool = True) -> Idle:
    """Returns the power of the parts of a device that wait.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
        pim: Whether the memory has multipliers; False for "npu-only".

    Returns:
        Watts by part.
    """
    parts, each = area(hardware, pim=pim), hardware.energy
    return Idle(
        npu=each.npu_idle_square_millimetre * parts.npu,
        memory=each.standby_gigabyte * memory_bytes(hardware.hbm) / GIGABYTE,
        pim=each.pim_idle_square_millimetre * parts.pim_units,
    )


def energy(counts: Counts, hardware: Hardware, *, pim: bool = True) -> Energy:
    """Returns the energy that one device spends.

    Rows count as open all the time. A second row buffer, where PIM uses it, takes the standby
    power again, as in the simulator.

    Args:
        counts: The commands and operations of the device.
        hardware: The machine.
        pim: Whether the memory has multipliers; False for "npu-only".

    Returns:
        Joules by part.
    """
    each, costs, hbm = command_energies(hardware), hardware.energy, hardware.hbm
    idle = idle_watts(hardware, pim=pim)
    seconds = counts.elapsed_cycles / hardware.npu.clock_hz
    results = counts.result_reads * FLOAT16_BYTES * banks(hbm)
    moved = counts.read_bytes + counts.write_bytes + results
    bits = costs.read_bit * counts.read_bytes + costs.write_bit * counts.write_bytes
    gathered = each.gwrite * counts.gwrites + each.result_read * counts.result_reads
    buffers = jnp.where(counts.group_activations > 0, hardware.pim.row_buffers, 1)
    return Energy(
        npu=PICO * costs.mac * counts.npu_macs,
        vector=PICO * costs.vector_operation * counts.vector_operations,
        scratchpad=PICO * costs.scratchpad_byte * counts.scratchpad_bytes,
        npu_idle=idle.npu * seconds,
        dram_array=PICO * (each.activation * counts.activations + 8 * bits),
        dram_interface=PICO * 8 * costs.interface_bit * moved,
        pim=PICO
        * (each.group_activation * counts.group_activations + each.comp * counts.comps + gathered),
        pim_idle=idle.pim * seconds,
        refresh=PICO * each.refresh * counts.refreshes,
        background=idle.memory * seconds * buffers,
        link=PICO * 8 * costs.link_bit * counts.link_bytes,
    )
