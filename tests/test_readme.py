"""The README's Python runs as it stands there, and what it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["descriptor"].shape == (8, 384)
    assert names["output"].logits.shape == (2, 1000)
    assert names["gradient"].p[...].shape == (6,)


@pytest.mark.parametrize(
    "module", sorted(set(re.findall(r"python -m ((?:train|eval|benchmarks)\.\w+)", README)))
)
def test_the_modules_of_the_readme_exist(module):
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_the_files_of_the_readme_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
