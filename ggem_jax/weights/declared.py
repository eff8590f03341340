"""What a publisher's files of settings say of a network, beside its weights or given by the user.

Shapes do not say the number of heads, the GELU, the order of the norms or how images are
normalised. Publishers write these into small JSON files: `config.json` of Hugging Face and of timm,
`open_clip_config.json`, and `preprocessor_config.json`. A file is evidence only if the sizes that
it names are those of the weights.

References for the keys: huggingface/transformers, the `configuration_*.py` of the models named in
`HUGGING_FACE`; huggingface/pytorch-image-models 1.0.22, `models/_hub.py`; mlfoundations/open_clip,
`factory.py` and `model.py`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.files.normalisation import Normalisation
from ggem_jax.models.transformer import GELU

Tower = Literal["image", "text"]
Norms = Literal["pre", "post"]

_IMAGES = "preprocessor_config.json"
BESIDE = ("config.json", "open_clip_config.json", _IMAGES)

# `hidden_act` of Hugging Face, `act_layer` of timm
GELUS: dict[str, GELU] = {
    "gelu": "exact",
    "gelu_erf": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "quick_gelu": "quick",
    "quickgelu": "quick",
}


class _Defaults(dict[str, Any]):
    """Values of a Hugging Face model's config that its files may leave out."""


def _defaults(gelu: str, eps: float, heads: int = 12) -> _Defaults:
    return _Defaults(num_attention_heads=heads, hidden_act=gelu, layer_norm_eps=eps)


# model_type -> defaults of its config class; files of SigLIP, for one, hold nothing else
HUGGING_FACE: dict[str, _Defaults] = {
    "vit": _defaults("gelu", 1e-12),
    "deit": _defaults("gelu", 1e-12),
    "vit_mae": _defaults("gelu", 1e-12),
    "vit_msn": _defaults("gelu", 1e-6),
    "ijepa": _defaults("gelu", 1e-12),
    "dinov2": _defaults("gelu", 1e-6),
    "dinov2_with_registers": _defaults("gelu", 1e-6),
    "dinov3_vit": _defaults("gelu", 1e-5, 6),
    "clip": _defaults("quick_gelu", 1e-5),
    "clip_vision_model": _defaults("quick_gelu", 1e-5),
    "clip_text_model": _defaults("quick_gelu", 1e-5, 8),
    "siglip": _defaults("gelu_pytorch_tanh", 1e-6),
    "siglip_vision_model": _defaults("gelu_pytorch_tanh", 1e-6),
    "siglip_text_model": _defaults("gelu_pytorch_tanh", 1e-6),
}
# `global_pool` of timm. Only among `model_args` does it belong to the weights: for all else it is a
# default, that of MAE's files too.
_POOLINGS_OF_TIMM = {"token": "cls", "avg": "avg", "map": "map"}
# the tower's config where a file has one for each tower: its key, and what its type is called
_TOWERS: dict[Tower, str] = {"image": "vision", "text": "text"}


# layout -> patterns of the `model_type` of its files
_KINDS_OF_LAYOUT = {
    "hf-vit": r"vit|deit|vit_mae|vit_msn|ijepa",
    "hf-dinov2": r"dinov2\w*",
    "dinov3": "dinov3_vit",
    "hf-dinov3": "dinov3_vit",
}
# family -> the same, for the layouts that more than one of Hugging Face's models fits
_KINDS_OF_FAMILY = {"clip": r"clip\w*", "siglip": r"siglip\w*", "dinov3": "dinov3_vit"}
# part of a name of timm -> the families that its networks are read as
_FAMILIES_OF_NAME = (
    ("_siglip_gap_", ("vit",)),
    ("_siglip_", ("siglip",)),
    ("_clip_", ("clip",)),
    ("_dinov3", ("dinov3",)),
    ("_dinov2", ("dinov2", "deit3", "vit")),
)
# options of open_clip's `vision_cfg` that change the network -> the values that do not
_OF_OPEN_CLIP: dict[str, tuple[Any, ...]] = {
    "pool_type": ("tok", None),
    **dict.fromkeys(
        (
            "final_ln_after_pool", "attentional_pool", "global_average_pool", "input_patchnorm",
            "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn",
            "scale_fc",
        ),
        (False, None),
    ),
}  # fmt: skip


