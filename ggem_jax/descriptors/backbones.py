"""The networks that descriptors are made with: one table, by name.

A row says how the parameters are read, how images are normalised, and how many pixels a place of
the feature map covers. `identify` finds the row of a file, `load_network` loads it. A new backbone
is one row here, and the module that reads its files.

The rows of Vision Transformers are the families of `ggem_jax.weights.vit`. A name such as
`vit-S/16` stands for any of them, and requires these sizes.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ggem_jax.descriptors.own_heads import OWN_HEADS
from ggem_jax.files.arrays import read_arrays
from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.files.images import RGB, normalise
from ggem_jax.files.normalisation import HALF, IMAGENET, Channels, Normalisation
from ggem_jax.files.preprocessing import Preprocessing
from ggem_jax.models.efficientnet_lite import EfficientNetLite, efficientnet_lite_config
from ggem_jax.models.resnet import ResNet, ResNetConfig, resnet_config
from ggem_jax.models.vit import ViT, vit_config
from ggem_jax.pooling import avg_pool
from ggem_jax.weights import read_cvnet
from ggem_jax.weights.architecture import NOTHING_GIVEN, Given
from ggem_jax.weights.efficientnet_lite import (
    LITE0_PREPROCESSING,
    efficientnet_lite_to_variables,
    load_pretrained,
)
from ggem_jax.weights.folders import find_checkpoint
from ggem_jax.weights.inference import require_preprocessing
from ggem_jax.weights.load import load_vit
from ggem_jax.weights.own import (
    AFTER_TOKENS,
    OWN_NAME,
    declared_settings,
    holds_own_vit,
    read_own_vit,
    settings_beside,
)
from ggem_jax.weights.own_settings import states_in_header
from ggem_jax.weights.runs import read_run
from ggem_jax.weights.vit import FAMILIES, PublishedViT, from_arrays, read_vit
from ggem_jax.weights.vit_table import Style

DEFAULT = "efficientnet-lite0"  # the only network whose weights can be installed
OWN = "vit-flax"
_PLAIN = "vit"  # a ViT whose names do not tell its family


class Loaded(NamedTuple):
    """A model and its variables, as a row of the table reads them."""

    model: Any  # from images to maps, see `Network`
    variables: Any  # of the model, as NumPy or JAX arrays


class Backbone(NamedTuple):
    """A row of the table of networks."""

    about: str  # the network in a few words
    # file of weights, or None, and choices of the user -> the model
    load: Callable[[str | Path | None, Given], Loaded]
    normalisation: Normalisation  # mean and deviation of the channels in [0, 1]
    stride: int | None = None  # pixels along one side of a place of the map; None: a ViT's patch
    mark: str | None = None  # pattern of a parameter's name that only files of this network have


@dataclass(frozen=True)
class Network:
    """A network with its parameters, and how it takes images."""

    # images (b, h, w, 3) -> map (b, rows, columns, channels), with the methods that
    # `ggem_jax.descriptors.superglobal` describes
    model: Any
    variables: Any  # of the model, on a device
    mean: Channels  # of red, green and blue in [0, 1], subtracted from images
    std: Channels  # standard deviation of the same, by which the difference is divided
    stride: int  # pixels along one side of a place of the map
    # whether a rest of less than a stride at the border makes a place; if not, it is cut off
    pads: bool = True
    # how images become squares; None: they keep their proportions, as the settings say
    preprocessing: Preprocessing | None = None

    @property
    def heads(self) -> int | None:
        """Attention heads of a ViT, None for other networks."""
        return self.model.vit.config.heads if isinstance(self.model, PatchMap) else None

    def normalise(self, images: Sequence[RGB]) -> Float[Array, "b h w 3"]:
        """Returns images of one size as the network takes them.

        Args:
            images: Images, `(h, w, 3)` uint8 in RGB each.

        Returns:
            The normalised images, `(b, h, w, 3)` float32.
        """
        return jnp.asarray(normalise(np.stack(images), mean=self.mean, std=self.std))

    def describe_tokens(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"] | None]:
        """Returns the tokens of normalised images: places of the map, and the class token or None.

        Args:
            images: Normalised images, `(b, h, w, 3)`.

        Returns:
            The places of the map row by row, `(b, n, d)`, and the class tokens, `(b, d)`; None for
            networks without one.
        """
        if isinstance(self.model, PatchMap):
            vit = self.model.vit
            output: Any = vit.apply(self.variables, self.model.crop(images))
            tokens = output.tokens
            cls = tokens[:, 0] if vit.config.class_token else None
            return tokens[:, vit.config.prefix_tokens :], cls
        found: Any = self.model.apply(self.variables, images)
        return found.reshape(len(images), -1, found.shape[-1]), None


@dataclass(frozen=True)
class PatchMap:
    """A ViT as a network of maps: its patch tokens after the final norm, row by row.

    Pixels beyond the last whole patch, at the right and at the bottom, are cut off.
    """

    vit: ViT  # its pooling and head are not used

    def apply(
        self, variables: Any, images: Float[Array, "b h w 3"]
    ) -> Float[Array, "b rows columns d"]:
        """Returns the feature map of normalised images, in the way of a Flax module.

        Args:
            variables: The variables of the ViT.
            images: Normalised images, `(b, h, w, 3)`, of at least one patch.

        Returns:
            The map, `(b, rows, columns, d)`, one place for each whole patch.
        """
        config, images = self.vit.config, self.crop(images)
        rows, columns = (length // config.patch for length in images.shape[1:3])
        output: Any = self.vit.apply(variables, images)
        tokens = output.tokens[:, config.prefix_tokens :]
        return tokens.reshape(len(images), rows, columns, config.width)

    def crop(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 3"]:
        """Returns the images without the pixels beyond the last whole patch.

        Args:
            images: Images, `(b, h, w, 3)`.

        Returns:
            The images, `(b, h2, w2, 3)`, whose sides are multiples of the patch.
        """
        patch = self.vit.config.patch
        height, width = (length // patch * patch for length in images.shape[1:3])
        return images[:, :height, :width]


@dataclass(frozen=True)
class OwnHead:
    """A ViT as a network of maps of one place: its own pooling and projection."""

    vit: ViT

    def apply(self, variables: Any, images: Float[Array, "b h w 3"]) -> Float[Array, "b 1 1 d"]:
        """Returns the projected descriptors of normalised images, in the way of a Flax module.

        Args:
            variables: The variables of the ViT.
            images: Normalised images, `(b, h, w, 3)`, whose sides are multiples of the patch.

        Returns:
            The descriptors as a map, `(b, 1, 1, d)`.
        """
        output: Any = self.vit.apply(variables, images)
        found = output.logits if self.vit.num_classes else output.descriptor
        return found[:, None, None]


def _load_efficientnet_lite0(path: str | Path | None, given: Given) -> Loaded:
    """The installed ImageNet weights, or those of a file, without the classification head."""
    _require_nothing_given(given, path)
    config = efficientnet_lite_config("lite0")
    if path is None:
        variables = _without(load_pretrained()[1], "head")
    else:
        variables = efficientnet_lite_to_variables(
            read_arrays(path), config=config, num_classes=0, source=str(path)
        )
    return Loaded(EfficientNetLite(config, num_classes=0), variables)


def _load_cvnet(layers: str, path: str | Path | None, given: Given) -> Loaded:
    _require_nothing_given(given, path)
    depths, variables = read_cvnet(_require_file(path), depths=resnet_config(layers).depths)
    return Loaded(ResNet(ResNetConfig(depths)), variables)


def _load_own_vit(
    path: str | Path | None,
    given: Given,
    *,
    variant: str | None = None,
    network: Mapping[str, Any] | None = None,
) -> Loaded:
    _require_nothing_given(given, path)
    if Path(_require_file(path)).is_dir():
        run = read_run(_require_file(path))
        plain = run.model.clone(pooling=avg_pool, num_classes=0)
        return Loaded(PatchMap(plain), _without(run.variables, "head", "pool"))
    vit, variables = read_own_vit(_require_file(path), variant, network=network)
    return Loaded(PatchMap(vit), variables)


def _load_published_vit(family: str, path: str | Path | None, given: Given) -> Loaded:
    published = read_vit(_require_file(path), **given._asdict())
    if family != published.family and published.family != _PLAIN:
        raise MismatchedWeights(
            f"{path} is {FAMILIES[published.family].about}, not {family}: leave out the name of the"
            f" backbone, or name {published.family}"
        )
    vit = ViT(published.config, pooling=avg_pool)
    return Loaded(PatchMap(vit), _without(published.variables, "head", "pool"))


def _require_nothing_given(given: Given, path: str | Path | None) -> None:
    """Refuses choices that only published ViTs leave open."""
    if any(value is not None for value in given):
        chosen = ", ".join(name for name, value in given._asdict().items() if value is not None)
        raise ValueError(
            f"{path or DEFAULT} says {chosen} itself: leave that out, it is for published ViTs"
        )


_CVNET = r"(encoder_q\.|globalmodel\.)?"
BACKBONES: dict[str, Backbone] = {
    DEFAULT: Backbone(
        "EfficientNet-Lite0, trained on ImageNet",
        _load_efficientnet_lite0,
        (LITE0_PREPROCESSING.mean, LITE0_PREPROCESSING.std),
        stride=32,
        mark=r"_conv_stem\.weight",
    ),
    "resnet101": Backbone(
        "the ResNet-101 of CVNet",
        partial(_load_cvnet, "101"),
        IMAGENET,
        stride=32,
        mark=_CVNET + r"s3\.b([7-9]|\d\d)\..*",
    ),
    "resnet50": Backbone(
        "the ResNet-50 of CVNet",
        partial(_load_cvnet, "50"),
        IMAGENET,
        stride=32,
        mark=_CVNET + r"s1\.b1\..*",
    ),
    OWN: Backbone(
        "a ViT in the names of our own variables", _load_own_vit, IMAGENET, mark=OWN_NAME
    ),
    **{
        family: Backbone(
            each.about,
            partial(_load_published_vit, family),
            # a plain ViT: the default of timm (vision_transformer.py, _cfg) and of Hugging Face
            # (ViTImageProcessor)
            each.normalised or HALF,
        )
        for family, each in FAMILIES.items()
    },
}
_SIZES = re.compile(r"vit-((?:Ti|S|B|L|H)/[1-9][0-9]?)")


class Identity(NamedTuple):
    """The network that a file of weights holds."""

    backbone: str  # name in `BACKBONES`
    # from a file of settings beside the weights; None: that of the row
    normalisation: Normalisation | None
    note: str = ""  # what the user should know about the choice, in one sentence
    declared: Given = NOTHING_GIVEN  # of a published ViT: given, or by a file of settings beside it
    # of any ViT: further fields of `ViTConfig` that a file of settings beside it states
    network: dict[str, Any] | None = None


def check_backbone(name: str) -> None:
    """Raises `ValueError`, which lists the known names, for a name that no network has.

    Args:
        name: A name in `BACKBONES`, or the sizes of a ViT such as "vit-S/16".

    Raises:
        ValueError: No network has the name.
    """
    if name not in BACKBONES and not _SIZES.fullmatch(name):
        raise ValueError(
            f"backbone must be one of {', '.join(BACKBONES)}, or the sizes of a ViT such as"
            f" vit-S/16, not {name!r}"
        )


def identify(
    weights: str | Path,
    given: Given = NOTHING_GIVEN,
    *,
    network: Mapping[str, Any] | None = None,
) -> Identity:
    """Returns the name of the network whose weights a file holds, found from its parameters.

    Args:
        weights: Any file that `ggem_jax.weights` reads: a ViT under every published naming, CVNet's
            ResNets, EfficientNet-Lite0, or a ViT in the names of our own variables; or the folder
            of a training run. Files of settings beside a published ViT are read too
            (`ggem_jax.weights.declared`).
        given: Choices of the user that a published ViT may leave open.
        network: What an earlier call found beside a file of our own; that is not read again then.

    Returns:
        The name, the normalisation that a file beside the weights states where it differs from that
        of the network, a note for the user, and the choices that were given or stated: with them,
        the same network is read without the file beside.

    Raises:
        UnreadableWeights: The file cannot be read.
        MismatchedWeights: The file holds none of these networks.
    """
    weights = find_checkpoint(weights)
    if weights.is_dir():
        _require_nothing_given(given, weights)
        how = read_run(weights).preprocessing
        other = None if (how.mean, how.std) == BACKBONES[OWN].normalisation else (how.mean, how.std)
        return Identity(OWN, other, network={})
    arrays = read_arrays(weights, given.which)
    for name, row in BACKBONES.items():
        if row.mark and any(re.fullmatch(row.mark, each) for each in arrays):
            _require_nothing_given(given, weights)
            if name != OWN:
                return Identity(name, None)
            body, own = _body(arrays), None
            if network is None or states_in_header(weights):
                own = declared_settings(body, weights)
            stated = own.normalised if own is not None else None
            found = dict(network) if network is not None else settings_beside(body, weights)
            other = None if stated == row.normalisation else stated
            return Identity(name, other, network=found)
    published = from_arrays(arrays, weights, given=given)
    row, declared = BACKBONES[published.family], published.declared._replace(which=given.which)
    beside: dict[str, Any] = {}
    if network is not None:
        beside = dict(network)
    elif published.evidence.get("rope", "").partition(":")[0].endswith(".json"):
        beside = {"rope_base": published.config.rope_base}
    if published.normalised is None:
        half = row.normalisation == HALF
        taken = (
            "mean and deviation are 0.5, the default of timm and Hugging Face; --backbone deit"
            " takes those of ImageNet"
            if half
            else f"mean and deviation are those of {row.about}, {row.normalisation[0]} and"
            f" {row.normalisation[1]}; put its preprocessor_config.json beside it for others"
        )
        note = f"{weights} does not say how its images are normalised: {taken}"
        return Identity(published.family, None, note, declared, beside)
    other = published.normalised if published.normalised != row.normalisation else None
    return Identity(published.family, other, "", declared, beside)


def load_network(
    backbone: str | None = None,
    weights: str | Path | None = None,
    *,
    normalisation: Normalisation | None = None,
    given: Given = NOTHING_GIVEN,
    own_head: Literal["clip", "own"] | None = None,
    network: Mapping[str, Any] | None = None,
) -> Network:
    """Returns a network with its parameters on the default device.

    Args:
        backbone: A name in `BACKBONES`, or sizes such as "vit-S/16". None takes the network that
            `identify` finds in the file, or EfficientNet-Lite0 without a file.
        weights: File of the parameters. None takes those installed with EfficientNet-Lite0.
        normalisation: Mean and deviation of the channels in [0, 1]. None takes those that
            `identify` finds beside the file, if it is asked for the row, and else those of the row.
        given: Choices of the user that a published ViT may leave open.
        own_head: Whose pooling and projection take the place of the map: those of CLIP or SigLIP,
            or those that a training run has learned. None keeps the map.
        network: Fields of `ViTConfig` that `identify` found beside the file of a ViT. None reads
            them from there.

    Raises:
        UnreadableWeights: The file cannot be read.
        MismatchedWeights: The file holds another network.
        ValueError: There is no such backbone, or it needs a file.
        ModuleNotFoundError: The weights of EfficientNet-Lite0 are not installed.
    """
    name = backbone or DEFAULT
    check_backbone(name)
    if weights is None and name != DEFAULT:
        raise ValueError(f"{name} needs a file of weights")
    sizes = _SIZES.fullmatch(name)
    weights = None if weights is None else find_checkpoint(weights)
    if weights is not None and (backbone is None or sizes):
        name, found, *_ = identify(weights, given, network=network)
        normalisation = normalisation or found
    if own_head:
        if sizes:
            _load_vit_of_sizes(name, weights, sizes[1], given)  # raises for other sizes
        if own_head == "own":
            return _load_own_pooling(name, weights, normalisation)
        return _load_own_head(name, weights, normalisation, given)
    row = BACKBONES[name]
    if sizes:
        loaded = _load_vit_of_sizes(name, weights, sizes[1], given, network)
    elif name == OWN:
        loaded = _load_own_vit(weights, given, network=network)
    else:
        loaded = row.load(weights, given)
    if network and isinstance(loaded.model, PatchMap):
        loaded = loaded._replace(model=_with_fields(loaded.model, network, weights))
    stride = row.stride or loaded.model.vit.config.patch
    mean, std = normalisation or row.normalisation
    variables = jax.device_put(loaded.variables)
    return Network(loaded.model, variables, mean, std, stride, pads=row.stride is not None)


def read_any_vit(path: str | Path, given: Given = NOTHING_GIVEN) -> PublishedViT:
    """Returns the ViT of a file as `ggem_jax.weights.vit.read_vit` does, for our own files too.

    Args:
        path: A file of weights in any published naming, or in the names of our own variables; or
            the folder of one (see `find_checkpoint`), or of a training run, whose newest checkpoint
            is read.
        given: Choices of the user that a published file may leave open.

    Returns:
        The network. That of a file of our own or of a run is without its pooling and head.

    Raises:
        UnreadableWeights: The file or folder cannot be read.
        AmbiguousWeights: The file fits networks that compute different things.
        MismatchedWeights: The file holds another network.
    """
    path = find_checkpoint(path)
    if path.is_dir():
        run = read_run(path)
        return _own(run.model, run.variables, (run.preprocessing.mean, run.preprocessing.std))
    arrays = read_arrays(path, given.which)
    if holds_own_vit(arrays):
        settings = declared_settings(_body(arrays), path)
        return _own(*read_own_vit(path), settings and settings.normalised)
    for row in BACKBONES.values():
        if row.mark and any(re.fullmatch(row.mark, name) for name in arrays):
            raise MismatchedWeights(f"{path} holds {row.about}, where a ViT is needed")
    return from_arrays(arrays, path, given=given)


def _body(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a file of our own without head, pooling and projection."""
    other = re.compile(rf"\w+/({'|'.join(AFTER_TOKENS)})/.*")
    return {name: each for name, each in arrays.items() if not other.fullmatch(name)}


