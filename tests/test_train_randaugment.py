"""train/randaugment.py: every operation on the device gives the pixels of Pillow on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from conftest import TINY
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from scipy import stats

from train import augment, classify
from train.cli import load_config
from train.config import Augment, Config
from train.log import read_metrics
from train.randaugment import OPERATIONS, augment_on_device, mean_grey, operate
from train.step import make_mesh

PHOTO = sklearn.datasets.load_sample_image("flower.jpg")[150:214, 250:330]
operate_once = jax.jit(operate)


@pytest.mark.parametrize("kind", range(15), ids=OPERATIONS)
def test_an_operation_gives_the_pixels_of_pillow(kind):
    for strength, sign in ((0.37, 1), (0.93, -1), (0.03, 1)):
        expected = augment._OPERATIONS[kind](Image.fromarray(PHOTO), strength, sign)
        found = np.asarray(operate_once(jnp.array(PHOTO), kind, strength, float(sign)), int)
        difference = np.abs(found - np.asarray(expected, int))
        assert difference.max() <= 1
        assert difference.mean() < 0.02


def test_operations_leave_flat_images_as_pillow_does():
    flat = np.full((8, 8, 3), 77, np.uint8)
    for kind, name in enumerate(OPERATIONS):
        expected = augment._OPERATIONS[kind](Image.fromarray(flat), 0.5, 1)
        found = operate_once(jnp.array(flat), kind, 0.5, 1.0)
        np.testing.assert_array_equal(found, expected, name)


def augmented(images, how, seed=0, step=0):
    sharding = NamedSharding(make_mesh(1), P(("data", "fsdp")))
    return np.asarray(augment_on_device(images, seed, step, how=how, sharding=sharding))


HOW = Augment(randaugment_ops=1, randaugment_magnitude=9.0, on_device=True)
NOISE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
ALIKE = jnp.broadcast_to(jnp.array(NOISE), (2000, 12, 12, 3))


def test_random_numbers_come_from_seed_step_and_place():
    first = augmented(ALIKE, HOW)
    np.testing.assert_array_equal(first, augmented(ALIKE, HOW))
    assert len({each.tobytes() for each in first}) > 400
    assert not np.array_equal(first, augmented(ALIKE, HOW, seed=1))
    assert not np.array_equal(first, augmented(ALIKE, HOW, step=1))


def test_operations_are_drawn_equally_often_and_applied_half_of_the_time():
    found = augmented(ALIKE, HOW)
    kept = (found == NOISE).all((1, 2, 3))
    assert 0.45 < kept.mean() < 0.56, "a few operations leave some images alone"
    inverted = (found == 255 - NOISE).all((1, 2, 3)).sum()
    assert stats.binomtest(int(inverted), len(found), 1 / 30).pvalue > 1e-4


def test_erasing_replaces_one_rectangle_with_its_probability():
    how = Augment(erase=0.5, on_device=True)
    image = PHOTO[:32, :32]
    changed = (augmented(jnp.broadcast_to(jnp.array(image), (400, 32, 32, 3)), how) != image).any(
        -1
    )
    erased = changed.any((1, 2))
    assert stats.binomtest(int(erased.sum()), 400, 0.5).pvalue > 1e-4
    for each in changed[erased]:
        rows, columns = np.flatnonzero(each.any(1)), np.flatnonzero(each.any(0))
        inside = each[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert inside.mean() > 0.9
        assert inside.size <= 0.36 * 32 * 32


def test_a_run_trains_on_the_images_that_the_device_has_changed(tmp_path):
    def first_gradient(name, *flags):
        out = tmp_path / name
        given = [*TINY, "--stop-after", "1", "--log-every", "1", "--out", str(out), *flags]
        classify.train(load_config(Config, given, "test"), quiet=True)
        (line,) = read_metrics(out, "train")
        return line["grad_norm"]

    on_device = ("--augment.on-device", "--augment.randaugment-ops")
    plain = first_gradient("plain")
    assert first_gradient("none", *on_device, "0") == plain
    assert first_gradient("two", *on_device, "2") != plain


def test_contrast_turns_around_the_mean_of_any_size():
    """The sum of 2,100 x 2,100 bright pixels, doubled, has more than 32 bits."""
    rng = np.random.default_rng(0)
    for height, width in ((2100, 2100), (3, 5), (7, 1), (1, 8), (64, 33)):
        grey = rng.integers(180, 256, (height, width), np.uint8)
        image = jnp.asarray(np.repeat(grey[..., None], 3, 2))
        exact = int(grey.sum(dtype=np.int64) * 2 + grey.size) // (2 * grey.size)
        assert int(mean_grey(image)) == exact
    half = jnp.array([[[1, 1, 1], [2, 2, 2]]], jnp.uint8)
    assert int(mean_grey(half)) == 2