# channels of a token by the word for the size in timm's names, where it stands for one
WIDTHS = {
    "tiny": (192,), "wee": (256,), "pwee": (256,), "xsmall": (256,), "little": (320,),
    "small": (384,), "medium": (512,), "mediumd": (512,), "betwixt": (640,), "base": (768, 896),
    "so150m": (896,), "so150m2": (832,), "large": (1024,), "so400m": (1152,), "huge": (1280,),
    "giant": (1408, 1536), "giantopt": (1536,), "gigantic": (1664,), "7b": (4096,),
}  # fmt: skip
_NAME = re.compile(r"(?:vit|deit|deit3|flexivit|eva|beit3)_([a-z0-9]+)(?:_\w+)?(?:\.\w+)?")


def is_name(text: str) -> bool:
    """Returns whether a text reads as the name of a ViT in timm.

    Args:
        text: Such as "vit_base_patch16_224" or "deit3_small_patch16_224.fb_in1k".
    """
    return _NAME.fullmatch(text) is not None


def other_sizes_of_name(name: str, sizes: Mapping[str, int]) -> str:
    """Returns in what a name of timm contradicts the sizes of a file, or "".

    Args:
        name: The name of a model of timm.
        sizes: `hidden_size` and `patch_size` of the weights.
    """
    found = _NAME.fullmatch(name)
    widths = WIDTHS.get(found[1], ()) if found else ()
    patch = re.search(r"_patch(\d+)", name)
    faults = []
    if widths and sizes.get("hidden_size", widths[0]) not in widths:
        which = " or ".join(map(str, widths))
        faults.append(f"width {which} where the weights have {sizes['hidden_size']}")
    if patch and sizes.get("patch_size", int(patch[1])) != int(patch[1]):
        faults.append(f"patches of {patch[1]} where the weights have {sizes['patch_size']}")
    return " and ".join(faults)


@dataclass(frozen=True)
class Facts:
    """What the names and shapes of a file tell; the tables are looked up with it."""

    family: str
    layout: str
    width: int
    patch: int = 0
    image: int = 0
    class_token: bool = True
    final_norm: Literal["norm", "fc_norm"] = "norm"
    qkv_bias: bool = True
    gated: bool = False
    of_openai: bool = False  # buffers that only OpenAI's own files of CLIP hold
    of_moco: bool = False  # MoCo v3's folder of names
    of_visual: bool = False  # a folder "visual", as in SLIP's files
    fixed_positions: bool = False  # those of `architecture.has_fixed_positions`
    mlp_width: int = 0
    depth: int = 0


@dataclass(frozen=True)
class Declared:
    """Settings that files of a publisher declare, each None where none does."""

    heads: int | None = None
    activation: str | None = None  # of the MLP, by a key of `GELUS`, or another one's own name
    norm_eps: float | None = None
    rope_base: float | None = None  # of the periods of rotary positions
    norm: Norms | None = None
    normalisation: Normalisation | None = None
    architecture: str | None = None  # the name of a model of timm
    pooling: Literal["cls", "avg", "map"] | None = None
    sources: dict[str, str] = field(default_factory=dict)  # field -> file and key
    open_clip: bool | None = None  # True: a file of open_clip describes the tower
    ignored: tuple[str, ...] = ()  # files beside the weights that are of another network, and why


