"""eval/contrastive.py: it repeats the measures of the run, classifies by words, compares in pairs,
and reports mistakes in one line.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_PAIR, one_line

from eval import contrastive as eval_contrastive
from eval.contrastive import ContrastiveResult, compare
from train import contrastive
from train.cli import Refused
from train.contrastive import PairDescriptors
from train.log import read_metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished runs on digits, of which one learned from shuffled captions."""
    root = tmp_path_factory.mktemp("runs")
    kinds = {"true": [], "shuffled": ["--text.shuffle-captions"]}
    for name, flags in kinds.items():  # the second compiles nothing
        contrastive.main([*TINY_PAIR, "--epochs", "2", *flags, "--out", str(root / name)])
    return root


def evaluated(capsys, *flags):
    capsys.readouterr()
    eval_contrastive.main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_tool_repeats_the_last_evaluation_and_compares_in_pairs(trained, capsys):
    report = evaluated(capsys, trained / "true", trained / "shuffled", "--zero-shot", "digits")
    for name, entry in zip(("true", "shuffled"), report["runs"], strict=True):
        final = read_metrics(trained / name, "eval")[-1]
        assert (entry["step"], entry["images"], entry["texts"]) == (90, 359, 10)
        assert entry["scale"] == pytest.approx(final["scale"], rel=1e-6)
        for direction, measures in entry["retrieval"].items():
            for measure, found in measures.items():
                assert found["value"] == pytest.approx(
                    final[f"{direction}@{measure.partition('@')[2]}"], abs=1e-9
                )
                assert found["low"] <= found["value"] <= found["high"]
        recall = entry["retrieval"]["image_to_text"]
        assert [recall[f"recall@{k}"]["chance"] for k in (1, 5, 10)] == pytest.approx(
            [0.1, 0.5, 1.0]
        )
        # one template, that of the captions: the nearest class is the class of the nearest caption
        assert entry["zero_shot"]["top1"]["value"] == pytest.approx(
            recall["recall@1"]["value"], abs=1e-9
        )
        assert entry["zero_shot"]["top5"]["value"] == pytest.approx(
            recall["recall@5"]["value"], abs=1e-9
        )
        assert (entry["zero_shot"]["images"], entry["zero_shot"]["classes"][3]) == (359, "three")
    (twice,) = evaluated(
        capsys,
        trained / "true",
        "--zero-shot",
        "digits",
        "--templates",
        *["the handwritten digit {}"] * 2,
    )["runs"]
    assert (
        twice["zero_shot"]["top1"] == report["runs"][0]["zero_shot"]["top1"]
    )  # the same prompt twice is the same class
    true, shuffled = (entry["retrieval"]["image_to_text"]["recall@1"] for entry in report["runs"])
    assert true["low"] > 0.2
    assert shuffled["low"] < 0.1 + 0.06
    for name in ("image_to_text@1", "zero_shot_top1"):
        test = report["paired"][name]
        assert test["difference"]["value"] == pytest.approx(true["value"] - shuffled["value"])
        assert test["only_first"] - test["only_second"] == pytest.approx(
            359 * (true["value"] - shuffled["value"])
        )
    assert report["paired"]["zero_shot_top1"]["p_value"] < 0.01


def test_the_tool_prints_tables(trained, capsys):
    eval_contrastive.main(
        [
            str(trained / "true"),
            str(trained / "shuffled"),
            "--zero-shot",
            "digits",
            "--templates",
            "{}",
            "digit {}",
        ]
    )
    said = capsys.readouterr().out
    assert "true, step 90, 359 images, 10 texts" in said
    assert "images -> texts, recall@5" in said
    assert "zero-shot on digits: top-1" in said
    assert "359 images, 10 classes, 2 template(s)" in said
    assert "learned image/pool/p" in said
    assert said.count("McNemar's exact test p = ") == 3


