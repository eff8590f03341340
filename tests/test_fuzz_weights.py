"""benchmarks/fuzz_weights.py: damaged and hostile files are read or refused; all else fails."""

import random

import pytest

from benchmarks import fuzz_weights
from ggem_jax.weights import UnreadableWeights


def test_some_hundred_files_are_read_or_refused(tmp_path, capsys):
    assert fuzz_weights.fuzz(tmp_path, 420, seed=1) == 0
    said = capsys.readouterr().out
    assert "420 files, 0 failed" in said
    rows = {line[:22].strip(): line[22:].split() for line in said.splitlines()[1:-1]}
    assert len(rows) == 14
    assert sum(int(row[0]) for row in rows.values()) > 20  # some are still sound
    assert sum(int(row[2]) for row in rows.values()) > 60  # some are refused as unsafe


def test_every_seed_is_sound(tmp_path):
    seeds = fuzz_weights.make_seeds(tmp_path)
    for seed in seeds.values():
        for name, data in seed.files.items():
            (tmp_path / name).write_bytes(data)
        found = fuzz_weights.read_checkpoint if not seed.is_pickle else fuzz_weights.read_pickle
        assert found(tmp_path / next(iter(seed.files)))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("x"), "KEYERROR"),
        (UnreadableWeights("two\nlines"), "SENTENCE"),
        (UnreadableWeights("without the file"), "SENTENCE"),
    ],
)
def test_other_errors_and_sentences_fail(tmp_path, monkeypatch, error, words):
    def reads(path):
        raise error

    monkeypatch.setattr(fuzz_weights, "read_pickle", reads)
    seed = fuzz_weights.Seed({"case": b""}, is_pickle=True)
    assert words in fuzz_weights.read(tmp_path / "case", seed, random.Random(0))[0]


def test_a_payload_that_runs_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        fuzz_weights, "read", lambda *_: (tmp_path / "ran").touch() or ("read", 0, 0)
    )
    assert fuzz_weights.fuzz(tmp_path, 14, seed=0) == 14
    assert "RAN" in capsys.readouterr().out