def _own(vit: ViT, variables: dict[str, Any], normalised: Normalisation | None) -> PublishedViT:
    """A ViT of ours as one that was published."""
    kept = _without(variables, "head", "pool")
    style = Style(int(vit.config.class_token))
    return PublishedViT("own", "flax", vit.config, "avg", 0, normalised, style, kept)


def _load_own_head(
    name: str, weights: str | Path | None, normalisation: Normalisation | None, given: Given
) -> Network:
    """The image tower of CLIP or SigLIP as it was trained, at the size of its images."""
    about = "the pooling clip needs the weights of CLIP or SigLIP"
    if weights is None or name not in ("clip", "siglip"):
        raise MismatchedWeights(f"{about}, not {weights or name}: name a file of these")
    published = read_vit(weights, **given._asdict())
    if published.family != name:
        raise MismatchedWeights(f"{weights} is {FAMILIES[published.family].about}, not {name}")
    if name == "clip" and not published.num_classes:
        raise MismatchedWeights(
            f"{about} with the projection into the space of texts, which {weights} lacks: name the"
            " file of both towers"
        )
    mean, std = normalisation or published.normalised or BACKBONES[name].normalisation
    variables, side = jax.device_put(published.variables), published.config.image
    return Network(OwnHead(published.model()), variables, mean, std, stride=side, pads=False)