def other_kind_of_name(name: str, facts: Facts, settings: Mapping[str, Any] | None = None) -> str:
    """Returns in what a name of timm contradicts the kind of network in a file, or "".

    Args:
        name: The name of a model of timm.
        facts: What names and shapes of the file say.
        settings: `model_args` of timm's config.json, which overrule the name.
    """
    settings = settings or {}
    for part, families in _FAMILIES_OF_NAME:
        if re.search(part, name) and not (part == "_dinov2" and "num_heads" in settings):
            if facts.family not in families:
                return f"other parameters than the weights, which are of family {facts.family}"
            break
    normed = "clip" in name or settings.get("pre_norm") is True
    if facts.family == "clip" and is_name(name) and not normed:
        return "no norm before its blocks where the weights have one"
    pooled = re.search("siglip|_map_", name) or settings.get("global_pool") == "map"
    if facts.family == "siglip" and is_name(name) and not pooled:
        return "no attention pooling where the weights have it"
    has = {"class_token": facts.class_token, "qkv_bias": facts.qkv_bias}
    expected = {}
    if "_rpn_" in name:
        expected = {"class_token": False, "qkv_bias": False}
    elif "_gap_" in name:
        expected = {"class_token": False}
    told = ("class_token", "qkv_bias") if "_rpn_" in name else ("class_token",)
    expected |= {key: settings[key] for key in told if isinstance(settings.get(key), bool)}
    faults = [
        f"{key} {value} where the weights have {has[key]}"
        for key, value in expected.items()
        if value != has[key]
    ]
    return " and ".join(faults)


def _other_kind(kind: Any, facts: Facts | None) -> str:
    """In what a `model_type` of Hugging Face contradicts the weights, or ""."""
    if kind is None or facts is None:
        return ""
    by_layout = _KINDS_OF_LAYOUT.get(facts.layout)
    pattern = by_layout or _KINDS_OF_FAMILY.get(facts.family)
    if pattern is None:  # of other publishers' names: anything but what a norm or a pooling shows
        fits = not re.fullmatch("|".join(_KINDS_OF_FAMILY.values()), str(kind))
    else:
        fits = re.fullmatch(pattern, str(kind)) is not None
    if fits:
        return ""
    return (
        f"model_type {kind} where the weights are of layout {facts.layout}, family {facts.family}"
    )


def read_declared(
    path: Path,
    sizes: Mapping[str, int],
    *,
    given: str | Path | None = None,
    tower: Tower = "image",
    facts: Facts | None = None,
) -> Declared:
    """Returns what is declared of the weights in a file.

    Args:
        path: The file of weights.
        sizes: Its sizes by the keys of Hugging Face: `hidden_size`, `num_hidden_layers`,
            `patch_size`, `intermediate_size`. A file that names other ones is of another network.
        given: A file of settings, or a folder that holds one, that the user names; None reads the
            files beside the weights whose names are in `BESIDE`.
        tower: Which tower of a network with two.
        facts: What names and shapes of the weights say; None: only sizes are compared.

    Returns:
        The settings. A file beside the weights that is of another network is left out and listed.

    Raises:
        UnreadableWeights: A file of settings cannot be read.
        MismatchedWeights: The file given is of another network, two files contradict each other, or
            one declares what our ViT cannot be.
    """
    if given is None:
        files = [path.with_name(name) for name in BESIDE]
    else:
        named = Path(given).expanduser()
        files = [named / name for name in BESIDE] if named.is_dir() else [named]
        if not any(file.is_file() for file in files):
            raise UnreadableWeights(
                f"{named} is not a file of settings: give a config.json of Hugging Face or timm,"
                " an open_clip_config.json, or the folder of one"
            )
    found = Declared()
    for file in files:
        if not file.is_file() and (given is None or named.is_dir()):
            continue
        if file.name == _IMAGES and any(each.startswith(BESIDE[0]) for each in found.ignored):
            reason = f"{file.name} is left out with the config.json beside it"
            found = dataclasses.replace(found, ignored=(*found.ignored, reason))
            continue
        try:
            settings = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise UnreadableWeights(
                f"{file} is not readable JSON: {error}; mend the file, or remove it"
            ) from None
        each = _declared(settings, file.name, sizes, tower, facts)
        if each.ignored and given is not None:
            raise MismatchedWeights(
                f"{path} is not the network that {file} describes: {each.ignored[0]}"
            )
        found = _join(found, each, path)
    return found


