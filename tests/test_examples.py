"""The scripts in examples/: each is short, says what it shows, runs by itself, and prints what is
checked here.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# name -> what is printed, with numbers as groups, and what must hold for them
CHECKS = {
    "explore_designs": (
        r"(\d+) of 512 designs.*\n(?:.*hbm\.num_channels 32.*\n){5}hbm.* decides .*: (\d+) % .*",
        lambda front, share: front > 3 and share > 50,
    ),
    "fine_tune_vit": (
        r"accuracy on 261 other images: (\d+)%\nexponents: \[([\d.]+)\]",
        lambda accuracy, p: accuracy >= 50 and p != 3,
    ),
    "pgvector_store": (
        r"([\d.]+) % of the 10 best in the same place",
        lambda same: same == 100,
    ),
    "pool_in_your_module": (
        r"loss ([\d.]+) -> ([\d.]+)\nexponents 3\.0 -> ([\d.]+) [\d. ]+",
        lambda before, after, p: after < before / 10 and p > 6,
    ),
    "rerank_vectors": (
        r"search +mAP ([\d.]+)\nalpha.* mAP ([\d.]+)\nSuperGlobal.* mAP ([\d.]+)",
        lambda search, expanded, reranked: min(expanded, reranked) > search + 5,
    ),
    "search_photos": (
        r"(\d+) images indexed.*\n(?:00-\d\.jpg  score .*\n){5}.*rank before reranking (\d+)",
        lambda indexed, before: indexed == 72 and before >= 1,
    ),
    "simulate_accelerator": (
        r"published npu-only +([\d.]+) ms.*\npublished neupims +([\d.]+) ms.*\n"
        r"mine +neupims +([\d.]+) ms.*",
        lambda npu, published, mine: npu > published > mine,
    ),
    "usearch_store": (
        r"([\d.]+) % of the candidates.*\n([\d.]+) % of the 10 best in the same place",
        lambda recall, same: recall > 99 and same > 98,
    ),
}


# name -> packages that the extra `dev` does not install everywhere, and why
NEEDED = {"pgvector_store": {"pgserver": "pgserver has no wheels for Python 3.13 and newer"}}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    assert path.stem in CHECKS, f"add to CHECKS what {path.name} prints"
    for package, why in NEEDED.get(path.stem, {}).items():
        pytest.importorskip(package, reason=why)
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert len(ast.get_docstring(ast.parse(text)) or "") > 100
    own = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    paths = [str(ROOT), *filter(None, [own.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env=own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    printed, holds = CHECKS[path.stem]
    found = re.fullmatch(printed, run.stdout.strip())
    assert found, run.stdout
    assert holds(*map(float, found.groups())), run.stdout
