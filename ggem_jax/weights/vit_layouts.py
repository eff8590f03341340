"""Names of published Vision Transformers -> those of timm, with arrays in PyTorch's axes.

One name for each parameter, whatever file it came in: `blocks.3.mlp.fc1.bias`, `attn_pool.latent`.
Queries, keys and values stand in one array in some files, `blocks.3.attn.qkv.weight`, and apart in
others, `blocks.3.attn.q.weight`, as in our model: `split_qkv`, and `join_qkv` on the way back.

References for the names: github.com/huggingface/pytorch-image-models, vision_transformer.py and
deit.py and eva.py; huggingface/transformers, models vit, deit, dinov2, dinov2_with_registers,
dinov3_vit, clip and siglip; openai/CLIP and mlfoundations/open_clip, model.py;
google-research/vision_transformer and big_vision, vit.py; facebookresearch/{mae,deit,dinov2} and
dinov3.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.files.networks import Arrays
from ggem_jax.weights.dinov3 import join_parts
from ggem_jax.weights.refused import refuse_others

Rule = tuple[str, str, Callable[[np.ndarray], np.ndarray] | None]


MOST_BLOCKS = 1000  # of a scan; a damaged file may tell any number


class Layout(NamedTuple):
    """How one publisher names the parameters of a ViT."""

    # pattern of a name that only such files have; what stands before it stands before all names
    mark: str
    rules: tuple[Rule, ...]
    unused: str = r"(?!)"  # pattern of the whole names that a ViT does not use


def _row(array: np.ndarray) -> np.ndarray:
    """A token or a table of tokens as timm keeps it, (1, n, width)."""
    return array.reshape(1, math.prod(array.shape[:-1]), array.shape[-1])


def _dense(array: np.ndarray) -> np.ndarray:
    """A kernel (in, ...) of Flax as (out, in)."""
    return np.ascontiguousarray(array.reshape(array.shape[0], -1).T)


def _dense_out(array: np.ndarray) -> np.ndarray:
    """The kernel (heads, channels, out) of an attention's output as (out, in)."""
    return np.ascontiguousarray(array.reshape(-1, array.shape[-1]).T)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


def _conv(array: np.ndarray) -> np.ndarray:
    """A kernel (h, w, in, out) as (out, in, h, w)."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1))


def _leaf(theirs: str, ours: str) -> Rule:
    """A module with the same two leaves, weight and bias, in PyTorch's layout."""
    return rf"{theirs}\.(weight|bias)", rf"{ours}.\g<leaf>", None


def _flax(theirs: str, ours: str, kernel: Callable = _dense) -> tuple[Rule, ...]:
    """A dense module of Flax."""
    return (rf"{theirs}/kernel", f"{ours}.weight", kernel), (
        rf"{theirs}/bias",
        f"{ours}.bias",
        _flat,
    )


def _flax_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (rf"{theirs}/scale", f"{ours}.weight", None), (rf"{theirs}/bias", f"{ours}.bias", None)