def _declared(
    settings: Any, name: str, sizes: Mapping[str, int], tower: Tower, facts: Facts | None
) -> Declared:
    """What one file says, or nothing and the reason."""
    if not isinstance(settings, dict):
        return Declared(ignored=(f"{name} holds no settings by name",))
    if name == _IMAGES:
        _check_preprocessing(settings, name)
        return _with_normalisation(Declared(), settings, name, ("image_mean", "image_std"))
    if isinstance(settings.get("model_cfg"), dict):
        return _of_open_clip(settings, name, sizes, tower, facts)
    if "architecture" in settings or "pretrained_cfg" in settings:
        return _of_timm(settings, name, sizes, facts)
    return _of_hugging_face(settings, name, sizes, tower, facts)


def _of_hugging_face(
    settings: dict[str, Any],
    name: str,
    sizes: Mapping[str, int],
    tower: Tower,
    facts: Facts | None,
) -> Declared:
    key = f"{_TOWERS[tower]}_config"
    kind = settings.get("model_type")
    own = settings
    if isinstance(settings.get(key), dict):
        own = settings[key]
        kind = own.get("model_type") or (f"{kind}_{_TOWERS[tower]}_model" if kind else None)
    defaults = HUGGING_FACE.get(kind, _Defaults()) if isinstance(kind, str) else _Defaults()
    if other := _other_kind(kind, facts) or _other_sizes(own, sizes, name):
        return Declared(ignored=(f"{name} says {other}",))
    _check_square(own.get("image_size"), name, "image_size")
    found = Declared()
    for setting, theirs, convert in (
        ("heads", "num_attention_heads", _whole),
        ("activation", "hidden_act", _activation),
        ("norm_eps", "layer_norm_eps", _positive),
    ):
        if theirs in own:
            found = _with(found, setting, convert(own[theirs], name, theirs), f"{name}: {theirs}")
        elif defaults:
            value = convert(defaults[theirs], name, theirs)
            found = _with(found, setting, value, f"{name}: model_type {kind}")
    if kind == "dinov3_vit" and "rope_theta" in own:
        base = _base(own["rope_theta"], name, "rope_theta")
        found = _with(found, "rope_base", base, f"{name}: rope_theta")
    if kind == "vit_mae":
        found = _with(found, "pooling", "avg", f"{name}: model_type {kind}")
    return found


def _of_timm(
    settings: dict[str, Any], name: str, sizes: Mapping[str, int], facts: Facts | None
) -> Declared:
    arguments = settings.get("model_args") or {}
    pretrained = settings.get("pretrained_cfg") or {}
    if not isinstance(arguments, dict) or not isinstance(pretrained, dict):
        return Declared(ignored=(f"{name}: model_args and pretrained_cfg must be objects",))
    theirs = {
        "hidden_size": arguments.get("embed_dim", settings.get("num_features")),
        "num_hidden_layers": arguments.get("depth"),
        "patch_size": arguments.get("patch_size"),
    }
    if other := _other_sizes(theirs, sizes, name):
        return Declared(ignored=(f"{name} says {other}",))
    found = Declared()
    architecture = settings.get("architecture") or pretrained.get("architecture")
    if isinstance(architecture, str):
        told = {"hidden_size": theirs["hidden_size"], "patch_size": theirs["patch_size"]}
        untold = {key: size for key, size in sizes.items() if told.get(key) is None}
        other = other_sizes_of_name(architecture, untold)
        if not other and facts is not None:
            other = other_kind_of_name(architecture, facts, arguments)
        if other:
            return Declared(ignored=(f"{name} names {architecture}, which has {other}",))
        found = _with(found, "architecture", architecture, f"{name}: architecture {architecture}")
    _check_square(arguments.get("img_size"), name, "img_size")
    images = pretrained.get("input_size")
    _check_square(images[1:] if isinstance(images, list) else None, name, "input_size")
    if "num_heads" in arguments:
        heads = _whole(arguments["num_heads"], name, "num_heads")
        found = _with(found, "heads", heads, f"{name}: num_heads")
    if "rope_temperature" in arguments:
        base = _base(arguments["rope_temperature"], name, "rope_temperature")
        found = _with(found, "rope_base", base, f"{name}: rope_temperature")
    if "act_layer" in arguments:
        activation = _activation(arguments["act_layer"], name, "act_layer")
        found = _with(found, "activation", activation, f"{name}: act_layer")
    if "block_fn" in arguments:
        norm: Norms = "post" if "ResPost" in str(arguments["block_fn"]) else "pre"
        found = _with(found, "norm", norm, f"{name}: block_fn")
    pooling = arguments.get("global_pool")
    if isinstance(pooling, str) and pooling in _POOLINGS_OF_TIMM:
        pooling = _POOLINGS_OF_TIMM[pooling]
        found = _with(found, "pooling", pooling, f"{name}: global_pool")
    return _with_normalisation(found, pretrained, name, ("mean", "std"))


