"""train/contrastive.py and the modules below it: captions, tokenizer, towers and step; exact
resuming; every mistake in one line.
"""

import dataclasses
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY_PAIR, one_line
from PIL import Image

from ggem_jax.files.images import UnreadableImage
from ggem_jax.losses.contrastive import clip_loss, siglip_loss
from ggem_jax.weights import write_safetensors
from ggem_jax.weights.vit import read_vit
from train import contrastive
from train.batches import train_batches
from train.captions import Text, read_names
from train.checkpoints import Checkpoints
from train.cli import Refused, configs_of, from_dict, known_configs, load_config, to_dict
from train.config import Data
from train.contrastive import (
    ContrastiveConfig,
    caption_sampler,
    clip_from_above,
    make_steps,
    make_towers,
    open_pairs,
)
from train.digest import digest_images
from train.log import read_metrics
from train.loop import make_first_state
from train.pairs import open_captions, read_csv, read_shards, shards_of
from train.step import normalise
from train.tokenizer import Tokenizer, read_tokenizer, train_tokenizer


def config_of(*flags):
    return load_config(ContrastiveConfig, [*TINY_PAIR, *map(str, flags)], "test")


def png(grey):
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (grey,) * 3).save(file, "PNG")
    return file.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards of three pairs."""
    write_shard(
        tmp_path / "shard-000.tar",
        {"a/0.png": png(0), "a/0.txt": b"black\n", "a/1.jpg": png(50),
        "a/1.json": b'{"caption": "dark grey", "url": ""}',
         "a/1.txt.gz": b"?", "a/2.PNG": png(90), "a/2.txt": "grün".encode(),
         "a/2.json": b'{"caption": "not this one"}'},
    )  # fmt: skip
    write_shard(
        tmp_path / "shard-001.tar",
        {
            f"{i}.{kind}": content
            for i in range(3)
            for kind, content in (
                ("txt", f"light {i}".encode()),
                ("cls", b"3"),
                ("png", png(150 + i)),
            )
        },
    )
    return tmp_path


def grey(pairs, i):
    return int(pairs.images.load(i)[0][0, 0, 0])


def test_rows_of_a_csv_with_one_image_are_its_captions(captioned_folder):
    pairs = read_csv(f"{captioned_folder}/pairs.csv", Data())
    assert len(pairs) == 12
    assert pairs.captions[0] == ("grey number 0, plain", "black")
    assert pairs.captions[11] == ("grey number 11, plain",)
    assert [grey(pairs, i) for i in range(12)] == [20 * i for i in range(12)]
    tabs = captioned_folder / "tabs.tsv"
    tabs.write_text("caption\tid\timage\ngrey, very\t7\t3.png\n\ngrey, very\t8\t3.png\n")
    assert read_csv(f"{tabs}", Data()).captions == [("grey, very",)]


def test_splits_of_a_csv_are_held_out_or_named(captioned_folder):
    source = f"csv:{captioned_folder}/pairs.csv"
    train, held = open_captions(Data(source=source, holdout=0.25), Text())
    assert (len(train), len(held)) == (9, 3)
    assert sorted([grey(train, i) for i in range(9)] + [grey(held, i) for i in range(3)]) == [
        20 * i for i in range(12)
    ]
    for part in (train, held):
        for i in range(len(part)):
            assert part.captions[i][0] == f"grey number {grey(part, i) // 20}, plain"
            assert part.images.load(i)[1] == i
    (captioned_folder / "other.csv").write_text("image,caption\n5.png,five\n")
    train, other = open_captions(
        Data(source=source, eval_split=f"{captioned_folder}/other.csv"), Text()
    )
    assert (len(train), other.captions) == (12, [("five",)])


def test_pairs_of_shards_are_read_where_they_lie(shards):
    for pattern in ("shard-{000..001}.tar", "shard-*.tar"):
        pairs = read_shards(f"{shards}/{pattern}", Data())
        assert pairs.captions == [
            ("black",),
            ("dark grey",),
            ("grün",),
            ("light 0",),
            ("light 1",),
            ("light 2",),
        ]
        assert [grey(pairs, i) for i in (5, 0, 2, 1, 3)] == [152, 0, 90, 50, 150]
    assert [path.name for path in shards_of(f"{shards}/shard-{{001..001}}.tar")] == [
        "shard-001.tar"
    ]


def test_incomplete_pairs_are_named_or_skipped(shards, captioned_folder, capsys):
    write_shard(
        shards / "bad.tar",
        {
            "0.png": png(0),
            "1.txt": b"no image",
            "2.png": png(9),
            "2.txt": b"fine",
            "3.png": png(1),
            "3.json": b"[]",
        },
    )
    with pytest.raises(
        Refused,
        match=(
            r"3 of the pairs of .*bad.tar are not complete: 0 in .*bad.tar \(no .txt and no"
            r" .json\), 3 in .*bad.tar \(no .txt and a .json that does not hold values by name\),"
            r" 1 in .* \(no image\) \(--data.corrupt skip"
        ),
    ):
        read_shards(f"{shards}/bad.tar", Data())
    assert read_shards(f"{shards}/bad.tar", Data(corrupt="skip")).captions == [("fine",)]
    (captioned_folder / "bad.csv").write_text("image,caption\n1.png,one\nnowhere.png,two\n2.png,\n")
    with pytest.raises(
        Refused,
        match=(
            r"2 of the pairs of .*bad.csv are not complete: nowhere.png \(no image\), 2.png \(no"
            r" caption\)"
        ),
    ):
        read_csv(f"{captioned_folder}/bad.csv", Data())
    assert read_csv(f"{captioned_folder}/bad.csv", Data(corrupt="skip")).captions == [("one",)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("skipped: ") for line in said)


def test_broken_shards_and_files_are_refused(shards, captioned_folder):
    whole = (shards / "shard-000.tar").read_bytes()
    for length in (
        100,
        700,
        2048,
        2600,
    ):  # in the first header, in an image, between two members, in a later header
        (shards / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(Refused, match=r"the shard .*cut.tar cannot be read as tar: "):
            read_shards(f"{shards}/cut.tar", Data())
    (shards / "packed.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(Refused, match=r"the shard .*packed.tar cannot be read as tar"):
        read_shards(f"{shards}/packed.tar", Data())
    write_shard(shards / "twice.tar", {"0.png": png(0), "0.jpg": png(1), "0.txt": b"black"})
    for pattern, sentence in (
        ("twice.tar", "two images for 0"),
        ("shard-{000..003}.tar", r"there is no shard .*shard-002.tar \(2 of 4"),
        ("none-*.tar", "there are no shards"),
    ):
        with pytest.raises(Refused, match=sentence):
            read_shards(f"{shards}/{pattern}", Data())
    write_shard(shards / "noise.tar", {"0.png": b"noise", "0.txt": b"black"})
    with pytest.raises(UnreadableImage, match=r"0.png in .*noise.tar is not a readable image"):
        read_shards(f"{shards}/noise.tar", Data()).images.load(0)
    for text, sentence in (
        (
            "path,caption\n1.png,one\n",
            "has no column image or filepath or file_name or image_path with the paths of images;"
            " its first line, separated by ',', names path, caption: choose with --image-key",
        ),
        ("", "has no column image .*names nothing"),
        ('image,caption\n1.png,"one\n', "cannot be read as CSV"),
        ("image,caption\n", "holds no image with a caption"),
        (
            "image,caption\n1.png,a cat, on a mat\n",
            (
                "line 2 of .*bad.csv has more columns than the first: text that holds ',' needs"
                " quotes"
            ),
        ),
    ):
        (captioned_folder / "bad.csv").write_text(text)
        with pytest.raises(Refused, match=sentence):
            read_csv(f"{captioned_folder}/bad.csv", Data())
    (captioned_folder / "bad.csv").write_bytes(b"image,caption\n1.png,\xff\n")
    with pytest.raises(Refused, match=r"bad.csv is not in UTF-8"):
        read_csv(f"{captioned_folder}/bad.csv", Data())


def test_class_names_become_captions(class_folders, tmp_path):
    (class_folders / "train" / "ants").rename(class_folders / "train" / "an_ant")
    (class_folders / "test" / "ants").rename(class_folders / "test" / "an_ant")
    data = Data(source=f"folder:{class_folders}")
    train, held = open_captions(data, Text())
    assert (len(train), len(held), train.classes) == (30, 12, ("an ant", "bees", "cows"))
    assert train.captions[0] == ("a photo of a an ant.",)
    texts, pairs = held.texts()
    assert texts == tuple(f"a photo of a {name}." for name in train.classes)
    assert pairs.tolist() == [[i, i // 4] for i in range(12)]
    (tmp_path / "names.txt").write_text("an_ant\tant\nbees\thoney bee\n\ncows\tcow, on grass\n")
    named, _ = open_captions(
        data, Text(templates=("{}", "two of {}: {}"), names=tmp_path / "names.txt")
    )
    assert named.captions[29] == ("cow, on grass", "two of cow, on grass: cow, on grass")
    (tmp_path / "names.txt").write_text("an_ant\tant\n")
    with pytest.raises(Refused, match=r"--text.names .*names.txt has no words for bees, cows"):
        open_captions(data, Text(names=tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("an_ant ant\n")
    with pytest.raises(
        Refused, match=r"line 1 of .*names.txt must be a folder name, a tab and words"
    ):
        read_names(tmp_path / "names.txt")


def test_digits_are_called_by_their_names():
    train, held = open_captions(Data(), Text())
    assert (len(train), len(held)) == (1438, 359)
    texts, pairs = held.texts()
    assert sorted(texts)[0] == "the handwritten digit eight"
    assert len(texts) == 10
    assert len(pairs) == 359
    assert open_captions(Data(), Text(templates=("{}!",)))[0].classes[7] == "seven"


def test_shuffled_captions_are_those_of_other_images(captioned_folder):
    pairs = read_csv(f"{captioned_folder}/pairs.csv", Data())
    shuffled = pairs.shuffled(3)
    assert sorted(shuffled.captions) == sorted(pairs.captions)
    assert all(one != other for one, other in zip(shuffled.captions, pairs.captions, strict=True))
    assert shuffled.captions == pairs.shuffled(3).captions != pairs.shuffled(4).captions
    assert (
        shuffled.digest()
        != pairs.digest()
        == read_csv(f"{captioned_folder}/pairs.csv", Data()).digest()
    )
    plain, control = (open_pairs(config_of(*flags)) for flags in ([], ["--text.shuffle-captions"]))
    assert plain[0].captions != control[0].captions
    assert plain[1].captions == control[1].captions  # evaluation captions are unchanged


CAPTIONS = [
    "a photo of a cat.",
    "a photo of a dog.",
    "two dogs, ünder a tree",
    "the cat and the dog",
]


def test_ids_are_start_pieces_end_and_padding():
    tokenizer = train_tokenizer(CAPTIONS, 300)
    assert 258 < tokenizer.size <= 300
    ids = tokenizer.encode([*CAPTIONS, "", "x" * 99], 20)
    assert (ids.shape, ids.dtype) == ((6, 20), np.int32)
    assert (ids[:, 0] == tokenizer.start).all()
    for row in ids:
        end = row.tolist().index(tokenizer.end)
        assert (row[end:] == tokenizer.pad).all()
        assert not np.isin(row[1:end], (tokenizer.start, tokenizer.end)).any()
    assert ids[4].tolist() == [tokenizer.start] + 19 * [tokenizer.end]
    assert ids[5, -1] == tokenizer.end
    assert len({row.tobytes() for row in ids}) == 6
    spelt = tokenizer.encode(["a <|endoftext|> b"], 40)[0].tolist()
    assert spelt.index(tokenizer.end) > 10, "a caption that spells the end token does not end there"


def test_a_tokenizer_is_the_same_from_its_file_and_trained_again(tmp_path):
    """Also in another process, where hashes have another order."""
    captions = [
        f"{a}{b} {b}{a}" for a in "abcdefgh" for b in "stuvwxyz"
    ]  # many pairs that are equally frequent
    tokenizer = train_tokenizer(captions, 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.text, encoding="utf-8")
    again = read_tokenizer(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(again.encode(captions, 12), tokenizer.encode(captions, 12))
    assert train_tokenizer(iter(captions), 300).text == tokenizer.text
    code = (
        "from train.tokenizer import train_tokenizer; import sys;"
        f" sys.stdout.buffer.write(train_tokenizer({captions}, 300).text.encode())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=120, check=True
    )
    assert found.stdout.decode() == tokenizer.text


def hugging_face(tokens, **more):
    """A tokenizer.json of whole words."""
    added = [
        {
            "id": i,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(tokens)
        if not token.isalpha()
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "Whitespace"},
            "model": model,
            **more,
        }
    )


def test_other_tokenizers_keep_their_own_tokens():
    truncation = {
        "truncation": {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    }
    bert = Tokenizer(
        hugging_face(["[PAD]", "<unk>", "[CLS]", "[SEP]", "cat", "dog"], **truncation), "bert"
    )
    assert bert.encode(["cat dog cat"], 7).tolist() == [[2, 4, 5, 4, 3, 0, 0]]
    t5 = Tokenizer(hugging_face(["<pad>", "</s>", "<unk>", "cat"]), "t5")
    assert t5.encode(["cat", "cat cat cat cat"], 4).tolist() == [[3, 1, 0, 0], [3, 3, 3, 1]]


def test_what_is_no_tokenizer_is_refused(tmp_path):
    for text, sentence in (
        ("{", r"t.json is not a tokenizer that the package tokenizers reads"),
        ("{}", "is not a tokenizer"),
        (
            hugging_face(["<unk>", "cat"]),
            r"t.json has no token that ends a text: one of <\|endoftext\|>, </s>",
        ),
    ):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(Refused, match=sentence) as caught:
            read_tokenizer(tmp_path / "t.json")
        assert "\n" not in str(caught.value)
    with pytest.raises(Refused, match=r"the tokenizer .*none.json cannot be read: No such file"):
        read_tokenizer(tmp_path / "none.json")
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(CAPTIONS, 257)


def test_batches_draw_a_caption_of_their_image(captioned_folder):
    pairs = read_csv(f"{captioned_folder}/pairs.csv", Data())
    config = config_of(
        "--data", f"csv:{captioned_folder}/pairs.csv", "--batch", "8", "--model.image", "8"
    )
    tokenizer = train_tokenizer(CAPTIONS, 280)
    beside = caption_sampler(pairs, tokenizer, 30)
    batches = [
        next_
        for next_, _ in zip(
            train_batches(pairs.images, config, start=0, beside=beside), range(12), strict=False
        )
    ]
    drawn = [row.tobytes() for batch in batches for row in batch["ids"]]
    shown = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]) // 20
    texts, places = pairs.texts()
    rows = tokenizer.encode(texts, 30)
    own = {
        image: {rows[text].tobytes() for one, text in places if one == image} for image in range(12)
    }
    assert all(row in own[image] for image, row in zip(shown, drawn, strict=True))
    assert {row for image, row in zip(shown, drawn, strict=True) if image == 0} == own[0], (
        "both captions of image 0"
    )
    entered = next(train_batches(pairs.images, config, start=7, beside=beside))
    np.testing.assert_array_equal(entered["ids"], batches[7]["ids"])


def test_the_scale_is_cut_but_can_come_back():
    assert [float(clip_from_above(jnp.float32(x), 2.0)) for x in (1, 3)] == [1, 2]
    slopes = [
        float(jax.grad(lambda x, sign=sign: sign * clip_from_above(x, 2.0))(jnp.float32(x)))
        for x in (1, 3)
        for sign in (-5, 5)
    ]
    assert slopes == [-5, 5, 0, 5]  # at 3, descent along -5 would push it further out


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the digits, so that tests share their compiled steps."""
    captions = (caption for each in open_pairs(config_of())[0].captions for caption in each)
    return train_tokenizer(captions, config_of().text.vocabulary)


