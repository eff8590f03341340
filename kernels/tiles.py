"""Tile sizes of the kernels by shape and dtype: each bound has its reason, nothing is tuned.

`itemsize` is the number of bytes of a token element.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """The tokens that a program reads in one step, and the threads that share them."""

    unroll: int  # tiles of tokens in a step
    rows: int  # tokens of a tile
    channels: int  # of a tile
    warps: int  # of 32 threads


MOST_TOKENS = 16384
_VECTOR_BYTES = 16  # one load of a thread, the widest there is
_WARPS = 4
# 256 bytes of bfloat16 from one token: whole 128-byte lines, and no idle lanes for 384, 768 and
# 1024 channels
_CHANNELS = 128


def pool_tile(n: int, d: int, itemsize: int) -> Tile:
    """Returns the tile of `ggem.pool`.

    It is unrolled 8 times, so that 8 tokens share the three special functions of a rescaling.
    Unrolling 16 times would need more than 128 registers.

    Args:
        n: Tokens of a row.
        d: Channels of a token.
        itemsize: Bytes of a token element.
    """
    return _tile(n, d, itemsize, unroll=8)


def gradient_tile(n: int, d: int, itemsize: int) -> Tile:
    """Returns the tile of `ggem.gradient`.

    It is unrolled twice, for two loads in flight per thread. The tokens, their slopes and the sums
    then fit 128 registers.

    Args:
        n: Tokens of a row.
        d: Channels of a token.
        itemsize: Bytes of a token element.
    """
    return _tile(n, d, itemsize, unroll=2)


def _tile(n, d, itemsize, unroll):
    held = _WARPS * 32 * (_VECTOR_BYTES // itemsize)  # elements of one load by all threads
    channels = min(_CHANNELS, power_of_two(d))
    rows = min(held // channels, power_of_two(n))
    unroll = min(unroll, power_of_two(-(-n // rows)))
    return Tile(unroll, rows, channels, _WARPS)


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
_MULTIPROCESSORS = 132  # of an H100 or H200
_NORM_WARPS = 8  # two programs on a multiprocessor give each thread 128 registers
_LEAST_RUN = 64  # tokens: a shorter run would not pay for its partial sums


def norm_pool_tile(rows: int, n: int, d: int, itemsize: int) -> NormTile:
    """Returns the tile of `norm_ggem.pool`, unrolled 4 times, the most that fits 128 registers.

    Args:
        rows: Rows of tokens, one for each image.
        n: Tokens of a row.
        d: Channels of a token.
        itemsize: Bytes of a token element.
    """
    return _norm_tile(rows, n, d, itemsize, unroll=4)


def norm_gradient_tile(rows: int, n: int, d: int, itemsize: int) -> NormTile:
    """Returns the tile of `norm_ggem.gradient`, with 8 to 12 elements per thread at a time.

    With 16 elements and a mask, two programs would not fit on a multiprocessor.

    Args:
        rows: Rows of tokens, one for each image.
        n: Tokens of a row.
        d: Channels of a token.
        itemsize: Bytes of a token element.
    """
    tile = _norm_tile(rows, n, d, itemsize, unroll=2)
    held_by_thread = tile.rows * tile.channels * tile.pieces // (32 * tile.warps)
    return tile if held_by_thread < 8 else tile._replace(unroll=1)


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
    splits = max(1, min(2 * _MULTIPROCESSORS // rows, n // _LEAST_RUN))
    return NormTile(min(unroll, power_of_two(-(-n // held))), held, channels, pieces, warps, splits)


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
        and images * -(-d // channels) < 2 * _MULTIPROCESSORS
    ):
        channels //= 2
    vectors = columns * channels * itemsize // _VECTOR_BYTES
    warps = min(max(vectors // 32, 1), _WARPS)  # a whole vector for each thread
    return Tile(1, columns, channels, warps)
