"""The machine: an NPU of systolic arrays, and HBM whose banks compute.

The defaults are the machine of the NeuPIMs paper as its public simulator configures it (Heo et al.,
ASPLOS 2024, arXiv:2403.00579; github.com/casys-kaist/NeuPIMs, commit f299af3). Timings
`t..._cycles` are cycles of the memory clock. A batch of designs is the same record with a leading
axis on the fields that vary. A DRAM timing is a field of `HBM` with its name in the simulator's
files; `timing.pim_commands.pim_timing` turns timings into those of commands.
"""

import numbers
from dataclasses import field
from typing import Any

import jax.numpy as jnp

from neupims.machine.costs import AreaCosts, EnergyCosts
from neupims.machine.quantity import check_quantities, quantity
from neupims.machine.record import COUNT_MOST, Number, record
from neupims.machine.units import CYCLES
from neupims.machine.workload import FLOAT16_BYTES

CORE = "configs/systolic_ws_128x128_dev.json"
MEMORY = "configs/memory_configs/neupims.json"
INI = "HBM2_8Gb_x128_dualpim.ini"
MOST_CHANNELS = 2**16  # of any machine: the model keeps a list of work for each channel
PARSER = "default of the simulator's ini parser"

# Ends of the ranges. They are wide enough for every machine that we know and for imagined ones, and
# narrow enough that a number in another unit (GHz, ns, GB, MB, us) falls outside.
SLOWEST_HZ = 1e6  # an FPGA prototype; a number of GHz or MHz is below
FASTEST_HZ = 1e11  # superconducting logic; CMOS ends below 1e10
MOST_UNITS = 2**16  # parts of one kind; the widest array that we know of has 256 (TPU v6e)
COUNT: dict[str, Any] = {"least": 1, "most": MOST_UNITS, "whole": True}
# A clock cycle or more. 1e5 cycles are 23 us of LPDDR5X at 4.27 GHz; seconds are far below 1.
DELAY: dict[str, Any] = {"least": 1, "most": 1e5, "zero": True}
SPEEDUP: dict[str, Any] = {"least": 1, "most": 16}
SAME_RATE = "assumed: narrow numbers take fewer bytes alone"
LEAST_RATE = 1e6  # bytes/s; a number of MB/s, GB/s or TB/s is below
MOST_RATE = 1e16  # bytes/s; a GPU of 2024 moves 8e12 (NVIDIA B200)


@record
class NPU:
    """Weight-stationary systolic arrays, vector units and a double-buffered scratchpad."""

    array_width: int = quantity(128, "processing elements", CORE, **COUNT)
    array_height: int = quantity(128, "processing elements", CORE, **COUNT)
    num_arrays: int = quantity(
        8, "arrays", "paper, table 2; fixed in src/operations/MatMul.cc", **COUNT
    )
    num_cores: int = quantity(
        1, "cores", f"{CORE}; a second core has no effect in the simulator", **COUNT, effect="none"
    )
    clock_hz: float = quantity(1e9, "Hz", CORE, least=SLOWEST_HZ, most=FASTEST_HZ)
    speedup_8_bit: float = quantity(
        1, "products of 8 bits, in the time of one of 16 bits", SAME_RATE, **SPEEDUP
    )
    speedup_4_bit: float = quantity(
        1, "products of 4 bits, in the time of one of 16 bits", SAME_RATE, **SPEEDUP
    )
    vector_units: int = quantity(8, "units", CORE, **COUNT)
    vector_lanes: int = quantity(128, "lanes, of a unit", CORE, **COUNT)
    # From a microcontroller's 8 KiB to 44 GB on a wafer (Cerebras WSE-3), and some more.
    scratchpad_bytes: float = quantity(
        134218 * 1024,
        "bytes, of which a tile may use half",
        f"{CORE}, sram_size",
        least=2**13,
        most=1e12,
    )
    interconnect_hz: float = quantity(
        2e9,
        "Hz, one burst a cycle and channel",
        CORE,
        least=SLOWEST_HZ,
        most=FASTEST_HZ,
        effect="none",
    )