_TIMM = Layout(
    mark=r"blocks\.0\.norm1\.weight",
    rules=(
        (r"(cls_token|dist_token|pos_embed)", r"\g<1>", _row),
        (r"(reg_token|register_tokens)", "reg_token", _row),
        _leaf(r"(?P<m>patch_embed\.proj|norm|fc_norm|norm_pre|head|head_dist)", r"\g<m>"),
        _leaf(
            r"blocks\.(?P<i>\d+)\.(?P<m>norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)",
            r"blocks.\g<i>.\g<m>",
        ),
        # DINOv2's own names of its gated MLP
        _leaf(r"blocks\.(?P<i>\d+)\.mlp\.w12", r"blocks.\g<i>.mlp.fc1"),
        _leaf(r"blocks\.(?P<i>\d+)\.mlp\.w3", r"blocks.\g<i>.mlp.fc2"),
        (r"blocks\.(?P<i>\d+)\.ls(?P<n>[12])\.gamma", r"blocks.\g<i>.ls\g<n>.gamma", None),
        (r"blocks\.(?P<i>\d+)\.gamma_(?P<n>[12])", r"blocks.\g<i>.ls\g<n>.gamma", None),
        # of Eva, timm's class of DINOv3
        (r"blocks\.(?P<i>\d+)\.attn\.(?P<m>q|v)_bias", r"blocks.\g<i>.attn.\g<m>.bias", None),
        _leaf(r"blocks\.(?P<i>\d+)\.mlp\.fc1_g", r"blocks.\g<i>.mlp.gate"),
        _leaf(r"blocks\.(?P<i>\d+)\.mlp\.fc1_x", r"blocks.\g<i>.mlp.value"),
        (r"attn_pool\.latent", "attn_pool.latent", _row),
        _leaf(r"attn_pool\.(?P<m>q|kv|proj|norm|mlp\.fc1|mlp\.fc2)", r"attn_pool.\g<m>"),
    ),
    # the last: losses and projection heads of DINO, DINOv2, iBOT and MoCo v3, whose class token has
    # the place of a classifier
    unused=r"mask_token|decoder_.*|mask(?:ed)?_embed.*|dino_head\..*|ibot_head\..*|text\..*|logit_scale"
    r"|logit_bias|\w+_loss\..*|head\.(mlp|last_layer2?|\d+)\..*|predictor\..*",
)

# The original files: timm's names but for these. `local_cls_norm` is of small crops in training.
_DINOV3 = Layout(
    mark=r"(?:storage_tokens|rope_embed\.periods)",
    rules=(
        (r"storage_tokens", "reg_token", _row),
        (r"rope_embed\.periods", "rope_embed.periods", None),
        (r"blocks\.(?P<i>\d+)\.attn\.qkv\.bias_mask", r"blocks.\g<i>.attn.qkv.bias_mask", None),
        _leaf(r"blocks\.(?P<i>\d+)\.mlp\.w1", r"blocks.\g<i>.mlp.gate"),
        _leaf(r"blocks\.(?P<i>\d+)\.mlp\.w2", r"blocks.\g<i>.mlp.value"),
        *_TIMM.rules,
    ),
    unused=_TIMM.unused + r"|local_cls_norm\.(weight|bias)|projectors\..*",
)

_HF_DINOV3_BLOCK = r"(?:model\.)?layer\.(?P<i>\d+)\."
_HF_DINOV3 = Layout(
    mark=r"(?:model\.)?layer\.0\.attention\.o_proj\.weight",
    rules=(
        (r"embeddings\.cls_token", "cls_token", _row),
        (r"embeddings\.register_tokens", "reg_token", _row),
        _leaf(r"embeddings\.patch_embeddings", "patch_embed.proj"),
        _leaf(_HF_DINOV3_BLOCK + r"(?P<m>norm1|norm2)", r"blocks.\g<i>.\g<m>"),
        _leaf(
            _HF_DINOV3_BLOCK + r"attention\.(?P<m>q|k|v)_proj",
            r"blocks.\g<i>.attn.\g<m>",
        ),
        _leaf(_HF_DINOV3_BLOCK + r"attention\.o_proj", r"blocks.\g<i>.attn.proj"),
        _leaf(_HF_DINOV3_BLOCK + r"mlp\.gate_proj", r"blocks.\g<i>.mlp.gate"),
        _leaf(_HF_DINOV3_BLOCK + r"mlp\.up_proj", r"blocks.\g<i>.mlp.value"),
        _leaf(_HF_DINOV3_BLOCK + r"mlp\.down_proj", r"blocks.\g<i>.mlp.fc2"),
        (
            _HF_DINOV3_BLOCK + r"layer_scale(?P<n>[12])\.lambda1",
            r"blocks.\g<i>.ls\g<n>.gamma",
            None,
        ),
        _leaf("norm", "norm"),
    ),
    unused=r"embeddings\.mask_token|rope_embeddings\.inv_freq",
)