def _of_open_clip(
    settings: dict[str, Any],
    name: str,
    sizes: Mapping[str, int],
    tower: Tower,
    facts: Facts | None,
) -> Declared:
    model = settings["model_cfg"]
    own = model.get(f"{_TOWERS[tower]}_cfg")
    own = own if isinstance(own, dict) else {}
    theirs = {
        "hidden_size": own.get("width"),
        "num_hidden_layers": own.get("layers"),
        "patch_size": own.get("patch_size"),
    }
    if other := _other_sizes(theirs, sizes, name):
        return Declared(ignored=(f"{name} says {other}",))
    found = Declared()
    if tower == "image":
        _check_open_clip(own, name, facts)
        found = _with(found, "open_clip", True, f"{name}: vision_cfg")
    if tower == "image" and isinstance(own.get("timm_model_name"), str):
        architecture = own["timm_model_name"]
        untold = {key: size for key, size in sizes.items() if theirs.get(key) is None}
        other = other_sizes_of_name(architecture, untold)
        if not other and facts is not None:
            other = other_kind_of_name(architecture, facts)
        if other:
            return Declared(ignored=(f"{name} names {architecture}, which has {other}",))
        found = _with(found, "architecture", architecture, f"{name}: {architecture} of timm")
    elif "width" in own:
        width = _whole(own["width"], name, "width")
        if "heads" in own:
            heads, key = _whole(own["heads"], name, "heads"), "heads"
        else:
            heads, key = (
                width // _whole(own.get("head_width", 64), name, "head_width"),
                "head_width",
            )
        found = _with(found, "heads", heads, f"{name}: {key}")
        approximate = _object(own, "act_kwargs", name).get("approximate")
        quick = bool(model.get("quick_gelu", False))
        activation = "quick_gelu" if quick else "gelu_tanh" if approximate == "tanh" else "gelu"
        found = _with(found, "activation", activation, f"{name}: quick_gelu {quick}")
        eps = _positive(_object(own, "norm_kwargs", name).get("eps", 1e-5), name, "eps")
        found = _with(found, "norm_eps", eps, f"{name}: the norms of open_clip")
    images = settings.get("preprocess_cfg")
    return _with_normalisation(
        found, images if isinstance(images, dict) else {}, name, ("mean", "std")
    )


def _check_open_clip(own: Mapping[str, Any], name: str, facts: Facts | None) -> None:
    """Raises `MismatchedWeights` for options of open_clip that make another network than ours."""
    _check_square(own.get("image_size"), name, "image_size")
    other = [key for key, same in _OF_OPEN_CLIP.items() if own.get(key) not in same]
    if own.get("no_ln_pre") and (other or (facts is not None and facts.family == "clip")):
        other.append("no_ln_pre")
    if facts is not None and facts.layout == "clip" and own.get("timm_model_name"):
        other.append("timm_model_name")
    if other:
        told = ", ".join(f"{key} {own[key]!r}" for key in other)
        raise MismatchedWeights(
            f"{name} declares a network of open_clip that our ViT would read as another one: {told}"
        )


