"""A ViT as files that other libraries load: weights in safetensors, with a `config.json` beside.

    loaded = load_vit("run/")  # or read_vit(file), which also keeps the second head of a DeiT
    export_vit(loaded, "out", to="hf")  # transformers.AutoModel.from_pretrained("out")
    export_vit(loaded, "out2", to="timm")  # timm.create_model("local-dir:out2", pretrained=True)

A network that the other library cannot compute is refused, so that every file that is written gives
the same tokens there. For images of another size, each library resamples the positions in its own
way.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import traverse_util

from ggem_jax.files.atomic import replacing
from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.files.normalisation import Normalisation
from ggem_jax.files.safetensors_files import write_safetensors
from ggem_jax.models.position import sincos_position
from ggem_jax.models.vit import MAP, ViT
from ggem_jax.pooling import avg_pool, cls_pool
from ggem_jax.weights.hugging_face import preprocessor, to_hugging_face
from ggem_jax.weights.load import LoadedViT, load_vit
from ggem_jax.weights.own_settings import HEADER, Facts, describe_settings
from ggem_jax.weights.timm_model import to_timm_model
from ggem_jax.weights.vit import PublishedViT
from ggem_jax.weights.vit_layouts import Arrays
from ggem_jax.weights.vit_table import Style, Trained

Target = Literal["flax", "timm", "hf"]

FOLDERS_FILE = "model.safetensors"  # what timm and Hugging Face look for in a folder

# fields of a config that the targets express or refuse, and those of training and of precision
_EXPRESSED = {
    *("patch", "width", "depth", "heads", "mlp_width", "image", "class_token", "registers"),
    *("position", "layer_scale", "gelu", "mlp", "patch_bias", "pre_norm", "post_norm", "qkv_bias"),
    *("norm_eps", "pool_order", "position_filter", "rope_base", "rope_dtype"),
    *("drop_path", "dropout", "dtype", "param_dtype", "remat"),
}


@dataclass(frozen=True)
class Exported:
    """What `export_vit` wrote."""

    files: tuple[Path, ...]  # the weights first
    arrays: int
    notes: tuple[str, ...]  # what the other library does not know, or does otherwise


def export_vit(
    vit: PublishedViT | LoadedViT,
    out: str | Path,
    *,
    to: Target = "flax",
    head: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Writes a ViT under the names of a library, and returns what was written.

    Args:
        vit: The network, of `read_vit` or `load_vit`.
        out: A file that ends in .safetensors, or a folder, in which the file is called
            `model.safetensors`. `config.json` stands beside the file; for "hf",
            `preprocessor_config.json` as well, where mean and deviation are known.
        to: "timm", "hf" (Hugging Face's transformers), or "flax", the names of our variables, which
            `load_vit` reads with every setting of the network.
        head: Whether to write the classification head, or the projection of CLIP or of a run.
        overwrite: Whether to replace JSON files that are there and say something else, and to
            remove a `preprocessor_config.json` where mean and deviation are not known. A file of
            weights is always replaced.

    Returns:
        The files, which appear together when they are complete.

    Raises:
        MismatchedWeights: The library has no model that computes the same; the message says why.
        ValueError: `out` or `to` is none of the above, or a JSON file is in the way.
        OSError: The files cannot be written.

    Example:
        >>> from ggem_jax.weights.export import export_vit
        >>> written = export_vit(load_vit(vit_file), vit_file.parent / "timm", to="timm")
        >>> [path.name for path in written.files]
        ['model.safetensors', 'config.json']
    """
    path = weights_path(out)
    if to not in ("flax", "timm", "hf"):
        raise ValueError(f"to must be flax, timm or hf, not {to!r}")
    if not head:
        vit = _without_head(vit)
    files: dict[str, Mapping[str, Any] | None] = {}
    metadata = None
    if to == "flax":
        model, normalised = _model_of(vit)
        arrays, facts = own_arrays(vit)
        files["config.json"] = describe_settings(model, normalised, facts)
        metadata = {HEADER: json.dumps(files["config.json"], default=_plain_number)}
        notes = []
        if isinstance(vit, PublishedViT) and vit.rest:
            notes.append("the second head, on the distillation token, is left out")
    else:
        plain = _plain(vit)
        convert = to_timm_model if to == "timm" else to_hugging_face
        arrays, settings = convert(plain)
        if to == "timm" and isinstance(vit, LoadedViT):
            add_timm_facts(settings, vit)
        files["config.json"] = settings
        if to == "hf" or plain.normalised is None:  # what is there would count, and be wrong
            files["preprocessor_config.json"] = preprocessor(plain) if to == "hf" else None
            _refuse_open_clip(path)
        notes = _notes(plain, to)
        if isinstance(vit, LoadedViT) and vit.several_labels:
            notes.append(
                "an image may have several of the classes: their probabilities are the sigmoid of"
                " the outputs, not the softmax"
            )
        if isinstance(vit, LoadedViT) and vit.projection is not None:
            notes.append("the head is the projection: divide its output by its length")
    written = _write(path, arrays, files, overwrite, metadata)
    return Exported(written, len(arrays), tuple(notes))


