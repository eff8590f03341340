"""Published Vision Transformers <-> `ggem_jax.models.vit.ViT`: MAE, DeiT, DINOv2, DINOv3, AugReg,
and the image towers of CLIP and SigLIP.

`read_vit` takes a file in the names of timm, Hugging Face, OpenAI or Google (`vit_layouts`) and
finds the sizes in the shapes (`vit_shapes`). Heads, GELU and the order of the norms, which shapes
do not say, come from evidence or are asked for (`architecture`). `to_timm` is the way back.

    published = read_vit("deit_small_patch16_224.safetensors")
    model = ViT(published.config, GGeM(), num_classes=102)
    # the file's weights; a new head and new exponents
    variables = published.fill(model.init(jax.random.key(0), images))
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ggem_jax.files.arrays import read_arrays
from ggem_jax.files.errors import AmbiguousWeights, MismatchedWeights
from ggem_jax.files.normalisation import HALF, IMAGENET, OPENAI, Normalisation
from ggem_jax.models.transformer import GELU
from ggem_jax.models.vit import MAP, ViT, ViTConfig, resample_position
from ggem_jax.pooling import avg_pool, cls_pool
from ggem_jax.weights.architecture import (
    NOTHING_GIVEN,
    OPENAI_BUFFERS,
    Evidence,
    Facts,
    Given,
    Settings,
    add_name,
    decide_first_norm,
    decide_gelu,
    decide_heads,
    decide_norm_eps,
    decide_norms,
    decide_positions,
    has_fixed_positions,
    take_name,
)
from ggem_jax.weights.convert import to_published, to_variables
from ggem_jax.weights.declared import Declared, Norms, read_declared
from ggem_jax.weights.dinov3 import (
    heads_of_periods,
    is_rotary,
    normalisation_of,
    rope_of,
    split_periods,
    to_names_of_eva,
)
from ggem_jax.weights.refused import refuse_architecture
from ggem_jax.weights.vit_layouts import (
    Arrays,
    heads_of,
    join_qkv,
    split_qkv,
    to_names_of_timm,
)
from ggem_jax.weights.vit_shapes import HUGGING_FACE_SIZES, Shapes, family_of, shapes_of
from ggem_jax.weights.vit_table import Style, Trained, fold_positions, unfold_positions, vit_table

POOLINGS = {"cls": cls_pool, "avg": avg_pool, "map": MAP()}


class Family(NamedTuple):
    """Settings that the weights of a family were trained with and that no shape says."""

    about: str
    # mean and deviation of the images, in [0, 1]; None: files of this kind do not agree
    normalised: Normalisation | None
    pooling: Trained
    norm_eps: float = 1e-6


FAMILIES = {
    "mae": Family("MAE (He et al., 2022), pre-trained or fine-tuned", IMAGENET, "avg"),
    "deit": Family("DeiT with a distillation token (Touvron et al., 2021)", IMAGENET, "cls"),
    "deit3": Family("DeiT III (Touvron et al., 2022)", IMAGENET, "cls"),
    "dinov2": Family("DINOv2 (Oquab et al., 2023), with or without registers", IMAGENET, "cls"),
    "dinov3": Family(  # its images: `normalisation_of`
        "DINOv3 (Siméoni et al., 2025)", None, "cls", norm_eps=1e-5
    ),
    "clip": Family("the image tower of CLIP (Radford et al., 2021)", OPENAI, "cls", norm_eps=1e-5),
    "siglip": Family("the image tower of SigLIP (Zhai et al., 2023)", HALF, "map"),
    "augreg": Family("AugReg (Steiner et al., 2022), as trained in Flax", HALF, "cls"),
    "big_vision": Family(
        "a ViT of big_vision (Beyer et al., 2022), as trained in Flax", HALF, "avg"
    ),
    "vit": Family(
        "a plain ViT: AugReg, DeiT or another, which their names do not tell apart", None, "cls"
    ),
}


@dataclass(frozen=True)
class PublishedViT:
    """A published network: its architecture, its variables, and facts about its training."""

    family: str
    layout: str
    config: ViTConfig
    pooling: Trained
    num_classes: int  # 0: no classification head (of CLIP: the channels of the shared space)
    normalised: Normalisation | None  # mean and deviation of red, green and blue in [0, 1]
    style: Style
    variables: dict[str, Any] = field(repr=False)
    # names in the file that no part of the network uses
    unused: tuple[str, ...] = field(default=(), repr=False)
    # the second head of a distilled network, which goes back as it came
    rest: Arrays = field(default_factory=dict, repr=False)
    # choice, such as heads or gelu -> where it came from
    evidence: dict[str, str] = field(default_factory=dict, repr=False)
    architecture: str | None = None  # the name of the model in timm, where it was given or declared
    # choices that the user or a file of settings made, and not the weights or a table
    stated: frozenset[str] = frozenset()

    @property
    def declared(self) -> Given:
        """The choices that the user or a file of settings made, and not the weights."""
        c = self.config
        chosen = Given(c.heads, c.gelu, c.norm_eps, "post" if c.post_norm else "pre")
        named = {name: value for name, value in chosen._asdict().items() if name in self.stated}
        return Given(**named)._replace(architecture=self.architecture)

    def model(self) -> ViT:
        """Returns the network as it was trained."""
        return ViT(self.config, POOLINGS[self.pooling], self.num_classes)  # type: ignore[arg-type]

    def fill(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns fresh variables with the file's weights everywhere but in pooling and head.

        Args:
            variables: Those of a `ViT` of this config with any pooling and head; positions are
                resampled for images of another size; the number of heads may differ.

        Raises:
            MismatchedWeights: A parameter outside `pool` and `head` is not in the file, of another
                shape, or in the file alone.
        """
        leaves = [
            (path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.variables)
            if path[1].key not in ("pool", "head")
        ]
        flat = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        faults: dict[str, list[str]] = {}  # by the part of the network

        def chosen(path, fresh):
            name = jax.tree_util.keystr(path)
            found = flat.pop(name, None)
            if found is not None and path[-1].key == "position":
                found = self._positions(found, len(fresh))
            if (
                found is not None
                and ".attention." in ".".join(part.key for part in path)
                and found.size == fresh.size
            ):
                found = found.reshape(fresh.shape)  # of other heads
            if found is not None and found.shape == fresh.shape:
                return found.astype(fresh.dtype)
            if path[1].key not in ("pool", "head"):
                other = "" if found is None else f", where the file has {found.shape}"
                faults.setdefault(path[1].key, []).append(f"{name} {fresh.shape}{other}")
            return fresh

        filled = jax.tree_util.tree_map_with_path(chosen, dict(variables))
        parts = {jax.tree_util.keystr(path): path[1].key for path, _ in leaves}
        for name, leaf in flat.items():
            said = f"{name} {leaf.shape}, which the network has not"
            faults.setdefault(parts[name], []).append(said)
        if faults:
            shown = [first for first, *_ in faults.values()][:4]
            left = sum(map(len, faults.values())) - len(shown)
            more = f"; and {left} more" if left else ""
            raise MismatchedWeights(f"the file does not fit this network: {'; '.join(shown)}{more}")
        return filled

    def _positions(self, table: np.ndarray, count: int) -> np.ndarray:
        """The table for `count` tokens, where that is a square of patches."""
        own, c = int(self.config.class_token), self.config
        side, old = math.isqrt(max(count - own, 0)), c.image // c.patch
        if len(table) == count or side * side != count - own:
            return table
        grid = resample_position(
            table[own:], (old, old), (side, side), antialias=c.position_filter == "antialias"
        )
        return np.concatenate([table[:own], np.asarray(grid)])


