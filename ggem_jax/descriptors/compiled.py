"""The descriptor of a network as one program for each image size: normalised images -> vectors.

`ggem_jax.descriptors.programs` keeps programs between processes. Flax, the models and the published
weights are loaded when something has to be traced, not before.
"""

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jaxtyping import Float

from ggem_jax.descriptors import programs
from ggem_jax.descriptors.own_heads import OWN_HEADS
from ggem_jax.descriptors.scales import SCALES
from ggem_jax.descriptors.settings import DEFAULT_BACKBONE, DescriptorSettings

if TYPE_CHECKING:
    from ggem_jax.descriptors.backbones import Network


class CompiledDescriptor:
    """Makes descriptors of normalised images of one size.

    Args:
        settings: How an image becomes a descriptor, up to the whitening.
        network: A network to use instead of the one that the settings name. Its programs are not
            kept between processes, as its code is not known here.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        ModuleNotFoundError: The weights of EfficientNet-Lite0 are not installed.
    """

    def __init__(self, settings: DescriptorSettings, network: "Network | None" = None):
        self._settings, self._network, self._named = settings, network, network is None
        # how the network takes images: `mean`, `std`, `stride`, `pads` and `preprocessing`
        self.takes: Network | programs.KeptNetwork
        kept = programs.load_kept_network() if self._named and self._is_installed else None
        if kept is not None:
            self.takes = replace(
                kept, mean=settings.mean or kept.mean, std=settings.std or kept.std
            )
            self._leaves = jax.device_put(kept.leaves)
            return
        self.takes = self.network
        self._leaves = jax.tree.leaves(self.network.variables)
        if self._named and self._is_installed and settings.mean is None:
            _keep_installed(self.network)

    def __call__(self, images: Float[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b d"]:
        """Returns the unit vectors of normalised images.

        Args:
            images: Normalised images, `(b, h, w, 3)` float32.

        Returns:
            The vectors, `(b, d)`.
        """
        program = self._load_program(images.shape) if self._named else None
        return np.asarray((program or partial(_describe, *self._traced()))(self._leaves, images))

    @property
    def network(self) -> "Network":
        """The network, which is loaded when it is first needed."""
        if self._network is None:
            from ggem_jax.descriptors.backbones import load_network

            s = self._settings
            normalisation = (s.mean, s.std) if s.mean and s.std else None
            self._network = load_network(
                s.backbone,
                s.weights,
                normalisation=normalisation,
                given=s.given(),
                own_head=s.pooling if s.pooling in ("clip", "own") else None,
                network=s.network_fields(),
            )
        return self._network

    @property
    def _is_installed(self) -> bool:
        """Whether the settings name the network whose weights are installed, and change nothing."""
        s = self._settings
        # not s.given(), which imports the networks
        given = (s.weights, s.heads, s.gelu, s.norm, s.norm_eps, s.architecture, s.which)
        return s.backbone in (None, DEFAULT_BACKBONE) and all(each is None for each in given)

    def _load_program(self, shape: tuple[int, ...]) -> programs.Program | None:
        installed = self._is_installed
        facts = {
            "model": DEFAULT_BACKBONE if installed else _describe_model(self.network.model),
            "options": repr(_options(self._settings)),
            "leaves": [[list(each.shape), str(each.dtype)] for each in self._leaves],
            "images": list(shape),
        }

        def compile_it() -> jax.stages.Compiled:
            images = jax.ShapeDtypeStruct(shape, np.float32)
            return _describe_for_keeping.lower(*self._traced(), self._leaves, images).compile()

        return programs.load_program(facts, self._leaves, compile_it)

    def _traced(self) -> tuple[Any, Any, tuple[tuple[str, Any], ...]]:
        """What a program is traced from, beside its arrays."""
        network = self.network
        return network.model, jax.tree.structure(network.variables), _options(self._settings)


def plain_pooling(settings: DescriptorSettings) -> Literal["average", "max"] | None:
    """Returns the pooling in place of GeM and GeM+, or None where one of these is chosen.

    The head of CLIP, SigLIP or a training run makes a map of one place, whose average it is itself.

    Args:
        settings: The settings of a descriptor, of which `pooling` is read.
    """
    if settings.pooling in OWN_HEADS:
        return "average"
    return settings.pooling if settings.pooling in ("average", "max") else None


def _options(settings: DescriptorSettings) -> tuple[tuple[str, Any], ...]:
    """The options of `superglobal_descriptors`."""
    s = settings
    options = {
        "scales": SCALES[s.scales],
        "gemp": s.pooling == "gem+",
        "rgem": s.regional,
        "sgem": s.scale_gem,
        "relup": s.relup,
        "antialias": s.antialias,
        "pooling": plain_pooling(s),
    }
    return tuple(options.items())


@partial(jax.jit, static_argnums=(0, 1, 2))
def _describe(model, tree, options, leaves, images):
    from ggem_jax.descriptors.superglobal import superglobal_descriptors

    variables = jax.tree.unflatten(tree, leaves)
    return superglobal_descriptors(model, variables, images, **dict(options)).descriptor


@partial(jax.jit, static_argnums=(0, 1, 2))
def _describe_for_keeping(model, tree, options, leaves, images):
    """The same under another name, which JAX does not find in its own cache (see `programs`)."""
    return _describe(model, tree, options, leaves, images)


def _describe_model(model: Any) -> str:
    """The class and the fields of a model, without addresses, which differ between processes."""
    return f"{type(model).__module__} {re.sub(r' at 0x[0-9a-f]+', '', repr(model))}"


def _keep_installed(network: "Network") -> None:
    if programs.kept_folder() is None:
        return
    from ggem_jax.weights.efficientnet_lite import find_pretrained

    leaves = [np.asarray(each) for each in jax.tree.leaves(network.variables)]
    kept = programs.KeptNetwork(network.mean, network.std, network.stride, network.pads, leaves)
    programs.keep_network(kept, find_pretrained())
