"""The machine: an NPU of systolic arrays, and HBM whose banks compute.

The defaults are the machine of the NeuPIMs paper as its public simulator configures it (Heo et al.,
ASPLOS 2024, arXiv:2403.00579; github.com/casys-kaist/NeuPIMs, commit f299af3). Timings
`t..._cycles` are cycles of the memory clock. A batch of designs is the same record with a leading
axis on the fields that vary. A DRAM timing is a field of `HBM` with its name in the simulator's
files; `timing.gemv.pim_timing` turns timings into those of commands.
"""

from dataclasses import field

import jax.numpy as jnp

from neupims.machine.costs import AreaCosts, EnergyCosts
from neupims.machine.record import Number, check_quantities, quantity, record
from neupims.machine.workload import FLOAT16_BYTES

CORE = "configs/systolic_ws_128x128_dev.json"
MEMORY = "configs/memory_configs/neupims.json"
INI = "HBM2_8Gb_x128_dualpim.ini"
MOST_CHANNELS = 2**16  # of any machine: the model keeps a list of work for each channel
PARSER = "default of the simulator's ini parser"


@record
class NPU:
    """Weight-stationary systolic arrays, vector units and a double-buffered scratchpad."""

    array_width: int = quantity(128, "processing elements", CORE, least=1, whole=True)
    array_height: int = quantity(128, "processing elements", CORE, least=1, whole=True)
    num_arrays: int = quantity(
        8, "arrays", "paper, table 2; fixed in src/operations/MatMul.cc", least=1, whole=True
    )
    num_cores: int = quantity(
        1, "cores", f"{CORE}; a second core has no effect in the simulator", least=1, whole=True
    )
    clock_hz: float = quantity(1e9, "Hz", CORE, least=1)
    vector_units: int = quantity(8, "units", CORE, least=1, whole=True)
    vector_lanes: int = quantity(128, "lanes of a unit", CORE, least=1, whole=True)
    scratchpad_bytes: float = quantity(
        134218 * 1024, "bytes, of which a tile may use half", f"{CORE}, sram_size", least=1
    )
    interconnect_hz: float = quantity(2e9, "Hz, one burst a cycle and channel", CORE, least=1)


@record
class HBM:
    """Stacked DRAM: channels of ranks of bank groups of banks."""

    num_channels: int = quantity(32, "channels", MEMORY, least=1, most=MOST_CHANNELS, whole=True)
    ranks: int = quantity(
        2, "ranks of a channel", f"{INI}: channel_size 1024 MB over 512 MB", least=1, whole=True
    )
    bank_groups: int = quantity(4, "bank groups of a rank", INI, least=1, whole=True)
    banks_per_group: int = quantity(4, "banks", INI, least=1, whole=True)
    rows: int = quantity(32768, "rows of a bank", INI, least=1, whole=True)
    row_bytes: int = quantity(1024, "bytes", f"{INI}: 64 columns of 128 bits", least=1, whole=True)
    bus_bits: int = quantity(128, "bits", INI, least=1, whole=True)
    burst_length: int = quantity(4, "transfers", INI, least=1, whole=True)
    clock_hz: float = quantity(1e9, "Hz, two transfers a cycle", MEMORY, least=1)
    trcd_read_cycles: float = quantity(14, "memory cycles", INI, simulator="tRCDRD")
    trcd_write_cycles: float = quantity(14, "memory cycles", INI, simulator="tRCDWR")
    trp_cycles: float = quantity(14, "memory cycles", INI, simulator="tRP")
    tras_cycles: float = quantity(34, "memory cycles", INI, simulator="tRAS")
    trrd_s_cycles: float = quantity(4, "memory cycles", INI, simulator="tRRD_S")
    trrd_l_cycles: float = quantity(6, "memory cycles", INI, simulator="tRRD_L")
    tfaw_cycles: float = quantity(30, "memory cycles", INI, simulator="tFAW")
    tccd_s_cycles: float = quantity(1, "memory cycles", INI, simulator="tCCD_S")
    tccd_l_cycles: float = quantity(2, "memory cycles", INI, simulator="tCCD_L")
    trtp_cycles: float = quantity(
        5,
        "memory cycles",
        f"{PARSER}: the ini's tRTP_S and tRTP_L are not read",
        simulator="tRTP",
    )
    trtrs_cycles: float = quantity(2, "memory cycles", PARSER, simulator="tRTRS")
    twr_cycles: float = quantity(16, "memory cycles", INI, simulator="tWR")
    read_latency_cycles: float = quantity(14, "memory cycles", f"{INI}, CL", simulator="CL")
    write_latency_cycles: float = quantity(4, "memory cycles", f"{INI}, CWL", simulator="CWL")
    trefi_cycles: float = quantity(
        3900, "memory cycles, of one rank", INI, least=1, simulator="tREFI"
    )
    trfc_cycles: float = quantity(260, "memory cycles", INI, simulator="tRFC")


@record
class PIM:
    """Multipliers at each bank, fed by a buffer that holds one row of the vector."""

    row_buffers: int = quantity(
        2,
        "row buffers of a bank: with 1 PIM blocks the NPU",
        "paper, section 5",
        least=1,
        whole=True,
    )
    macs_per_bank: int = quantity(
        16, "float16 products of one command", f"{MEMORY}, pim_comp_coverage", least=1, whole=True
    )
    page_bytes: int = quantity(
        1024,
        "bytes of a row that a tile uses, and of the vector's buffer",
        f"{MEMORY}, dram_page_size",
        least=2,
        whole=True,
    )
    banks_per_activation: int = quantity(
        4, "banks opened by one command", "paper, section 5.2; command G_ACT", least=1, whole=True
    )
    banks_per_precharge: int = quantity(
        1,
        "banks closed by one command",
        "command PIM_PRECHARGE of the simulator",
        least=1,
        whole=True,
    )
    product_cycles: float = quantity(
        0,
        "memory cycles from one product to the next, at least those of a burst",
        "the simulator: one product a burst",
    )
    least_products: int = quantity(
        6,
        "products that one result takes at least",
        "adder tree; EstimatePIMOperationLatency",
        least=1,
        whole=True,
    )
    gwrite_bursts: int = quantity(
        32,
        "(tCCD_S + tCCD_L) that filling the vector's buffer takes",
        "InitTimingParams",
        least=0,
        whole=True,
    )


@record
class Link:
    """The link between devices; free by default, as the simulator has no communication."""

    bandwidth_bytes_per_second: float = quantity(
        float("inf"),
        "bytes/s, in and out of a device",
        "not in the simulator",
        least=1,
        most=float("inf"),
    )
    latency_seconds: float = quantity(0.0, "s of one message", "not in the simulator")


@record
class GPU:
    """A GPU at its roofline, for comparison: by default the paper's, NVIDIA's A100 with 40 GB."""

    flops_per_second: float = quantity(
        312e12,
        "FLOP/s, float16 products summed in float32, dense",
        "NVIDIA A100 data sheet, 2020",
        least=1,
    )
    bytes_per_second: float = quantity(
        1555e9, "bytes/s", "NVIDIA A100 40 GB data sheet, 2020", least=1
    )
    memory_bytes: float = quantity(40e9, "bytes", "NVIDIA A100 40 GB data sheet, 2020", least=1)
    board_watts: float = quantity(400.0, "W, the most", "NVIDIA A100 SXM data sheet, 2020", least=0)
    die_mm2: float = quantity(
        826.0, "mm2 without the memory", "NVIDIA A100 architecture white paper, 2020", least=0
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