def read_vit(
    path: str | Path,
    *,
    heads: int | None = None,
    gelu: GELU | None = None,
    norm_eps: float | None = None,
    norm: Norms | None = None,
    architecture: str | Path | None = None,
    which: str | None = None,
) -> PublishedViT:
    """Returns the network of a published checkpoint.

    What shapes do not say is decided by the arguments, by the publisher's file of settings, or by a
    table of published sizes (`ggem_jax.weights.architecture`); `PublishedViT.evidence` tells which.

    Args:
        path: A safetensors, npz or PyTorch file (`read_checkpoint`). A `config.json` of Hugging
            Face or timm, an `open_clip_config.json` and a `preprocessor_config.json` beside it are
            evidence where their sizes are those of the weights.
        heads: Attention heads; None: by the evidence.
        gelu: GELU of the MLPs; None: by the evidence.
        norm_eps: Epsilon of the norms; None: by the evidence.
        norm: Whether the norms of a block come before ("pre") or after its branches ("post"); None:
            by the evidence.
        architecture: A file of settings of the publisher, or the folder of one, instead of those
            beside the weights; or the name of the model in timm.
        which: The network of a file with several, such as "ema"; see `read_checkpoint`.

    Returns:
        The network, its variables in float32.

    Raises:
        UnreadableWeights: The file cannot be read.
        AmbiguousWeights: It fits networks that compute different things, and nothing decides.
        MismatchedWeights: It is no ViT of a known layout, or one that our ViT cannot be; the
            message lists the offending names.
    """
    given = Given(heads, gelu, norm_eps, norm)
    return from_arrays(read_arrays(path, which), path, given=given, architecture=architecture)


