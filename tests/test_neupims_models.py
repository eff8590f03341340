"""The named models against published numbers, and docs/accelerator/models.md."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.neupims_models import QUANTITIES, compare, table
from neupims import load_model
from neupims.machine.config import names
from neupims.machine.hugging_face import READERS

PAGE = (Path(__file__).parent.parent / "docs/accelerator/models.md").read_text(encoding="utf-8")
FOUND = compare()


def test_enough_models_and_quantities_are_compared():
    for quantity, least in zip(QUANTITIES, (20, 8, 16, 20, 12), strict=True):
        assert len([each for each in FOUND if each.quantity == quantity]) >= least, quantity


@pytest.mark.parametrize("each", FOUND, ids=lambda each: f"{each.model}, {each.quantity}")
def test_sizes_are_the_published_ones(each):
    """Within 1 %; the few others say why, and are explained on the page."""
    assert each.source
    if abs(each.percent) > 1:
        assert each.why
        assert abs(each.percent) < 6
        names_ = {
            "glm4.5": "GLM-4.5",
            "kimi-k2": "Kimi K2",
            "llama4-maverick": "Llama 4 Maverick and Qwen3 30B-A3B",
            "qwen3-30b-a3b": "Llama 4 Maverick and Qwen3 30B-A3B",
        }
        assert f"- {names_.get(each.model, 'gpt-oss')}: " in PAGE


def test_scales_of_four_bit_experts_are_what_the_checkpoint_has_more():
    """gpt-oss: 8 bits for 32 weights of 4 bits are 1/16 of the bytes of the experts."""
    for name in ("gpt-oss-20b", "gpt-oss-120b"):
        (weights,) = [x for x in FOUND if (x.model, x.quantity) == (name, "weights, GB")]
        model = load_model(name)
        experts = model.layers * model.experts * 3 * model.width * model.expert_width / 2
        assert weights.ours + experts / 16 == pytest.approx(weights.published, rel=0.01)


def test_the_page_has_the_table_of_the_command():
    assert "\n".join(table()) in PAGE


def test_the_page_names_every_architecture_and_the_number_of_models():
    assert f"There are {len(names('models'))} named models" in PAGE
    listed = PAGE[PAGE.index("how it is read:") : PAGE.index(". Another")]
    assert set(re.findall(r"`(\w+)`", listed)) == set(READERS)


def test_the_files_of_the_page_are_models(tmp_path):
    text, short = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(short, encoding="utf-8")
    assert load_model(path) == replace(load_model("llama3-8b"), weight_bits=8, kv_bits=8)
    path.write_text(text, encoding="utf-8")
    model, shipped = load_model(path), load_model("qwen3-32b")
    assert (model.query_width, model.vocabulary) == (shipped.query_width, shipped.vocabulary)
    assert (model.weight_bits, model.kv_bits) == (8, 8)
