"""eval.studies.codesign: what the search chooses, and the page of a small study."""

import json

import numpy as np
import pytest

from eval.studies import codesign
from eval.studies.codesign import POLICIES, PUBLISHED, choose, ratios
from neupims import Hardware, replace


def test_the_best_policy_machine_and_pair_are_chosen():
    knobs = [{"npu.num_arrays": float(count)} for count in (8, 4, 16)]
    table = np.full((len(POLICIES), 3), 1.0)
    published = POLICIES.index(PUBLISHED)
    table[published] = [2.0, 1.0, 3.0]
    table[4] = [2.5, 1.0, 2.0]
    table[5] = [1.0, 4.0, 1.0]
    found = choose(table, knobs, [{"area_mm2": 1.0 * place} for place in range(3)])
    assert [each.name for each in found] == [
        *("published", "policy searched", "hardware searched", "both searched"),
    ]
    assert [each.searched for each in found] == [2.0, 2.5, 3.0, 4.0]
    assert [each.policy for each in found] == [PUBLISHED, POLICIES[4], PUBLISHED, POLICIES[5]]
    assert [each.knobs["npu.num_arrays"] for each in found] == [8, 8, 16, 4]
    assert [each.size["area_mm2"] for each in found] == [0, 0, 2, 1]


def test_equally_good_ones_are_those_that_come_first():
    table = np.ones((len(POLICIES), 2))
    chosen = choose(table, [{"a": 1.0}, {"a": 2.0}], [{}, {}])
    assert {each.knobs["a"] for each in chosen} == {1.0}
    assert chosen[0].policy == PUBLISHED


def test_ratios_are_those_of_each_seed():
    first, second = ratios(np.array([[2.0, 4.0], [4.0, 4.0], [1.0, 3.0]]))
    assert first == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert second["value"] == pytest.approx(2.0)  # of 2, 1 and 3
    half = 4.302653 / np.sqrt(3)  # Student's t of two degrees of freedom, and their deviation, 1
    assert (second["low"], second["high"]) == pytest.approx((2 - half, 2 + half), rel=1e-5)


def test_machines_that_serve_are_no_larger_and_the_fastest(monkeypatch):
    small = {"hbm.num_channels": (24, 32, 40), "npu.num_arrays": (4, 8, 16)}
    monkeypatch.setattr(codesign, "GRID", small)
    study = codesign.Codesign(served=2)
    machines, sizes, grid, allowed = codesign.list_machines(study, "intended")
    found = [tuple(codesign.knobs_of(each).values()) for each in machines]
    assert (grid, found[0]) == (9, (32, 8))
    values = np.array([(channels, arrays) for channels in (24, 32, 40) for arrays in (4, 8, 16)])
    step = codesign.evaluate_step(study, "intended", values * 1.0)
    own = step["area_mm2"][4], step["peak_power_watts"][4]
    fits = [
        place
        for place in range(9)
        if step["area_mm2"][place] <= own[0] and step["peak_power_watts"][place] <= own[1]
    ]
    assert allowed == len(fits)
    assert not {8, 5, 7} & set(fits)  # more of both, or of one of them
    fastest = sorted(set(fits) - {4}, key=lambda place: -step["tokens_per_second"][place])
    assert found[1:] == [tuple(values[place]) for place in fastest[:2]]
    rows = [4, *fastest[:2]]
    for name in codesign.SIZES:
        np.testing.assert_allclose([each[name] for each in sizes], step[name][rows], rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--limits", "ttft<1s"], "such as ttft_p99<2s"),
        (["--out", "nowhere/page.md"], "there is no folder nowhere"),
    ],
)
def test_settings_that_no_study_can_be_made_of_are_refused(flags, message):
    with pytest.raises(SystemExit, match=message):
        codesign.main(flags)


def study_of(monkeypatch, tmp_path, goodput_of):
    """Runs a study of two machines and a given goodput of machine and interleaving."""
    machines = [replace(Hardware(), "npu.num_arrays", count) for count in (8, 16)]
    sizes = [{"area_mm2": 100.0 * each, "peak_power_watts": 10.0} for each in (1, 2)]
    found = codesign.Machines(machines, sizes, 9, 2)
    monkeypatch.setattr(codesign, "list_machines", lambda study, fidelity: found)
    monkeypatch.setattr(
        codesign,
        "find_goodputs",
        lambda server, machines, requests, tails: np.array(
            [goodput_of(each.npu.num_arrays, server.setting.interleaving) for each in machines]
        ),
    )
    flags = ["--requests", "3", "--seeds", "2", "--fidelities", "intended"]
    page, results = tmp_path / "page.md", tmp_path / "found.json"
    codesign.main([*flags, "--out", str(page), "--results", str(results)])
    return page.read_text(), json.loads(results.read_text())["found"]["intended"]


def test_the_page_has_each_contender_with_its_ratio(monkeypatch, tmp_path):
    page, found = study_of(
        monkeypatch, tmp_path, lambda arrays, on: arrays * (1.5 if on == "off" else 1)
    )
    assert [each["searched"] for each in found["contenders"]] == [8, 12, 16, 24]
    for kind in codesign.TRACES:
        assert [each["value"] for each in found["ratios"][kind]] == [1, 1.5, 2, 3]
    last = page[page.index("| both searched |") :].splitlines()[0]
    assert last.startswith(
        "| both searched | 32 | 16 | 128 | 128 | 16 | off | greedy | 200 | 10 | 24"
    )
    assert last.endswith("| 3.00 [3.00, 3.00] | 3.00 [3.00, 3.00] |")
    assert "2 of the 9 machines of the grid are allowed" in page


def test_a_published_machine_that_meets_the_limits_at_no_rate_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="at no rate on sharegpt:3, seed 1: give looser --limits"):
        study_of(monkeypatch, tmp_path, lambda arrays, on: 0.0 if arrays == 8 else 1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_small_study_writes_its_page(tmp_path, monkeypatch):
    small = {"hbm.num_channels": (28, 32), "npu.num_arrays": (8,), "pim.macs_per_bank": (16,)}
    monkeypatch.setattr(codesign, "GRID", small)
    monkeypatch.setattr(codesign, "TRACES", ("alpaca",))
    flags = ["--requests", "6", "--seeds", "2", "--fidelities", "intended"]
    page, results = tmp_path / "page.md", tmp_path / "found.json"
    codesign.main([*flags, "--out", str(page), "--results", str(results)])
    found = json.loads(results.read_text())["found"]["intended"]
    assert (found["grid"], found["allowed"], found["served"]) == (2, 2, 2)
    assert found["ratios"]["alpaca"][0]["value"] == 1.0
    best = found["contenders"][-1]["searched"]
    assert best >= found["contenders"][0]["searched"] > 0
    assert f"| both searched | {found['contenders'][-1]['knobs']['hbm.num_channels']:g}" in (
        page.read_text()
    )