def from_arrays(
    found: Arrays,
    path: str | Path,
    *,
    given: Given = NOTHING_GIVEN,
    architecture: str | Path | None = None,
) -> PublishedViT:
    """Returns the network of arrays that were read from a file; otherwise as `read_vit`.

    Args:
        found: The arrays by their names in the file.
        path: The file, beside which files of settings are looked for.
        given: Choices of the user.
        architecture: As in `read_vit`.

    Returns:
        The network, its variables in float32.

    Raises:
        AmbiguousWeights: As in `read_vit`.
        MismatchedWeights: As in `read_vit`.
    """
    layout, arrays, unused, folders = to_names_of_timm(found, source=str(path))
    given, architecture = take_name(given, architecture)
    return from_timm(
        arrays,
        gammas=any(name.endswith("blocks.0.gamma_1") for name in found),
        layout=layout,
        unused=unused,
        folders=folders,
        given=given,
        heads_by_shape=heads_of(found),
        settings=Settings(Path(path), architecture),
        source=str(path),
    )


def from_timm(
    arrays: Mapping[str, np.ndarray],
    *,
    layout: str = "timm",
    unused: tuple[str, ...] = (),
    folders: str = "",
    gammas: bool = False,
    given: Given = NOTHING_GIVEN,
    heads_by_shape: int | None = None,
    settings: Settings | None = None,
    source: str = "the checkpoint",
) -> PublishedViT:
    """Returns the network of parameters by timm's names.

    Args:
        arrays: The parameters.
        layout: The layout of the file they came in (`vit_layouts.LAYOUTS`).
        unused: Names in the file that no ViT uses.
        folders: What stood before the names in the file, such as "module.base_encoder.".
        gammas: Whether LayerScales were called `gamma_1`, as in the code of DeiT and of EVA.
        given: Choices of the user.
        heads_by_shape: Heads, where the kernels of the file tell them, as Flax's do.
        settings: Where files of settings are looked for; None: nowhere.
        source: The file, for messages.

    Returns:
        The network, its variables in float32.

    Raises:
        AmbiguousWeights: As in `read_vit`.
        MismatchedWeights: As in `read_vit`.
    """
    if "blocks.0.gamma_1" in arrays:  # of Eva, as `to_timm` returns a DINOv3
        arrays = to_names_of_timm(arrays, source=source).arrays
    arrays = split_qkv(dict(arrays), source=source)
    rotary = is_rotary(arrays, layout)
    family = "dinov3" if rotary else family_of(layout, arrays, unused)
    usual = FAMILIES[family]
    arrays, periods = split_periods(arrays, source=source) if rotary else (arrays, None)
    shapes = shapes_of(arrays, source, rotary)
    style, facts = shapes.style, _facts(family, layout, arrays, unused, folders, shapes)
    sizes = {name: shapes.sizes[ours] for name, ours in HUGGING_FACE_SIZES.items()}
    if not facts.gated:
        sizes["intermediate_size"] = facts.mlp_width
    declared = Declared()
    if settings:
        beside = settings.architecture
        declared = read_declared(settings.path, sizes, given=beside, facts=facts)
    declared = add_name(declared, given, sizes, source=source, facts=facts)
    refuse_architecture(declared, source=source)
    decide_first_norm(declared, facts, source=source)
    if gammas and family == "deit3":
        decide_positions(declared, source=source)
    evidence = Evidence(given, declared, source)
    rope: dict[str, Any] = {}
    if rotary:
        rope, evidence.found["rope"] = rope_of(periods, declared, source=source)
    if periods is not None:
        by_periods = heads_of_periods(facts.width, periods, source=source)
        heads = decide_heads(evidence, facts, by_periods, told_by="periods")
    else:
        heads = decide_heads(evidence, facts, heads_by_shape)
    config = _config(evidence, facts, shapes.sizes | rope | {"heads": heads}, usual)
    folded = fold_positions(arrays, config, style)
    if "head.weight" in folded and "head.bias" not in folded:  # the projection of CLIP
        folded["head.bias"] = np.zeros(len(folded["head.weight"]), folded["head.weight"].dtype)
    num_classes = len(folded["head.weight"]) if "head.weight" in folded else 0
    rest = {name: folded.pop(name) for name in list(folded) if name.startswith("head_dist.")}
    if rest:
        evidence.found["head"] = "that of the class token; publishers average it with head_dist"
    pooling, evidence.found["pooling"] = _pooling(folded, style, usual, config, family, declared)
    variables = to_variables(folded, vit_table(config, style, pooling, num_classes), source=source)
    unknown = family == "clip" and not facts.of_openai  # others normalise otherwise
    normalised = None if unknown else usual.normalised
    normalised = normalisation_of(config, layout, unused) if rotary else normalised
    if declared.ignored:
        evidence.found["ignored"] = "; ".join(declared.ignored)
    if declared.normalisation is not None:
        evidence.found["normalisation"] = declared.sources["normalisation"]
    elif normalised is not None:
        evidence.found["normalisation"] = f"family {family}"
    return PublishedViT(
        family,
        layout,
        config,
        pooling,
        num_classes,
        declared.normalisation or normalised,
        style,
        variables,
        unused,
        rest,
        evidence.found,
        declared.architecture,
        frozenset(evidence.stated),
    )


