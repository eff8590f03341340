"""The retrieval tool as a process of its own, with the real network."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from retrieval_photos import json_of, unit
from test_retrieval_sheet import Page
from test_weights_vit import file_of

from ggem_jax.retrieval import index as library

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--scales",
    "1",
    "--no-regional",
    "--longest-side",
    "160",
]  # one program of 160 x 160 pixels


# Processes, and the real network


def finished(process, *, timeout=300):
    said, told = process.communicate(timeout=timeout)
    return process.returncode, said, told


def test_from_images_of_all_kinds_to_a_search_with_the_real_network(tool, tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    images = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((160, 160)))
        for _ in range(4)
    ]
    rotation = Image.Exif()
    rotation[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(images[0]).save(folder / "plain.png")
    Image.fromarray(np.rot90(images[0])).save(folder / "rotated.jpg", exif=rotation, quality=98)
    Image.fromarray(images[1]).convert("CMYK").save(folder / "cmyk.jpg", quality=98)
    Image.fromarray(images[2][..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.new("RGB", (1, 5000)).save(folder / "thin.png")
    (folder / "none.jpg").write_text("no image")
    Image.fromarray(images[1]).save(tmp_path / "rgb.png")
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}

    code, said, told = finished(
        tool(
            "ggem_jax.retrieval",
            "index",
            folder,
            "-o",
            tmp_path / "my.index",
            *SMALL,
            environment=own,
        )
    )
    assert (code, said.partition(": ")[2]) == (
        0,
        "4 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 2 skipped\n",
    ), told
    assert sum(line.startswith("skipped: ") for line in told.splitlines()) == 2
    assert "none.jpg is not a readable image" in told
    assert "an image of 1 x 5000 pixels is too thin" in told
    (kept,) = (tmp_path / "cache" / "ggem-jax").iterdir()

    queries = [folder / "plain.png", tmp_path / "rgb.png"]
    command = [
        "search",
        tmp_path / "my.index",
        *queries,
        "--rerank",
        "superglobal",
        "--json",
        "--html",
        tmp_path / "sheet.html",
    ]
    code, said, told = finished(tool("ggem_jax.retrieval", *command, environment=own))
    assert (code, told) == (0, "")
    first, second = (each["results"] for each in json.loads(said)["queries"])
    by_path = {hit["path"]: hit for hit in first}
    assert (first[0]["path"], by_path["plain.png"]["rank_before"]) == ("plain.png", 1)
    assert by_path["plain.png"]["score_before"] == pytest.approx(1, abs=2e-3)
    assert by_path["rotated.jpg"]["rank_before"] == 2
    assert by_path["rotated.jpg"]["score_before"] > 0.95 > by_path["deep.png"]["score_before"]
    assert min(second, key=lambda hit: hit["rank_before"])["path"] == "cmyk.jpg"
    assert len(Page((tmp_path / "sheet.html").read_text()).images) == 10
    programs = {path.name for path in kept.iterdir() if path.name.endswith("-cache")}

    for path in kept.rglob("*"):  # programs that were cut off are compiled again, without a word
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    code, said, told = finished(tool("ggem_jax.retrieval", *command, environment=own))
    assert (code, told) == (0, "")
    assert json.loads(said)["queries"][0]["results"] == first
    assert {path.name for path in kept.iterdir() if path.name.endswith("-cache")} == programs


def shell(line, tmp_path, **options):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
    } | {
        "PYTHONPATH": str(ROOT),
        "P": sys.executable,
    }
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
        **options,
    )


def test_closed_and_full_streams(indexed, tmp_path):
    tool = '"$P" -m ggem_jax.retrieval'
    assert (lambda done: (done.returncode, done.stderr))(
        shell(f"{tool} info my.index <&- >&-", tmp_path)
    ) == (0, "")
    assert (lambda done: (done.returncode, done.stdout))(
        shell(f"{tool} info none.index <&- 2>&-", tmp_path)
    ) == (1, "")
    done = shell(f"{tool} info my.index > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (1, "ggem-retrieval: No space left on device\n")
    done = shell(f"{tool} info my.index | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode in (0, 141), done.stderr) == (True, "")
    done = shell(f"{tool} info my.index > >(exec 0<&-; sleep 3); exit $?", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_is_one_sentence(twelve_photos, tool, tmp_path):
    np.save(tmp_path / "q.npy", unit(np.random.default_rng(0), 40, 8))
    command = [
        "rerank",
        tmp_path / "q.npy",
        tmp_path / "q.npy",
        "-o",
        tmp_path / "out.npz",
        "--method",
        "none",
    ]
    own = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, said, told = finished(
        tool("ggem_jax.retrieval", *command, environment=own, file_blocks=4)
    )
    assert (code, said, told) == (1, "", "ggem-retrieval: File too large\n")
    assert not (tmp_path / "out.npz").exists()
    assert not (tmp_path / "cache").exists()
    assert not list(tmp_path.glob(".out*"))


def test_interrupted(tool, tmp_path):
    os.mkfifo(tmp_path / "waits.npy")
    process = tool(
        "ggem_jax.retrieval",
        "rerank",
        tmp_path / "waits.npy",
        tmp_path / "waits.npy",
        "-o",
        tmp_path / "out.npz",
    )
    with open(tmp_path / "waits.npy", "wb"):  # returns when the other end is read
        process.send_signal(signal.SIGINT)
        assert finished(process) == (130, "", "ggem-retrieval: interrupted\n")


# Files of weights alone


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("timm-deit3", "deit3"), ("timm-vit", "vit"), ("hf-dinov2", "dinov2"), ("hf-clip", "clip")],
)
def test_a_vit_is_indexed_searched_and_reranked_with_its_weights_alone(
    twelve_photos, run, tmp_path, name, backbone
):
    (tmp_path / "weights").mkdir()
    weights, _ = file_of(name, tmp_path / "weights")
    code, said, told = run("index", twelve_photos, "-o", "my.index", "--weights", weights, *SMALL)
    assert (code, said) == (
        0,
        "my.index: 12 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 0 skipped\n",
    )
    unknown = backbone in ("vit", "clip")
    assert ("does not say how its images are normalised" in told) == unknown
    assert library.info("my.index")["settings"]["backbone"] == backbone
    options = ["--rerank", "superglobal", "--candidates", 12, "--neighbors", 2, "-k", 12]
    code, found = json_of(run, "search", "my.index", "photos/03.png", *options)
    assert code == 0
    first = {hit["rank_before"]: hit for hit in found["queries"][0]["results"]}
    assert (first[1]["path"], len(first)) == ("03.png", 12)
    assert first[1]["score_before"] == pytest.approx(1, abs=2e-3)
    assert run("search", "my.index", "photos/03.png", "--weights", weights)[0] == 0
    again = run("index", twelve_photos, "-o", "my.index", "--weights", weights, *SMALL)
    assert (
        again[1] == "my.index: 0 added, 0 updated, 12 unchanged, 0 reused, 0 removed, 0 skipped\n"
    )
