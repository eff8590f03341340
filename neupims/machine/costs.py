"""What a device costs: energy of actions, watts of what waits, square millimetres of parts.

The two records are the groups `energy` and `area` of `Hardware`, so files, `--set` and the knobs of
`explore` can change every cost. The energy of an action is a charge times a voltage: it does not
depend on the clock. What a part draws while it waits is a power, and counts for all the time.

The source of a cost begins with its confidence: "published" (a paper or data sheet states it),
"derived" (calculated from published numbers, as the source says) or "assumed". Energies of other
memories are in `configs/memory` (`neupims show memories`).
"""

from typing import Any

from neupims.machine.quantity import Effect, check_quantities, quantity
from neupims.machine.record import record

INI = "HBM2_8Gb_x128_dualpim.ini of the simulator, at its 1 GHz"
NEWTON = (
    "a product in all 32 banks, of 1024 bytes, takes four times the energy of a read of 64 bytes"
    " (Newton, He et al., MICRO 2020, as in the simulator's InitPowerParams)"
)
TEN_LESSONS = "Jouppi et al., Ten Lessons, ISCA 2021"
TPUV4I = f"{TEN_LESSONS}: TPU v4i, 7 nm, at the 400 mm2 that its die is below"
FINE_GRAINED = "O'Connor et al., Fine-Grained DRAM, MICRO 2017, table 3, HBM2"
ATTACC = "published: Park et al., AttAcc, ASPLOS 2024, section 7.7: units in a 1z nm HBM3 die"
READ_PICOJOULES = 1.2 * (390 - 55) * 2  # of a burst of 64 bytes, 2 ns
WRITE_PICOJOULES = 1.2 * (500 - 55) * 2


def _cost(least: float, most: float, effect: Effect) -> dict[str, Any]:
    """Returns a range, and 0, which leaves a part out.

    It is wide enough for every memory and process that we know (DDR3 moves a bit for 70 pJ, a
    stack's wires for 0.1), and narrow enough that the default in another unit (fJ, nJ, J, mW, um2)
    falls outside.
    """
    return {"least": least, "most": most, "zero": True, "effect": effect}


@record
class EnergyCosts:
    """Picojoules of an action, and watts of a part that waits.

    Args:
        activate_kilobyte: Opening and closing 1024 bytes of a row.
        read_bit: Reading one bit of an open row, as far as the interface.
        write_bit: Writing one bit of an open row.
        interface_bit: One bit between the memory and the NPU.
        pim_bit: One bit of an operand of a product in the banks, with the product.
        refresh_kilobyte: Refreshing 1024 bytes.
        standby_gigabyte: 2^30 bytes of memory with rows open.
        mac: One product and one sum in the arrays.
        vector_operation: One operation on one element.
        scratchpad_byte: One byte to or from the scratchpad.
        link_bit: One bit to another device.
        npu_idle_square_millimetre: Leakage and clocks of the NPU.
        pim_idle_square_millimetre: Leakage of the multipliers in the memory.

    Raises:
        ValueError: A cost is not a number or outside its range; the sentence names it.
    """

    activate_kilobyte: float = quantity(
        1.2 * (65 * 48 - 55 * 34 - 40 * 14),
        "pJ/KiB, of a row, opened and closed",
        f"derived: {INI}: VDD (IDD0 tRC - IDD3N tRAS - IDD2N tRP)",
        **_cost(10, 1e5, "energy"),
    )
    read_bit: float = quantity(
        READ_PICOJOULES / 512,
        "pJ/bit, from the row to the interface",
        f"derived: {INI}: VDD (IDD4R - IDD3N) for a burst of 512 bits",
        **_cost(0.005, 300, "energy"),
    )
    write_bit: float = quantity(
        WRITE_PICOJOULES / 512,
        "pJ/bit, from the interface to the row",
        f"derived: {INI}: VDD (IDD4W - IDD3N) for a burst of 512 bits",
        **_cost(0.005, 300, "energy"),
    )
    interface_bit: float = quantity(
        0.80,
        "pJ/bit, between the memory and the NPU, both ends",
        f"published: {FINE_GRAINED}",
        **_cost(0.005, 300, "energy"),
    )
    pim_bit: float = quantity(
        4 * READ_PICOJOULES / 8192,
        "pJ/bit, of an operand of a product in the banks",
        f"derived: {NEWTON}",
        **_cost(0.005, 300, "energy"),
    )
    refresh_kilobyte: float = quantity(
        1.2 * (250 - 55) * 260 / 64,
        "pJ/KiB, refreshed once",
        f"derived: {INI}: VDD (IDD5AB - IDD3N) tRFC for 64 of a rank's rows",
        **_cost(10, 1e5, "energy"),
    )
    standby_gigabyte: float = quantity(
        1.2 * 55e-3 * 2,
        "W/GiB, with rows open",
        f"derived: {INI}: VDD IDD3N of a rank of 512 MiB",
        **_cost(5e-4, 20, "energy"),
    )
    mac: float = quantity(
        0.34 + 0.38,
        "pJ, of one float16 product and one float32 sum",
        f"published: {TEN_LESSONS}, table 2, 7 nm: arithmetic alone",
        **_cost(0.005, 100, "energy"),
    )
    vector_operation: float = quantity(
        0.38,
        "pJ, of one float32 sum",
        f"published: {TEN_LESSONS}, table 2, 7 nm; a division or an exponential takes more",
        **_cost(0.005, 100, "energy"),
    )
    scratchpad_byte: float = quantity(
        14 / 8,
        "pJ/byte",
        f"published: {TEN_LESSONS}, table 2, 7 nm: 14 pJ for 64 bits of 1 MB; wires of a larger one"
        " are extra",
        **_cost(0.02, 500, "energy"),
    )
    link_bit: float = quantity(
        10.0,
        "pJ/bit, to another device",
        "published: Arunkumar et al., MCM-GPU, ISCA 2017, table 2, over a board",
        **_cost(0.02, 1000, "energy"),
    )
    npu_idle_square_millimetre: float = quantity(
        (90 - 32 * 0.132) / 600,
        "W/mm2, of leakage and clocks of the NPU",
        "derived: Jouppi et al., TPU v4, ISCA 2023, table 4: 90 W idle with 32 GB of HBM2, whose"
        " standby is taken off, over a die below 600 mm2, 7 nm",
        **_cost(1e-3, 10, "energy"),
    )
    pim_idle_square_millimetre: float = quantity(
        0.132 / 81.8,
        "W/mm2, of multipliers in the memory",
        "assumed: as the memory around them, standby_gigabyte over area.dram_gigabyte",
        **_cost(1e-5, 1, "energy"),
    )

    def __post_init__(self):
        check_quantities(self, "energy")


