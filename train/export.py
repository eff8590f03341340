"""Writes a trained run for other programs: python -m train.export RUN OUT --to FORMAT.

OUT is a new folder, which appears when it is complete:

- `safetensors`: `model.safetensors` and `config.json` under our names, with pooling, head,
  projection, classes and preprocessing; `load_vit`, `train.predict`, `--init` and
  `ggem-retrieval index --weights` read it.
- `timm`: the same files under timm's names, for `timm.create_model("local-dir:OUT",
  pretrained=True)`. timm has no pooling with learned exponents: a run with one is refused.
- `stablehlo`: `model.stablehlo`, the whole network as one function that `jax.export` reads without
  this package, for any number of images, and `model.json` with its facts.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ggem_jax.models.token_pooling import GGeM
from ggem_jax.weights import MismatchedWeights
from ggem_jax.weights.export import export_vit
from ggem_jax.weights.load import LoadedViT
from ggem_jax.weights.stablehlo import write_stablehlo
from train.cli import Refused, one_sentence, parse
from train.predict import WeightsKind, load_trained

TOOL = "train.export"
Target = Literal["safetensors", "timm", "stablehlo"]


@dataclass(frozen=True)
class ExportOptions:
    """A trained run as files of other programs."""

    run: Positional[Path]  # folder of a run, or what this tool wrote from one
    out: Positional[Path]  # folder to write to, which must not exist
    # safetensors: our own names, which keep everything; timm: for timm, of the poolings that it
    # has; stablehlo: a function that runs with JAX alone
    to: Target
    # the moving average of the weights, or the weights themselves; None: as the run was evaluated
    weights_kind: WeightsKind | None = None


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    with one_sentence(TOOL):
        options = parse(ExportOptions, argv, TOOL)
        for line in export(options):
            print(line)


def export(options: ExportOptions) -> list[str]:
    """Writes a run and returns the lines that say what was written.

    Args:
        options: The run, the folder and the format.

    Raises:
        Refused: The run cannot be read, the format has no such network, or the folder exists or
            cannot be written.
    """
    loaded = load_trained(options.run.expanduser(), options.weights_kind)
    out = options.out.expanduser()
    if options.to == "timm":
        _check_pooling(loaded)
    with _new_folder(out) as folder:
        try:
            files, notes = _write(loaded, folder, options.to)
        except MismatchedWeights as error:
            other = "--to safetensors and --to stablehlo write every run"
            raise Refused(f"{error} ({other})") from None
        except (ValueError, ModuleNotFoundError) as error:
            raise Refused(str(error)) from None
    names = " and ".join(str(out / file.name) for file in files)
    return [loaded.source, f"written to {names}", *(f"note: {note}" for note in notes)]


def _write(loaded: LoadedViT, folder: Path, to: Target) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Writes the network, and returns the files and notes for the user."""
    if to == "stablehlo":
        return write_stablehlo(loaded, folder), ()
    written = export_vit(loaded, folder, to="timm" if to == "timm" else "flax")
    return written.files, written.notes


def _check_pooling(loaded: LoadedViT) -> None:
    if isinstance(loaded.model.pooling, GGeM):
        raise Refused(
            f"{loaded.source}: timm has no pooling with learned exponents, so that none of its"
            " models gives these answers: --to stablehlo writes a function that does, and --to"
            " safetensors keeps everything under our names"
        )


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name when the block ends without an error."""
    if os.path.lexists(out):
        raise Refused(f"{out} exists already: choose another folder, nothing is overwritten")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        try:
            folder = temporary / out.name  # has the usual permissions, which `temporary` has not
            folder.mkdir()
            yield folder
            if os.path.lexists(out):  # a rename would replace an empty folder
                raise Refused(f"{out} was made by another process meanwhile: choose another folder")
            folder.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise Refused(f"{out} cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    main()