def _load_own_pooling(
    name: str, weights: str | Path | None, normalisation: Normalisation | None
) -> Network:
    """The network of a training run with its pooling and projection, for squares of its size."""
    if weights is None or name != OWN:
        raise MismatchedWeights(
            f"the pooling own needs the weights of {OWN_HEADS['own']}, not {weights or name}: leave"
            " out --pooling, or name such weights"
        )
    loaded = load_vit(weights)
    how = require_preprocessing(loaded)
    vit, variables = loaded.model.clone(num_classes=0), _without(loaded.variables, "head")
    if loaded.projection is not None:
        projected = loaded.with_projection_as_head()
        vit, variables = projected.model, projected.variables
    mean, std = normalisation or (how.mean, how.std)
    variables = jax.device_put(variables)
    return Network(OwnHead(vit), variables, mean, std, how.side, pads=False, preprocessing=how)


def _with_fields(
    model: PatchMap, fields: Mapping[str, Any], weights: str | Path | None
) -> PatchMap:
    """The same network with other fields of its config, of which parameters do not depend."""
    try:
        config = dataclasses.replace(model.vit.config, **fields)
    except (TypeError, ValueError) as error:
        raise MismatchedWeights(f"{weights} is not of the network recorded: {error}") from None
    return PatchMap(model.vit.clone(config=config))