def _check_square(size: Any, name: str, key: str) -> None:
    """Raises `MismatchedWeights` for images with sides of different length."""
    sides = list(size.values()) if isinstance(size, dict) else size
    if isinstance(sides, list) and any(side != sides[0] for side in sides):
        raise MismatchedWeights(
            f"{name}: {key} {size} is not square, and the positions of our ViT are a square grid"
        )


def _check_preprocessing(settings: Mapping[str, Any], name: str) -> None:
    """Raises `MismatchedWeights` where images are not scaled to [0, 1] and then normalised."""
    for key in ("do_normalize", "do_rescale"):
        if settings.get(key) is False:
            raise MismatchedWeights(
                f"{name}: {key} is false, where we scale images to [0, 1] and normalise them:"
                " remove the file if it is not of these weights"
            )
    factor = settings.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise MismatchedWeights(
            f"{name}: rescale_factor is {factor!r}, where we scale images by 1/255"
        )


def _other_sizes(settings: Mapping[str, Any], sizes: Mapping[str, int], name: str) -> str:
    """The sizes that a file of settings says otherwise than the weights."""
    other = []
    for key, size in sizes.items():
        value = settings.get(key)
        if key == "patch_size" and isinstance(value, list) and value == value[:1] * 2:
            value = value[0]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MismatchedWeights(f"{name}: {key} must be a number, not {value!r}")
        if value != size:
            other.append(f"{key} {value} where the weights have {size}")
    return ", ".join(other)


def _with(declared: Declared, name: str, value: Any, source: str) -> Declared:
    return dataclasses.replace(declared, sources=declared.sources | {name: source}, **{name: value})


def _with_normalisation(
    declared: Declared, settings: Mapping[str, Any], name: str, keys: tuple[str, str]
) -> Declared:
    try:
        mean, std = (tuple(float(value) for value in settings[key]) for key in keys)
    except (KeyError, TypeError, ValueError, OverflowError):
        return declared
    if len(mean) != 3 or len(std) != 3:
        return declared
    if not all(0 <= value <= 1 for value in (*mean, *std)) or not min(std) > 0:
        raise MismatchedWeights(
            f"{name}: {keys[0]} {list(mean)} and {keys[1]} {list(std)} must be of images in [0, 1],"
            " with deviations above 0"
        )
    return _with(declared, "normalisation", (mean, std), f"{name}: {keys[0]}, {keys[1]}")


_FIRST_COUNTS = ("normalisation", "architecture")  # of which two files may speak differently


def _join(first: Declared, second: Declared, path: Path) -> Declared:
    """Both; raises `MismatchedWeights` where they contradict each other."""
    for name, source in second.sources.items():
        before, now = getattr(first, name), getattr(second, name)
        if name == "activation":
            before, now = GELUS.get(before or "", before), GELUS.get(now, now)
        if name not in _FIRST_COUNTS and before is not None and before != now:
            raise MismatchedWeights(
                f"{path}: {first.sources[name]} and {source} contradict each other ({before} and"
                f" {now}): remove one of the files, or name the right one as the architecture"
            )
    new = [name for name in second.sources if name not in first.sources]
    changes = {name: getattr(second, name) for name in new}
    return dataclasses.replace(
        first,
        sources=second.sources | first.sources,
        ignored=first.ignored + second.ignored,
        **changes,
    )


def _object(settings: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    value = settings.get(key) or {}
    if not isinstance(value, dict):
        raise MismatchedWeights(f"{name}: {key} must hold settings by name, not {value!r}")
    return value


def _whole(value: Any, name: str, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**16:
        raise MismatchedWeights(
            f"{name}: {key} must be a whole number from 1 to 65535, not {value!r}"
        )
    return value


def _positive(value: Any, name: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise MismatchedWeights(
            f"{name}: {key} must be a number above 0 and below 1, not {value!r}"
        )
    return float(value)


def _base(value: Any, name: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise MismatchedWeights(f"{name}: {key} must be a number above 0, not {value!r}")
    return float(value)


def _activation(value: Any, name: str, key: str) -> str:
    if not isinstance(value, str):
        raise MismatchedWeights(f"{name}: {key} must be the name of a GELU, not {value!r}")
    return value.lower()