LEARN = [*TINY_PAIR, "--epochs", "3", "--log-every", "1"]
STEPS = 135  # of this run


@pytest.fixture(scope="module")
def learned(tool, tmp_path_factory):
    """A finished run on one device, and its output."""
    run = tmp_path_factory.mktemp("learned")
    process = tool("train.contrastive", *LEARN, "--out", run, devices=1)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return run, said


def test_a_run_learns_to_name_digits_and_leaves_its_tokenizer(learned):
    run, said = learned
    final = read_metrics(run, "eval")[-1]
    assert (final["images"], final["texts"], final["step"]) == (359, 10, STEPS)
    assert (
        0.35
        < final["image_to_text@1"]
        <= final["image_to_text@5"]
        <= final["image_to_text@10"]
        == 1
    )  # chance 10 %
    assert len(final["p"]["image/pool/p"]) == 2
    assert 10 < final["scale"] < 20
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read_tokenizer(run / "tokenizer.json").size <= 320
    assert (
        "1,438 images to train, of which an epoch shows 97.9%, none twice in a batch; 359 with 10"
        " texts to evaluate"
    ) in said


@pytest.mark.slow
def test_eight_devices_with_split_weights_train_as_one(learned, tmp_path):
    config = load_config(
        ContrastiveConfig,
        [*LEARN, "--fsdp", "8", "--stop-after", "12", "--out", str(tmp_path)],
        "test",
    )
    contrastive.train(config, quiet=True)
    losses, want = (
        [line["loss"] for line in read_metrics(run, "train")] for run in (tmp_path, learned[0])
    )
    assert (len(losses), len(want)) == (12, STEPS)
    np.testing.assert_allclose(losses, want[:12], rtol=1e-4)


