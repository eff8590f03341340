"""One function that loads every ViT: a published file, a file of our own, or a training run."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggem_jax.files.arrays import read_arrays
from ggem_jax.files.errors import UnreadableWeights
from ggem_jax.models.token_pooling import Pooling
from ggem_jax.models.transformer import GELU
from ggem_jax.models.vit import ViT
from ggem_jax.weights.architecture import Given
from ggem_jax.weights.declared import Norms
from ggem_jax.weights.folders import find_checkpoint
from ggem_jax.weights.own import fit_variables, holds_own_vit, own_settings
from ggem_jax.weights.runs import Means, read_run
from ggem_jax.weights.vit import FAMILIES, from_arrays


@dataclass(frozen=True)
class LoadedViT:
    """A ViT with its variables: `loaded.model.apply(loaded.variables, images)`."""

    model: ViT
    variables: dict[str, Any] = field(repr=False)
    mean: Means | None  # of red, green and blue in [0, 1], subtracted; None: the file does not say
    std: Means | None  # likewise, divided by
    source: str  # what was read, for people

    @property
    def image(self) -> int:
        """The side of the square training images, pixels."""
        return self.model.config.image


def load_vit(
    path: str | Path,
    *,
    pooling: Pooling | None = None,
    num_classes: int | None = None,
    ema: bool = True,
    key: jax.Array | None = None,
    heads: int | None = None,
    gelu: GELU | None = None,
    norm: Norms | None = None,
    norm_eps: float | None = None,
    architecture: str | Path | None = None,
    which: str | None = None,
) -> LoadedViT:
    """Returns a ViT from a published file, a file of our own, or the folder of a training run.

    Args:
        path: A checkpoint in the names of timm, Hugging Face, OpenAI or Google (see
            `ggem_jax.weights.vit`), a file of Flax variables (see `ggem_jax.weights.own`), the
            folder of a `model.safetensors` of either kind or of a `pytorch_model.bin`, also in
            shards, or the folder of a run of `python -m train.*`, of which the newest checkpoint is
            read.
        pooling: A pooling that replaces the one the ViT was trained with; its parameters are fresh.
            None keeps it.
        num_classes: Channels of a fresh classification head; 0 removes the head, None keeps it.
        ema: Whether to take the moving average of the weights of a run that has one.
        key: Random key of the fresh parameters; None is `jax.random.key(0)`.
        heads: Attention heads of a published file that does not say them; None: by the evidence
            (see `ggem_jax.weights.vit.read_vit`).
        gelu: Its GELU; None: by the evidence.
        norm: Whether its norms come before ("pre") or after ("post") the branches of a block; None:
            by the evidence.
        norm_eps: Epsilon of its norms; None: by the evidence.
        architecture: The publisher's file of settings of a published file, or the folder of one, or
            the name of the model in timm; None: the files beside the weights.
        which: The network of a file with several, such as "ema" or "teacher"; None: the usual one
            (see `ggem_jax.files.arrays.read_checkpoint`).

    Returns:
        The model, its variables in float32, and the mean and deviation of its images.

    Raises:
        UnreadableWeights: The file or folder cannot be read.
        AmbiguousWeights: A published file fits ViTs that compute different things; the message
            names the argument that decides.
        MismatchedWeights: It does not hold a ViT that `ViT` can be; the message lists the names.
        ValueError: `pooling` is no pooling, or `num_classes` no number of classes.
        ModuleNotFoundError: A package that reads this kind of file is not installed.

    Example:
        >>> loaded = load_vit(vit_file, pooling=GGeM(groups=2), num_classes=10)
        >>> images = jnp.ones((1, loaded.image, loaded.image, 3))
        >>> loaded.model.apply(loaded.variables, images).logits.shape
        (1, 10)
    """
    _check_replacements(pooling, num_classes)
    try:
        path = Path(path).expanduser()
    except RuntimeError:
        raise UnreadableWeights(f"{path} begins with the home folder of an unknown user") from None
    given = Given(heads, gelu, norm_eps, norm, which=which)
    path = find_checkpoint(path)  # of a folder that `export_vit` or another library wrote
    if path.is_dir():
        loaded = _load_run(path, ema)
    else:
        loaded = _load_file(path, given, architecture)
    if pooling is None and num_classes is None:
        return loaded
    return _replace(loaded, pooling, num_classes, jax.random.key(0) if key is None else key)


def _check_replacements(pooling: Any, num_classes: Any) -> None:
    if pooling is not None and (isinstance(pooling, type) or not callable(pooling)):
        raise ValueError(
            "pooling must be a function or a module such as ggem_jax.avg_pool or ggem_jax.GGeM(),"
            f" not {pooling!r}"
        )
    if num_classes is not None and (
        isinstance(num_classes, bool)
        or not isinstance(num_classes, numbers.Integral)
        or int(num_classes) < 0
    ):
        raise ValueError(f"num_classes must be a whole number of at least 0, not {num_classes!r}")


def _load_run(folder: Path, ema: bool) -> LoadedViT:
    model, variables, (mean, std) = read_run(folder, ema=ema)
    return LoadedViT(model, variables, mean, std, f"{folder}, a training run")


def _load_file(path: Path, given: Given, architecture: str | Path | None) -> LoadedViT:
    arrays = read_arrays(path, given.which)
    if holds_own_vit(arrays):
        source = f"{path}, Flax variables"
        classes = next(reversed(np.shape(arrays.get("params/head/kernel", 0))), 0)
        settings = own_settings(arrays, path)
        model = ViT(settings.config, settings.pooling, classes)
        variables = fit_variables(model, arrays, source=str(path))
        mean, std = settings.normalised or (None, None)
        return LoadedViT(model, variables, mean, std, source)
    published = from_arrays(arrays, path, given=given, architecture=architecture)
    mean, std = published.normalised or (None, None)
    source = f"{path}, {FAMILIES[published.family].about}"
    return LoadedViT(published.model(), published.variables, mean, std, source)


def _replace(
    loaded: LoadedViT, pooling: Pooling | None, num_classes: int | None, key: jax.Array
) -> LoadedViT:
    """The same network with another pooling or head, whose parameters are fresh."""
    model, side = loaded.model, loaded.image
    new = model.clone(
        pooling=model.pooling if pooling is None else pooling,
        num_classes=model.num_classes if num_classes is None else num_classes,
    )
    replaced = {"pool": pooling, "head": num_classes}
    names = [name for name, value in replaced.items() if value is not None]

    def fresh(key: jax.Array) -> dict[str, Any]:
        params = new.init(key, jnp.zeros((1, side, side, 3)))["params"]
        return {name: params[name] for name in names if name in params}

    init: Callable = jax.jit(fresh)  # compiled, the rest of the network is not initialised at all
    kept = {name: value for name, value in loaded.variables["params"].items() if name not in names}
    variables = {**loaded.variables, "params": kept | init(key)}
    return LoadedViT(new, variables, loaded.mean, loaded.std, loaded.source)
