"""PCA whitening: descriptors `(n, d)` -> unit vectors `(n, dim)` with uncorrelated components of
equal variance.

Reference: Jégou and Chum, "Negative Evidences and Co-occurences in Image Retrieval: The Benefit of
    PCA and Whitening", ECCV 2012.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ggem_jax.files.vectors import write_npz


class Whitening(NamedTuple):
    """The parameters of y = (x - mean) projection, which is then L2-normalised."""

    mean: Float[np.ndarray, " d"]  # of the descriptors it was learned on
    projection: Float[np.ndarray, "d dim"]  # scaled eigenvectors, largest variance first


def learn_whitening(descriptors: Float[np.ndarray, "n d"], *, dim: int | None = None) -> Whitening:
    """Returns the whitening of descriptors, computed in float64.

    The projection holds the eigenvectors of the covariance with the largest eigenvalues, each
    divided by the root of its eigenvalue.

    Args:
        descriptors: Descriptors, `(n, d)`, finite.
        dim: Number of components to keep; None keeps all d.

    Returns:
        The mean, `(d,)`, and the projection, `(d, dim)`, in float32.

    Raises:
        ValueError: The descriptors are not finite `(n, d)`, `dim` is not from 1 to d, or they span
            fewer than `dim` dimensions.

    Reference: Jégou and Chum, 2012, as the module says.
    """
    x = np.asarray(descriptors, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"descriptors must be finite (n, d), not of shape {x.shape}")
    n, d = x.shape
    dim = d if dim is None else dim
    if not isinstance(dim, int | np.integer) or not 1 <= dim <= d:
        raise ValueError(f"dim must be a whole number from 1 to {d}, not {dim!r}")
    mean = x.mean(axis=0) if n else np.zeros(d)
    values, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / max(n - 1, 1))
    spanned = int(np.sum(values > 1e-10 * max(values[-1], 1e-300))) if n > 1 else 0
    if spanned < dim:
        raise ValueError(
            f"{n} descriptors span {spanned} dimensions, and {dim} are asked for: give more"
            " descriptors or a smaller dim"
        )
    order = np.argsort(-values, kind="stable")[:dim]
    return Whitening(
        mean.astype(np.float32), (vectors[:, order] / np.sqrt(values[order])).astype(np.float32)
    )


def whiten(
    descriptors: Float[np.ndarray, "*b d"], whitening: Whitening
) -> Float[np.ndarray, "*b dim"]:
    """Returns whitened unit vectors: (x - mean) projection, then L2, in float32.

    Args:
        descriptors: Descriptors, `(..., d)`.
        whitening: A whitening of descriptors of the same width d.

    Returns:
        The vectors, `(..., dim)` float32.

    Raises:
        ValueError: The descriptors have another width than those of the whitening.
    """
    if np.shape(descriptors)[-1] != len(whitening.mean):
        raise ValueError(
            f"the whitening is for descriptors of {len(whitening.mean)} numbers, and these have"
            f" {np.shape(descriptors)[-1]}"
        )
    y = (np.asarray(descriptors, np.float32) - whitening.mean) @ whitening.projection
    return y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-12)


def save_whitening(path: str | Path, whitening: Whitening) -> None:
    """Writes a whitening to a `.npz` file, which appears when it is complete.

    Args:
        path: The file to write; a file of this name is replaced.
        whitening: The arrays, stored as `mean` and `projection`.

    Raises:
        OSError: The file cannot be written.
    """
    write_npz(path, **whitening._asdict())


def load_whitening(path: str | Path) -> Whitening:
    """Returns the whitening of a file.

    Args:
        path: A file that `save_whitening` wrote.

    Raises:
        ValueError: The file cannot be read, or holds no whitening.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            whitening = Whitening(
                *(np.asarray(file[name], np.float32) for name in Whitening._fields)
            )
    except Exception as error:  # damaged files raise a dozen kinds in NumPy, zipfile and zlib
        raise ValueError(
            f"{path} is no file of a whitening: {str(error).partition(chr(10))[0]}"
        ) from None
    if (
        whitening.mean.ndim != 1
        or whitening.projection.ndim != 2
        or len(whitening.mean) != len(whitening.projection)
    ):
        raise ValueError(
            f"{path} is no file of a whitening: shapes {whitening.mean.shape} and"
            f" {whitening.projection.shape} do not go together"
        )
    return whitening
