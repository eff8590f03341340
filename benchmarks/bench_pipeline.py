"""Measures the training input pipeline: images a second of a core, beside torchvision and tf.data.

    python -m benchmarks.bench_pipeline [--torch PYTHON] [--tensorflow PYTHON]

Each pipeline reads JPEGs of 500 x 375 pixels (quality 90, 4:2:0, 107 KB on average: windows of two
photos with grain), takes a random crop and a flip to 224 pixels, and hands over batches of uint8.
`before` decodes whole images to arrays, which all versions did up to 0.1.0. The pipelines take
turns on the same cores. What a core does is counted in CPU time, so that other work on the machine
disturbs it less. Rows go to benchmarks/results/pipeline.csv.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.record import append, machine
from eval.statistics import mean
from ggem_jax.files.images import Choose, read_image, take_part
from ggem_jax.models.vit import vit_config
from train.batches import train_batches
from train.cli import load_config
from train.config import Config
from train.folders import folder as open_folder
from train.images import Images
from train.throughput import PEAK_FLOPS, training_flops

Round = Callable[[], tuple[float, float]]  # () -> seconds and CPU seconds of the batches

SIDE = 224
H200_MFU = 0.45  # of a ViT-B/16 in bfloat16, for the number of images that a GPU takes


def write_images(root: Path, count: int) -> float:
    """Writes JPEGs in two classes and returns their mean size in KB."""
    rng, photos, total = np.random.default_rng(0), load_sample_images().images, 0
    for i in range(count):
        photo = photos[i % 2]
        width = int(photo.shape[1] * rng.uniform(0.78, 0.88))
        height = width * 3 // 4
        top, left = (
            rng.integers(0, a - b + 1)
            for a, b in zip(photo.shape[:2], (height, width), strict=True)
        )
        window = Image.fromarray(photo[top : top + height, left : left + width])
        pixels = np.asarray(window.resize((500, 375), Image.Resampling.BICUBIC))
        grain = rng.normal(0, 22, (375, 500, 1))
        image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90, subsampling="4:2:0")
        path = root / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        total += file.tell()
    return total / count / 1e3


def our_round(images: Images, config: Config, batches: int) -> Round:
    """A round of our own pipeline, from its first batch on."""

    def call() -> tuple[float, float]:
        stream = train_batches(images, config, start=0)
        next(stream)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(stream)
        result = time.perf_counter() - began, time.process_time() - cpu
        del stream
        gc.collect()
        while True:  # until its threads have ended
            cpu = time.process_time()
            time.sleep(0.1)
            if time.process_time() - cpu < 0.01:
                return result

    return call


def read_whole(images: Images, root: Path) -> Images:
    """The images as they were read before crops were: decoded whole, to an array."""
    files = sorted(root.rglob("*.jpg"), key=lambda file: file.name)

    def load(i: int, choose: Choose | None = None):
        image = read_image(files[i])
        return (image if choose is None else take_part(image, choose(*image.shape[:2]))), 0

    return dataclasses.replace(images, load=load)


class Other:
    """A pipeline of another library in a process of its own."""

    def __init__(self, python: str, *arguments):
        script = Path(__file__).with_name("other_pipelines.py")
        self.process = subprocess.Popen(
            [python, str(script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
        )
        self.versions = self._read()

    def _read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args[:3])} ended without a result")
        return line.strip()

    def __call__(self) -> tuple[float, float]:
        print(file=self.process.stdin, flush=True)
        seconds, cpu = map(float, self._read().split())
        return seconds, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16, help="of a round (%(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--torch", metavar="PYTHON", help="a Python that has torchvision")
    parser.add_argument("--tensorflow", metavar="PYTHON", help="a Python that has TensorFlow")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        mean_kb = write_images(root, 512)
        images = open_folder(root)["train"]
        calls: dict[tuple[str, str], Round] = {}
        ours = ", ".join(
            f"{package} {importlib.metadata.version(package)}"
            for package in ("grain", "pillow", "simplejpeg", "cykooz-resizer")
        )
        versions: dict[str, str] = {}

        def add(pipeline: str, augment: str, call: Round, version: str) -> None:
            calls[pipeline, augment] = call
            versions[pipeline] = version

        for augment, ops in (("crop, flip", 0), ("crop, flip, RandAugment", 2)):
            flags = [
                "--variant", "B/16", "--model.image", SIDE, "--batch", options.batch,
                "--augment.crop", "resized", "--augment.flip", "--augment.randaugment-ops", ops,
                "--data.workers", options.workers,
            ]  # fmt: skip
            config = load_config(Config, list(map(str, flags)), "bench")
            fast = load_config(Config, [*map(str, flags), "--data.fast"], "bench")
            add(
                "before",
                augment,
                our_round(read_whole(images, root), config, options.batches),
                ours,
            )
            add("default", augment, our_round(images, config, options.batches), ours)
            add("--data.fast", augment, our_round(images, fast, options.batches), ours)
            if ops:
                spared = load_config(
                    Config, [*map(str, flags), "--data.fast", "--augment.on-device"], "bench"
                )
                name = "--data.fast --augment.on-device"
                add(name, augment, our_round(images, spared, options.batches), ours)
            others = [(options.torch, "torchvision-pil"), (options.torch, "torchvision-tensor")]
            if not ops:
                others.append((options.tensorflow, "tf.data"))
            for python, kind in others:
                if python:
                    sizes = (options.workers, options.batch, options.batches, ops)
                    other = Other(python, kind, root, *sizes)
                    add(kind, augment, other, other.versions)
        times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in calls}
        for _ in range(options.rounds + 1):
            for key, call in calls.items():
                times[key].append(call())
                print(*key, *(f"{each:.2f} s" for each in times[key][-1]), file=sys.stderr)
    count = options.batch * options.batches
    needed = H200_MFU * PEAK_FLOPS["NVIDIA H200"] / training_flops(vit_config("B/16"), 1000)
    print(f"ViT-B/16 at {H200_MFU:.0%} of an H200's peak: {needed:,.0f} images a second (computed)")
    for (pipeline, augment), taken in times.items():
        seconds, cpu = np.array(taken[1:]).T
        per_core = count / float(np.median(cpu))
        ratios = {
            f"over_{other}": compare(times[other, augment][1:], cpu)
            for other in ("before", "torchvision-pil", "torchvision-tensor")
            if (other, augment) in times
        }
        append(
            "pipeline",
            machine()
            | {"pipeline": pipeline, "augment": augment, "versions": versions[pipeline]}
            | {"mean_kb": f"{mean_kb:.0f}", "workers": options.workers, "rounds": options.rounds}
            | {"images": count, "images_per_s": f"{count / float(np.median(seconds)):.0f}"}
            | {"images_per_core_s": f"{per_core:.0f}"}
            | ratios
            | {"cores_for_4000_per_s": f"{4000 / per_core:.1f}"},
        )


def compare(other: list[tuple[float, float]], cpu: np.ndarray) -> str:
    """How many times as fast as another pipeline, by CPU time, with the 95 % interval of rounds."""
    ratio = mean(np.log(np.array(other)[:, 1] / cpu))
    middle, low, high = np.exp([ratio.value, ratio.low, ratio.high])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
