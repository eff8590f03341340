"""eval/studies/pooling.py, frozen.py, cifar.py and pooling_report.py: arms that do what their names
say, verdicts, and the report of the results.
"""

import csv
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from eval.statistics import Interval, pigeonhole_bootstrap
from eval.studies import cifar, diagnostics, frozen
from eval.studies import pooling as pooling_study
from eval.studies.pooling_report import Claim, make_claims, make_section, write_report
from ggem_jax import pooling
from train.images import hold_in_memory

TINY_CIFAR = [
    "--model.image", "8", "--model.patch", "4", "--model.width", "16", "--model.depth", "1",
    "--model.heads", "2", "--model.mlp-width", "16",
    "--batch", "16", "--checkpoint-every", "1000000", "--eval-every", "1000000",
]  # fmt: skip


def planted_tokens(seed, count=300, heads=2, channels=8, classes=3):
    """Class c shows as a bump in one token of channel c, which an average over 16 noisy tokens
    hardly sees.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    tokens = rng.normal(0, 1, (count, 16, channels))
    tokens[np.arange(count), rng.integers(0, 16, count), labels] += 4
    return tokens.astype(np.float16), labels


@pytest.fixture(scope="module")
def tokens():
    (train, train_labels), (test, test_labels) = planted_tokens(0), planted_tokens(1)
    return frozen.Tokens(
        "planted", train, train_labels, test, test_labels, 2, train[:, 0], test[:, 0]
    )


def test_every_arm_is_the_pooling_of_its_name(tokens):
    x = jnp.asarray(tokens.test[:5], jnp.float32)
    arms = frozen.arms_of(tokens)
    p = {"p": np.array([2.0, 5.0], np.float32)}
    four = {"p": np.array([2.0, 3.0, 4.0, 5.0], np.float32)}
    order = diagnostics.random_blocks(8, 2, 1)
    per_channel = np.empty(8)
    per_channel[order[0]], per_channel[order[1]] = 2, 5
    expected = {
        "average": ({}, pooling.avg_pool(x)),
        "positive average": ({}, pooling.gem_pool(x, 1.0)),
        "average + max": ({}, (pooling.avg_pool(x) + pooling.max_pool(x)) / 2),
        "GeM, p = 3": ({}, pooling.gem_pool(x, 3.0)),
        "LSE, r = 10": ({}, pooling.lse_pool(x, 10.0)),
        "class token": ({}, x[:, 0]),
        "GGeM": (p, pooling.ggem_pool(x, p["p"])),
        "GGeM, interleaved": (p, pooling.ggem_pool(x, p["p"], layout="interleaved")),
        "GGeM, random groups 2": (p, pooling.gem_pool(x, per_channel)),
        "GGeM, 4 groups": (four, pooling.ggem_pool(x, four["p"])),
        "GGeM, one p per channel": ({"p": np.full(8, 3.0, np.float32)}, pooling.gem_pool(x, 3.0)),
    }
    for name, (params, pooled) in expected.items():
        np.testing.assert_allclose(
            arms[name].pool(params, x), pooled, rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert arms["GGeM, p learned slowly"].exponent_lr == 1.0
    assert arms["GeM"].start["p"].shape == (1,)
    assert arms["MAP"].pool(arms["MAP"].start, x).shape == (5, 8)


def test_counts_of_groups_are_around_the_heads_and_divide_the_channels():
    assert frozen.group_counts(192, 8) == [4, 16, 32]
    assert frozen.group_counts(48, 4) == [2, 8, 16]
    assert frozen.group_counts(36, 6) == [3, 12]
    assert frozen.group_counts(8, 2) == [4]


def test_probes_of_a_large_p_find_sparse_evidence_and_the_same_seed_gives_the_same(tokens):
    arms, how = frozen.arms_of(tokens), frozen.Probe(seeds=2, epochs=10, batch=60)
    average, ggem, again = (
        frozen.probe(tokens, arms[name], how) for name in ("average", "GGeM", "GGeM")
    )
    assert ggem.accuracy.mean() > average.accuracy.mean() + 0.1
    assert (ggem.p > 3.2).all()
    assert average.p.shape == (2, 0)
    np.testing.assert_array_equal(ggem.correct, again.correct)
    assert not np.array_equal(ggem.correct[0], ggem.correct[1])  # another four fifths of the images
    token = frozen.probe(tokens, arms["class token"], how)
    assert 0.2 < token.accuracy.mean() < average.accuracy.mean() + 0.1
    pooled = frozen.pool_test_images(tokens, arms["GGeM"], ggem.params[0])
    np.testing.assert_allclose(
        pooled, pooling.ggem_pool(jnp.float32(tokens.test), ggem.p[0]), rtol=1e-5
    )


def test_a_part_on_tokens_reports_everything_the_report_needs(tokens, tmp_path, monkeypatch):
    """A few arms only; the report is made from the results, and has the same numbers."""
    few = (
        "average",
        "positive average",
        "GeM",
        "GGeM",
        "GGeM, interleaved",
        "GGeM, random groups 1",
        "GGeM, 4 groups",
        "GGeM, one p per channel",
    )
    every = frozen.arms_of(tokens)
    monkeypatch.setattr(
        pooling_study, "arms_of", lambda tokens: {name: every[name] for name in few}
    )
    study = pooling_study.PoolingStudy(seeds=2, probe_epochs=2, runs=tmp_path / "runs")
    found = json.loads(json.dumps(pooling_study.run_frozen(tokens, study))) | {
        "seconds": 1,
        "machine": {"date": "2026-01-01"},
    }
    assert set(found["arms"]) == set(few)
    assert found["differences"]["GGeM less average"]["value"] == pytest.approx(
        found["arms"]["GGeM"]["accuracy"]["value"] - found["arms"]["average"]["accuracy"]["value"]
    )
    assert len(found["dependence"]["GGeM"]["blocks"]["HSIC"]) == 2
    assert found["retrieval"]["GeM, p = 1"] != found["retrieval"]["average"]
    retrieval = tmp_path / "metric.csv"
    with retrieval.open("w", newline="") as file:
        row = {
            f"recall_at_1_less_{rival}{end}": value
            for rival in ("average", "positive_average", "GeM")
            for end, value in (("", 0.05), ("_low", 0.01), ("_high", 0.09))
        }
        writer = csv.DictWriter(file, ["set", "arm", *row])
        writer.writeheader()
        writer.writerow({"set": "omniglot", "arm": "GGeM", **row})
    machine = {"date": "2026-01-01", "device": "a CPU", "python": "3", "jax": "0", "flax": "0"}
    said = write_report(
        tmp_path / "report.md",
        {"cifar10-frozen": found},
        pooling_study.study_settings(study),
        machine,
        retrieval,
    )
    text = (tmp_path / "report.md").read_text()
    assert said in text
    assert "| GGeM is better than average | CIFAR-10, frozen | top-1 |" in text
    assert (
        "| GGeM retrieves better than GeM | omniglot, trained | recall@1 | +5.00 [1.00, 9.00] |"
        " **supported** |" in text
    )
    assert "as many groups as heads (2) are better than 4" in text
    for name in ("accuracy", "groups", "dependence"):
        assert f"(report/cifar10-frozen-{name}.png)" in text
        assert (
            (tmp_path / "report" / f"cifar10-frozen-{name}.png").read_bytes().startswith(b"\x89PNG")
        )
    assert not list((tmp_path / "report").glob(".*"))


@pytest.mark.slow
def test_networks_are_trained_once_and_their_heads_and_tokens_are_those_of_the_model(
    tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(32, dtype=np.int32) % 4
    members = hold_in_memory(images, labels, tuple("abcd"))
    monkeypatch.setattr(cifar, "FLAGS", TINY_CIFAR)
    network = cifar.train_network("GGeM", 0, (members, members), tmp_path, 1.0)
    assert network.p.shape == (2,)
    again = cifar.train_network("GGeM", 0, (members, members), tmp_path, 1.0)
    np.testing.assert_array_equal(network.predictions.probability, again.predictions.probability)
    heads, descriptor = cifar.describe_heads(network, members.take(np.arange(20)))
    tokens = cifar.compute_tokens(network, members.take(np.arange(20)))
    assert (heads.shape, descriptor.shape, tokens.shape) == ((20, 16), (20, 16), (20, 5, 16))
    np.testing.assert_allclose(
        descriptor, pooling.ggem_pool(jnp.float32(tokens[:, 1:]), network.p), rtol=2e-3, atol=2e-3
    )
    found = pooling_study.measure_head_dependence(
        network, (members, members.take(np.arange(20).repeat(50)))
    )
    assert set(found) == {"heads", "random channels of heads", "blocks", "random"}
    assert cifar.train_network("average", 0, (members, members), tmp_path, 1.0).p.shape == (0,)


def test_both_ways_covers_seeds_and_images():
    """If values differ by seed alone, or by image alone, the interval is that of the one that
    varies; for constants it is a point.
    """
    rng = np.random.default_rng(0)
    by_seed, by_image = rng.normal(size=(200, 1)), rng.normal(size=(1, 300))
    for values, spread in (
        (by_seed + np.zeros((1, 50)), by_seed.std() / np.sqrt(200)),
        (by_image + np.zeros((40, 1)), by_image.std() / np.sqrt(300)),
    ):
        interval = pigeonhole_bootstrap(values)
        assert interval.value == pytest.approx(values.mean())
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    for seeds in (
        3,
        10,
    ):  # of seeds that differ and one image, a true 0 is decided in about one case of twenty
        decided = sum(
            not i.low <= 0 <= i.high
            for i in (
                pigeonhole_bootstrap(rng.normal(size=(seeds, 1)), draws=200) for _ in range(300)
            )
        )
        assert 3 <= decided <= 30
    constant = pigeonhole_bootstrap(np.full((3, 4), 0.5))
    assert (constant.low, constant.high) == pytest.approx((0.5, 0.5))
    for wrong in (np.zeros(3), np.zeros((0, 3)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="seeds, images"):
            pigeonhole_bootstrap(wrong)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "supported"),
        (-0.2, -0.01, "not supported"),
        (-0.1, 0.1, "undecided"),
        (np.nan, np.nan, "undecided"),
    ],
)
def test_a_claim_is_decided_where_its_whole_interval_lies_on_one_side(low, high, verdict):
    assert Claim("c", "d", "m", Interval(0.05, low, high)).verdict == verdict


def test_dependence_that_falls_supports_the_claim():
    """Against the average, dependence falls between heads and not between random channels. Against
    GeM, it falls between random channels as well.
    """
    scores = {
        "GGeM": ([0.3, 0.31, 0.32], 0.2),
        "average": ([0.5, 0.51, 0.53], 0.2),
        "positive average": ([0.3, 0.32, 0.31], 0.2),
        "GeM": ([0.4, 0.41, 0.42], 0.35),
    }
    kinds = ("heads", "random channels of heads"), ("blocks", "random")
    dependence = {
        name: (
            {named: {"HSIC": values} for named, _ in kinds}
            | {null: {"HSIC": [least] * 3} for _, null in kinds}
        )
        for name, (values, least) in scores.items()
    }
    found = {"cifar10": {"differences": {}, "dependence": dependence}}
    verdicts = {
        claim.claim.partition(" with ")[2]: claim.verdict
        for claim in make_claims(found, retrieval=Path("nowhere"))
    }
    assert verdicts == {
        "average": "supported",
        "positive average": "undecided",
        "GeM": "not supported",
    }


def test_results_are_kept_while_the_settings_are_the_same(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        pooling_study, "run_planted", lambda study: calls.append(study.seeds) or {"arms": {}}
    )
    study = pooling_study.PoolingStudy(runs=tmp_path)
    first, again = (pooling_study.load_or_run("planted", study) for _ in range(2))
    assert first == again
    pooling_study.load_or_run("planted", dataclasses.replace(study, seeds=4))
    assert calls == [10, 4]
    stored = tmp_path / "planted.json"  # as version 0.1.0 wrote it
    stored.write_text(stored.read_text().replace('"images"', '"pictures"'))
    assert '"pictures": 10000' in stored.read_text()
    pooling_study.load_or_run("planted", dataclasses.replace(study, seeds=4))
    assert calls == [10, 4]


@pytest.mark.parametrize("part", ["imagenette", "cifar10-frozen"])
def test_the_committed_results_are_read(part, tmp_path):
    found = json.loads(pooling_study.PoolingStudy().results.read_text())
    text = make_section(part, found["parts"][part], tmp_path)
    train, test = found["parts"][part]["images"]
    assert f"{train:,} images to train on (four fifths of them for each seed), {test:,} to" in text
    assert found["study"] == pooling_study.study_settings(pooling_study.PoolingStudy())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--parts", "imagenet"], "--parts must be among planted, imagenette"),
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--images", "9"], "--images must be at least 100, it is 9"),
        (["--epochs", "0"], "--epochs must be positive"),
        (["--out", "no/where/report.md"], "there is no folder no/where"),
        (["--out", "report"], "report needs an ending"),
    ],
    ids=["part", "seeds", "images", "epochs", "folder", "ending"],
)
def test_mistakes_are_told_in_one_line(flags, sentence):
    with pytest.raises(SystemExit) as stop:
        pooling_study.main(flags)
    assert sentence in str(stop.value.code)
    assert "\n" not in str(stop.value.code)
