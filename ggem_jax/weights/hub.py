"""Published weights by a short name, through the package huggingface_hub and into its cache.

    path = fetch("dinov2-small").path
    loaded = load_vit(path)

The cache is the one that every program with huggingface_hub shares (`HF_HOME`, `HF_HUB_CACHE`); it
alone is written to. Its folders carry the revision of a file, `snapshots/COMMIT/`, and its blobs
the SHA-256, so that no record beside it is needed: `FetchedFile` and `get --json` tell both.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ggem_jax.files.errors import UnreadableWeights

SITE = "https://huggingface.co"
SETTINGS = "config.json"  # needed beside the weights: it says what their shapes do not
IMAGES = "preprocessor_config.json"  # taken along where there is one


class Entry(NamedTuple):
    """Where the weights of a name are."""

    repo: str  # on huggingface.co
    about: str
    gated: bool = False  # whether its licence must be accepted there first
    # names of the file, of which the first that is there is taken
    files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")


_DINOV3 = "facebook/dinov3-vit{}16-pretrain-lvd1689m"
NAMES = {
    "dinov2-small": Entry("facebook/dinov2-small", "DINOv2 ViT-S/14"),
    "dinov2-base": Entry("facebook/dinov2-base", "DINOv2 ViT-B/14"),
    "dinov2-large": Entry("facebook/dinov2-large", "DINOv2 ViT-L/14"),
    "dinov3-small": Entry(_DINOV3.format("s"), "DINOv3 ViT-S/16", gated=True),
    "dinov3-base": Entry(_DINOV3.format("b"), "DINOv3 ViT-B/16", gated=True),
    "dinov3-large": Entry(_DINOV3.format("l"), "DINOv3 ViT-L/16", gated=True),
    "clip-b32": Entry("openai/clip-vit-base-patch32", "CLIP ViT-B/32 of OpenAI, both towers"),
    "clip-b16": Entry("openai/clip-vit-base-patch16", "CLIP ViT-B/16 of OpenAI, both towers"),
    "clip-l14": Entry("openai/clip-vit-large-patch14", "CLIP ViT-L/14 of OpenAI, both towers"),
    "laion-clip-b32": Entry(
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "CLIP ViT-B/32 of LAION, both towers"
    ),
    "laion-clip-b16": Entry(
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "CLIP ViT-B/16 of LAION, both towers"
    ),
    "laion-clip-l14": Entry(
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "CLIP ViT-L/14 of LAION, both towers"
    ),
    "siglip-b16": Entry("google/siglip-base-patch16-224", "SigLIP ViT-B/16, both towers"),
    "mae-base": Entry("facebook/vit-mae-base", "MAE ViT-B/16 with its decoder"),
    "deit-small": Entry("facebook/deit-small-patch16-224", "DeiT-S/16 with its ImageNet head"),
    "deit-base": Entry("facebook/deit-base-patch16-224", "DeiT-B/16 with its ImageNet head"),
}


@dataclass(frozen=True)
class FetchedFile:
    """A file of weights in the cache, with its settings beside it."""

    path: Path
    revision: str  # the commit that it is of
    sha256: str
    offline: str = ""  # why the hub was not asked, so that a newer revision may exist; "": it was


def fetch(name: str, revision: str | None = None) -> FetchedFile:
    """Returns the weights of a name; they are downloaded unless the cache has them.

    Args:
        name: A name of `NAMES`.
        revision: A commit, branch or tag of the repository; None is the newest commit of its branch
            main, or, where the hub cannot be reached, the one that the cache holds of this branch.

    Returns:
        The file, for `load_vit`. `config.json`, and `preprocessor_config.json` where there is one,
        stand beside it.

    Raises:
        UnreadableWeights: The files are neither in the cache nor to be had; the message names them,
            the page they are on, and the reason.
        ValueError: The name is unknown.
        ModuleNotFoundError: The package huggingface_hub is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"no weights are called {name}: the names are {', '.join(NAMES)}")
    entry, hub = NAMES[name], _package()
    commit_given = re.fullmatch("[0-9a-f]{40}", revision or "") is not None
    path = _cached(hub, entry, revision) if commit_given else None
    offline = ""
    try:
        if path is None:
            file, offline = _ask(hub, entry, revision)
            if not offline:
                path = Path(hub.hf_hub_download(entry.repo, file, revision=revision))
            elif (path := _cached(hub, entry, revision)) is None:
                raise UnreadableWeights(_message(name, revision, offline))
        for beside in (SETTINGS, IMAGES):
            _take_along(hub, entry.repo, beside, path.parent.name, bool(offline))
    except _failures(hub) as error:
        reason = offline or _reason(hub, error, entry, revision)
        raise UnreadableWeights(_message(name, revision, reason)) from None
    return FetchedFile(path, path.parent.name, _checksum(path), offline)