def _load_vit_of_sizes(
    name: str,
    weights: str | Path | None,
    variant: str,
    given: Given,
    network: Mapping[str, Any] | None = None,
) -> Loaded:
    """The ViT of a row of the table, whose sizes must be those of the variant."""
    if name == OWN:
        return _load_own_vit(weights, given, variant=variant, network=network)
    loaded, wanted = BACKBONES[name].load(weights, given), vit_config(variant)
    if not isinstance(loaded.model, PatchMap):
        raise MismatchedWeights(f"{weights} holds {BACKBONES[name].about}, not a ViT-{variant}")
    found = loaded.model.vit.config
    if wrong := [
        f"{size} {getattr(found, size)} where {getattr(wanted, size)} is needed"
        for size in ("patch", "width", "depth", "heads", "mlp_width")
        if getattr(found, size) != getattr(wanted, size)
    ]:
        raise MismatchedWeights(f"{weights} is not a ViT-{variant}: {', '.join(wrong)}")
    return loaded


def _require_file(path: str | Path | None) -> str | Path:
    if path is None:
        raise ValueError("this network needs a file of weights")
    return path


def _without(variables: dict[str, Any], *parts: str) -> dict[str, Any]:
    return {
        kind: {name: value for name, value in own.items() if name not in parts}
        for kind, own in variables.items()
    }