@pytest.mark.parametrize("loss", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_the_loss_of_a_step_is_that_of_the_whole_batch(tokenizer, loss):
    """On eight devices, with the weights split over them, the loss equals that of descriptors
    computed without a mesh.
    """
    config = config_of("--loss", loss, "--fsdp", "8")
    towers = make_towers(config, tokenizer)
    steps = make_steps(config, towers, STEPS)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    ids = tokenizer.encode([f"digit {i}" for i in range(32)], config.text.context)
    state = steps.init(0)
    params = jax.tree.map(np.asarray, state.params)
    assert params["log_scale"] == pytest.approx(
        np.log(1 / 0.07 if loss == "softmax" else 10), rel=1e-6
    )
    assert ("bias" in params) == (loss == "sigmoid")
    described = jax.jit(towers.describe_images)(params, normalise(jnp.array(images), config.data))
    texts = jax.jit(towers.describe_texts)(params, ids)
    np.testing.assert_allclose(np.linalg.norm(described, axis=1), 1, rtol=1e-5)
    want = (
        clip_loss(described, texts, 1 / 0.07)
        if loss == "softmax"
        else siglip_loss(described, texts, 10.0, -10.0)
    )
    state, metrics = steps.train(state, {"image": jnp.array(images), "ids": jnp.array(ids)}, 0)
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-4)
    assert (
        make_steps(dataclasses.replace(config, seed=3), make_towers(config, tokenizer), STEPS)
        is steps
    )


