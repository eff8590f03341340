"""Matrix products on weight-stationary systolic arrays: cycles, traffic and useful work.

The arrays keep a block of tokens and stream the weights past it (the product is computed
transposed), so the loops run over blocks of tokens, then of inner channels, then of output
features. The first block of tokens runs at the pace of the arriving weights, the others find them
on chip. Cycles are core cycles.

Numbers of 8 or 4 bits take fewer bytes. A processing element multiplies them in the same time as
one number of 16 bits, or several of them, which lie in one word of the array and belong to
neighbouring inner channels (`products_at_once`). Results always have 16 bits.

In the public simulator, three effects set the pace of arrival (seen in its commands, burst by
burst): all reads of a tile are queued at once, in a queue of each bank; blocks come out of order,
products are started in order, so some weights still wait for their products when the last one
comes; and a WRITE left over from the operation before may sit at the head of one bank's queue,
unable to turn the bus around while reads follow each other, so that the next row of that bank
comes last of all and nearly all products wait for it ("stuck").

Source: src/operations/MatMul.cc, src/NeuPIMSystolicWS.cc, src/NeuPIMSCore.cc and
extern/NewtonSim/src/neupims_command_queue.cc of the public simulator.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from neupims.machine.calibration import Calibration
from neupims.machine.division import ceil_divide
from neupims.machine.hardware import (
    GPU,
    NPU,
    Hardware,
    banks,
    burst_bytes,
    burst_cycles,
    peak_bytes_per_cycle,
)
from neupims.machine.record import Number
from neupims.machine.workload import FLOAT16_BYTES

HALVINGS = 24  # of a tile until it fits the scratchpad; 2^24 is more than any side
LEAST_STREAM = 4  # core cycles from one instruction to the next
# Commands that the queue of one bank holds: cmd_queue_size of the simulator's ini.
QUEUED_READS = 128
# Rows of a bank that arrive before a full queue frees a stuck write: 8 queued, 2 in front of the
# queues.
STUCK_ROWS = 10
# Writes of a channel after which a product finds one stuck in every second run: three times what
# the buffer in front of the queues holds (trans_queue_size of the simulator's ini is 32).
HALF_STUCK_WRITES = 96
FEW_WRITES = 6  # bursts that an operation wrote to a channel; below, chances are observed
# The share of a written byte's bus time that passes before the next operation: buffers take bursts
# at twice the pace of the bus.
ACCEPTED = 0.5
REFRESH_CYCLES = 30  # memory cycles from the end of an interval to REFRESH: precharges and tRP
FINISH_CYCLES = 45  # from the last product to the operation's end


class Work(NamedTuple):
    """One operation on one device: core cycles, bytes and products."""

    cycles: Number  # from start to end
    memory_cycles: Number  # the part of `cycles` that waits for the memory
    busy_cycles: Number  # with products in the pipeline of the arrays, as the simulator counts
    read_bytes: Number  # from the memory
    write_bytes: Number  # to the memory
    macs: Number  # products, without those of padding


class Bits(NamedTuple):
    """The widths of the numbers that a product multiplies; its result has 16 bits."""

    inputs: Number = 16  # of the first matrix
    weights: Number = 16  # of the second matrix


SIXTEEN = Bits()


class Tiling(NamedTuple):
    """Sides of a tile that fits half of the scratchpad, and the number of tiles along each."""

    tokens: Number  # rows of the first matrix in a tile
    inner: Number  # inner channels of a tile
    features: Number  # columns of the second matrix in a tile
    token_tiles: Number  # number of tiles along the tokens
    inner_tiles: Number  # along the inner channels
    feature_tiles: Number  # along the features


def one_tile(tokens: Number, inner: Number, features: Number) -> Tiling:
    """Returns the tiling of a product that reads each matrix once, whatever a scratchpad holds.

    Args:
        tokens: The rows of the first matrix.
        inner: Its columns, and the rows of the second matrix.
        features: The columns of the second matrix.
    """
    return Tiling(tokens, inner, features, 1.0, 1.0, 1.0)


def bytes_per_cycle(hardware: Hardware) -> Number:
    """Returns the peak bytes that the memory moves in one core cycle.

    Args:
        hardware: The machine; its memory and both clocks matter.
    """
    return peak_bytes_per_cycle(hardware.hbm) * (hardware.hbm.clock_hz / hardware.npu.clock_hz)


def least_tile_bytes(hardware: Hardware) -> Number:
    """Returns the bytes of the smallest tile: three blocks as wide as an array.

    Args:
        hardware: The machine; the width of its arrays matters.
    """
    return 3.0 * FLOAT16_BYTES * hardware.npu.array_width * hardware.npu.array_width


def tile_bytes_limit(hardware: Hardware) -> Number:
    """Returns the bytes that a tile may have: half of the scratchpad; the next one loads beside it.

    Args:
        hardware: The machine; its scratchpad matters.
    """
    return hardware.npu.scratchpad_bytes / 2


def holds_tile(hardware: Hardware) -> Number:
    """Returns whether half of the scratchpad holds the smallest tile.

    Where it does not, the public simulator never ends, and a product has no cycles.

    Args:
        hardware: The machine; its scratchpad and the width of its arrays matter.
    """
    return jnp.asarray(least_tile_bytes(hardware)) <= tile_bytes_limit(hardware)


def check_scratchpad(hardware: Hardware) -> None:
    """Raises unless half of the scratchpad holds the smallest tile.

    Args:
        hardware: The machine.

    Raises:
        ValueError: It does not; the sentence names the least scratchpad.
    """
    if not holds_tile(hardware):
        width, least = int(hardware.npu.array_width), int(least_tile_bytes(hardware))
        raise ValueError(
            f"npu.scratchpad_bytes must be at least {2 * least}, not"
            f" {int(hardware.npu.scratchpad_bytes)}: half of the scratchpad must hold three blocks"
            f" of {width} x {width} numbers, {least} bytes (a scratchpad too small for them never"
            " ends in the public simulator)"
        )


def products_at_once(unit: NPU | GPU, bits: Bits) -> Number:
    """Returns the products that a unit makes in the time of one of 16 bits.

    The wider of the two numbers decides: 4-bit weights with 16-bit inputs are products of 16 bits.
    Numbers of 4 bits are numbers of 8 bits too, so they are multiplied at least as fast.

    Args:
        unit: The NPU or the GPU; its `speedup_8_bit` and `speedup_4_bit` matter.
        bits: The widths of the two numbers.
    """
    if bits is SIXTEEN:
        return 1.0
    widest = jnp.maximum(bits.inputs, bits.weights)
    of_4_bits = jnp.maximum(unit.speedup_4_bit, unit.speedup_8_bit)
    narrow = jnp.where(widest > 4, unit.speedup_8_bit, of_4_bits)
    return jnp.where(widest > 8, 1.0, narrow)


def tiling(hardware: Hardware, tokens, inner, features, bits: Bits = SIXTEEN) -> Tiling:
    """Returns the tiling of a matrix product, whose tiles fit half of the scratchpad.

    The longest side is halved until they fit; the first of equals in the order tokens, inner,
    features.

    Args:
        hardware: The machine; its scratchpad and the width of its arrays matter.
        tokens: The rows of the first matrix.
        inner: Its columns, and the rows of the second matrix.
        features: The columns of the second matrix. All three may be arrays that broadcast.
        bits: The widths of the numbers (default: 16), which may be arrays too.
    """
    width = 1.0 * hardware.npu.array_width
    limit = tile_bytes_limit(hardware)

    def pad(side):
        return ceil_divide(side, width) * width

    def over(sides):
        n, k, m = (pad(side) for side in sides)
        numbers = bits.inputs / 16 * n * k + bits.weights / 16 * k * m + m * n
        return FLOAT16_BYTES * numbers > limit

    def halve(state):
        (n, k, m), tiles, step = state
        longest = ((n >= k) & (n >= m), (k > n) & (k >= m), (m > n) & (m > k))
        halved = [over((n, k, m)) & chosen for chosen in longest]
        return (
            tuple(
                jnp.where(now, ceil_divide(side, 2), side)
                for now, side in zip(halved, (n, k, m), strict=True)
            ),
            tuple(
                jnp.where(now, 2 * count, count) for now, count in zip(halved, tiles, strict=True)
            ),
            step + 1,
        )

    zero = 0.0 * (limit + width + tokens + inner + features)
    sides = tuple(side + zero for side in (tokens, inner, features))
    start = (sides, (zero + 1, zero + 1, zero + 1), 0)
    (n, k, m), (n_tiles, k_tiles, m_tiles), _ = jax.lax.while_loop(
        lambda state: jnp.any(over(state[0])) & (state[2] < HALVINGS), halve, start
    )
    return Tiling(n, k, m, n_tiles, k_tiles, m_tiles)


def gemm(
    hardware: Hardware,
    tokens,
    inner,
    features,
    *,
    calibration: Calibration,
    fidelity: str,
    npu_only: bool = False,
    stuck: Number = 0.0,
    inherited_bytes: Number = 0.0,
    tile: Tiling | None = None,
    bits: Bits = SIXTEEN,
) -> Work:
    """Returns the work of the product of (tokens, inner) and (inner, features) on one device.

    In "simulator" fidelity the written result is cut to the first block of features, as the
    simulator does. "intended" writes all of the result, and neither `stuck` nor `npu_only` matters.

    Args:
        hardware: The machine.
        tokens: The rows of the first matrix.
        inner: Its columns, and the rows of the second matrix.
        features: The columns of the second matrix.
        calibration: The fitted constants.
        fidelity: "simulator" or "intended".
        npu_only: Whether the rules of the simulator's NPU-only branch hold: no block of tokens is
            loaded while products run, and few reads are in flight.
        stuck: The chance that a left-over write holds up the first tile (`stuck_chance`).
        inherited_bytes: The bytes that the operation just before wrote, "simulator" only.
        tile: The tiling (default: computed by `tiling`).
        bits: The widths of inputs and weights (default: 16).

    Returns:
        The work, with cycles in core cycles.
    """
    npu, simulated = hardware.npu, fidelity == "simulator"
    serial = simulated and npu_only
    queued = simulated and not npu_only
    tile = tile or tiling(hardware, tokens, inner, features, bits)
    width = 1.0 * npu.array_width
    deep = width * products_at_once(npu, bits)  # inner channels that the arrays hold
    input_bytes, weight_bytes = bits.inputs / 8, bits.weights / 8
    token_blocks, inner_blocks, feature_blocks = (
        ceil_divide(side, block)
        for side, block in ((tile.tokens, width), (tile.inner, deep), (tile.features, width))
    )
    stream = jnp.maximum(width / npu.num_arrays, LEAST_STREAM)
    fill = npu.array_height + width - 2 + stream
    load_block = fill + 1 if serial else 1.0 * npu.array_height
    pass_cycles = inner_blocks * (load_block + stream * (feature_blocks - 1))
    tiles = tile.token_tiles * tile.inner_tiles * tile.feature_tiles

    rate = bytes_per_cycle(hardware)
    if queued:
        efficiency = calibration.streaming_efficiency
    else:
        efficiency = calibration.shallow_efficiency if serial else calibration.queued_efficiency
    weights = weight_bytes * tile.inner * tile.features
    first_bytes = weights + input_bytes * jnp.minimum(tile.tokens, width) * tile.inner
    tile_bytes = weights + input_bytes * tile.inner * tile.tokens
    streaming = tile_bytes / (efficiency * rate)
    inherited = ACCEPTED * inherited_bytes / rate if queued else 0.0
    loading = streaming + inherited
    compute = token_blocks * pass_cycles
    two_tiles = jnp.minimum(jnp.minimum(tiles, 2) * tile_bytes, STUCK_ROWS * _full_row(hardware))

    def paces(slower):
        """Returns the first block's cycles and a later tile's, reads taking `slower` as long."""
        first = _first_pass(
            hardware,
            calibration,
            loading=slower * loading,
            pass_cycles=pass_cycles,
            fill=fill,
            first_bytes=first_bytes,
            tile_bytes=tile_bytes,
            held_up=slower * (inherited + two_tiles / (efficiency * rate)),
            stuck=stuck,
        )
        return first, _later_pace(hardware, slower * streaming, compute, fill)

    if queued:
        first, later = paces(1.0)
        slow_first, slow_later = paces(1 + calibration.pim_slowdown)
        waits = slow_first - first + (tiles - 1) * (slow_later - later)
        waits = waits / jnp.maximum(calibration.pim_slowdown, 1e-3)
    else:
        first, later = jnp.maximum(loading, pass_cycles + fill), jnp.maximum(streaming, compute)
        waits = jnp.minimum(loading, first) + (tiles - 1) * jnp.maximum(streaming - compute, 0)
    cycles = first + (token_blocks - 1) * pass_cycles + (tiles - 1) * later + fill + FINISH_CYCLES
    # Where weights come late, each block of inner channels finds the pipeline empty: it is loaded
    # and drained, not hidden behind the one before.
    waiting = jnp.where(loading > pass_cycles, 1.0, 0.0) + (tiles - 1) * jnp.where(
        streaming > token_blocks * pass_cycles, 1.0, 0.0
    )
    busy = tiles * token_blocks * pass_cycles + waiting * inner_blocks * (fill + 1 - load_block)

    read_bytes = (
        weight_bytes * inner * features * tile.token_tiles
        + input_bytes * inner * tokens * tile.feature_tiles
    )
    written = jnp.minimum(features, ceil_divide(tokens, width) * width) if simulated else features
    return Work(
        cycles=cycles,
        memory_cycles=waits,
        busy_cycles=jnp.minimum(busy, cycles),
        read_bytes=read_bytes,
        write_bytes=FLOAT16_BYTES * tokens * written * 1.0,
        macs=1.0 * tokens * inner * features,
    )


def _full_row(hardware: Hardware) -> Number:
    """Returns the bytes of one row in all banks of all channels."""
    return banks(hardware.hbm) * 1.0 * hardware.hbm.row_bytes * hardware.hbm.num_channels


def _first_pass(
    hardware: Hardware,
    calibration: Calibration,
    *,
    loading,
    pass_cycles,
    fill,
    first_bytes,
    tile_bytes,
    held_up,
    stuck,
) -> Number:
    """Returns the core cycles of the first tile's first block of tokens.

    Products are started in order, and wait for the bank that is behind the others. A bank that is
    behind stays behind, because its full queue blocks all that follows: the most is the rows that
    a queue holds. A stuck write puts its bank behind at once, and so does tCCD_L above the length
    of a burst, which serves the first bank of each group before the others. Otherwise the banks
    drift apart as in a random walk: by one row in `backlog_bytes`, by two in four times as many,
    at most, in the mean, by half the rows of the rank that waits for its turn.
    The last rows of the bank behind come one after another, and each frees the products of a row
    of all banks.
    """
    hbm, to_core = hardware.hbm, hardware.npu.clock_hz / hardware.hbm.clock_hz
    row = _full_row(hardware)
    bursts = hbm.row_bytes / burst_bytes(hbm)
    alone = hbm.trtp_cycles + hbm.trp_cycles + hbm.trcd_read_cycles + bursts * burst_cycles(hbm)
    each = jnp.maximum(pass_cycles * row / first_bytes - alone * to_core, 0)
    most = jnp.minimum(QUEUED_READS / bursts, first_bytes / row)
    after = (tile_bytes - first_bytes) / row  # rows of the later blocks of tokens, which come last

    def finished(behind):
        return loading + each * jnp.maximum(behind - after, 0)

    in_turn = jnp.minimum(
        jnp.minimum(most, first_bytes / row / hbm.ranks / 2),
        jnp.sqrt(tile_bytes / calibration.backlog_bytes),
    )
    behind = jnp.where(hbm.tccd_l_cycles > burst_cycles(hbm), most, in_turn)
    usual = jnp.maximum(finished(behind), pass_cycles + fill)
    late = jnp.maximum(
        finished(most), held_up + pass_cycles * jnp.maximum(1 - row / first_bytes, 0)
    )
    return usual + stuck * jnp.maximum(late - usual, 0)


def _later_pace(hardware: Hardware, streaming, compute, fill) -> Number:
    """Returns the core cycles from the end of one tile to the end of the next.

    A tile is loaded while the one before is computed. Where it comes late, the arrays run empty
    and are filled again, once for two tiles. Each refresh holds up the tile that is being loaded,
    which small tiles do not hide.
    """
    hbm, to_core = hardware.hbm, hardware.npu.clock_hz / hardware.hbm.clock_hz
    restart = fill + hardware.npu.array_height - 1
    refresh = (REFRESH_CYCLES + hbm.trfc_cycles + hbm.trcd_read_cycles) * to_core
    late = streaming + jnp.maximum(refresh - compute / 2, 0) - compute
    interval = hbm.trefi_cycles / hbm.ranks * to_core
    lost = jnp.where(late > 0, jnp.minimum((late + restart) / interval, 0.9), 0.0)
    return jnp.where(
        streaming > compute,
        jnp.maximum(streaming, (streaming + compute + restart) / 2),
        compute / (1 - lost),
    )


def stuck_chance(hardware: Hardware, previous_write_bytes, few) -> Number:
    """Returns the chance that a write of the operation just before holds up a product.

    It is `few` after 1 to 6 writes of each channel, which are written together with later ones,
    and grows with the writes w of a channel as w / (w + 96): writes leave their buffer when 32
    have come, and the last ones meet the reads that follow.

    Args:
        hardware: The machine.
        previous_write_bytes: The bytes that the operation just before wrote.
        few: The chance after few writes; less where only some channels have one.
    """
    bursts = previous_write_bytes / burst_bytes(hardware.hbm) / hardware.hbm.num_channels
    return jnp.where(
        bursts < FEW_WRITES,
        few * jnp.minimum(bursts, 1),
        bursts / (bursts + HALF_STUCK_WRITES),
    )
