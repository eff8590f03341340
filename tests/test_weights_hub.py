"""ggem_jax/weights/hub.py: weights by name, from a local stand-in of the hub and from its cache."""

import hashlib
import http.server
import json
import threading
from functools import partial

import huggingface_hub.constants
import numpy as np
import pytest
from test_weights_vit import recorded

from ggem_jax.weights import UnreadableWeights, write_safetensors
from ggem_jax.weights.__main__ import main
from ggem_jax.weights.hub import NAMES, fetch
from ggem_jax.weights.load import load_vit

OLD, NEW = "a" * 40, "b" * 40  # commits


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers `GET` and `HEAD` of /REPOSITORY/resolve/REVISION/FILE as huggingface.co does."""

    def __init__(self, site, *args):
        self.site = site
        super().__init__(*args)

    def do_HEAD(self):
        self.site.asked.append(self.path)
        repo, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit = self.site.commits.get(revision)
        files = self.site.files.get((repo, commit), {})
        if self.site.error:
            return self.refuse(*self.site.error)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if name not in files:
            return self.refuse(404, "EntryNotFound", commit)
        content = files[name]
        kind = "sha256" if name.startswith("model") else "sha1"  # of large files, and of others
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.new(kind, content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def do_GET(self):
        content = self.do_HEAD()
        if content is not None:
            self.wfile.write(content[: self.site.cut])

    def refuse(self, status, code, commit=None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()

    def log_message(self, *args):
        pass


class Site:
    """What the stand-in holds."""

    def __init__(self):
        self.files = {}  # repository and commit -> name -> bytes
        self.commits = {"main": NEW, NEW: NEW, OLD: OLD, "v1": OLD}
        self.error = None  # status and code, whatever is asked
        self.cut = None  # bytes after which a download breaks off
        self.asked = []


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The stand-in, with two revisions of a small DINOv2, and an empty cache."""
    site = Site()
    for commit, scale in ((OLD, 1), (NEW, 2)):
        weights = {name: scale * array for name, array in recorded("hf-dinov2")[0].items()}
        write_safetensors(tmp_path / "made.safetensors", weights)
        site.files["facebook/dinov2-small", commit] = {
            "model.safetensors": (tmp_path / "made.safetensors").read_bytes(),
            "config.json": json.dumps(
                {"model_type": "dinov2", "num_attention_heads": 2, "hidden_size": 16}
            ).encode(),
            "preprocessor_config.json": json.dumps(
                {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.25]}
            ).encode(),
        }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, site))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    at = f"http://127.0.0.1:{server.server_port}"
    site.environment = {
        "HF_ENDPOINT": at,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": at,
        "HUGGINGFACE_CO_URL_TEMPLATE": at + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        assert hasattr(constants, name)
        monkeypatch.setattr(constants, name, value)
    site.close = lambda: (server.shutdown(), server.server_close(), thread.join())
    yield site
    site.close()


def test_the_newest_revision_is_fetched_with_its_settings(site, tmp_path):
    found = fetch("dinov2-small")
    content = site.files["facebook/dinov2-small", NEW]["model.safetensors"]
    assert (found.revision, found.offline) == (NEW, "")
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.path.read_bytes() == content
    assert found.path.parent.name == NEW
    names = {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert {path.name for path in found.path.parent.iterdir()} == names
    loaded = load_vit(found.path)
    assert loaded.mean == (0.1, 0.2, 0.3)
    assert loaded.model.config.width == 16


def test_a_revision_is_fetched_and_kept(site):
    new = fetch("dinov2-small")
    for revision in ("v1", OLD):
        old = fetch("dinov2-small", revision)
        assert old.revision == OLD
        assert old.sha256 != new.sha256
    site.asked.clear()
    assert fetch("dinov2-small", NEW) == new
    assert not any("model" in path for path in site.asked)  # a commit never changes


def test_without_the_hub_the_cache_is_used_and_says_so(site, monkeypatch):
    before = fetch("dinov2-small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = fetch("dinov2-small")
    assert (again.path, again.sha256) == (before.path, before.sha256)
    assert again.offline == "HF_HUB_OFFLINE is set"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    site.error = (503, "")
    assert "answers 503" in fetch("dinov2-small").offline
    site.close()
    site.close = lambda: None
    assert "does not answer" in fetch("dinov2-small").offline
    assert fetch("dinov2-small", NEW).offline == ""


BRING = (
    "bring model.safetensors or pytorch_model.bin, config.json and preprocessor_config.json from"
    " https://huggingface.co/{} into one folder, and give the path of the first"
)


@pytest.mark.parametrize(
    ("error", "name", "reason"),
    [
        (None, "dinov2-small", "does not answer"),
        ((503, ""), "dinov2-small", "answers 503"),
        ((401, "RepoNotFound"), "dinov2-small", "answers 401"),
        ((401, "GatedRepo"), "dinov3-base", "its licence must be accepted on that page first"),
        ((403, "GatedRepo"), "dinov3-base", "`hf auth login`"),
        ((404, "EntryNotFound"), "mae-base", "its repository lacks model.safetensors"),
    ],
)
def test_what_cannot_be_fetched_is_named_in_one_sentence(error, name, reason, site):
    site.error = error
    if error is None:
        site.close()
        site.close = lambda: None
    with pytest.raises(UnreadableWeights) as caught:
        fetch(name)
    said = str(caught.value)
    assert reason in said
    assert said.endswith(BRING.format(NAMES[name].repo))
    assert "\n" not in said


def test_an_unknown_revision_is_no_reason_for_another(site):
    fetch("dinov2-small")
    with pytest.raises(UnreadableWeights, match=r"has no revision v9\).*dinov2-small/tree/v9 into"):
        fetch("dinov2-small", "v9")
    with pytest.raises(ValueError, match="no weights are called dinov2: the names are dinov2-sma"):
        fetch("dinov2")


def test_older_repositories_have_the_file_of_pytorch(site, tmp_path):
    files = site.files["facebook/dinov2-small", NEW]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    del files["preprocessor_config.json"]
    found = fetch("dinov2-small")
    assert found.path.name == "pytorch_model.bin"
    assert found.revision == NEW
    del files["config.json"]
    site.commits["main"] = OLD
    del site.files["facebook/dinov2-small", OLD]["config.json"]
    with pytest.raises(UnreadableWeights, match=r"lacks .* or config\.json"):
        fetch("dinov2-small")


def test_a_download_that_breaks_off_leaves_no_file(site, monkeypatch):
    site.cut = 1000
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before it is tried again
    with pytest.raises(UnreadableWeights, match="dinov2-small cannot be fetched"):
        fetch("dinov2-small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnreadableWeights, match="HF_HUB_OFFLINE is set"):
        fetch("dinov2-small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    site.cut = None
    assert fetch("dinov2-small").offline == ""


def test_a_damaged_file_in_the_cache_is_refused(site):
    blob = fetch("dinov2-small").path.resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(UnreadableWeights, match=f"is damaged, its SHA-256 .* delete {blob}"):
        fetch("dinov2-small")


def test_the_command_lists_and_fetches(site, tool, capsys):
    assert main(["get"]) == 0
    said = capsys.readouterr().out
    assert all(name in said and entry.repo in said for name, entry in NAMES.items())
    assert said.count("accept the licence there first") == 3
    assert main(["get", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mae-base"]["repo"] == "facebook/vit-mae-base"
    run = tool("ggem_jax.weights", "get", "dinov2-small", "--json", environment=site.environment)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    found = json.loads(out)
    assert found["revision"] == NEW
    assert found["path"].startswith(site.environment["HF_HOME"])
    assert main(["get", "dinov2-small", "--revision", "v1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"snapshots/{OLD}/model.safetensors")
    assert lines[1] == f"revision {OLD}"
    assert lines[2].startswith("sha256 ")
    site.error = (503, "")
    assert main(["get", "dinov2-small", "--revision", "v1"]) == 0
    assert "note: from the cache, a newer revision may exist" in capsys.readouterr().out
    assert main(["get", "mae-base"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_without_the_package_its_name_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ggem-jax\[hub\]'"):
        fetch("mae-base")


def test_the_names_are_of_known_families():
    kinds = ("dinov2", "dinov3", "clip", "laion-clip", "siglip", "mae", "deit")
    assert {name.rpartition("-")[0] for name in NAMES} == set(kinds)
    assert np.all([entry.gated == name.startswith("dinov3") for name, entry in NAMES.items()])