def states(config):
    steps = make_steps(
        config, make_towers(config, read_tokenizer(config.out / "tokenizer.json")), 8
    )
    return jax.tree.leaves(
        jax.tree.map(np.asarray, Checkpoints(config.out, read_only=True).restore(steps))
    )


def test_a_stopped_run_ends_with_the_same_bits_and_takes_no_other_data(
    captioned_folder, tmp_path, tokenizer
):
    """The run has several captions of an image, a given tokenizer, augmentation, dropout and a
    moving average.
    """
    given, table = tmp_path / "given.json", captioned_folder / "pairs.csv"
    given.write_text(tokenizer.text, encoding="utf-8")
    captions = table.read_text()
    flags = ["--data", f"csv:{table}", "--batch", "8", "--epochs", "6", "--log-every", "1",
    "--augment.crop", "pad", "--model.dropout", "0.1",
             "--optimizer.ema", "0.9", "--loss", "sigmoid", "--text.tokenizer", given]  # fmt: skip
    one, other = (config_of(*flags, "--out", tmp_path / name) for name in ("one", "other"))
    assert contrastive.train(one, quiet=True).finished
    assert not contrastive.train(dataclasses.replace(other, stop_after=3), quiet=True).finished
    assert (other.out / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.text
    table.write_text(captions.replace("number 3", "number three"))
    with pytest.raises(Refused, match=r"data_found.captions \d+ there, \d+ now"):
        contrastive.train(other, quiet=True)
    table.write_text(captions)
    given.write_text(train_tokenizer(CAPTIONS, 280).text, encoding="utf-8")
    with pytest.raises(Refused, match=r"data_found.tokenizer \d+ there, \d+ now"):
        contrastive.train(other, quiet=True)
    given.write_text(tokenizer.text, encoding="utf-8")
    assert contrastive.train(other, quiet=True).finished
    for a, b in zip(states(one), states(other), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [
        [(line["step"], line["loss"]) for line in read_metrics(config.out, "train")]
        for config in (one, other)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    assert read_metrics(one.out, "eval")[-1] == read_metrics(other.out, "eval")[-1]
    (other.out / "tokenizer.json").unlink()
    with pytest.raises(Refused, match=r"the tokenizer .*tokenizer.json cannot be read"):
        contrastive.train(other, quiet=True)


def test_the_image_tower_starts_from_a_published_file(tmp_path, tokenizer):
    with np.load(ROOT / "tests" / "data" / "vit" / "timm-deit-distilled.npz") as file:
        arrays = {
            key.removeprefix("weights/"): file[key].astype(np.float32)
            for key in file.files
            if key.startswith("weights/")
        }
    write_safetensors(tmp_path / "deit.safetensors", arrays)
    flags = [
        "--data",
        "digits",
        "--init",
        str(tmp_path / "deit.safetensors"),
        "--model.heads",
        "2",
        "--text.width",
        "16",
        "--text.depth",
        "1",
    ]
    config = load_config(ContrastiveConfig, flags, "test")
    steps = make_steps(config, make_towers(config, tokenizer), 10)
    state = make_first_state(steps, config)
    theirs = read_vit(tmp_path / "deit.safetensors", heads=2).variables["params"]
    for name in ("patch_embedding", "blocks_1", "norm", "position"):
        jax.tree.map(
            lambda own, file: np.testing.assert_array_equal(own, np.reshape(file, own.shape)),
            state.params["image"][name],
            theirs[name],
        )
    np.testing.assert_array_equal(state.params["image"]["pool"]["p"], np.full(2, 3.0))
    np.testing.assert_array_equal(
        state.params["text"]["position"], steps.init(0).params["text"]["position"]
    )


MISTAKES = {
    "unknown config": (["--config", "coco"], "--config must be one of .*digits"),
    "parts": (
        ["--optimizer.accumulate", "2"],
        "--optimizer.accumulate must be 1: the negatives of a pair are those of its batch",
    ),
    "mixup": (["--augment.mixup", "0.2"], "--augment.mixup must be 0: there are no labels to mix"),
    "label smoothing": (
        ["--augment.label-smoothing", "0.1"],
        "--augment.label-smoothing must be 0",
    ),
    "loss": (["--loss", "hinge"], "invalid choice 'hinge'"),
    "heads": (["--text.heads", "3"], "--text.width must be a multiple of its 3 heads, it is 16"),
    "context": (["--text.context", "2"], "--text.context must be at least 3"),
    "vocabulary": (
        ["--text.vocabulary", "100"],
        (
            "--text.vocabulary must be at least 258: all bytes, start and end, and at most"
            " 16777216, it is 100"
        ),
    ),
    "template": (
        ["--text.templates", "a digit"],
        "--text.templates must be texts with {} where the name of the class goes",
    ),
    "scale": (
        ["--init-scale", "200"],
        "--init-scale must be above 0 and at most --max-scale 100, it is 200",
    ),
    "embed": (["--embed", "0"], "--embed must be at least 1"),
    "data": (
        ["--data", "coco"],
        (
            "unknown data source 'coco'; known are digits, folder:DIR, tfds:NAME, csv:FILE,"
            " wds:PATTERN"
        ),
    ),
    "no file": (["--data", "csv:"], "unknown data source 'csv:'"),
    "csv": (
        ["--data", "csv:nowhere.csv"],
        "the captions: nowhere.csv cannot be read: No such file",
    ),
    "templates": (
        ["--data", "csv:a.csv", "--text.templates", "{}"],
        "csv:a.csv has captions of its own",
    ),
    "names": (["--text.names", "nowhere.txt"], "--text.names: nowhere.txt cannot be read"),
    "tokenizer": (
        ["--text.tokenizer", "nowhere.json"],
        "the tokenizer nowhere.json cannot be read: No such file",
    ),
    "batch": (
        ["--batch", "33"],
        r"--batch must be a multiple of 1 part\(s\) x 8 device\(s\), it is 33",
    ),
}


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line(tmp_path, capsys, flags, sentence):
    said = one_line(capsys, contrastive.main, *TINY_PAIR, "--out", tmp_path / "run", *flags)
    assert said.startswith("train.contrastive: ")
    assert re.search(sentence, said), said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", known_configs(ContrastiveConfig))
def test_every_config_loads_and_says_its_command_and_what_to_expect(name):
    config = load_config(ContrastiveConfig, ["--config", name], "test")
    assert isinstance(config, ContrastiveConfig)
    assert from_dict(ContrastiveConfig, to_dict(config)) == config
    header = (configs_of(ContrastiveConfig) / f"{name}.toml").read_text()
    assert f"python -m train.contrastive --config {name}" in header
    assert "Expect" in header


def facts_of(table):
    pairs = read_csv(table, Data())
    return digest_images(pairs.images), pairs.digest()


def test_other_pairings_of_the_same_captions_are_other_data(captioned_folder):
    text = (captioned_folder / "pairs.csv").read_text()
    first = facts_of(f"{captioned_folder}/pairs.csv")
    lines = text.splitlines()
    names = [line.split(",")[0] for line in lines[1:]]
    swapped = [
        lines[0],
        *(
            line.replace(name, other, 1)
            for line, name, other in zip(lines[1:], names, names[2:] + names[:2], strict=True)
        ),
    ]
    (captioned_folder / "swapped.csv").write_text("\n".join(swapped) + "\n")
    assert facts_of(f"{captioned_folder}/swapped.csv") != first
    assert facts_of(f"{captioned_folder}/pairs.csv") == first


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("image,caption,caption\n0.png,a,b\n", "names a column twice"),
        ('image,caption\n0.png,"a" b\n', "after line 1: .*--quoting none takes quotes as text"),
        ('image,caption\n0.png,"a\n0.png,b"\n', "in two ways: .* ends in line 3"),
    ],
    ids=["columns", "quotes", "lines"],
)
def test_tables_that_mean_two_things_are_refused(text, sentence, tmp_path):
    (tmp_path / "0.png").write_bytes(png(3))
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(Refused, match=sentence):
        read_csv(f"{tmp_path}/pairs.csv", Data())


def test_captions_are_found_under_the_names_that_others_write(tmp_path):
    """open_clip's columns, LAION's names, an empty .txt beside a .json, an index without a name."""
    (tmp_path / "0.png").write_bytes(png(3))
    (tmp_path / "clip.csv").write_text("filepath\ttitle\n0.png\tone\n")
    (tmp_path / "index.csv").write_text(",file_name,text\n0,0.png,one\n")
    for name in ("clip.csv", "index.csv"):
        assert read_csv(f"{tmp_path}/{name}", Data()).captions == [("one",)]
    (tmp_path / "own.csv").write_text("at;alt;caption\n0.png;one;two\n")
    own = Data(separator=";", image_key="at", caption_key="alt")
    assert read_csv(f"{tmp_path}/own.csv", own).captions == [("one",)]
    with pytest.raises(Refused, match=r"no column none with the captions; .*separated by ';', nam"):
        read_csv(f"{tmp_path}/own.csv", dataclasses.replace(own, caption_key="none"))
    write_shard(
        tmp_path / "s.tar",
        {
            "0.png": png(1),
            "0.txt": b"",
            "0.json": b'{"TEXT": "one", "alt": ["two", "three"]}',
            "1.bmp": png(2),
            "1.txt": b"four",
            "1.json": b'{"alt": "five"}',
        },
    )
    for key, captions in (
        (None, [("one",), ("four",)]),
        ("alt", [("two", "three"), ("five",)]),
        ("TEXT", "1 of the pairs .*1 in .*s.tar .a .json without TEXT, with 'alt'"),
        ("txt", "1 of the pairs .*0 in .*s.tar .an empty .txt."),
    ):
        if isinstance(captions, list):
            found = read_shards(f"{tmp_path}/s.tar", Data(caption_key=key)).captions
            assert found == captions
        else:
            with pytest.raises(Refused, match=captions):
                read_shards(f"{tmp_path}/s.tar", Data(caption_key=key))


def test_quotes_are_those_of_csv_or_text(tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(png(3))

    def read(text, **settings):
        (tmp_path / "table").write_text("image\tcaption\n" + text)
        return read_csv(f"{tmp_path}/table", Data(**settings)).captions[0]

    assert read('0.png\t"red\tand ""blue"""\n') == ('red\tand "blue"',)
    assert not capsys.readouterr().err
    assert read('0.png\t"A Kiss" by Klimt\n0.png\t"Adele\n') == ('"A Kiss" by Klimt', '"Adele')
    assert "its quotes are taken as text, as line 2 does not quote as" in capsys.readouterr().err
    assert read('0.png\t"red"\n', quoting="none") == ('"red"',)
    two = '0.png\t"A\n0.png\tB"\n'
    with pytest.raises(Refused, match=r"in two ways: .*choose --quoting csv or --quoting none"):
        read(two)
    assert read(two, quoting="none") == ('"A', 'B"')
    assert read(two, quoting="csv") == ("A\n0.png\tB",)
    with pytest.raises(Refused, match=r"after line 1: .*--quoting none takes quotes as text"):
        read('0.png\t"A Kiss" by Klimt\n', quoting="csv")
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match=r'--data.separator must be one character, or "tab"'):
        Data(separator=", ")
    assert read("0.png\ta, b\n", separator="tab") == ("a, b",)


def test_two_spellings_of_a_path_are_one_image(tmp_path):
    (tmp_path / "0.png").write_bytes(png(3))
    (tmp_path / "pairs.csv").write_text("image,caption\n0.png,a\n./0.png,b\n")
    assert list(read_csv(f"{tmp_path}/pairs.csv", Data()).captions) == [("a", "b")]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"img.001.png": png(1), "img.001.txt": b"one"}, "more dots"),
        ({"0.png": png(1), "0.json": b'{"caption": "half a pair \\ud83d"}'}, "half a pair of surr"),
        ({"0.png": png(1), "0.txt": "gr\u00fcn".encode("latin-1")}, "a .txt that is not in UTF-8"),
        ({"0.png": png(1), "0.json": b"[" * 100_000}, "a .json that is not JSON in UTF-8"),
        ({"0.png": png(1), "0.txt": b" \n"}, r"an empty \.txt and no \.json"),
        (
            {"0.png": png(1), "0.json": b'{"url": "", "alt": "one"}'},
            "a .json without caption or title or text or TEXT, with 'url', 'alt': --caption-key",
        ),
    ],
    ids=["dots", "surrogate", "latin", "nested", "empty", "key"],
)
def test_members_that_would_be_lost_are_refused(members, sentence, tmp_path):
    write_shard(tmp_path / "s.tar", members)
    with pytest.raises(Refused, match=sentence):
        read_shards(f"{tmp_path}/s.tar", Data())