@record
class AreaCosts:
    """Square millimetres of the parts of a device.

    Args:
        mac: One processing element of an array.
        vector_lane: One lane of a vector unit.
        scratchpad_megabyte: 10^6 bytes of scratchpad.
        memory_channel: Controller and interface of one channel of 128 bits.
        uncore_share: Share of the NPU that is network, links and control.
        dram_gigabyte: 2^30 bytes of memory.
        pim_bank: The multipliers and adders of one bank.
        pim_bank_group: The accumulator of one bank group.
        row_buffer_share: A second row buffer, as a share of the memory.

    Raises:
        ValueError: A cost is not a number or outside its range; the sentence names it.
    """

    mac: float = quantity(
        0.11 * 400 / (4 * 128 * 128),
        "mm2, of one processing element",
        f"published: {TPUV4I}; four arrays are 11 % of it",
        **_cost(1e-5, 0.05, "area"),
    )
    vector_lane: float = quantity(
        0.0125,
        "mm2, of one lane",
        f"derived: {TPUV4I}; 2048 lanes in the floorplan's vector unit, without its 16 MB",
        **_cost(2e-4, 1, "area"),
    )
    scratchpad_megabyte: float = quantity(
        0.28 * 400 / 134.2,
        "mm2/MB",
        f"published: {TPUV4I}; 128 MiB are 28 % of it",
        **_cost(0.02, 200, "area"),
    )
    memory_channel: float = quantity(
        1.6,
        "mm2, of controller and interface of one channel of 128 bits; others in proportion",
        f"derived: {TPUV4I}; read off its floorplan, 2 stacks",
        **_cost(0.05, 50, "area"),
    )
    uncore_share: float = quantity(
        0.45,
        "shares, of the NPU: on-chip network, links, control",
        f"derived: {TPUV4I}; what the floorplan's other parts leave",
        most=0.99,
        effect="area",
    )
    dram_gigabyte: float = quantity(
        81.8,
        "mm2/GiB",
        "published: Cho et al., ISSCC 2018, 12.3: an 8 Gb die of HBM2; Sohn et al., 2016: 96",
        **_cost(1, 2000, "area"),
    )
    pim_bank: float = quantity(
        0.094,
        "mm2, of 16 float16 multipliers and adders at a bank",
        ATTACC,
        **_cost(1e-3, 5, "area"),
    )
    pim_bank_group: float = quantity(
        0.036, "mm2, of the accumulator of a bank group", ATTACC, **_cost(5e-4, 5, "area")
    )
    row_buffer_share: float = quantity(
        0.0311,
        "shares, of the memory's area for a second row buffer",
        "published: NeuPIMs paper, CACTI 7.0, 22 nm",
        most=1,
        effect="area",
    )

    def __post_init__(self):
        check_quantities(self, "area")
