"""Input pipelines of torchvision and tf.data, measured by `bench_pipeline` in their own Python.

    PYTHON benchmarks/other_pipelines.py KIND FOLDER WORKERS BATCH BATCHES RANDAUGMENT

KIND is torchvision-pil, torchvision-tensor or tf.data; FOLDER holds JPEGs. The batches are uint8,
224 x 224 pixels, from a random crop with the bicubic filter and a flip. For each line on standard
input one round is measured, whose seconds and CPU seconds go to standard output.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIDE = 224


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    workers, batch, batches, randaugment = map(int, sys.argv[3:])
    files = sorted(map(str, folder.rglob("*.jpg")))
    need = batch * (batches + 1)
    files = (files * -(-need // len(files)))[:need]
    if kind == "tf.data":
        start, versions = with_tensorflow(files, workers, batch, randaugment)
    else:
        start, versions = with_torchvision(
            files, workers, batch, randaugment, tensor=kind == "torchvision-tensor"
        )
    print(versions, flush=True)
    for _ in sys.stdin:
        stream = iter(start())
        next(stream)
        began, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(batches):
            next(stream)
        print(time.perf_counter() - began, cpu_seconds() - cpu, flush=True)
        del stream


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of the workers it has started."""
    ticks = 0
    for pid in [os.getpid(), *children()]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and in system mode
    return ticks / os.sysconf("SC_CLK_TCK")


def children() -> list[str]:
    """Returns the process ids of the workers, whichever thread started them."""
    return [
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]


def with_torchvision(files: list[str], workers: int, batch: int, randaugment: int, *, tensor: bool):
    """A DataLoader; `tensor`: decoded and transformed as tensors of uint8, not by Pillow."""
    import torch
    import torchvision
    from PIL import Image
    from torchvision.io import decode_jpeg, read_file
    from torchvision.transforms import v2

    steps: list[Any] = [
        v2.RandomResizedCrop(SIDE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if randaugment:
        steps.append(v2.RandAugment(randaugment, 9))
    if not tensor:
        steps.append(v2.PILToTensor())
    transform = v2.Compose(steps)

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            if tensor:
                return transform(decode_jpeg(read_file(files[i])))
            with Image.open(files[i]) as image:
                return transform(image.convert("RGB"))

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Files(), batch, shuffle=True, num_workers=workers, persistent_workers=True
    )
    return (lambda: loader), f"torch {torch.__version__}, torchvision {torchvision.__version__}"


def with_tensorflow(files: list[str], workers: int, batch: int, randaugment: int):
    """tf.data, which decodes only the crop; without antialiasing, as recipes in TensorFlow do."""
    import tensorflow as tf

    if randaugment:
        raise SystemExit("tf.data has no RandAugment of its own")
    tf.config.threading.set_intra_op_parallelism_threads(1)

    def read(file):
        content = tf.io.read_file(file)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(content),
            tf.zeros((1, 0, 4)),
            area_range=(0.08, 1),
            aspect_ratio_range=(3 / 4, 4 / 3),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.io.decode_and_crop_jpeg(content, window, channels=3)
        image = tf.image.resize(image, (SIDE, SIDE), "bicubic")
        image = tf.image.random_flip_left_right(image)
        return tf.saturate_cast(tf.round(image), tf.uint8)

    def start() -> Iterator[Any]:
        options = tf.data.Options()
        options.threading.private_threadpool_size = workers
        data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files))
        data = data.map(read, num_parallel_calls=workers).batch(batch).prefetch(1)
        return data.with_options(options).as_numpy_iterator()

    return start, f"tensorflow {tf.__version__}"


if __name__ == "__main__":
    main()
