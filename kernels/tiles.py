"""Tile sizes of the kernels by shape and dtype: each bound has its reason, nothing is tuned.

`itemsize` is the number of bytes of a token element.
"""

from typing import NamedTuple

import jax

from . import launch


class Tile(NamedTuple):
    """The tokens that a program reads in one step, and the threads that share them."""

    unroll: int  # tiles of tokens in a step
    rows: int  # tokens of a tile
    channels: int  # of a tile
    warps: int  # of 32 threads


MOST_TOKENS = 16384
_VECTOR_BYTES = 16  # one load of a thread, the widest there is
_WARPS = 4


def pool_tile(n: int, d: int) -> Tile:
    """Returns the tile of `ggem.pool`: two numbers for each thread, so that many programs fit.

    With 14 tiles in a step, a thread takes 48 registers.

    Args:
        n: Tokens of a row.
        d: Channels of a token.
    """
    return _tile(n, d, channels=128, most=14)


def gradient_tile(n: int, d: int) -> Tile:
    """Returns the tile of `ggem.gradient`: two numbers for each thread, as for `ggem.pool`.

    Programs of 64 channels are short, so the last ones fill the multiprocessors better. With 4
    tiles in a step, a thread takes 40 registers.

    Args:
        n: Tokens of a row.
        d: Channels of a token.
    """
    return _tile(n, d, channels=64, most=4)


def _tile(n, d, channels, most):
    """Returns the tile with the fewest steps, each of which costs about as much as another tile."""
    channels = min(channels, power_of_two(d))
    rows = min(max(_WARPS * 32 * 2 // channels, 1), power_of_two(n))

    def steps(unroll):
        return n // (unroll * rows) + -(-(n % (unroll * rows)) // rows)

    return Tile(min(range(most, 0, -1), key=steps), rows, channels, _WARPS)


def power_of_two(x: int) -> int:
    """Returns the smallest power of two that is at least x.

    Args:
        x: Whole number of at least 1.
    """
    return 1 << (x - 1).bit_length()


class NormTile(NamedTuple):
    """A step of a program that takes all channels of its tokens."""

    unroll: int  # tiles of tokens in a step
    rows: int  # tokens of a tile
    channels: int  # of a piece
    pieces: int  # that hold the channels of a token
    warps: int  # of 32 threads
    splits: int  # programs that share the tokens of a row


# 8 channels for each of 512 threads: the sums and parameters of more would not fit the registers
MOST_NORM_CHANNELS = 4096
_NORM_WARPS = 4  # for one token, so that few threads wait for each other
_LEAST_RUN = 32  # tokens: a shorter run would not pay for its partial sums
_START = 4  # tokens: what start and end of a program cost
_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # by capability


def norm_pool_tile(rows: int, n: int, d: int, itemsize: int) -> NormTile:
    """Returns the tile of `norm_ggem.pool`, unrolled 4 times, so that 4 tokens share a barrier.

    Args:
        rows: Rows of tokens, one for each image.
        n: Tokens of a row.
        d: Channels of a token.
        itemsize: Bytes of a token element.
    """
    return _norm_tile(rows, n, d, itemsize, unroll=4)


def norm_gradient_tile(rows: int, n: int, d: int, itemsize: int) -> NormTile:
    """Returns the tile of `norm_ggem.gradient`, unrolled twice, for 12 to 16 elements per thread.

    Args:
        rows: Rows of tokens, one for each image.
        n: Tokens of a row.
        d: Channels of a token.
        itemsize: Bytes of a token element.
    """
    return _norm_tile(rows, n, d, itemsize, unroll=2)


def _norm_tile(rows, n, d, itemsize, unroll):
    """Returns the tile for a number of unrolled tiles.

    With several pieces, each thread takes two channels of each piece. The parameters of its
    channels stay in registers, so whole vectors would be too many.
    """
    pieces = min((1, 3, 5), key=lambda pieces: pieces * power_of_two(-(-d // pieces)))
    channels = power_of_two(-(-d // pieces))
    held_by_thread = _VECTOR_BYTES // itemsize if pieces == 1 else 2
    warps = max(_NORM_WARPS, channels // (32 * held_by_thread))
    held = max(min(warps * 32 * held_by_thread // channels, power_of_two(n)), 1)
    # Registers for 20 warps on a multiprocessor, or 16 of 8 channels a thread.
    resident = max((16 if held_by_thread * pieces >= 8 else 20) // warps, 1)
    splits = _splits(rows, n, multiprocessors() * resident)
    return NormTile(min(unroll, power_of_two(-(-n // held))), held, channels, pieces, warps, splits)


def _splits(rows, n, places):
    """Returns the number of runs for which all waves of programs together are shortest.

    A quarter of a wave is lost until the programs are out of step.
    """

    def tokens(splits):
        waves = -(-rows * splits // places)
        return (waves + 0.25) * (-(-n // splits) + _START)

    return min(range(1, max(n // _LEAST_RUN, 1) + 1), key=tokens)


def multiprocessors() -> int:
    """Returns the number of multiprocessors of the GPU that a kernel is for.

    It is that of this machine's GPU, or the usual one of the capability that
    `launch.compiled_for` sets, or where there is neither that of an H100.
    """
    capability = launch.capability()
    if capability is None:
        counts = (getattr(device, "core_count", None) for device in jax.local_devices())
        return next(filter(None, counts), _MULTIPROCESSORS[90])
    return _MULTIPROCESSORS.get(capability, _MULTIPROCESSORS[90])


# Columns of the widest map that `regional_gem` takes: it keeps 6 tiles of columns x channels in
# registers.
MOST_COLUMNS = 256


def regional_tile(images: int, w: int, d: int, itemsize: int) -> Tile:
    """Returns the tile of `regional_gem.pool`: a row of a map, with a block of its channels.

    It has 8 elements per thread, because the window keeps 5 or more tiles in registers. It has
    fewer channels where the multiprocessors would otherwise not get two programs each.

    Args:
        images: Number of maps.
        w: Columns of a map.
        d: Channels of a map.
        itemsize: Bytes of an element.
    """
    columns = power_of_two(w)
    channels = min(64, max(_WARPS * 32 * 8 // columns, 1), power_of_two(d))
    while (
        channels > 2 * _VECTOR_BYTES // itemsize
        and images * -(-d // channels) < 2 * multiprocessors()
    ):
        channels //= 2
    vectors = columns * channels * itemsize // _VECTOR_BYTES
    warps = min(max(vectors // 32, 1), _WARPS)  # a whole vector for each thread
    return Tile(1, columns, channels, warps)