def _config(evidence: Evidence, facts: Facts, sizes: dict[str, Any], usual: Family) -> ViTConfig:
    """The config, with the choices that the evidence decides."""
    rotary = facts.family == "dinov3"
    antialias = (facts.layout == "timm" and not rotary) or (
        facts.family == "dinov2" and sizes["registers"] > 0
    )
    try:
        return ViTConfig(
            **sizes,
            post_norm=decide_norms(evidence, facts) == "post",
            gelu=decide_gelu(evidence, facts),
            norm_eps=decide_norm_eps(evidence, facts, usual.norm_eps),
            position_filter="antialias" if antialias else "cubic",
        )
    except AmbiguousWeights:
        raise
    except ValueError as error:
        raise MismatchedWeights(f"{evidence.source}: {error}") from None


def _pooling(
    arrays: Arrays,
    style: Style,
    usual: Family,
    config: ViTConfig,
    family: str,
    declared: Declared,
) -> tuple[Trained, str]:
    """The pooling that the network was trained with, and what says so."""
    if "attn_pool.latent" in arrays:
        return "map", "the parameters of attention pooling"
    if declared.pooling == "avg" or (declared.pooling == "cls" and config.class_token):
        return declared.pooling, declared.sources["pooling"]
    if style.fc_norm:
        return "avg", "the norm after the pooling, fc_norm"
    if not config.class_token:
        return "avg", "no class token"
    if family == "big_vision":
        return "cls", "big_vision has a class token only where it is pooled (vit.py, pool_type tok)"
    return ("avg" if usual.pooling == "map" else usual.pooling), f"family {family}"


def _facts(
    family: str,
    layout: str,
    arrays: Arrays,
    unused: tuple[str, ...],
    folders: str,
    shapes: Shapes,
) -> Facts:
    sizes = shapes.sizes
    return Facts(
        family,
        layout,
        width=sizes["width"],
        patch=sizes["patch"],
        image=sizes["image"],
        class_token=sizes["class_token"],
        final_norm="fc_norm" if shapes.style.fc_norm else "norm",
        qkv_bias=sizes["qkv_bias"],
        gated=sizes["mlp"] == "swiglu",
        of_openai=set(unused) >= OPENAI_BUFFERS,
        of_moco=not {"base_encoder", "momentum_encoder"}.isdisjoint(folders.split(".")),
        of_visual="visual" in folders.split("."),
        fixed_positions=has_fixed_positions(arrays.get("pos_embed")),
        mlp_width=sizes["mlp_width"],
        depth=sizes["depth"],
    )


def to_timm(published: PublishedViT, variables: Mapping[str, Any] | None = None) -> Arrays:
    """Returns parameters by timm's names, as `write_safetensors` takes them.

    Those of a DINOv3 are the names of timm's Eva, which has no place for periods in bfloat16: it
    computes them in float32.

    Args:
        published: The network.
        variables: Its variables, trained further; None: those that were read.

    Raises:
        MismatchedWeights: They are not the variables of this network; another pooling has no name
            there.
    """
    table = vit_table(published.config, published.style, published.pooling, published.num_classes)
    arrays = to_published(published.variables if variables is None else variables, table)
    if published.config.position == "rope":
        return to_names_of_eva(arrays)
    return join_qkv(unfold_positions(arrays, published.config, published.style)) | published.rest
