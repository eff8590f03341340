"""train/data.py, batches.py, augment.py and prepare.py: every source gives the same images in the
same order.
"""

import copy
import dataclasses
import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from ggem_jax.files.images import take_part
from train import augment, prepare
from train.batches import Reader, eval_batches, train_batches
from train.cli import Refused, load_config
from train.config import Augment, Config, Data
from train.data import digits, hold_out, open_data
from train.folders import folder
from train.images import hold_in_memory, join_splits
from train.samplers import draw_evenly


def config_of(*flags):
    return load_config(Config, ["--config", "digits", "--batch", "8", *map(str, flags)], "test")


def first(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


AUGMENTED = (
    "--augment.crop",
    "resized",
    "--augment.flip",
    "--augment.randaugment-ops",
    2,
    "--augment.erase",
    0.5,
    "--seed",
    3,
)


def test_batches_do_not_depend_on_where_the_stream_is_entered():
    config, (images, _) = config_of(*AUGMENTED), open_data(config_of().data)
    whole = first(train_batches(images, config, start=0), 6)
    assert_same(first(train_batches(images, config, start=4), 2), whole[4:])


def test_two_processes_read_the_halves_of_the_same_batches():
    config, (images, evaluation) = config_of(*AUGMENTED), open_data(config_of().data)
    whole = first(train_batches(images, config, start=2), 3)
    halves = [
        first(train_batches(images, config, start=2, process=i, processes=2), 3) for i in range(2)
    ]
    assert_same(
        [
            {name: np.concatenate([a[name], b[name]]) for name in a}
            for a, b in zip(*halves, strict=True)
        ],
        whole,
    )
    whole = list(eval_batches(evaluation, config))
    halves = [list(eval_batches(evaluation, config, process=i, processes=2)) for i in range(2)]
    assert_same(
        [
            {name: np.concatenate([a[name], b[name]]) for name in a}
            for a, b in zip(*halves, strict=True)
        ],
        whole,
    )


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    images, _ = hold_out(digits(), 0.2)
    images = images.take(np.arange(16))
    labelled = {images.load(i)[0].tobytes(): i for i in range(16)}
    batches = first(train_batches(images, config_of(), start=0), 4)
    epochs = [
        [labelled[image.tobytes()] for batch in batches[i : i + 2] for image in batch["image"]]
        for i in (0, 2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(16))
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_seeds_differ_and_agree():
    images, _ = open_data(config_of().data)
    one, same, other = (
        first(train_batches(images, config_of("--seed", seed), start=0), 2) for seed in (1, 1, 2)
    )
    assert_same(one, same)
    assert not np.array_equal(one[0]["label"], other[0]["label"])


def test_evaluation_shows_every_image_once_and_fills_up_with_weight_zero():
    _, images = open_data(config_of().data)
    batches = list(eval_batches(images, config_of()))
    weight, index, label = (
        np.concatenate([batch[name] for batch in batches]) for name in ("weight", "index", "label")
    )
    assert len(weight) == 360
    assert weight.sum() == len(images) == 359
    np.testing.assert_array_equal(index[weight > 0], np.arange(359))
    np.testing.assert_array_equal(label[weight > 0], images.labels())


def test_held_out_images_are_a_share_of_every_class_and_always_the_same():
    whole = digits()
    train, held = hold_out(whole, 0.2)
    assert len(train) + len(held) == len(whole)
    np.testing.assert_allclose(
        np.bincount(held.labels()) / np.bincount(whole.labels()), 0.2, atol=0.005
    )
    np.testing.assert_array_equal(hold_out(whole, 0.2)[1].labels(), held.labels())
    shown = {train.load(i)[0].tobytes() for i in range(len(train))} & {
        held.load(i)[0].tobytes() for i in range(len(held))
    }
    assert not shown


def test_class_folders(class_folders):
    splits = folder(class_folders)
    assert splits["train"].classes == ("ants", "bees", "cows")
    assert (len(splits["train"]), len(splits["eval"])) == (30, 12)
    image, label = splits["train"].load(29)
    assert label == 2
    np.testing.assert_array_equal(
        image, np.asarray(Image.open(class_folders / "train" / "cows" / "cows9.png"))
    )
    single = folder(class_folders / "train")
    assert list(single) == ["train"]
    assert len(single["train"]) == 30


def test_a_corrupt_image_is_refused_by_name_or_skipped_and_named(class_folders, capsys):
    (class_folders / "train" / "bees" / "bees3.png").write_bytes(b"no image")
    (class_folders / "test" / "ants" / "ants1.png").write_bytes(b"")
    splits = folder(class_folders)
    with pytest.raises(Refused, match=r"bees3\.png is not a readable image.*--data\.corrupt skip"):
        first(train_batches(splits["train"], config_of(), start=0), 8)
    skip = config_of("--data.corrupt", "skip")
    labels = np.concatenate(
        [batch["label"] for batch in first(train_batches(splits["train"], skip, start=0), 15)]
    )
    assert len(labels) == 120
    batches = list(eval_batches(splits["eval"], skip))
    assert np.concatenate([batch["weight"] for batch in batches]).sum() == 11
    said = capsys.readouterr().err
    assert said.count("bees3.png is not a readable image") == 1
    assert said.count("ants1.png is not a readable image") == 1


def test_folders_that_cannot_be_used_are_refused(tmp_path, class_folders):
    def refused(source, sentence):
        with pytest.raises(Refused, match=sentence) as caught:
            open_data(config_of("--data", source).data)
        assert "\n" not in str(caught.value)

    refused(f"folder:{tmp_path}/nowhere", "there is no folder .*nowhere")
    refused("cifar10", "unknown data source 'cifar10'; known are digits, folder:DIR, tfds:NAME")
    refused("folder:", "known are")
    (tmp_path / "empty").mkdir()
    refused(f"folder:{tmp_path}/empty", "holds no class sub-folders")
    (class_folders / "train" / "dogs").mkdir()
    refused(f"folder:{class_folders}", "dogs holds no images")
    (class_folders / "train" / "dogs").rmdir()
    (class_folders / "test" / "dogs").mkdir()
    (class_folders / "test" / "dogs" / "a.png").write_bytes(b"")
    refused(
        f"folder:{class_folders}",
        "must have the same classes; only images to evaluate on are of dogs",
    )


def test_data_sets_that_are_not_prepared_are_refused_with_the_way_to_prepare_them(tmp_path):
    with pytest.raises(
        Refused,
        match=r"no_such is not prepared in .*\(there: nothing\): add --download .* train\.prepare",
    ):
        open_data(config_of("--data", "tfds:no_such", "--data-dir", tmp_path).data)
    with pytest.raises(Refused, match="could not prepare no_such"):
        open_data(config_of("--data", "tfds:no_such", "--data-dir", tmp_path, "--download").data)


def jpeg(rng, side=12):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(params=["arrays", "jpegs", "zip"])
def packed(request, tmp_path):
    """A small data set in each of the packed forms: 3 classes whose names do not sort by label, or
    sort for the zip.
    """
    rng, root = np.random.default_rng(1), tmp_path / "tiny-set"
    root.mkdir()
    labels = {
        "train": rng.integers(0, 3, 40).astype(np.uint8),
        "test": np.arange(9, dtype=np.uint8) % 3,
    }
    labels["train"][:3] = [2, 0, 1]
    if request.param == "arrays":
        images = {
            f"{split}_images": rng.integers(0, 256, (len(ys), 9, 9), dtype=np.uint8)
            for split, ys in labels.items()
        }
        np.savez(
            root / "tiny.npz", **images, **{f"{split}_labels": ys for split, ys in labels.items()}
        )
    elif request.param == "jpegs":
        for split, ys in labels.items():
            files = [jpeg(rng) for _ in ys]
            joined = np.frombuffer(b"".join(files), np.uint8)
            offsets = np.cumsum([0, *map(len, files)])
            np.savez(
                root / f"tiny_{split}.npz",
                jpeg_bytes=joined,
                offsets=offsets,
                labels=ys,
                class_names=np.array(["owl", "T-shirt/top", "ant"]),
            )
    else:
        with zipfile.ZipFile(root / "tiny.zip", "w") as archive:
            for split, ys in (("train", labels["train"]), ("val", labels["test"])):
                for i, y in enumerate(ys):
                    archive.writestr(f"{split}/n{y}/{i}.JPEG", jpeg(rng))
            archive.writestr("__MACOSX/train/n0/._0.JPEG", b"no image")
    return root


def test_prepared_folder_and_data_set_give_the_same_batches(packed, tmp_path, capsys):
    prepare.main([str(packed), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"--data tfds:tiny_set --data-dir {tmp_path}/out/tfds" in said
    side = ("--model.image", 12, "--model.patch", 2)
    by_folder = config_of("--data", f"folder:{tmp_path}/out/folder", *side, *AUGMENTED)
    by_tfds = config_of(
        "--data", "tfds:tiny_set", "--data-dir", tmp_path / "out" / "tfds", *side, *AUGMENTED
    )
    one, other = open_data(by_folder.data), open_data(by_tfds.data)
    assert one[0].classes == other[0].classes
    assert (len(one[0]), len(one[1])) == (len(other[0]), len(other[1])) == (40, 9)
    assert_same(
        first(train_batches(one[0], by_folder, start=0), 7),
        first(train_batches(other[0], by_tfds, start=0), 7),
    )
    assert_same(list(eval_batches(one[1], by_folder)), list(eval_batches(other[1], by_tfds)))


def test_prepared_images_are_those_of_the_packed_files_in_their_order(packed, tmp_path):
    prepare.main([str(packed), str(tmp_path / "out"), "--format", "folder", "--limit", "20"])
    _, splits = prepare.read_packed(packed)
    images = folder(tmp_path / "out" / "folder")["train"]
    assert len(images) == 20
    taken = [splits["train"][i] for i in np.linspace(0, 39, 20).round().astype(int)]
    for i, (read, label) in enumerate(taken):
        image, own = images.load(i)
        np.testing.assert_array_equal(image, read())
        assert own == label


def test_preparing_again_replaces_what_was_there(packed, tmp_path):
    for limit in ("9", "7"):
        prepare.main([str(packed), str(tmp_path / "out"), "--limit", limit])
    assert len(folder(tmp_path / "out" / "folder")["train"]) == 7
    data = config_of("--data", "tfds:tiny_set", "--data-dir", tmp_path / "out" / "tfds").data
    assert len(open_data(data)[0]) == 7
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["folder", "tfds"]
    assert [path.name for path in (tmp_path / "out" / "tfds").iterdir()] == ["tiny_set"]


def test_class_names_that_a_file_system_cannot_take_or_sort_get_numbers():
    assert prepare.folder_names(("airplane", "bird", "cat")) == ("airplane", "bird", "cat")
    assert prepare.folder_names(("owl", "T-shirt/top", "ant")) == (
        "0-owl",
        "1-T-shirt-top",
        "2-ant",
    )


def test_what_cannot_be_prepared_is_refused(tmp_path):
    def refused(sentence, *flags):
        with pytest.raises(SystemExit, match=sentence) as caught:
            prepare.main([*map(str, flags)])
        assert "\n" not in str(caught.value.code)

    refused("there is no folder", tmp_path / "nowhere", tmp_path / "out")
    refused("holds neither .npz files nor one .zip file", tmp_path, tmp_path / "out")
    refused("PATH", tmp_path)
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    refused(
        "must hold train_images, train_labels, test_images, test_labels, not x",
        tmp_path,
        tmp_path / "out",
    )
    for content in (b"broken", b""):
        (tmp_path / "a.npz").write_bytes(content)
        refused(r"a\.npz cannot be read", tmp_path, tmp_path / "out")

    images, labels = np.zeros((6, 4, 4), np.uint8), np.array([0, 1, 2] * 2)
    for wrong, sentence in (
        (
            {"train_images": images.astype(float)},
            r"train_images must be uint8 .*, not float64 \(6, 4, 4\)",
        ),
        ({"train_images": images.reshape(6, 16)}, r"not uint8 \(6, 16\)"),
        ({"test_labels": labels[:5]}, r"test_labels whole numbers \(n,\), not .* int64 \(5,\)"),
        ({"test_labels": labels + 0.5}, "float64"),
        (
            {"train_labels": labels - 1},
            "the split train has the label -1 for image 0, where 0 to 2 are classes",
        ),
        ({"test_labels": labels * 0}, "the split test holds no images of 1, 2"),
    ):
        good = {
            "train_images": images,
            "train_labels": labels,
            "test_images": images,
            "test_labels": labels,
        }
        np.savez(tmp_path / "a.npz", **good | wrong)
        refused(sentence, tmp_path, tmp_path / "out", "--name", "tiny")
    np.savez(tmp_path / "a.npz", **good)
    refused(
        "must be letters a to z, digits and _, not '../x'",
        tmp_path,
        tmp_path / "out",
        "--name",
        "../x",
    )
    refused(
        "the split train holds no images of 1: .*larger --limit",
        tmp_path,
        tmp_path / "out",
        "--name",
        "tiny",
        "--limit",
        2,
    )
    (tmp_path / "a.npz").unlink()
    (tmp_path / "a.zip").write_bytes(b"PK broken")
    refused("a.zip cannot be read as .zip", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_preparing_never_replaces_what_others_made(packed, tmp_path):
    for place in ("out/folder", "other/tfds/tiny_set"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "thesis.txt").write_text("precious")
        with pytest.raises(
            SystemExit, match="holds files that this script did not make: choose another OUT"
        ):
            prepare.main([str(packed), str(tmp_path / place.split("/")[0])])
        assert (tmp_path / place / "thesis.txt").read_text() == "precious"
        assert not list(tmp_path.rglob("*.new"))


SQUARE = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)


@pytest.mark.parametrize("operation", range(15))
def test_every_randaugment_operation_keeps_the_size_and_grows_with_its_strength(operation):
    pil = Image.fromarray(np.random.default_rng(0).integers(30, 200, (16, 16, 3), dtype=np.uint8))
    weak, strong = (
        np.asarray(augment._OPERATIONS[operation](pil, strength, 1), int) for strength in (0.1, 0.9)
    )
    assert weak.shape == strong.shape == (16, 16, 3)
    change = [np.abs(image - np.asarray(pil, int)).mean() for image in (weak, strong)]
    assert change[1] >= change[0]
    assert change[1] > 0


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
@pytest.mark.parametrize("shape", [(16, 16), (1, 200), (40, 20), (5, 5)])
def test_crops_of_any_image_have_the_asked_size(crop, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(20):
        how = Augment(crop=crop, flip=True, erase=0.5)
        part = augment.choose_part(*shape, 8, how, rng)
        assert augment.augment(take_part(image, part), 8, how, rng).shape == (8, 8, 3)


def test_nothing_switched_on_changes_nothing():
    np.testing.assert_array_equal(
        augment.augment(SQUARE, 16, Augment(), np.random.default_rng(0)), SQUARE
    )


def test_pad_crop_shifts_and_flip_mirrors():
    rng = np.random.default_rng(0)
    shifted = {augment.pad_crop(SQUARE, 16, 1, rng)[1:15, 1:15].tobytes() for _ in range(200)}
    assert shifted == {
        SQUARE[1 + y : 15 + y, 1 + x : 15 + x].tobytes() for y in (-1, 0, 1) for x in (-1, 0, 1)
    }
    flipped = {augment.augment(SQUARE, 16, Augment(flip=True), rng).tobytes() for _ in range(20)}
    assert flipped == {SQUARE.tobytes(), SQUARE[:, ::-1].tobytes()}


def test_fast_reading_needs_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(
        Refused, match=r"--data.fast: the package simplejpeg is missing: pip install"
    ):
        train_batches(digits(), config_of("--data.fast"), start=0)


@pytest.mark.parametrize("flags", [(), ("--data.fast",), ("--data.no-shrink",)])
def test_settings_decide_how_training_images_are_decoded(flags):
    parts = []

    def load(i, choose=None):
        parts.append(choose(40, 50))
        return np.zeros((*parts[-1].size, 3), np.uint8), 0

    next(train_batches(dataclasses.replace(digits(), load=load), config_of(*flags), start=0))
    assert {part.fast for part in parts} == {"--data.fast" in flags}
    assert {part.shrink for part in parts} == {"--data.no-shrink" not in flags}


def test_erasing_replaces_one_rectangle():
    changed = (augment.erase(SQUARE, np.random.default_rng(3)) != SQUARE).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert 0 < changed.sum() < 0.5 * 16 * 16
    assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.9


@pytest.mark.parametrize(
    ("flags", "low", "high"),
    [([], 8, 24), (["--data.eval-zoom", "2"], 12, 20), (["--data.eval-crop", "squash"], 0, 32)],
)
def test_evaluation_images_are_cut_as_the_config_says(flags, low, high):
    """A 16 x 32 image whose column c is 8 c: the crop shows from which columns it was made."""
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (16, 32, 3))
    images = hold_in_memory([ramp], np.zeros(1, np.int32), ("ramp",))
    (batch,) = eval_batches(images, config_of("--model.image", "8", *flags))
    row = batch["image"][0, 4, :, 0].astype(float) / 8
    step = (high - low) / 8
    np.testing.assert_allclose(row[1:-1], low + step * (np.arange(1, 7) + 0.5) - 0.5, atol=0.3)


def test_the_split_to_evaluate_on_can_be_chosen(class_folders):
    shutil.copytree(class_folders / "train", class_folders / "val")
    assert len(open_data(Data(source=f"folder:{class_folders}"))[1]) == 30, (
        "val comes before test, which is kept for the end"
    )
    assert len(open_data(Data(source=f"folder:{class_folders}", eval_split="test"))[1]) == 12
    with pytest.raises(
        Refused, match=r"--data.eval-split extra is not in .*, which has test, train, val"
    ):
        open_data(Data(source=f"folder:{class_folders}", eval_split="extra"))


def test_joined_splits_keep_their_images_labels_and_order():
    grey = [np.full((1, 1, 3), i, np.uint8) for i in range(5)]
    labels = np.array([0, 1, 1, 0, 1], np.int32)
    parts = [hold_in_memory(grey[a:b], labels[a:b], ("x", "y")) for a, b in ((0, 2), (2, 5))]
    whole = join_splits(parts)
    found = [whole.load(i) for i in range(len(whole))]
    assert [int(image[0, 0, 0]) for image, _ in found] == list(range(5))
    assert [label for _, label in found] == whole.labels().tolist() == labels.tolist()
    assert [whole.stored(i).read() for i in range(5)] == [image.tobytes() for image in grey]


@pytest.mark.slow
def test_processes_read_the_batches_that_threads_read(class_folders):
    """In one process each, from any step on, undisturbed by Ctrl-C while they start; an error of
    a reader, and a killed process, are one sentence here as well.
    """

    def interrupt():
        while not (started := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(started[0].pid, signal.SIGINT)

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    threading.Thread(target=interrupt, daemon=True).start()
    images = folder(class_folders)["train"]
    draw = draw_evenly(images.labels(), 8, seed=0)
    threads = train_batches(images, config_of(*AUGMENTED), start=2, draw=draw)
    processes = train_batches(
        images, config_of(*AUGMENTED, "--data.processes", "2"), start=2, draw=draw
    )
    for _ in range(3):
        ours, theirs = next(threads), next(processes)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    for each in multiprocessing.active_children():
        os.kill(each.pid, signal.SIGKILL)
    with pytest.raises(Refused, match=r"a process of --data.processes was killed.* run the same"):
        first(processes, 8)
    processes.close()
    assert not multiprocessing.active_children()
    (class_folders / "train" / "bees" / "bees3.png").write_bytes(b"no image")
    broken = train_batches(images, config_of("--data.processes", "1"), start=0)
    with pytest.raises(Refused, match=r"bees3.png is not a readable image"):
        first(broken, 4)
    broken.close()


@pytest.mark.slow
def test_processes_report_a_skipped_image_once(class_folders, capfd):
    """Over epochs that both processes read; images of the same contents are not the same image."""
    bees = class_folders / "train" / "bees"
    for name in ("bees1.png", "bees3.png"):
        (bees / name).write_bytes(b"no image")
    images = folder(class_folders)["train"]
    flags = ["--data.corrupt", "skip", "--data.processes", "2"]
    batches = train_batches(images, config_of(*flags), start=0)
    first(batches, 6 * len(images) // 8)
    batches.close()
    lines = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert sorted(line.split("/bees/")[1][:9] for line in lines) == ["bees1.png", "bees3.png"]


def test_readers_that_read_together_report_an_image_once(class_folders, tmp_path, capsys):
    """A copy for each process, which finds in a folder what the others have reported."""
    (class_folders / "train" / "bees" / "bees3.png").write_bytes(b"no image")
    images = folder(class_folders)["train"]
    reader = Reader(images, "skip")
    reader.reported = tmp_path
    for each in [copy.copy(reader) for _ in range(3)]:
        each.named = set()
        assert [i for i in range(len(images)) if each.or_none(i) is None] == [13]
        assert each.or_none(13) is None
    assert capsys.readouterr().err.count("skipped") == 1
    alone = Reader(images, "skip")
    assert alone.or_none(13) is None is alone.or_none(13)
    assert capsys.readouterr().err.count("skipped") == 1
