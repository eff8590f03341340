"""benchmarks/bench_weights.py: its files have the published sizes, and its columns are right."""

import math

import pytest

from benchmarks.bench_weights import cases, measure, write_random

# Parameters of the published networks, as timm counts them (those before CLIP), as open_clip does
# (CLIP), and as the model card says (SigLIP).
PUBLISHED = {
    "DeiT-S/16 distilled": 22_436_432, "DeiT-III-B/16": 86_585_320,
    "DINOv2-B/14 registers": 86_582_016, "AugReg-B/16": 86_567_656,
    "CLIP-B/16": 149_620_737, "SigLIP-B/16": 203_155_970,
}  # fmt: skip


def test_files_of_full_size_have_the_published_number_of_parameters():
    found = cases()
    assert {
        name: sum(math.prod(shape) for shape in found[name].shapes.values()) for name in PUBLISHED
    } == PUBLISHED


@pytest.mark.parametrize("name", cases())
def test_small_files_come_back_to_the_bit(tmp_path, name):
    case = cases(small=True)[name]
    path = tmp_path / f"weights{case.ending}"
    write_random(case, path)
    for tower in case.towers:
        row = measure(path, tower, 3, rounds=1)
        assert row["differs"] == ("dist_token pos_embed" if "distilled" in name else "")
        assert name.replace("-III", "3").lower().startswith(row["family_found"])
