"""eval/studies/planted.py: the exponents go where the planted evidence wants them."""

import json

import jax
import numpy as np
import pytest

from eval.studies import planted
from eval.studies.planted import Planted


@pytest.fixture(scope="module")
def arms():
    """A third of the default length: enough to see."""
    config = Planted(seeds=5, steps=200, test=1024)
    return planted.summarise(planted.run(config))


@pytest.mark.slow
def test_ggem_gives_each_half_its_own_exponent_and_gem_cannot(arms):
    sparse, dense = arms["GGeM"]["p"]
    assert sparse["low"] > dense["high"] + 1, "the 95 % intervals of the two groups must lie apart"
    (shared,) = arms["GeM"]["p"]
    assert dense["high"] < shared["low"]
    assert shared["high"] < sparse["low"]


@pytest.mark.slow
def test_ggem_is_the_more_accurate_on_the_same_draws(arms):
    for other in ("average", "positive average", "maximum", "GeM", "GGeM, random groups"):
        assert arms["GGeM"]["accuracy"]["low"] > arms[other]["accuracy"]["high"]
        assert arms[other]["ggem_less_this"]["low"] > 0
    assert len(arms["GGeM"]["accuracy_by_seed"]) == 5


def test_the_evidence_stands_where_the_experiment_says():
    config = Planted(bump=1000.0, shift=500.0, tokens=9, channels=16, classes=3)
    codes = planted.draw_codes(jax.random.key(0), config)
    tokens, labels = planted.draw(jax.random.key(1), 64, codes, config)
    tokens, labels = np.asarray(tokens), np.asarray(labels)
    bumps, shifts = tokens[..., :8] > 500, tokens[..., 8:] > 250
    assert (bumps.any(-1).sum(-1) == 1).all(), "sparse evidence is in one token"
    assert (shifts.any(-1).sum(-1) == 9).all(), "dense evidence is in every token"
    np.testing.assert_array_equal(bumps.any(1), np.asarray(codes)[0][labels // 3] > 0)
    np.testing.assert_array_equal(shifts.all(1), np.asarray(codes)[1][labels % 3] > 0)


def test_the_tool_prints_a_table_or_json(capsys, monkeypatch):
    every = planted.make_arms
    monkeypatch.setattr(
        planted, "make_arms", lambda config: {name: every(config)[name] for name in ("GeM", "GGeM")}
    )
    flags = ["--seeds", "2", "--steps", "3", "--test", "16", "--batch", "8"]
    planted.main(flags)
    assert "GGeM less GeM" in capsys.readouterr().out
    planted.main([*flags, "--json"])
    assert set(json.loads(capsys.readouterr().out)["arms"]) == {"GeM", "GGeM"}
    with pytest.raises(SystemExit, match="--seeds must be at least 2"):
        planted.main(["--seeds", "1"])
