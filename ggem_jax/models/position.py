"""Positions of a grid of patches: fixed sines and cosines, resampling to a new grid, and rotations.

A table is `(n, d)`, one row for each patch, the patches row by row.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def sincos_position(side: int, width: int) -> Float[np.ndarray, "n d"]:
    """Returns the fixed two-dimensional position embedding of a square grid.

    A quarter of the channels each holds sines and cosines of the column, then of the row, at the
    frequencies 10000^(-4 k / width).

    Args:
        side: Patches along one side of the grid.
        width: Channels of a token, a multiple of 4.

    Returns:
        The table, `(side * side, width)`, float32.

    Reference: Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers",
        2021, arXiv:2104.02057; the order of the channels is that of MAE's code.
    """
    frequency = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [np.outer(column, frequency), np.outer(row, frequency)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return table.astype(np.float32)


def rope_periods(channels: int, base: float, dtype: str = "float32") -> Float[np.ndarray, " k"]:
    """Returns the periods of rotary positions, base^(4 i / channels), in halves of an image side.

    Args:
        channels: Channels of an attention head, a multiple of 4.
        base: The period that the next one after the last would have.
        dtype: The periods are rounded to it. The original files of DINOv3 hold bfloat16.

    Returns:
        The periods, `(channels / 4,)`, float32: the shortest, which is 1, first.

    Reference: Siméoni et al., "DINOv3", 2025, arXiv:2508.10104; github.com/facebookresearch/dinov3,
        rope_position_encoding.py.
    """
    periods = base ** (np.arange(channels // 4) / (channels // 4))
    return periods.astype(np.float32).astype(jnp.dtype(dtype)).astype(np.float32)


def rope_angles(
    rows: int, columns: int, periods: Float[np.ndarray, " k"], *, prefix: int = 0
) -> Float[np.ndarray, "n c"]:
    """Returns the angles by which `rotate` turns the pairs of channels of every token.

    The centre of a patch lies in [-1, 1] along each axis, whatever the size of the grid: patch i of
    n at (2 i + 1) / n - 1. Its angles are 2 pi y / period and 2 pi x / period for every period.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid.
        periods: The periods, `(k,)`, see `rope_periods`.
        prefix: Tokens before the patches, which have no place: their angles are 0.

    Returns:
        The angles, `(prefix + rows * columns, 2 k)`, radians, float32: those of the row, then those
        of the column.

    Reference: As `rope_periods`, with `normalize_coords="separate"`, and without the random shifts
        and scales of the training there.
    """
    y, x = ((2 * np.arange(length) + 1) / length - 1 for length in (rows, columns))
    places = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = (2 * np.pi * places[:, :, None] / periods).reshape(len(places), -1)
    return np.pad(angles, ((prefix, 0), (0, 0))).astype(np.float32)


def rotate(
    heads: Float[Array, "*b n heads c"], angles: Float[ArrayLike, "n half"]
) -> Float[Array, "*b n heads c"]:
    """Returns queries or keys with pairs of channels turned by the angles of their tokens.

    Channel i and channel i + c / 2 are a pair (u, v), which becomes
    (u cos - v sin, v cos + u sin), in float32. The product of a turned query and a turned key
    depends on the difference of their angles only.

    Args:
        heads: Queries or keys, `(..., n, heads, c)`.
        angles: Radians, `(n, c / 2)`, see `rope_angles`.

    Returns:
        The turned ones, of the shape and dtype of `heads`.

    Reference: Su et al., "RoFormer", 2021, arXiv:2104.09864, eq. 34; the pairs are those of DINOv3.
    """
    cos, sin = (f(jnp.asarray(angles, jnp.float32))[:, None] for f in (jnp.cos, jnp.sin))
    u, v = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([u * cos - v * sin, v * cos + u * sin], axis=-1).astype(heads.dtype)


def resample_position(
    grid: ArrayLike, old: tuple[int, int], new: tuple[int, int], *, antialias: bool = False
) -> Float[Array, "m d"]:
    """Returns a position embedding resampled to another grid by bicubic interpolation.

    Args:
        grid: The table, `(n, d)` with n = rows * columns of `old`.
        old: Rows and columns of the grid that the table was made for.
        new: Rows and columns of the grid that is wanted.
        antialias: Whether to use the antialiased filter, as timm does. It has another kernel
            (a = -0.5) and so differs from the plain one where the grid grows, too.

    Returns:
        The table of the new grid, `(m, d)`; the very same one where `old` equals `new`.

    Reference: PyTorch, `torch.nn.functional.interpolate`, mode "bicubic".
    """
    if old == new:
        return jnp.asarray(grid)
    matrix = _antialiased_matrix if antialias else _bicubic_matrix
    rows, columns = (matrix(n_old, n_new) for n_old, n_new in zip(old, new, strict=True))
    table = jnp.einsum(
        "ri,cj,ijd->rcd", rows, columns, jnp.reshape(grid, (*old, -1)), precision="highest"
    )
    return table.reshape(new[0] * new[1], -1)


def _bicubic_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of cubic convolution with a = -0.75 between pixel centres; positions outside the
    grid repeat its border.
    """
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += _cubic_convolution(abs(centre - tap))
    return matrix.astype(np.float32)


def _antialiased_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Pillow's filter: a = -0.5, a kernel that widens as the grid shrinks, and no weights outside
    the border.
    """
    shrink = max(old / new, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * old / new
    places = np.arange(old)[None] + 0.5
    near = np.abs(places - centres) / shrink
    weights = np.vectorize(lambda x: _cubic_convolution(x, a=-0.5))(near)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic_convolution(x: float, a: float = -0.75) -> float:
    """The cubic convolution kernel at distance x >= 0; a = -0.75 is PyTorch's choice.

    Reference: Keys, "Cubic convolution interpolation for digital image processing", 1981.
    """
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0
