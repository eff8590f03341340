"""Published text towers <-> `ggem_jax.models.text.TextTransformer`: those of CLIP and SigLIP.

`read_text` takes a file of Hugging Face's, OpenAI's and open_clip's, or big_vision's names and
finds the architecture in the shapes; the image tower that is in most such files is read by
`ggem_jax.weights.vit.read_vit`. `to_published_names` is the way back.

    text = read_text("open_clip_pytorch_model.safetensors")
    # ids (b, n) of the tokenizer that the network was trained with
    output = text.model().apply(text.variables, ids)

References for the names: github.com/huggingface/transformers, models clip and siglip; openai/CLIP,
model.py; mlfoundations/open_clip, model.py and transformer.py; google-research/big_vision,
models/proj/image_text/text_transformer.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ggem_jax.files.arrays import read_arrays
from ggem_jax.files.errors import AmbiguousWeights, MismatchedWeights
from ggem_jax.models.text import TextConfig, TextTransformer
from ggem_jax.models.transformer import GELU
from ggem_jax.weights.architecture import (
    NOTHING_GIVEN,
    OPENAI_BUFFERS,
    Evidence,
    Facts,
    Given,
    Settings,
    decide_gelu,
    decide_norm_eps,
    decide_text_heads,
)
from ggem_jax.weights.convert import Parameter, to_published, to_variables
from ggem_jax.weights.declared import Declared, read_declared
from ggem_jax.weights.vit_layouts import (
    Arrays,
    explain_several,
    heads_of,
    stack_blocks,
    unstack_blocks,
    unwrap_name,
)


class TextFamily(NamedTuple):
    """Settings that the towers of a family were trained with and that no shape says."""

    about: str
    causal: bool
    pooled: Literal["end", "last"]
    norm_eps: float


TEXT_FAMILIES = {
    "clip": TextFamily("the text tower of CLIP (Radford et al., 2021)", True, "end", 1e-5),
    "siglip": TextFamily("the text tower of SigLIP (Zhai et al., 2023)", False, "last", 1e-6),
}


class TextLayout(NamedTuple):
    """How one publisher names the parts of a text tower.

    Names of modules end with what stands before `weight` or `kernel`.
    """

    prefixes: tuple[str, ...]  # folders before the names
    token: str
    position: str
    block: str  # folder of block {i}
    norms: tuple[str, str]
    attention: tuple[str, ...]  # query, key and value, or the three in one
    attention_out: str
    mlp: tuple[str, str]
    norm: str
    # names of the kernel, with the folder {p}: of a projection with a bias (SigLIP's), and of one
    # without
    projections: tuple[str, str | None]
    scale: str  # of the logits, with the folder {o} outside the tower
    bias: str
    unused: str  # a pattern of the full names that are no part of a text tower
    flax: bool = False  # names of leaves and axes as in Flax


LAYOUTS: dict[str, TextLayout] = {
    "hf-clip": TextLayout(  # and SigLIP
        prefixes=("text_model.", ""),
        token="embeddings.token_embedding.weight",
        position="embeddings.position_embedding.weight",
        block="encoder.layers.{i}.",
        norms=("layer_norm1.", "layer_norm2."),
        attention=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
        attention_out="self_attn.out_proj.",
        mlp=("mlp.fc1.", "mlp.fc2."),
        norm="final_layer_norm.",
        projections=("{p}head.weight", "text_projection.weight"),
        scale="logit_scale",
        bias="logit_bias",
        unused=(
            r"vision_model\..*|visual_projection\.weight|(text_model\.)?embeddings\.position_ids"
        ),
    ),
    "clip": TextLayout(  # OpenAI's, and open_clip's, where some have the folder
        prefixes=("text.", ""),
        token="token_embedding.weight",
        position="positional_embedding",
        block="transformer.resblocks.{i}.",
        norms=("ln_1.", "ln_2."),
        attention=("attn.in_proj_",),
        attention_out="attn.out_proj.",
        mlp=("mlp.c_fc.", "mlp.c_proj."),
        norm="ln_final.",
        projections=("{p}text_projection.weight", "{p}text_projection"),
        scale="logit_scale",
        bias="logit_bias",
        unused=r"visual\..*|input_resolution|context_length|vocab_size|(text\.)?attn_mask",
    ),
    "big_vision": TextLayout(
        prefixes=("params/txt/", "txt/", "params/", ""),
        token="Embed_0/embedding",
        position="pos_embedding",
        block="Encoder_0/encoderblock_{i}/",
        norms=("LayerNorm_0/", "LayerNorm_1/"),
        attention=tuple(
            f"MultiHeadDotProductAttention_0/{part}/" for part in ("query", "key", "value")
        ),
        attention_out="MultiHeadDotProductAttention_0/out/",
        mlp=("MlpBlock_0/Dense_0/", "MlpBlock_0/Dense_1/"),
        norm="Encoder_0/encoder_norm/",
        projections=("{p}head/kernel", None),
        scale="{o}t",
        bias="{o}b",
        unused=r"(params/)?img/.*|opt/.*",
        flax=True,
    ),
}


class TextStyle(NamedTuple):
    """Choices of a file that our model makes in one way."""

    prefix: str = ""
    projection: str | None = None  # the full name of the kernel
    stacked: bool = False  # the blocks of a scan in one array
    folders: str = ""  # before all names, such as "module."


@dataclass(frozen=True)
class PublishedText:
    """A published text tower: its architecture, its variables, and scale and bias of its logits."""

    family: str
    layout: str
    config: TextConfig
    outputs: int  # channels of the shared space; 0: no projection
    project_bias: bool
    logit_scale: float | None  # as in the file: the logarithm of the factor of the cosines
    logit_bias: float | None  # added to the scaled cosines, of SigLIP
    style: TextStyle
    variables: dict[str, Any] = field(repr=False)
    # names in the file that are no part of the tower
    unused: tuple[str, ...] = field(default=(), repr=False)
    # scale and bias of the logits, which go back as they came
    rest: Arrays = field(default_factory=dict, repr=False)
    # choice, such as heads or gelu -> where it came from
    evidence: dict[str, str] = field(default_factory=dict, repr=False)

    def model(self) -> TextTransformer:
        """Returns the tower as it was trained."""
        return TextTransformer(self.config, self.outputs, self.project_bias)


def read_text(
    path: str | Path,
    *,
    heads: int | None = None,
    gelu: GELU | None = None,
    norm_eps: float | None = None,
    end_id: int | None = None,
    architecture: str | Path | None = None,
    which: str | None = None,
) -> PublishedText:
    """Returns the text tower of a published checkpoint.

    A tower counts as SigLIP's, which sees the whole text and takes its last token, where the
    projection has a bias or the names are big_vision's.

    What shapes do not say is decided by the arguments, by the publisher's file of settings, or by a
    table of published sizes (`ggem_jax.weights.architecture`); `PublishedText.evidence` tells
    which.

    Args:
        path: A safetensors, npz or PyTorch file (`read_checkpoint`). A `config.json` or
            `open_clip_config.json` beside it is evidence where its sizes are those of the weights.
        heads: Attention heads; None: by the evidence.
        gelu: GELU of the MLPs; None: by the evidence.
        norm_eps: Epsilon of the norms; None: by the evidence.
        end_id: Id of the token that ends a text; None: the largest id of the vocabulary.
        architecture: A file of settings of the publisher, or the folder of one, instead of those
            beside the weights.
        which: The network of a file with several, such as "ema"; see `read_checkpoint`.

    Returns:
        The tower, its variables in float32.

    Raises:
        UnreadableWeights: The file cannot be read.
        AmbiguousWeights: It fits towers that compute different things, and nothing decides.
        MismatchedWeights: It holds no text tower of a known layout, or one that ours cannot be; the
            message lists the offending names.
    """
    return from_published_names(
        read_arrays(path, which),
        given=Given(heads, gelu, norm_eps),
        end_id=end_id,
        settings=Settings(Path(path), architecture),
        source=str(path),
    )


def from_published_names(
    arrays: Mapping[str, np.ndarray],
    *,
    given: Given = NOTHING_GIVEN,
    end_id: int | None = None,
    settings: Settings | None = None,
    source: str = "the checkpoint",
) -> PublishedText:
    """Returns the tower of arrays by their published names; otherwise as `read_text`.

    Args:
        arrays: The arrays of a file by their names.
        given: Choices of the user.
        end_id: As in `read_text`.
        settings: Where files of settings are looked for; None: nowhere.
        source: The file, for messages.

    Returns:
        The tower, its variables in float32.

    Raises:
        AmbiguousWeights: As in `read_text`.
        MismatchedWeights: As in `read_text`.
    """
    name, prefix, folders = _find_layout(arrays, source)
    names = {unwrap_name(key).removeprefix(folders): key for key in arrays}
    if len(names) < len(arrays):
        twice = next(key for key in arrays if key not in names.values())
        raise MismatchedWeights(f"{source} has two names of one parameter, one of them {twice}")
    arrays = {short: arrays[key] for short, key in names.items()}
    layout = LAYOUTS[name]
    taken_apart = unstack_blocks(arrays, "Encoder_0")
    found = {
        key: array for key, array in taken_apart.items() if not re.fullmatch(layout.unused, key)
    }
    scale, bias = _logits(layout, prefix)
    rest = {key: np.asarray(found.pop(key)) for key in (scale, bias) if key in found}
    style = TextStyle(
        prefix,
        projection=next((each for each in _projections(layout, prefix) if each in found), None),
        stacked=set(taken_apart) != set(arrays),
        folders=folders,
    )
    project_bias = style.projection == _projections(layout, prefix)[0]
    family = "siglip" if project_bias or layout.flax else "clip"
    usual = TEXT_FAMILIES[family]
    shapes = _shapes(found, layout, style, source)
    width = shapes.pop("width")
    outputs = shapes.pop("outputs")
    unused = tuple(key for short, key in names.items() if re.fullmatch(layout.unused, short))
    evidence = _evidence(given, settings, shapes | {"width": width}, source)
    facts = Facts(family, name, width, of_openai=set(unused) >= OPENAI_BUFFERS)
    heads = decide_text_heads(evidence, width, heads_of(found, "Encoder_0"))
    try:
        config = TextConfig(
            width=width,
            heads=heads,
            causal=usual.causal,
            pooled=usual.pooled,
            end_id=end_id,
            gelu=decide_gelu(evidence, facts),
            norm_eps=decide_norm_eps(evidence, facts, usual.norm_eps),
            **shapes,
        )
    except AmbiguousWeights:
        raise
    except ValueError as error:
        raise MismatchedWeights(f"{source}: {error}") from None
    variables = to_variables(
        found, text_table(name, style, config, outputs, project_bias), source=source
    )
    numbers = {key: _number(key, array, source) for key, array in rest.items()}
    return PublishedText(
        family,
        name,
        config,
        outputs,
        project_bias,
        numbers.get(scale),
        numbers.get(bias),
        style,
        _apart(variables),
        unused,
        rest,
        evidence.found,
    )


def _evidence(
    given: Given, settings: Settings | None, shapes: Mapping[str, int], source: str
) -> Evidence:
    """What is given and declared of a tower of these sizes."""
    if settings is None:
        return Evidence(given, Declared(), source)
    sizes = {"hidden_size": shapes["width"], "num_hidden_layers": shapes["depth"]}
    declared = read_declared(settings.path, sizes, given=settings.architecture, tower="text")
    return Evidence(given, declared, source)


def to_published_names(
    published: PublishedText, variables: Mapping[str, Any] | None = None
) -> Arrays:
    """Returns parameters by the names that they came in, with scale and bias of the logits.

    The image tower is no part of them.

    Args:
        published: The tower.
        variables: Its variables, trained further; None: those that were read, in float32.

    Raises:
        MismatchedWeights: They are not the variables of this tower.
    """
    layout = LAYOUTS[published.layout]
    variables = published.variables if variables is None else variables
    together = variables if len(layout.attention) == 3 else _together(variables)
    table = text_table(
        published.layout,
        published.style,
        published.config,
        published.outputs,
        published.project_bias,
    )
    arrays = to_published(together, table)
    stacked = stack_blocks(arrays, "Encoder_0") if published.style.stacked else arrays
    folders = published.style.folders
    return {folders + name: array for name, array in (stacked | published.rest).items()}


def holds_text(names: Iterable[str]) -> bool:
    """Returns whether a text tower of a known layout is among the names of a file.

    Args:
        names: The names.
    """
    names = [unwrap_name(name) for name in names]
    return any(_folders_before(names, layout.token) for layout in LAYOUTS.values())


def text_table(
    name: str, style: TextStyle, config: TextConfig, outputs: int, project_bias: bool
) -> dict[str, Parameter]:
    """Returns the published names of a layout and where their parameters go.

    Projections that are kept together go to one module, `qkv`, with an axis of 3.

    Args:
        name: The layout.
        style: Choices of the file.
        config: Of the tower.
        outputs: Channels of the shared space; 0: no projection.
        project_bias: Whether the projection has a bias.
    """
    c, layout, p = config, LAYOUTS[name], style.prefix
    width, heads = (c.width,), (c.heads, c.width // c.heads)
    table = {
        p + layout.token: Parameter(
            ("params", "token_embedding", "embedding"), (c.vocabulary, c.width)
        ),
        p + layout.position: Parameter(
            ("params", "position"),
            (1, c.context, c.width) if layout.flax else (c.context, c.width),
            ours=(c.context, c.width),
        ),
    }
    for i in range(c.depth):
        theirs, ours = p + layout.block.format(i=i), f"blocks_{i}"
        for n in (0, 1):
            table |= _norm(theirs + layout.norms[n], (ours, f"norm_{n + 1}"), c.width, layout.flax)
        if len(layout.attention) == 3:
            for part, each in zip(("query", "key", "value"), layout.attention, strict=True):
                table |= _dense(theirs + each, (ours, "attention", part), width, heads, layout.flax)
        else:
            table |= _dense(
                theirs + layout.attention[0],
                (ours, "attention", "qkv"),
                width,
                (3, *heads),
                layout.flax,
            )
        table |= _dense(
            theirs + layout.attention_out, (ours, "attention", "out"), heads, width, layout.flax
        )
        table |= _dense(
            theirs + layout.mlp[0], (ours, "mlp", "in"), width, (c.mlp_width,), layout.flax
        )
        table |= _dense(
            theirs + layout.mlp[1], (ours, "mlp", "out"), (c.mlp_width,), width, layout.flax
        )
    table |= _norm(p + layout.norm, ("norm",), c.width, layout.flax)
    if style.projection is not None:
        kernel = _is_transposed(style.projection)
        shape = (outputs, c.width) if kernel else (c.width, outputs)
        table[style.projection] = Parameter(
            ("params", "head", "kernel"), shape, "dense" if kernel else "same"
        )
        if project_bias:
            table[re.sub(r"(weight|kernel)$", "bias", style.projection)] = Parameter(
                ("params", "head", "bias"), (outputs,)
            )
    return table


def _norm(theirs: str, ours: tuple[str, ...], width: int, flax: bool) -> dict[str, Parameter]:
    return {
        theirs + ("scale" if flax else "weight"): Parameter(("params", *ours, "scale"), (width,)),
        theirs + "bias": Parameter(("params", *ours, "bias"), (width,)),
    }


def _dense(
    theirs: str, ours: tuple[str, ...], inner: tuple[int, ...], outer: tuple[int, ...], flax: bool
) -> dict[str, Parameter]:
    """A dense layer with the axes of our kernel: as they are in Flax's files, flat and transposed
    in PyTorch's.
    """
    kernel, bias = ("params", *ours, "kernel"), ("params", *ours, "bias")
    if flax:
        return {
            theirs + "kernel": Parameter(kernel, inner + outer),
            theirs + "bias": Parameter(bias, outer),
        }
    flat = (math.prod(outer), math.prod(inner))
    return {
        theirs + "weight": Parameter(kernel, flat, "dense", ours=inner + outer),
        theirs + "bias": Parameter(bias, flat[:1], ours=outer),
    }


def _is_transposed(projection: str) -> bool:
    """Whether a projection is `(out, in)`, a dense layer of PyTorch's; the plain array of OpenAI's
    and Flax's kernel are `(in, out)`.
    """
    return projection.endswith("weight")


def _projections(layout: TextLayout, prefix: str) -> list[str]:
    return [each.format(p=prefix) for each in layout.projections if each]


def _find_layout(arrays: Mapping[str, np.ndarray], source: str) -> tuple[str, str, str]:
    """The layout, the folder of the tower, and the folders before all names, such as "module."."""
    names = [unwrap_name(name) for name in arrays]
    for name, layout in LAYOUTS.items():
        own = [each for each in names if not re.fullmatch(layout.unused, each)]
        for prefix in layout.prefixes:
            found = _folders_before(own, prefix + layout.token)
            if len(found) > 1:
                raise MismatchedWeights(f"{source}: {explain_several(found)}")
            if found:
                return name, prefix, found.pop()
    shown = ", ".join(sorted(arrays)[:8])
    raise MismatchedWeights(
        f"{source}: no text tower of a known layout ({', '.join(LAYOUTS)}): its names begin"
        f" {shown or 'nowhere, there are none'}"
    )


def _folders_before(names: Iterable[str], end: str) -> set[str]:
    return {
        name.removesuffix(end)
        for name in names
        if name.endswith(end) and name.removesuffix(end)[-1:] in ("", ".", "/")
    }


def _logits(layout: TextLayout, prefix: str) -> tuple[str, str]:
    """The names of scale and bias, which stand beside the tower."""
    outside = prefix.removesuffix("txt/")
    return layout.scale.format(o=outside), layout.bias.format(o=outside)


def _number(name: str, array: np.ndarray, source: str) -> float:
    if array.size != 1:
        raise MismatchedWeights(f"{source}: {name} must be one number, not of shape {array.shape}")
    return float(array.reshape(()))


def _shapes(found: Arrays, layout: TextLayout, style: TextStyle, source: str) -> dict[str, Any]:
    """The sizes that the shapes say."""
    first = (
        style.prefix
        + layout.block.format(i=0)
        + layout.mlp[0]
        + ("kernel" if layout.flax else "weight")
    )
    position = style.prefix + layout.position
    needed = [
        style.prefix + layout.token,
        position,
        first,
        *([] if style.projection is None else [style.projection]),
    ]
    if missing := [name for name in needed if name not in found]:
        raise MismatchedWeights(f"{source} has no {', '.join(missing)}")
    if flat := [
        f"{name} {found[name].shape}"
        for name in needed
        if found[name].ndim != 2 + (layout.flax and name == position)
    ]:
        raise MismatchedWeights(f"{source}: of {', '.join(flat)} the number of axes is wrong")
    vocabulary, width = found[needed[0]].shape
    pattern = re.escape(style.prefix + layout.block).replace(r"\{i\}", r"(\d+)") + ".*"
    blocks = [
        int(match.group(1)) for match in (re.fullmatch(pattern, name) for name in found) if match
    ]
    return {
        "vocabulary": vocabulary,
        "width": width,
        "context": found[position].shape[-2],
        "depth": min(1 + max(blocks), len(found)),  # a name may have any number in it
        "mlp_width": found[first].shape[1 if layout.flax else 0],
        "outputs": (
            0
            if style.projection is None
            else found[style.projection].shape[0 if _is_transposed(style.projection) else 1]
        ),
    }


def _apart(variables: dict[str, Any]) -> dict[str, Any]:
    """Queries, keys and values as modules of their own where they came in one."""
    for block in variables["params"].values():
        if isinstance(block, dict) and "qkv" in block.get("attention", {}):
            attention = block["attention"]
            for leaf, array in attention.pop("qkv").items():
                for part, each in zip(
                    ("query", "key", "value"), np.moveaxis(array, -3, 0), strict=True
                ):
                    attention.setdefault(part, {})[leaf] = np.ascontiguousarray(each)
    return variables


def _together(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Queries, keys and values in one module, unless their shapes do not fit each other."""
    params = {}
    for name, block in variables.get("params", {}).items():
        attention = dict(block.get("attention", {})) if isinstance(block, Mapping) else {}
        parts = [attention.get(part, {}) for part in ("query", "key", "value")]
        shapes = [{leaf: np.shape(array) for leaf, array in part.items()} for part in parts]
        if shapes[0] and shapes[0] == shapes[1] == shapes[2]:
            together = {
                leaf: np.stack([np.asarray(part[leaf]) for part in parts], axis=-3)
                for leaf in parts[0]
            }
            others = {
                key: value
                for key, value in attention.items()
                if key not in ("query", "key", "value")
            }
            block = {**block, "attention": {**others, "qkv": together}}
        params[name] = block
    return {**variables, "params": params}