def _ask(hub: Any, entry: Entry, revision: str | None) -> tuple[str, str]:
    """The name of the file in the repository, or why the hub does not tell."""
    for file in entry.files:
        try:
            hub.get_hf_file_metadata(hub.hf_hub_url(entry.repo, file, revision=revision))
            return file, ""
        except hub.errors.RemoteEntryNotFoundError:
            continue
        except _failures(hub) as error:
            return "", _reason(hub, error, entry, revision)
    raise hub.errors.EntryNotFoundError


def _cached(hub: Any, entry: Entry, revision: str | None) -> Path | None:
    """The file in the cache, where its settings are there too."""
    for file in entry.files:
        found, settings = (
            hub.try_to_load_from_cache(entry.repo, each, revision=revision)
            for each in (file, SETTINGS)
        )
        if isinstance(found, str) and isinstance(settings, str):
            return Path(found)
    return None


def _take_along(hub: Any, repo: str, file: str, commit: str, offline: bool) -> None:
    try:
        hub.hf_hub_download(repo, file, revision=commit, local_files_only=offline)
    except hub.errors.EntryNotFoundError:
        if file == SETTINGS:
            raise


def _reason(hub: Any, error: Exception, entry: Entry, revision: str | None) -> str:
    """What went wrong, as a clause."""
    endpoint, errors = hub.constants.ENDPOINT, hub.errors
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"its repository has no revision {revision}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _reason(hub, error.__cause__, entry, revision)  # of a request that failed
    if isinstance(error, errors.EntryNotFoundError):
        return f"its repository lacks {' and '.join(entry.files)}, or {SETTINGS}"
    if status in (401, 403) and entry.gated:
        return "its licence must be accepted on that page first, and `hf auth login` run here"
    if status is not None:
        return f"{endpoint} answers {status}"
    if isinstance(error, errors.FileMetadataError):
        return f"{endpoint} does not answer as the hub does"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the cache'}: {error.strerror}"
    return f"{endpoint} does not answer"


def _message(name: str, revision: str | None, reason: str) -> str:
    entry = NAMES[name]
    page = f"{SITE}/{entry.repo}" + (f"/tree/{revision}" if revision else "")
    return (
        f"{name} cannot be fetched ({reason}): bring {' or '.join(entry.files)}, {SETTINGS} and"
        f" {IMAGES} from {page} into one folder, and give the path of the first"
    )


def _checksum(path: Path) -> str:
    """The SHA-256 of a file, which must be that of its name in the cache where it has one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", blob) and blob != found:
        raise UnreadableWeights(
            f"{path} is damaged, its SHA-256 is {found}: delete {path.resolve()} and fetch it again"
        )
    return found


def _failures(hub: Any) -> tuple[type[Exception], ...]:
    """What a request or a download raises, whichever HTTP client the package is built on."""
    return (OSError, hub.errors.EntryNotFoundError, hub.errors.HTTPError)


def _package() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise ModuleNotFoundError(
            "fetching weights by name needs the package huggingface_hub: pip install"
            " 'ggem-jax[hub]'"
        ) from None
    return huggingface_hub
