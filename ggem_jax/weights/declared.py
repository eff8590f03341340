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

BESIDE = ("config.json", "open_clip_config.json", "preprocessor_config.json")

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
    ignored: tuple[str, ...] = ()  # files beside the weights that are of another network, and why


def read_declared(
    path: Path, sizes: Mapping[str, int], *, given: str | Path | None = None, tower: Tower = "image"
) -> Declared:
    """Returns what is declared of the weights in a file.

    Args:
        path: The file of weights.
        sizes: Its sizes by the keys of Hugging Face: `hidden_size`, `num_hidden_layers`,
            `patch_size`, `intermediate_size`. A file that names other ones is of another network.
        given: A file of settings, or a folder that holds one, that the user names; None reads the
            files beside the weights whose names are in `BESIDE`.
        tower: Which tower of a network with two.

    Returns:
        The settings. A file beside the weights that is of another network is left out and listed.

    Raises:
        UnreadableWeights: The file given cannot be read.
        MismatchedWeights: The file given is of another network, or two files contradict each other.
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
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if given is None or (named.is_dir() and not file.exists()):
                continue
            raise UnreadableWeights(f"{file} is not readable JSON: {error}") from None
        each = _declared(settings, file.name, sizes, tower)
        if each.ignored and given is not None:
            raise MismatchedWeights(
                f"{path} is not the network that {file} describes: {each.ignored[0]}"
            )
        found = _join(found, each, path)
    return found


def _declared(settings: Any, name: str, sizes: Mapping[str, int], tower: Tower) -> Declared:
    """What one file says, or nothing and the reason."""
    if not isinstance(settings, dict):
        return Declared(ignored=(f"{name} holds no settings by name",))
    if name == "preprocessor_config.json":
        return _with_normalisation(Declared(), settings, name, ("image_mean", "image_std"))
    if isinstance(settings.get("model_cfg"), dict):
        return _of_open_clip(settings, name, sizes, tower)
    if "architecture" in settings or "pretrained_cfg" in settings:
        return _of_timm(settings, name, sizes)
    return _of_hugging_face(settings, name, sizes, tower)


def _of_hugging_face(
    settings: dict[str, Any], name: str, sizes: Mapping[str, int], tower: Tower
) -> Declared:
    key = f"{_TOWERS[tower]}_config"
    kind = settings.get("model_type")
    own = settings
    if isinstance(settings.get(key), dict):
        own = settings[key]
        kind = own.get("model_type") or (f"{kind}_{_TOWERS[tower]}_model" if kind else None)
    defaults = HUGGING_FACE.get(kind, _Defaults()) if isinstance(kind, str) else _Defaults()
    if other := _other_sizes(own, sizes):
        return Declared(ignored=(f"{name} says {other}",))
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


def _of_timm(settings: dict[str, Any], name: str, sizes: Mapping[str, int]) -> Declared:
    arguments = settings.get("model_args") or {}
    pretrained = settings.get("pretrained_cfg") or {}
    if not isinstance(arguments, dict) or not isinstance(pretrained, dict):
        return Declared(ignored=(f"{name}: model_args and pretrained_cfg must be objects",))
    theirs = {
        "hidden_size": arguments.get("embed_dim", settings.get("num_features")),
        "num_hidden_layers": arguments.get("depth"),
        "patch_size": arguments.get("patch_size"),
    }
    if other := _other_sizes(theirs, sizes):
        return Declared(ignored=(f"{name} says {other}",))
    found = Declared()
    architecture = settings.get("architecture") or pretrained.get("architecture")
    if isinstance(architecture, str):
        told = {"hidden_size": theirs["hidden_size"], "patch_size": theirs["patch_size"]}
        untold = {key: size for key, size in sizes.items() if told.get(key) is None}
        if other := other_sizes_of_name(architecture, untold):
            return Declared(ignored=(f"{name} names {architecture}, which has {other}",))
        found = _with(found, "architecture", architecture, f"{name}: architecture {architecture}")
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
    settings: dict[str, Any], name: str, sizes: Mapping[str, int], tower: Tower
) -> Declared:
    model = settings["model_cfg"]
    own = model.get(f"{_TOWERS[tower]}_cfg")
    own = own if isinstance(own, dict) else {}
    theirs = {
        "hidden_size": own.get("width"),
        "num_hidden_layers": own.get("layers"),
        "patch_size": own.get("patch_size"),
    }
    if other := _other_sizes(theirs, sizes):
        return Declared(ignored=(f"{name} says {other}",))
    found = Declared()
    if tower == "image" and isinstance(own.get("timm_model_name"), str):
        architecture = own["timm_model_name"]
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


def _other_sizes(settings: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """The sizes that a file of settings says otherwise than the weights."""
    return ", ".join(
        f"{key} {settings[key]} where the weights have {size}"
        for key, size in sizes.items()
        if isinstance(settings.get(key), int | float) and settings[key] != size
    )


def _with(declared: Declared, name: str, value: Any, source: str) -> Declared:
    return dataclasses.replace(declared, sources=declared.sources | {name: source}, **{name: value})


def _with_normalisation(
    declared: Declared, settings: Mapping[str, Any], name: str, keys: tuple[str, str]
) -> Declared:
    try:
        mean, std = (tuple(float(value) for value in settings[key]) for key in keys)
    except (KeyError, TypeError, ValueError, OverflowError):
        return declared
    if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
        return declared
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