@record
class HBM:
    """Stacked DRAM: channels of ranks of bank groups of banks."""

    num_channels: int = quantity(32, "channels", MEMORY, least=1, most=MOST_CHANNELS, whole=True)
    # DDR5 has 8 groups of 4 banks and pages of 1 or 2 KiB, a stack of HBM4 a bus of 2048 bits. The
    # ends leave a factor of 8 or more.
    ranks: int = quantity(
        2,
        "ranks, of a channel",
        f"{INI}: channel_size 1024 MB over 512 MB",
        least=1,
        most=256,
        whole=True,
    )
    bank_groups: int = quantity(4, "bank groups, of a rank", INI, least=1, most=256, whole=True)
    banks_per_group: int = quantity(4, "banks", INI, least=1, most=256, whole=True)
    rows: int = quantity(
        32768, "rows, of a bank", INI, least=1, most=COUNT_MOST, whole=True, effect="capacity"
    )
    row_bytes: int = quantity(
        1024, "bytes", f"{INI}: 64 columns of 128 bits", least=32, most=2**20, whole=True
    )
    bus_bits: int = quantity(128, "bits, of a channel", INI, least=1, most=2**16, whole=True)
    burst_length: int = quantity(4, "transfers", INI, least=1, most=1024, whole=True)
    clock_hz: float = quantity(
        1e9, "Hz, two transfers a cycle", MEMORY, least=SLOWEST_HZ, most=FASTEST_HZ
    )
    trcd_read_cycles: float = quantity(14, CYCLES, INI, **DELAY, simulator="tRCDRD")
    trcd_write_cycles: float = quantity(14, CYCLES, INI, **DELAY, effect="none", simulator="tRCDWR")
    trp_cycles: float = quantity(14, CYCLES, INI, **DELAY, simulator="tRP")
    tras_cycles: float = quantity(34, CYCLES, INI, **DELAY, effect="none", simulator="tRAS")
    trrd_s_cycles: float = quantity(4, CYCLES, INI, **DELAY, effect="none", simulator="tRRD_S")
    trrd_l_cycles: float = quantity(6, CYCLES, INI, **DELAY, effect="none", simulator="tRRD_L")
    tfaw_cycles: float = quantity(30, CYCLES, INI, **DELAY, simulator="tFAW")
    tccd_s_cycles: float = quantity(1, CYCLES, INI, **DELAY, simulator="tCCD_S")
    tccd_l_cycles: float = quantity(2, CYCLES, INI, **DELAY, simulator="tCCD_L")
    trtp_cycles: float = quantity(
        5, CYCLES, f"{PARSER}: the ini's tRTP_S and tRTP_L are not read", **DELAY, simulator="tRTP"
    )
    trtrs_cycles: float = quantity(2, CYCLES, PARSER, **DELAY, effect="none", simulator="tRTRS")
    twr_cycles: float = quantity(16, CYCLES, INI, **DELAY, effect="none", simulator="tWR")
    read_latency_cycles: float = quantity(14, CYCLES, f"{INI}, CL", **DELAY, simulator="CL")
    write_latency_cycles: float = quantity(
        4, CYCLES, f"{INI}, CWL", **DELAY, effect="none", simulator="CWL"
    )
    # From a memory that refreshes all the time to one that never does; microseconds are below.
    trefi_cycles: float = quantity(
        3900, f"{CYCLES}, of one rank", INI, least=16, most=1e7, longest=True, simulator="tREFI"
    )
    trfc_cycles: float = quantity(260, CYCLES, INI, **DELAY, simulator="tRFC")


@record
class PIM:
    """Multipliers at each bank, fed by a buffer that holds one row of the vector."""

    row_buffers: int = quantity(
        2,
        "row buffers, of a bank; with 1 PIM blocks the NPU",
        "paper, section 5",
        least=1,
        most=64,
        whole=True,
    )
    macs_per_bank: int = quantity(
        16, "float16 products, of one command", f"{MEMORY}, pim_comp_coverage", **COUNT
    )
    page_bytes: int = quantity(
        1024,
        "bytes, of a row that a tile uses, and of the vector's buffer; at most a row",
        f"{MEMORY}, dram_page_size",
        least=32,
        most=2**20,
        whole=True,
    )
    banks_per_activation: int = quantity(
        4, "banks, opened by one command", "paper, section 5.2; command G_ACT", **COUNT
    )
    banks_per_precharge: int = quantity(
        1, "banks, closed by one command", "command PIM_PRECHARGE of the simulator", **COUNT
    )
    product_cycles: float = quantity(
        0,
        f"{CYCLES}, from one product to the next, at least those of a burst",
        "the simulator: one product a burst",
        **DELAY,
    )
    least_products: int = quantity(
        6,
        "products, that one result takes at least",
        "adder tree; EstimatePIMOperationLatency",
        least=1,
        most=1024,
        whole=True,
    )
    gwrite_bursts: int = quantity(
        32,
        "bursts, of tCCD_S + tCCD_L, that filling the vector's buffer takes",
        "InitTimingParams",
        least=0,
        most=MOST_UNITS,
        whole=True,
    )


@record
class Link:
    """The link between devices; free by default, as the simulator has no communication."""

    bandwidth_bytes_per_second: float = quantity(
        float("inf"),
        "bytes/s, in and out of a device",
        "not in the simulator",
        least=LEAST_RATE,
        most=float("inf"),
    )
    latency_seconds: float = quantity(
        0.0,
        "s, of one message",
        "not in the simulator",
        least=1e-12,
        most=1e-2,  # between cities; a number of us or ns is above
        zero=True,
    )


