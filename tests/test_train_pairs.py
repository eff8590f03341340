"""train/pairs.py: images with captions from tables, shards and names of classes."""

import dataclasses
import gzip
import io
import tarfile

import pytest
from PIL import Image

from ggem_jax.files.images import UnreadableImage
from train.captions import Text, read_names
from train.cli import Refused
from train.config import Data
from train.digest import digest_images
from train.pairs import open_captions, read_csv, read_shards, shards_of


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


def test_a_caption_of_several_lines_is_one_where_the_file_means_nothing_else(tmp_path):
    (tmp_path / "0.png").write_bytes(png(3))
    (tmp_path / "pairs.csv").write_text('image,caption\n0.png,"a\nb"\n')
    assert read_csv(f"{tmp_path}/pairs.csv", Data()).captions == [("a\nb",)]
    (tmp_path / "pairs.tsv").write_text('image\tcaption\n0.png\t"a" b\n0.png\n')
    with pytest.raises(Refused, match="cannot be read as CSV after line 1"):
        read_csv(f"{tmp_path}/pairs.tsv", Data())


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
