"""Folders of weights: the file that stands for a folder which another program wrote, and the
checkpoints of a training run.
"""

import re
from pathlib import Path

# of timm and Hugging Face, in the order in which they look for them
CHECKPOINTS = (
    *("model.safetensors", "pytorch_model.bin"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),  # of several shards
)


def find_checkpoint(path: str | Path) -> Path:
    """Returns the file of weights in a folder.

    Args:
        path: A file, or a folder.

    Returns:
        The first of `CHECKPOINTS` that the folder holds. The path itself if it is a file, or a
        folder without any of these, such as that of a training run.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in CHECKPOINTS if (path / name).is_file()), path)


def is_run(path: str | Path) -> bool:
    """Returns whether a path is the folder of a training run, with checkpoints and settings.

    Args:
        path: Any path; it need not exist.
    """
    path = Path(path)
    return (
        find_checkpoint(path) == path
        and (path / "config.json").is_file()
        and (path / "checkpoints").is_dir()
    )


def checkpoint_steps(run: str | Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a training run, newest first.

    Unfinished ones have other names than their step.

    Args:
        run: The folder of the run; it need not exist.
    """
    folders = (path for path in (Path(run) / "checkpoints").glob("[0-9]*") if path.is_dir())
    return sorted((int(x.name) for x in folders if re.fullmatch("[0-9]+", x.name)), reverse=True)