@record
class GPU:
    """A GPU at its roofline, for comparison: by default the paper's, NVIDIA's A100 with 40 GB."""

    # From a microcontroller to hundreds of the largest GPUs of 2024 (NVIDIA B200: 2.25e15).
    flops_per_second: float = quantity(
        312e12,
        "FLOP/s, float16 products summed in float32, dense",
        "NVIDIA A100 data sheet, 2020",
        least=1e9,
        most=1e18,
    )
    speedup_8_bit: float = quantity(
        1, "products of 8 bits, in the time of one of 16 bits", SAME_RATE, **SPEEDUP
    )
    speedup_4_bit: float = quantity(
        1, "products of 4 bits, in the time of one of 16 bits", SAME_RATE, **SPEEDUP
    )
    bytes_per_second: float = quantity(
        1555e9, "bytes/s", "NVIDIA A100 40 GB data sheet, 2020", least=LEAST_RATE, most=MOST_RATE
    )
    memory_bytes: float = quantity(
        40e9, "bytes", "NVIDIA A100 40 GB data sheet, 2020", least=1e6, most=1e15, effect="capacity"
    )
    # A wafer draws 23 kW (Cerebras CS-3).
    board_watts: float = quantity(
        400.0, "W, the most", "NVIDIA A100 SXM data sheet, 2020", least=1, most=1e5, effect="energy"
    )
    # A reticle is 858 mm2, a wafer 46,225 mm2 (Cerebras WSE-3).
    die_mm2: float = quantity(
        826.0,
        "mm2, without the memory",
        "NVIDIA A100 architecture white paper, 2020",
        least=1,
        most=1e6,
        effect="area",
    )


@record
class Hardware:
    """One device and its link, a GPU to compare with, and what energy and area they cost.

    Args:
        npu: The NPU (default: as the public simulator configures it; so are the others).
        hbm: The memory.
        pim: The multipliers in the memory's banks.
        link: The link between devices (default: free).
        gpu: The GPU of the system "gpu" (default: NVIDIA A100 with 40 GB).
        energy: The energy of each action of the device, and the power of its parts while they wait.
        area: The area of each of its parts.

    Raises:
        ValueError: A field has an impossible value; the sentence names the field.

    Example:
        >>> from neupims import Hardware
        >>> Hardware().hbm.num_channels
        32
    """

    npu: NPU = field(default_factory=NPU)
    hbm: HBM = field(default_factory=HBM)
    pim: PIM = field(default_factory=PIM)
    link: Link = field(default_factory=Link)
    gpu: GPU = field(default_factory=GPU)
    energy: EnergyCosts = field(default_factory=EnergyCosts)
    area: AreaCosts = field(default_factory=AreaCosts)

    def __post_init__(self):
        for group in ("npu", "hbm", "pim", "link", "gpu", "energy", "area"):
            check_quantities(getattr(self, group), group)
        page, row = self.pim.page_bytes, self.hbm.row_bytes
        if isinstance(page, numbers.Real) and isinstance(row, numbers.Real) and page > row:
            raise ValueError(
                f"pim.page_bytes must be at most hbm.row_bytes, {row:g}, because a tile uses a row"
                f" or a part of it, not {page:g}: change both together"
            )


def banks(hbm: HBM) -> float:
    """Returns the banks of a channel, over all ranks, as a float.

    Args:
        hbm: The memory; fields may be arrays of a batch of designs.
    """
    return 1.0 * hbm.ranks * hbm.bank_groups * hbm.banks_per_group


def burst_bytes(hbm: HBM) -> float:
    """Returns the bytes of one burst of a channel.

    Args:
        hbm: The memory; fields may be arrays of a batch of designs.
    """
    return hbm.bus_bits / 8 * hbm.burst_length


def burst_cycles(hbm: HBM) -> float:
    """Returns the memory cycles of one burst on the bus of a channel, at two transfers a cycle.

    Args:
        hbm: The memory; fields may be arrays of a batch of designs.
    """
    return hbm.burst_length / 2


def peak_bytes_per_cycle(hbm: HBM) -> float:
    """Returns the bytes that all channels together move in one memory cycle.

    Args:
        hbm: The memory; fields may be arrays of a batch of designs.
    """
    return hbm.num_channels * burst_bytes(hbm) / burst_cycles(hbm)


def memory_bytes(hbm: HBM) -> float:
    """Returns the bytes of the whole memory of a device, as a float.

    Args:
        hbm: The memory; fields may be arrays of a batch of designs.
    """
    return 1.0 * hbm.num_channels * banks(hbm) * hbm.rows * hbm.row_bytes


def product_cycles(hardware: Hardware) -> Number:
    """Returns the memory cycles from one product in the banks to the next.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
    """
    hbm = hardware.hbm
    return jnp.maximum(
        jnp.maximum(burst_cycles(hbm), hbm.tccd_s_cycles), hardware.pim.product_cycles
    )


def pim_bytes_per_second(hardware: Hardware) -> Number:
    """Returns the bytes that the multipliers of all banks of a device take each second, at most.

    Args:
        hardware: The machine; fields may be arrays of a batch of designs.
    """
    hbm = hardware.hbm
    operands = hbm.num_channels * banks(hbm) * hardware.pim.macs_per_bank * FLOAT16_BYTES
    return operands * hbm.clock_hz / product_cycles(hardware)
