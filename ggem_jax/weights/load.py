"""One function that loads every ViT: a published file, a file of our own, or a training run."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggem_jax.files.arrays import read_arrays
from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.files.preprocessing import Preprocessing
from ggem_jax.models.embedder import Embedder
from ggem_jax.models.token_pooling import Pooling
from ggem_jax.models.transformer import GELU
from ggem_jax.models.vit import ViT
from ggem_jax.weights.architecture import Given
from ggem_jax.weights.declared import Norms
from ggem_jax.weights.folders import find_checkpoint
from ggem_jax.weights.own import fit_variables, holds_own_vit, own_settings
from ggem_jax.weights.runs import Means, Projection, read_run
from ggem_jax.weights.vit import FAMILIES, from_arrays


@dataclass(frozen=True)
class LoadedViT:
    """A ViT with its variables: `loaded.model.apply(loaded.variables, images)`."""

    model: ViT
    variables: dict[str, Any] = field(repr=False)
    mean: Means | None  # of red, green and blue in [0, 1], subtracted; None: the file does not say
    std: Means | None  # likewise, divided by
    source: str  # what was read, for people
    # of a training run, and of the files that are written from one; None: there is none, or the
    # file does not say it
    preprocessing: Preprocessing | None = None  # how an image of any size becomes an input
    classes: tuple[str, ...] | None = None  # names of the channels of the head
    several_labels: bool = False  # whether an image may have several of the classes, or none
    # of the pooled tokens into the space of the descriptors: "kernel" (width, dim), "bias" (dim,)
    projection: Projection | None = field(default=None, repr=False)

    @property
    def image(self) -> int:
        """The side of the square training images, pixels."""
        return self.model.config.image

    def embedder(self) -> tuple[Embedder, dict[str, Any]]:
        """Returns the network from images to unit descriptors, and its variables.

        The descriptor is the pooled tokens, projected where there is a projection, divided by their
        length. `embedder.apply(variables, images)` takes normalised images `(b, side, side, 3)`.
        """
        params = dict(self.variables["params"])
        params.pop("head", None)
        own: dict[str, Any] = {"vit": params}
        if self.projection is not None:
            own["projection"] = self.projection
        dim = 0 if self.projection is None else len(self.projection["bias"])
        return Embedder(self.model.clone(num_classes=0), dim), {"params": own}

    def with_projection_as_head(self) -> "LoadedViT":
        """Returns the same network with its projection in the place of the head; itself without."""
        if self.projection is None:
            return self
        params = {**self.variables["params"], "head": self.projection}
        return replace(
            self,
            model=self.model.clone(num_classes=len(self.projection["bias"])),
            variables={**self.variables, "params": params},
            classes=None,
            projection=None,
        )


def load_vit(
    path: str | Path,
    *,
    pooling: Pooling | None = None,
    num_classes: int | None = None,
    ema: bool | None = None,
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
            None keeps it. A projection of the pooled tokens is left out with the old one.
        num_classes: Channels of a fresh classification head; 0 removes the head, None keeps it.
        ema: Whether to take the moving average of the weights of a run; None takes it where the run
            has one, as its evaluations do.
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
        The model, its variables in float32, and the mean and deviation of its images. Of a training
        run, and of a file that was written from one: also the names of the classes, the projection
        and the preprocessing.

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


def _load_run(folder: Path, ema: bool | None) -> LoadedViT:
    run = read_run(folder, ema=ema)
    return LoadedViT(
        run.model,
        run.variables,
        run.preprocessing.mean,
        run.preprocessing.std,
        f"{folder}, a run of {run.tool} at step {run.step}, {run.weights} weights",
        run.preprocessing,
        run.classes,
        run.several_labels,
        run.projection,
    )


def _load_file(path: Path, given: Given, architecture: str | Path | None) -> LoadedViT:
    arrays = read_arrays(path, given.which)
    if holds_own_vit(arrays):
        return _load_own(path, arrays)
    published = from_arrays(arrays, path, given=given, architecture=architecture)
    mean, std = published.normalised or (None, None)
    source = f"{path}, {FAMILIES[published.family].about}"
    return LoadedViT(published.model(), published.variables, mean, std, source)


def _load_own(path: Path, arrays: dict[str, np.ndarray]) -> LoadedViT:
    network = {name: each for name, each in arrays.items() if "/projection/" not in name}
    classes = next(reversed(np.shape(arrays.get("params/head/kernel", 0))), 0)
    settings = own_settings(network, path)
    model = ViT(settings.config, settings.pooling, classes)
    variables = fit_variables(model, network, source=str(path))
    names = settings.facts.classes if classes else None
    if names is not None and len(names) != classes:
        raise MismatchedWeights(f"{path} names {len(names)} classes, and its head has {classes}")
    mean, std = settings.normalised or (None, None)
    return LoadedViT(
        *(model, variables, mean, std, f"{path}, Flax variables"),
        preprocessing=settings.facts.preprocessing,
        classes=names,
        several_labels=settings.facts.several_labels,
        projection=_projection_of(arrays, settings.config.width, path),
    )


def _projection_of(arrays: dict[str, np.ndarray], width: int, path: Path) -> Projection | None:
    prefix = "params/projection/"
    found = {
        name.removeprefix(prefix): np.asarray(array, np.float32)
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    if not found:
        return None
    shapes = {name: array.shape for name, array in found.items()}
    dim = (shapes.get("bias") or (0,))[0]
    if shapes != {"kernel": (width, dim), "bias": (dim,)}:
        raise MismatchedWeights(
            f"{path} has a projection of other shapes: a kernel ({width}, dim) and a bias (dim,)"
            f" are needed, not {shapes}"
        )
    return found


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
    return replace(
        loaded,
        model=new,
        variables=variables,
        classes=loaded.classes if num_classes is None else None,
        several_labels=loaded.several_labels and num_classes is None,
        projection=loaded.projection if pooling is None else None,
    )