def own_arrays(vit: PublishedViT | LoadedViT) -> tuple[Arrays, Facts]:
    """Returns the arrays of a file of our own, and what `describe_settings` says beside them.

    Args:
        vit: The network, of `read_vit` or `load_vit`.

    Returns:
        The variables by their paths, the projection included, and what is known of the training.
    """
    arrays = traverse_util.flatten_dict(dict(vit.variables), sep="/")
    if isinstance(vit, PublishedViT):
        return arrays, Facts()
    beside = {f"params/projection/{name}": each for name, each in (vit.projection or {}).items()}
    return arrays | beside, Facts(vit.preprocessing, vit.classes, vit.several_labels)


@contextlib.contextmanager
def run_as_file(run: str | Path) -> Iterator[Path]:
    """Yields a file of our own with the network of a training run, as its evaluations use it.

    Equal weights give equal bytes. The file is removed when the block ends.

    Args:
        run: The folder of the run.

    Yields:
        The file.

    Raises:
        UnreadableWeights, MismatchedWeights, ModuleNotFoundError: As `load_vit`.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield export_vit(load_vit(run), Path(folder) / FOLDERS_FILE).files[0]


def weights_path(out: str | Path) -> Path:
    """Returns the file that weights are written to.

    Args:
        out: That file, which ends in .safetensors, or a folder.

    Returns:
        The file; `model.safetensors` in a folder.

    Raises:
        ValueError: The name has another ending, and is no folder.
    """
    path = Path(out).expanduser()
    if path.suffix == ".safetensors" and not path.is_dir():
        return path
    if path.suffix and not path.is_dir():
        raise ValueError(
            "the output is a safetensors file: give a name that ends in .safetensors, or that of a"
            f" folder, not {out}"
        )
    return path / FOLDERS_FILE


def _refuse_open_clip(path: Path) -> None:
    """Refuses a folder whose `open_clip_config.json` would say how images are normalised."""
    other = path.with_name("open_clip_config.json")
    if other.exists():
        raise ValueError(
            f"{other} is there, and would count for the new file too: write into another folder"
        )


def _model_of(vit: PublishedViT | LoadedViT) -> tuple[ViT, Normalisation | None]:
    if isinstance(vit, PublishedViT):
        return vit.model(), vit.normalised
    return vit.model, None if vit.mean is None or vit.std is None else (vit.mean, vit.std)


def _without_head(vit: PublishedViT | LoadedViT) -> PublishedViT | LoadedViT:
    params = {name: leaf for name, leaf in vit.variables["params"].items() if name != "head"}
    changes: dict[str, Any] = {"variables": {**vit.variables, "params": params}}
    if isinstance(vit, PublishedViT):
        return dataclasses.replace(vit, num_classes=0, rest={}, **changes)
    model = vit.model.clone(num_classes=0)
    gone: dict[str, Any] = {"classes": None, "several_labels": False, "projection": None}
    return dataclasses.replace(vit, model=model, **gone, **changes)


def _plain(vit: PublishedViT | LoadedViT) -> PublishedViT:
    """The network as other libraries have them: a pooling of theirs, and no sincos positions."""
    if isinstance(vit, LoadedViT):
        vit = vit.with_projection_as_head()
        model, normalised = _model_of(vit)
        style = Style(int(model.config.class_token))
        vit = PublishedViT(
            *("own", "flax", model.config, _pooling(model), model.num_classes, normalised, style),
            dict(vit.variables),
        )
    c = vit.config
    known = {field.name: field.default for field in dataclasses.fields(c)}
    if odd := [x for x in known if x not in _EXPRESSED and getattr(c, x) != known[x]]:
        named = ", ".join(f"{name}={getattr(c, name)!r}" for name in odd)
        raise MismatchedWeights(f"other libraries have no model for this network: it has {named}")
    if c.position != "sincos":
        return vit
    table = sincos_position(c.image // c.patch, c.width)
    own = np.zeros((int(c.class_token), c.width), np.float32)
    params = {**vit.variables["params"], "position": np.concatenate([own, table])}
    return dataclasses.replace(
        vit,
        config=dataclasses.replace(c, position="learned"),
        variables={**vit.variables, "params": params},
    )


def add_timm_facts(settings: dict[str, Any], vit: LoadedViT) -> None:
    """Adds what timm's `config.json` can say of a training run: classes, and how images are cut.

    Args:
        settings: The contents of the file, which has `pretrained_cfg`.
        vit: The network of the run.
    """
    if vit.classes is not None:
        settings["label_names"] = list(vit.classes)
    if vit.preprocessing is not None:
        how = vit.preprocessing
        mode = {"centre": "center", "squash": "squash"}[how.crop]
        share = _crop_share(how.side, how.size(how.side, how.side)[0])
        settings["pretrained_cfg"] |= {"crop_mode": mode, "crop_pct": share}


def _crop_share(side: int, shorter: int) -> float:
    """The share by which timm divides the side, and rounds down, to resize the shorter side."""
    share = side / shorter
    return share if side / share >= shorter else math.nextafter(share, 0)


def _pooling(model: ViT) -> Trained:
    """The name of a pooling that other libraries have."""
    function = inspect.unwrap(getattr(model.pooling, "func", model.pooling))
    if isinstance(model.pooling, MAP) and model.pooling.config is None and model.pooled != "all":
        return "map"
    if function is inspect.unwrap(cls_pool):
        return "cls"
    if function is inspect.unwrap(avg_pool) and model.pooled != "all":
        return "avg"
    tokens = " of all tokens" if model.pooled == "all" else ""
    raise MismatchedWeights(
        f"other libraries have no pooling {model.pooling!r}{tokens}: the class token, the mean of"
        ' the patches and attention pooling can be written, and to="flax" writes every pooling of'
        " named_pooling"
    )


def _notes(vit: PublishedViT, to: Target) -> list[str]:
    notes = []
    if vit.normalised is None:
        notes.append("mean and deviation of the images are not known, and not written")
    if to == "timm" and vit.config.norm_eps < 1e-6:
        notes.append(f"the norms of timm have an epsilon of 1e-06, not {vit.config.norm_eps:g}")
    if vit.config.position == "rope" and vit.config.rope_dtype != "float32":
        notes.append(
            f"the periods of the rotations are rounded to {vit.config.rope_dtype} here, and float32"
            " there: features differ a little"
        )
    if to == "hf" and vit.family == "mae":
        notes.append(
            "ViTMAEModel shuffles the patches: ViTModel.from_pretrained reads the same files and"
            " keeps their order"
        )
    if to == "hf" and vit.pooling == "avg":
        notes.append("Hugging Face's model returns the tokens: average the patches yourself")
    return notes


def _write(
    path: Path,
    arrays: Arrays,
    files: Mapping[str, Mapping[str, Any] | None],
    overwrite: bool,
    metadata: Mapping[str, str] | None,
) -> tuple[Path, ...]:
    """Writes all files, or none; those without contents are removed."""
    texts = {
        path.with_name(name): json.dumps(contents, indent=2, default=_plain_number) + "\n"
        for name, contents in files.items()
        if contents is not None
    }
    stale = [path.with_name(name) for name, contents in files.items() if contents is None]
    stale = [file for file in stale if file.exists()]
    for file in (path, *texts, *stale):
        if file.is_dir():
            raise ValueError(f"{file} is a folder: move it, or write into another folder")
    for file in (*texts, *stale):
        if not overwrite and file.exists() and not _says(file, texts.get(file)):
            raise ValueError(
                f"{file} is there and says something else: write into another folder, or replace it"
                " (--overwrite, overwrite=True)"
            )
    before = {file: file.read_bytes() if file.exists() else None for file in texts}
    new = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(replacing(path))
            write_safetensors(file, arrays, metadata=metadata)
            for file, text in texts.items():
                stack.enter_context(replacing(file)).write_text(text, encoding="utf-8")
        for file in stale:
            file.unlink(missing_ok=True)
    except BaseException as error:
        for file, contents in before.items():
            with contextlib.suppress(OSError):
                _restore(file, contents)
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    return (path, *texts)


def _plain_number(value: Any) -> Any:
    return value.item()  # of NumPy, which a config may hold


def _restore(file: Path, contents: bytes | None) -> None:
    """Gives a file its earlier contents, where they have changed; None: there was none."""
    if contents is None:
        file.unlink(missing_ok=True)
    elif file.read_bytes() != contents:
        file.write_bytes(contents)


def _says(file: Path, text: str | None) -> bool:
    if text is None:
        return False
    try:
        return json.loads(file.read_text(encoding="utf-8")) == json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
