"""Matrix products on weight-stationary systolic arrays: cycles, traffic and useful work.

The arrays keep a block of tokens and stream the weights past it (the product is computed
transposed), so the loops run over blocks of tokens, then of inner channels, then of output
features. The first block of tokens runs at the pace of the arriving weights, the others find them
on chip. Cycles are core cycles.

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
from neupims.machine.hardware import Hardware, banks, burst_bytes, peak_bytes_per_cycle
from neupims.machine.record import Number
from neupims.machine.workload import FLOAT16_BYTES

HALVINGS = 24  # of a tile until it fits the scratchpad; 2^24 is more than any side
LEAST_STREAM = 4  # core cycles from one instruction to the next
# Commands that the queue of one bank holds: cmd_queue_size of the simulator's ini.
QUEUED_READS = 128
# Rows of a bank that arrive before a full queue frees a stuck write: 8 queued, 2 in front of the
# queues.
STUCK_ROWS = 10
# Bursts that the operation before wrote to a channel. From the first number on one is always left;
# below the second one is left after some operations and not after others. Both are observed.
MANY_WRITES = 96
FEW_WRITES = 6
FINISH_CYCLES = 45  # from the last product to the operation's end


class Work(NamedTuple):
    """One operation on one device: core cycles, bytes and products."""

    cycles: Number  # from start to end
    memory_cycles: Number  # the part of `cycles` that waits for the memory
    busy_cycles: Number  # with products in the pipeline of the arrays, as the simulator counts
    read_bytes: Number  # from the memory
    write_bytes: Number  # to the memory
    macs: Number  # products, without those of padding


class Tiling(NamedTuple):
    """Sides of a tile that fits half of the scratchpad, and the number of tiles along each."""

    tokens: Number  # rows of the first matrix in a tile
    inner: Number  # inner channels of a tile
    features: Number  # columns of the second matrix in a tile
    token_tiles: Number  # number of tiles along the tokens
    inner_tiles: Number  # along the inner channels
    feature_tiles: Number  # along the features


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


def tiling(hardware: Hardware, tokens, inner, features) -> Tiling:
    """Returns the tiling of a matrix product, whose tiles fit half of the scratchpad.

    The longest side is halved until they fit; the first of equals in the order tokens, inner,
    features.

    Args:
        hardware: The machine; its scratchpad and the width of its arrays matter.
        tokens: The rows of the first matrix.
        inner: Its columns, and the rows of the second matrix.
        features: The columns of the second matrix. All three may be arrays that broadcast.
    """
    width = 1.0 * hardware.npu.array_width
    limit = tile_bytes_limit(hardware)

    def pad(side):
        return ceil_divide(side, width) * width

    def over(sides):
        n, k, m = (pad(side) for side in sides)
        return FLOAT16_BYTES * (n * k + k * m + m * n) > limit

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
    tile: Tiling | None = None,
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
        tile: The tiling (default: computed by `tiling`).

    Returns:
        The work, with cycles in core cycles.
    """
    npu, simulated = hardware.npu, fidelity == "simulator"
    serial = simulated and npu_only
    tile = tile or tiling(hardware, tokens, inner, features)
    width = 1.0 * npu.array_width
    token_blocks, inner_blocks, feature_blocks = (
        ceil_divide(side, width) for side in (tile.tokens, tile.inner, tile.features)
    )
    stream = jnp.maximum(width / npu.num_arrays, LEAST_STREAM)
    fill = npu.array_height + width - 2 + stream
    load_block = fill + 1 if serial else 1.0 * npu.array_height
    pass_cycles = inner_blocks * (load_block + stream * (feature_blocks - 1))
    tiles = tile.token_tiles * tile.inner_tiles * tile.feature_tiles

    rate = bytes_per_cycle(hardware)
    per_channel = hardware.hbm.num_channels * burst_bytes(hardware.hbm)
    queue_bytes = banks(hardware.hbm) * QUEUED_READS * per_channel

    def load(amount):
        if serial:
            return amount / (calibration.shallow_efficiency * rate)
        if not simulated:
            return amount / (calibration.queued_efficiency * rate)
        queued, rest = jnp.minimum(amount, queue_bytes), jnp.maximum(amount - queue_bytes, 0)
        return (
            queued / calibration.queued_efficiency + rest / calibration.streaming_efficiency
        ) / rate

    weights = FLOAT16_BYTES * tile.inner * tile.features
    first_bytes = weights + FLOAT16_BYTES * jnp.minimum(tile.tokens, width) * tile.inner
    tile_bytes = weights + FLOAT16_BYTES * tile.inner * tile.tokens
    loading = load(tile_bytes)
    backlog = (
        calibration.backlog_bytes * hardware.hbm.num_channels / 32
        if simulated and not serial
        else 0.0
    )
    first = jnp.maximum(
        loading + pass_cycles * jnp.minimum(1, backlog / first_bytes), pass_cycles + fill
    )
    if simulated and not serial:
        row_bytes = banks(hardware.hbm) * 1.0 * hardware.hbm.row_bytes * hardware.hbm.num_channels
        held_up = jnp.minimum(loading, load(STUCK_ROWS * row_bytes)) + pass_cycles * jnp.maximum(
            1 - row_bytes / first_bytes, 0
        )
        first = first + stuck * jnp.maximum(held_up - first, 0)
    streaming = tile_bytes / (
        (calibration.streaming_efficiency if simulated else calibration.queued_efficiency) * rate
    )
    later = jnp.maximum(streaming, token_blocks * pass_cycles)
    cycles = first + (token_blocks - 1) * pass_cycles + (tiles - 1) * later + fill + FINISH_CYCLES
    # Where weights come late, each block of inner channels finds the pipeline empty: it is loaded
    # and drained, not hidden behind the one before.
    waiting = jnp.where(loading > pass_cycles, 1.0, 0.0) + (tiles - 1) * jnp.where(
        streaming > token_blocks * pass_cycles, 1.0, 0.0
    )
    busy = tiles * token_blocks * pass_cycles + waiting * inner_blocks * (fill + 1 - load_block)

    read_bytes = FLOAT16_BYTES * (
        inner * features * tile.token_tiles + inner * tokens * tile.feature_tiles
    )
    written = jnp.minimum(features, ceil_divide(tokens, width) * width) if simulated else features
    return Work(
        cycles=cycles,
        memory_cycles=jnp.minimum(loading, first)
        + (tiles - 1) * jnp.maximum(streaming - token_blocks * pass_cycles, 0),
        busy_cycles=jnp.minimum(busy, cycles),
        read_bytes=read_bytes,
        write_bytes=FLOAT16_BYTES * tokens * written * 1.0,
        macs=1.0 * tokens * inner * features,
    )


def stuck_chance(hardware: Hardware, previous_write_bytes, few) -> Number:
    """Returns the chance that a write of the operation just before holds up a product.

    It is 1 after many writes, `few` after almost none, and 0 between, as seen in traces.

    Args:
        hardware: The machine.
        previous_write_bytes: The bytes that the operation just before wrote.
        few: The chance after almost no writes.
    """
    bursts = previous_write_bytes / burst_bytes(hardware.hbm) / hardware.hbm.num_channels
    return jnp.where(bursts >= MANY_WRITES, 1.0, jnp.where(bursts < FEW_WRITES, few, 0.0))
