"""Kinds of weights files: by the ending, or by the first bytes where the ending says nothing."""

import zipfile
from pathlib import Path
from typing import Literal

from ggem_jax.files.errors import UnreadableWeights
from ggem_jax.files.torch_files import ZIP

Kind = Literal["safetensors", "npz", "torch"]

ENDINGS: dict[str, Kind] = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    **dict.fromkeys((".pth", ".pt", ".pyth", ".bin", ".ckpt"), "torch"),
}
# first bytes of files that people take for weights -> what they are
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a single NumPy array without a name",
    b"<": "a web page: download the file itself",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
}


def find_kind(path: Path) -> Kind:
    """Returns the kind of a weights file.

    Args:
        path: The file. A known ending decides; otherwise the first bytes do.

    Returns:
        The kind.

    Raises:
        UnreadableWeights: The file cannot be opened, or is of no known kind.
    """
    kind = ENDINGS.get(path.suffix.lower())
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        if kind:
            return kind  # whose reader says what is wrong
        if path.is_dir():
            raise UnreadableWeights(f"{path} is a folder: give a file in it") from None
        raise UnreadableWeights(
            f"{path} cannot be read ({error.strerror}); weights are in files such as"
            f" {', '.join(ENDINGS)}"
        ) from None
    other = next((about for first, about in _OTHERS.items() if start.startswith(first)), None)
    if other:
        raise UnreadableWeights(f"{path} is {other}")
    if kind:
        return kind
    if start.startswith(ZIP):
        return "npz" if _holds_npy(path) else "torch"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    if start.startswith(b"\x80\x02"):  # PyTorch's before 1.6: a pickle
        return "torch"
    raise UnreadableWeights(
        f"{path} is of no known kind: it must be a safetensors, npz or PyTorch file"
        f" ({', '.join(ENDINGS)})"
    )


def _holds_npy(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return False