def test_other_images_captions_and_classes(
    trained, captioned_folder, class_folders, tmp_path, capsys
):
    """A CSV with captions of its own, and a folder whose classes get other names from a file; both
    have images of other sizes than the digits.
    """
    (tmp_path / "names.txt").write_text("ants\tan ant\nbees\ta bee\ncows\ta cow\n")
    flags = [
        "--data",
        f"csv:{captioned_folder}/pairs.csv",
        "--split",
        f"{captioned_folder}/pairs.csv",
        "--zero-shot",
        f"folder:{class_folders}",
    ]
    (entry,) = evaluated(
        capsys,
        trained / "true",
        *flags,
        "--templates",
        "{}",
        "this is {}",
        "--names",
        tmp_path / "names.txt",
    )["runs"]
    assert (entry["images"], entry["texts"]) == (12, 13)
    chance = entry["retrieval"]["image_to_text"]["recall@1"]["chance"]
    assert chance == pytest.approx((11 / 13 + 2 / 13) / 12)
    assert entry["zero_shot"] | {"top1": 0, "top5": 0} == {
        "source": f"folder:{class_folders}", "images": 12, "classes": ["an ant", "a bee", "a cow"],
        "templates": ["{}", "this is {}"],
        "top1": 0, "top5": 0,
    }  # fmt: skip
    assert entry["zero_shot"]["top5"]["value"] == 1  # of three classes


def test_texts_of_images_that_cannot_be_read_are_not_asked(trained, captioned_folder, capsys):
    (captioned_folder / "3.png").write_bytes(b"noise")
    source = [
        "--data",
        f"csv:{captioned_folder}/pairs.csv",
        "--split",
        f"{captioned_folder}/pairs.csv",
    ]
    (entry,) = evaluated(capsys, trained / "true", *source, "--corrupt", "skip")["runs"]
    assert (entry["images"], entry["texts"]) == (11, 13)
    assert entry["retrieval"]["text_to_image"]["recall@1"]["chance"] == pytest.approx(1 / 11)
    assert "3.png is not a readable image" in one_line(
        capsys, eval_contrastive.main, trained / "true", *source
    )


def test_several_images_with_one_caption_are_all_right():
    """Images 0 and 1 share text 0, image 2 has texts 0 and 1; all in a plane."""
    circle = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    pairs = np.array([[0, 0], [1, 0], [2, 0], [2, 1]])
    described = PairDescriptors(
        circle, np.arange(3), np.zeros(3), circle[[0, 2]], ("a", "b"), pairs
    )
    found = described.found((1,))
    assert found["image_to_text"][:, 0].tolist() == [
        True,
        False,
        True,
    ]  # image 1 is nearer to text 1, which is not its own
    assert found["text_to_image"][:, 0].tolist() == [True, True]
    chance = described.chance((1,))
    assert chance["image_to_text"][0] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert chance["text_to_image"][0] == pytest.approx((3 / 3 + 1 / 3) / 2)


def test_mistakes_end_in_one_line(trained, tmp_path, capsys, captioned_folder, class_folders):
    assert "is not a run of train.contrastive" in one_line(capsys, eval_contrastive.main, tmp_path)
    (tmp_path / "config.json").write_text((trained / "true" / "config.json").read_text())
    assert "has no checkpoint yet" in one_line(capsys, eval_contrastive.main, tmp_path)
    run = trained / "true"
    assert "unknown data source 'coco'" in one_line(
        capsys, eval_contrastive.main, run, "--zero-shot", "coco"
    )
    said = one_line(
        capsys,
        eval_contrastive.main,
        run,
        "--data",
        f"csv:{captioned_folder}/pairs.csv",
        "--templates",
        "{}",
    )
    assert "has captions of its own" in said
    (tmp_path / "names.txt").write_text("bees\tbee\ncows\tcow\n")
    assert "has no words for ants" in one_line(
        capsys,
        eval_contrastive.main,
        run,
        "--zero-shot",
        f"folder:{class_folders}",
        "--names",
        tmp_path / "names.txt",
    )


def test_runs_on_other_images_are_not_compared_in_pairs():
    def run(digests, captions):
        unit = np.eye(2)
        described = PairDescriptors(
            unit, np.arange(2), np.array(digests), unit, captions, np.array([[0, 0], [1, 1]])
        )
        return ContrastiveResult(Path("run"), 1, {}, described, None, 10.0)

    one = run([1, 2], ("a", "b"))
    assert compare(one, one)["image_to_text@1"].p_value == 1
    for other in (run([1, 3], ("a", "b")), run([1, 2], ("a", "c"))):
        with pytest.raises(Refused, match="were not evaluated on the same images and captions"):
            compare(one, other)