_HF_BLOCK = r"encoder\.layer\.(?P<i>\d+)\."
_HF_SHARED: tuple[Rule, ...] = (
    (r"embeddings\.cls_token", "cls_token", _row),
    (r"embeddings\.position_embeddings", "pos_embed", _row),
    _leaf(r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    _leaf(
        _HF_BLOCK + r"attention\.attention\.(?P<m>q|k|v)(?:uery|ey|alue)",
        r"blocks.\g<i>.attn.\g<m>",
    ),
    _leaf(_HF_BLOCK + r"attention\.output\.dense", r"blocks.\g<i>.attn.proj"),
    _leaf("layernorm", "norm"),
)
_HF_VIT = Layout(
    mark=r"encoder\.layer\.0\.layernorm_before\.weight",
    rules=(
        *_HF_SHARED,
        (r"embeddings\.distillation_token", "dist_token", _row),
        _leaf(_HF_BLOCK + r"layernorm_before", r"blocks.\g<i>.norm1"),
        _leaf(_HF_BLOCK + r"layernorm_after", r"blocks.\g<i>.norm2"),
        _leaf(_HF_BLOCK + r"intermediate\.dense", r"blocks.\g<i>.mlp.fc1"),
        _leaf(_HF_BLOCK + r"output\.dense", r"blocks.\g<i>.mlp.fc2"),
        _leaf("(?:cls_)?classifier", "head"),
        _leaf("distillation_classifier", "head_dist"),
    ),
    unused=r"pooler\.dense\.(weight|bias)|embeddings\.mask_token|decoder\..*",  # of MAE
)

_HF_DINOV2 = Layout(
    mark=r"encoder\.layer\.0\.layer_scale1\.lambda1",
    rules=(
        *_HF_SHARED,
        (r"embeddings\.register_tokens", "reg_token", _row),
        _leaf(_HF_BLOCK + r"(?P<m>norm1|norm2|mlp\.fc1|mlp\.fc2)", r"blocks.\g<i>.\g<m>"),
        _leaf(_HF_BLOCK + r"mlp\.weights_in", r"blocks.\g<i>.mlp.fc1"),  # of the gated MLP
        _leaf(_HF_BLOCK + r"mlp\.weights_out", r"blocks.\g<i>.mlp.fc2"),
        (_HF_BLOCK + r"layer_scale(?P<n>[12])\.lambda1", r"blocks.\g<i>.ls\g<n>.gamma", None),
    ),
    # its classifier takes the class token and the mean of the patches
    unused=r"embeddings\.mask_token|classifier\.(weight|bias)",
)

_HF_LAYER = r"encoder\.layers\.(?P<i>\d+)\."
_HF_TOWER = (
    (r"embeddings\.class_embedding", "cls_token", _row),
    (r"embeddings\.position_embedding\.weight", "pos_embed", _row),
    _leaf(r"embeddings\.patch_embedding", "patch_embed.proj"),
    _leaf(r"pre_layrnorm", "norm_pre"),  # as it is spelled there
    _leaf(_HF_LAYER + r"layer_norm(?P<n>[12])", r"blocks.\g<i>.norm\g<n>"),
    _leaf(_HF_LAYER + r"self_attn\.(?P<m>q|k|v)_proj", r"blocks.\g<i>.attn.\g<m>"),
    _leaf(_HF_LAYER + r"self_attn\.out_proj", r"blocks.\g<i>.attn.proj"),
    _leaf(_HF_LAYER + r"mlp\.(?P<m>fc1|fc2)", r"blocks.\g<i>.mlp.\g<m>"),
    _leaf("post_layernorm", "norm"),
    (r"head\.probe", "attn_pool.latent", _row),
    (r"head\.attention\.in_proj_(weight|bias)", r"attn_pool.qkv.\g<leaf>", None),
    _leaf(r"head\.attention\.out_proj", "attn_pool.proj"),
    _leaf(r"head\.layernorm", "attn_pool.norm"),
    _leaf(r"head\.mlp\.(?P<m>fc1|fc2)", r"attn_pool.mlp.\g<m>"),
)
_HF_CLIP = Layout(
    mark=r"(?<!text_model\.)encoder\.layers\.0\.layer_norm1\.weight",
    rules=(
        *((rf"(?:vision_model\.)?{theirs}", ours, change) for theirs, ours, change in _HF_TOWER),
        (r"visual_projection\.weight", "head.weight", None),
    ),
    unused=r"text_model\..*|text_projection\.weight|logit_scale|logit_bias"
    r"|(vision_model\.)?embeddings\.position_ids",
)

_CLIP_BLOCK = r"transformer\.resblocks\.(?P<i>\d+)\."
_CLIP = Layout(
    mark=r"visual\.transformer\.resblocks\.0\.ln_1\.weight",
    rules=tuple(
        (rf"visual\.{theirs}", ours, change)
        for theirs, ours, change in (
            ("class_embedding", "cls_token", _row),
            ("positional_embedding", "pos_embed", _row),
            (r"conv1\.weight", "patch_embed.proj.weight", None),
            _leaf("ln_pre", "norm_pre"),
            _leaf("ln_post", "norm"),
            _leaf(_CLIP_BLOCK + r"ln_(?P<n>[12])", r"blocks.\g<i>.norm\g<n>"),
            (_CLIP_BLOCK + r"attn\.in_proj_(weight|bias)", r"blocks.\g<i>.attn.qkv.\g<leaf>", None),
            _leaf(_CLIP_BLOCK + r"attn\.out_proj", r"blocks.\g<i>.attn.proj"),
            _leaf(_CLIP_BLOCK + r"mlp\.c_fc", r"blocks.\g<i>.mlp.fc1"),
            _leaf(_CLIP_BLOCK + r"mlp\.c_proj", r"blocks.\g<i>.mlp.fc2"),
            ("proj", "head.weight", lambda array: np.ascontiguousarray(array.T)),
        )
    ),
    unused=r"transformer\..*|token_embedding\.weight|positional_embedding|ln_final\..*"
    r"|text_projection|logit_scale|logit_bias|input_resolution|context_length|vocab_size|attn_mask"
    r"|visual\.attnpool\..*|text\..*",
)


def _npz(
    block: str, attention: str, second: str, mlp: str, rest: tuple[Rule, ...]
) -> tuple[Rule, ...]:
    """Rules of Flax's own files: the blocks, and the parts that differ between layouts."""
    inside = rf"Transformer/{block}/"
    rules: list[Rule] = [
        *_flax("embedding", "patch_embed.proj", _conv),
        ("cls", "cls_token", _row),
        *_flax("head", "head"),
    ]
    rules += _flax_norm(inside + "LayerNorm_0", r"blocks.\g<i>.norm1") + _flax_norm(
        inside + second, r"blocks.\g<i>.norm2"
    )
    for name in ("query", "key", "value"):
        rules += _flax(inside + rf"{attention}/{name}", rf"blocks.\g<i>.attn.{name[0]}")
    rules += _flax(inside + rf"{attention}/out", r"blocks.\g<i>.attn.proj", _dense_out)
    rules += _flax(inside + f"{mlp}/Dense_0", r"blocks.\g<i>.mlp.fc1") + _flax(
        inside + f"{mlp}/Dense_1", r"blocks.\g<i>.mlp.fc2"
    )
    return (*rules, *_flax_norm("Transformer/encoder_norm", "norm"), *rest)


_AUGREG = Layout(
    mark=r"Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel",
    rules=_npz(
        r"encoderblock_(?P<i>\d+)",
        "MultiHeadDotProductAttention_1",
        "LayerNorm_2",
        "MlpBlock_3",
        ((r"Transformer/posembed_input/pos_embedding", "pos_embed", _row),),
    ),
    # of weights before fine-tuning, where the head was another one
    unused=r"pre_logits/(kernel|bias)",
)

_MAP_HEAD = "MAPHead_0/"
_MAP_RULES: tuple[Rule, ...] = (
    ("pos_embedding", "pos_embed", _row),
    (_MAP_HEAD + "probe", "attn_pool.latent", _row),
    *(
        rule
        for name in ("query", "key", "value")
        for rule in _flax(
            _MAP_HEAD + f"(?:MultiHeadDotProductAttention_0|MHDPA_0)/{name}", f"attn_pool.{name[0]}"
        )
    ),
    *_flax(
        _MAP_HEAD + "(?:MultiHeadDotProductAttention_0|MHDPA_0)/out", "attn_pool.proj", _dense_out
    ),
    *_flax_norm(_MAP_HEAD + "LayerNorm_0", "attn_pool.norm"),
    *_flax(_MAP_HEAD + "MlpBlock_0/Dense_0", "attn_pool.mlp.fc1"),
    *_flax(_MAP_HEAD + "MlpBlock_0/Dense_1", "attn_pool.mlp.fc2"),
)
_BIG_VISION = Layout(
    mark=r"Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel",
    rules=_npz(
        r"encoderblock_(?P<i>\d+)",
        "(?:MultiHeadDotProductAttention_0|MHDPA_0)",
        "LayerNorm_1",
        "MlpBlock_0",
        _MAP_RULES,
    ),
    unused=r"(params/)?(txt/.*|t|b|t_.*|b_.*)|opt/.*|pre_logits/.*",
)

LAYOUTS: dict[str, Layout] = {
    "dinov3": _DINOV3,  # before timm's, whose mark it has too
    "hf-dinov3": _HF_DINOV3,
    "timm": _TIMM,
    "hf-vit": _HF_VIT,
    "hf-dinov2": _HF_DINOV2,
    "hf-clip": _HF_CLIP,  # and SigLIP
    "clip": _CLIP,  # OpenAI's and open_clip's
    "augreg": _AUGREG,
    "big_vision": _BIG_VISION,
}


# Folders that wrap a module and say nothing of it: of torch.compile, FSDP, checkpointed
# activations and Lightning.
_WRAPPERS = (
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Blocks in chunks, as DINOv2 trains them: the second number counts the blocks.
_CHUNK = r"(?<![^.])blocks\.\d+\.(?=\d+\.)"


def unwrap_name(name: str) -> str:
    """Returns the name of a parameter without what wraps modules, and of a block without its chunk.

    Args:
        name: Such as `_orig_mod.blocks.0.3.norm1.weight`.

    Returns:
        The name, such as `blocks.3.norm1.weight`.
    """
    return re.sub(_CHUNK, "blocks.", re.sub(_WRAPPERS, "", name))


def find_layout(arrays: Iterable[str]) -> tuple[str, str]:
    """Returns the layout whose mark is among the names, and the folders before them.

    Args:
        arrays: The names, or arrays by their names.

    Returns:
        The layout's name, and folders such as "module.base_encoder.", in any order and nesting.

    Raises:
        MismatchedWeights: No mark is among the names, or one stands in several folders.
    """
    names = [unwrap_name(name) for name in arrays]
    for name, layout in LAYOUTS.items():
        mark = re.compile(rf"((?:[^./]*[./]){{0,16}})(?:{layout.mark})")
        found = {
            match[1]
            for each in names
            if (match := mark.fullmatch(each)) and not re.fullmatch(layout.unused, each)
        }
        if len(found) > 1:
            raise MismatchedWeights(explain_several(found))
        if found:
            return name, found.pop()
    shown = ", ".join(sorted(arrays)[:8])
    raise MismatchedWeights(
        f"no Vision Transformer of a known layout ({', '.join(LAYOUTS)}): its names begin"
        f" {shown or 'nowhere, there are none'}"
    )


def explain_several(folders: Iterable[str]) -> str:
    """Returns the sentence that asks which of several networks of a file is meant.

    Args:
        folders: That the names of the networks begin with, such as "student.backbone.".

    Returns:
        The sentence.
    """
    parts = [re.split("[./]", folder) for folder in sorted(folders)]
    places = enumerate(zip(*parts, strict=False))
    first = next((i for i, each in places if len(set(each)) > 1), 0)
    choices = " or ".join(f"--which {part[first]}" for part in parts if part[first])
    return f"several networks, under {', '.join(sorted(folders))}: choose with {choices} (which=)"


def _shorten(name: str, folders: str) -> list[str]:
    """A name without as many of the first folders as it has, then without fewer of them."""
    ends = [match.end() for match in re.finditer("[./]", folders)]
    return [name[end:] for end in [*reversed(ends), 0] if name.startswith(folders[:end])]


class Renamed(NamedTuple):
    """The parameters of a file by timm's names."""

    layout: str  # a key of `LAYOUTS`
    arrays: Arrays
    unused: tuple[str, ...]  # names in the file that no ViT uses
    folders: str  # what stood before the names, such as "module.base_encoder."


def to_names_of_timm(arrays: Mapping[str, np.ndarray], *, source: str) -> Renamed:
    """Returns the parameters by timm's names.

    Queries, keys and values stay together or apart, as they came. Folders before the names, in any
    order and nesting, are left out.

    Args:
        arrays: By the names of any publisher.
        source: The file, for messages.

    Returns:
        The parameters, the layout and the folders they came in, and the names that are not used.

    Raises:
        MismatchedWeights: No known layout, several networks, a network that our ViT cannot be
            (`refuse_others`), or names that the layout has no place for; the message lists them.
    """
    arrays = unstack_blocks(arrays)
    refuse_others({unwrap_name(name): array for name, array in arrays.items()}, source=source)
    try:
        name, folders = find_layout(arrays)
    except MismatchedWeights as error:
        raise MismatchedWeights(f"{source}: {error}") from None
    layout = LAYOUTS[name]
    found: Arrays = {}
    unused: list[str] = []
    unknown: list[str] = []
    for full, array in arrays.items():
        shorter = _shorten(unwrap_name(full), folders)
        if any(re.fullmatch(layout.unused, short) for short in shorter):
            unused.append(full)
            continue
        many = re.search(r"\d{10}", full)  # blocks, more than anyone has
        for pattern, ours, change in () if many else layout.rules:
            pattern = pattern.replace("(weight|bias)", "(?P<leaf>weight|bias)")
            match = re.fullmatch(pattern, shorter[0])
            if (
                match and match.expand(ours) not in found
            ):  # two names of one parameter: no place for the second
                found[match.expand(ours)] = (
                    array if change is None else _change(array, change, full, source)
                )
                break
        else:
            unknown.append(full)
    if odd := [
        f"{name} {array.dtype} {array.shape}"
        for name, array in found.items()
        if not array.ndim
        or array.dtype.kind in "biuScUOM"
        or not np.can_cast(array.dtype, np.float64, "same_kind")
    ]:
        raise MismatchedWeights(
            f"{source} has parameters that are no arrays of real numbers: {', '.join(odd)}"
        )
    unused += _without_logits(found, unused, arrays)
    if unknown:
        raise MismatchedWeights(
            f"{source} has {len(unknown)} names that a ViT of layout {name} has no place for:"
            f" {', '.join(sorted(unknown))}"
        )
    return Renamed(name, join_parts(found, source=source), tuple(unused), folders)


def _without_logits(
    found: Arrays, unused: list[str], arrays: Mapping[str, np.ndarray]
) -> list[str]:
    """Takes out the head of a network with a layer before it (`pre_logits`), and returns its names.

    Our ViT has no such layer, without which the logits would be others.
    """
    if not any(re.search(r"(^|/)pre_logits/", name) for name in unused):
        return []
    for leaf in ("weight", "bias"):
        found.pop(f"head.{leaf}", None)
    return [name for name in arrays if re.search(r"(^|/)head/(kernel|bias)$", name)]


def _change(
    array: np.ndarray, change: Callable[[np.ndarray], np.ndarray], name: str, source: str
) -> np.ndarray:
    try:
        return change(array)
    except (ValueError, IndexError):  # axes that this parameter cannot have
        raise MismatchedWeights(
            f"{source}: {name} is of shape {array.shape}, which this parameter cannot have"
        ) from None


def heads_of(arrays: Mapping[str, np.ndarray], encoder: str = "Transformer") -> int | None:
    """Returns the attention heads of a tower whose arrays have an axis for them, else None.

    Flax's own files have such an axis.

    Args:
        arrays: The arrays by their published names.
        encoder: The tower's name in them.
    """
    pattern = rf"(.*/)?{encoder}/encoderblock.*/query/kernel"
    return next(
        (
            array.shape[-2]
            for name, array in arrays.items()
            if re.fullmatch(pattern, name) and array.ndim > 2
        ),
        None,
    )


def unstack_blocks(arrays: Mapping[str, np.ndarray], encoder: str = "Transformer") -> Arrays:
    """Returns the arrays with one array for each block, where a scan keeps all blocks in one.

    Args:
        arrays: The arrays by their published names.
        encoder: The name of the tower whose blocks they are.
    """
    found: Arrays = {}
    for name, array in arrays.items():
        match = re.fullmatch(rf"((?:.*/)?{encoder}/encoderblock)(/.*)", name)
        if match and array.ndim > 0 and 0 < len(array) <= MOST_BLOCKS:
            found |= {f"{match[1]}_{block}{match[2]}": array[block] for block in range(len(array))}
        else:
            found[name] = array
    return found


def stack_blocks(arrays: Arrays, encoder: str = "Transformer") -> Arrays:
    """Returns the arrays with all blocks of a tower in one array, as a scan keeps them.

    Args:
        arrays: The arrays by their published names.
        encoder: The name of the tower whose blocks they are.
    """
    found: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        match = re.fullmatch(rf"((?:.*/)?{encoder}/encoderblock)_\d+(/.*)", name)
        found.setdefault(match[1] + match[2] if match else name, []).append(array)
    return {name: each[0] if name in arrays else np.stack(each) for name, each in found.items()}


def split_qkv(arrays: Arrays, *, source: str = "the checkpoint") -> Arrays:
    """Returns the arrays with the joined projections `qkv` and `kv` as single arrays.

    Args:
        arrays: The arrays by timm's names.
        source: The file, for messages.

    Raises:
        MismatchedWeights: A joined projection does not divide into its parts.
    """
    found: Arrays = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(.*)\.(qkv|kv)\.(weight|bias)", name)
        if not match:
            found[name] = array
            continue
        module, parts, leaf = match.groups()
        if len(array) % len(parts):
            raise MismatchedWeights(
                f"{source}: {name} {array.shape} does not hold {len(parts)} projections"
            )
        found |= {
            f"{module}.{part}.{leaf}": each
            for part, each in zip(parts, np.split(array, len(parts)), strict=True)
        }
    return found


def join_qkv(arrays: Arrays) -> Arrays:
    """Returns the arrays with projections joined as timm does.

    They are `qkv` in blocks, `q` and `kv` in the attention pooling.

    Args:
        arrays: The arrays by timm's names, with single projections.
    """
    found: Arrays = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(.*)\.(q|k|v)\.(weight|bias)", name)
        if not match:
            found[name] = array
            continue
        module, part, leaf = match.groups()
        together = "kv" if module == "attn_pool" else "qkv"
        if part == together[0]:
            found[f"{module}.{together}.{leaf}"] = np.concatenate(
                [arrays[f"{module}.{each}.{leaf}"] for each in together]
            )
        elif part not in together:
            found[name] = array
    return found
