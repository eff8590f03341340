"""train/samplers.py: which images a batch holds, and how much of a set the batches show."""

import itertools

import cloudpickle
import numpy as np
import pytest
from conftest import TINY, one_line

from train import classify, contrastive
from train.samplers import (
    draw_balanced,
    draw_distinct,
    draw_evenly,
    measure_coverage,
    steps_to_cover,
)

LABELS = np.repeat(np.arange(7), [9, 2, 5, 5, 4, 1, 12])  # 38 images, some classes rare


def test_batches_of_pairs_hold_none_twice_and_leave_out_others_in_every_epoch():
    draw = draw_distinct(23, 5, seed=1)
    batches = [draw(step) for step in range(12)]
    assert all(len(set(batch.tolist())) == 5 for batch in batches)
    epochs = [np.concatenate(batches[i : i + 4]) for i in (0, 4, 8)]
    assert all(len(set(epoch.tolist())) == 20 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert measure_coverage(draw, 23, 12) == 1
    np.testing.assert_array_equal(draw_distinct(23, 5, seed=1)(7), batches[7])
    assert not np.array_equal(draw_distinct(23, 5, seed=2)(7), batches[7])


@pytest.mark.parametrize(("batch", "per_class"), [(6, 3), (9, 3), (8, 2), (7, 1), (20, 4)])
def test_balanced_batches_show_every_image_in_the_steps_that_are_said(batch, per_class):
    draw = draw_balanced(LABELS, batch, per_class, seed=0)
    steps = steps_to_cover(LABELS, batch, per_class)
    assert measure_coverage(draw, len(LABELS), steps) == 1
    classes = batch // per_class
    for step in range(steps):
        found, counts = np.unique(LABELS[draw(step)], return_counts=True)
        assert (len(found), set(counts)) == (classes, {per_class})
    # a round shows every class
    rounds = -(-7 // classes)
    shown = np.concatenate([LABELS[draw(step)] for step in range(rounds)])
    assert set(shown) == set(range(7))


def test_a_second_visit_shows_no_image_twice_where_the_class_has_enough():
    """Two batches of four classes a round: the second one visits one of seven again."""
    labels = np.repeat(np.arange(7), 4)
    draw = draw_balanced(labels, 16, 4, seed=0)
    assert all(len(set(draw(step).tolist())) == 16 for step in range(8))


def test_an_image_of_a_class_comes_again_after_all_others():
    """Seven classes in a batch: each step is a round, without second visits."""
    draw = draw_balanced(LABELS, 21, 3, seed=5)
    drawn = np.concatenate([draw(step) for step in range(4)])
    largest = drawn[LABELS[drawn] == 6]
    assert sorted(largest) == list(range(26, 38))
    assert sorted(largest) != largest.tolist()


def test_classes_come_equally_often_where_they_are_drawn_evenly():
    draw = draw_evenly(LABELS, 10, seed=3)
    drawn = np.concatenate([draw(step) for step in range(84)])
    assert set(np.bincount(LABELS[drawn])) == {120}
    for label, images in itertools.groupby(range(38), key=lambda i: LABELS[i]):
        counts = np.bincount(drawn, minlength=38)[list(images)]
        assert np.ptp(counts) <= 1, label
    np.testing.assert_array_equal(draw_evenly(LABELS, 10, seed=3)(50), draw(50))


def test_a_batch_larger_than_the_set_is_refused(class_folders, captioned_folder, tmp_path, capsys):
    flags = [*TINY, "--out", tmp_path / "run", "--data"]
    said = one_line(capsys, classify.main, *flags, f"folder:{class_folders}")
    assert said.endswith(
        "--batch 32 is more than the 30 images to train on: a batch would hold some twice; give at"
        " most 30"
    )
    said = one_line(
        capsys, contrastive.main, *flags[2:], f"csv:{captioned_folder}/pairs.csv", "--batch", "16"
    )
    assert "--batch 16 is more than the 10 images to train on" in said


@pytest.mark.parametrize(
    "draw",
    [draw_distinct(38, 8, 3), draw_balanced(LABELS, 8, 2, 3), draw_evenly(LABELS, 8, 3)],
    ids=["distinct", "balanced", "evenly"],
)
def test_functions_that_draw_can_be_sent_to_other_processes(draw):
    sent = cloudpickle.loads(cloudpickle.dumps(draw))
    for step in (7, 0, 30, 7):
        np.testing.assert_array_equal(sent(step), draw(step))
