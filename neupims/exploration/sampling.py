"""Points of a space: a grid, independent draws, or a Sobol sequence.

Every sampler computes any range of its points independently, so a run can resume at any point.
"""

import math

import numpy as np

from neupims.exploration.space import STEPS, Space

METHODS = ("grid", "random", "sobol")


def grid_size(space: Space) -> int:
    """Returns the number of points of the grid, with `STEPS` values for each continuous knob.

    Args:
        space: The space with its knobs.
    """
    return math.prod(knob.count or STEPS for knob in space.knobs)


def sample(space: Space, method: str, start: int, stop: int, *, seed: int = 0) -> np.ndarray:
    """Returns the values of the points `start` up to `stop` of a sampler.

    Args:
        space: The space with its knobs.
        method: One of `METHODS`. In a grid the last knob varies fastest.
        start: Number of the first point.
        stop: Number after the last point.
        seed: Seed of "random" and "sobol".

    Returns:
        `(stop - start, knobs)` float64 values.

    Raises:
        ValueError: The method is unknown, or the range exceeds the grid.
        ImportError: The method is "sobol" and SciPy is not installed.
    """
    if method == "grid":
        if stop > (size := grid_size(space)):
            raise ValueError(f"the grid has {size} points, so there is no point {stop - 1}")
        rest, columns = np.arange(start, stop), []
        for knob in reversed(space.knobs):
            levels = knob.levels()
            columns.append(levels[rest % len(levels)])
            rest = rest // len(levels)
        return np.stack(columns[::-1], axis=1)
    return space.values(unit_sample(len(space.knobs), method, start, stop, seed=seed))


def unit_sample(
    dimensions: int, method: str, start: int, stop: int, *, seed: int = 0
) -> np.ndarray:
    """Returns the coordinates of the points `start` up to `stop` of "random" or "sobol".

    Sobol points are scrambled, and the first 2^k of them are balanced.

    Args:
        dimensions: Coordinates of a point.
        method: "random" or "sobol".
        start: Number of the first point.
        stop: Number after the last point.
        seed: Seed of the random numbers.

    Returns:
        `(stop - start, dimensions)` coordinates from 0 up to 1.

    Raises:
        ValueError: The method is unknown.
        ImportError: The method is "sobol" and SciPy is not installed.

    Reference:
        Owen, "Randomly permuted (t,m,s)-nets and (t,s)-sequences", 1995.
    """
    if method == "random":
        stream = np.random.PCG64(seed).advance(start * dimensions)  # one draw for each number
        return np.random.Generator(stream).random((stop - start, dimensions))
    if method != "sobol":
        raise ValueError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    try:
        from scipy.stats import qmc
    except ImportError:
        raise ImportError(
            "the Sobol sequence needs SciPy: pip install 'ggem-jax[neupims]'"
        ) from None
    sequence = qmc.Sobol(dimensions, rng=seed)
    if start:
        return sequence.fast_forward(start).random(stop - start)
    # Drawn alone: SciPy warns if the first draw is not a power of 2, but points are counted over
    # all chunks.
    first = sequence.random(1)
    return np.concatenate([first, sequence.random(stop - 1)]) if stop > 1 else first