def test_shards_that_were_joined_or_name_a_pair_twice_are_refused_and_a_byte_order_mark_is_none(
    tmp_path,
):
    write_shard(tmp_path / "a.tar", {"0.png": png(1), "0.txt": b"\xef\xbb\xbfone"})
    assert list(read_shards(f"{tmp_path}/a.tar", Data()).captions) == [("one",)]
    (tmp_path / "joined.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    with pytest.raises(Refused, match="something follows its end"):
        read_shards(f"{tmp_path}/joined.tar", Data())
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for name, content in (("0.png", png(1)), ("0.txt", b"one"), ("0.txt", b"two")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(Refused, match=r"two files 0\.txt"):
        read_shards(f"{tmp_path}/twice.tar", Data())


def test_a_tokenizer_without_a_piece_for_what_it_does_not_know_says_so(tmp_path):
    from tokenizers import Tokenizer as Published
    from tokenizers import models

    known = Published(models.WordLevel({"</s>": 0, "cat": 1}, unk_token="[UNK]"))
    with pytest.raises(Refused, match="cannot encode the text 'dog'"):
        Tokenizer(known.to_str(), "the file").encode(["dog"], 5)
    far = Published(models.WordLevel({"</s>": 0, "cat": 2**24}, unk_token="</s>"))
    with pytest.raises(Refused, match="at most 16,777,216 pieces"):
        Tokenizer(far.to_str(), "the file")


def test_a_tokenizer_that_was_replaced_in_the_folder_of_a_run_is_refused(
    tmp_path, captioned_folder, monkeypatch
):
    pairs = read_csv(f"{captioned_folder}/pairs.csv", Data())
    config = config_of("--data", f"csv:{captioned_folder}/pairs.csv", "--out", tmp_path)
    own = contrastive.open_tokenizer(config, None, pairs)
    monkeypatch.setattr(contrastive, "has_checkpoint", lambda run: True)
    assert contrastive.open_tokenizer(config, None, pairs).vocabulary == own.vocabulary
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(["zzz zzz yyy yyy"] * 9, 300).text)
    with pytest.raises(Refused, match="is not the one that the run began with"):
        contrastive.open_tokenizer(config, None, pairs)
