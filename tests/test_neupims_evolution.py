"""Evolution of designs: a known front, children, and who survives."""

import jax.numpy as jnp
import numpy as np

from neupims.exploration import evolution
from neupims.exploration.explore_space import explore_space
from neupims.exploration.points import Objective, overall
from neupims.exploration.space import make_space


def test_evolution_nears_a_known_front_and_beats_chance():
    """ZDT1 (Zitzler, Deb and Thiele, 2000) moved up by 1 so that all is positive: the front is f2 =
    2 - sqrt(f1 - 1), where all other knobs are 0.
    """
    names = [
        "hbm.trp_cycles",
        "hbm.tccd_s_cycles",
        "hbm.tfaw_cycles",
        "hbm.trfc_cycles",
        "hbm.tccd_l_cycles",
        "hbm.trtp_cycles",
    ]
    space = make_space({name: {"low": 0.0, "high": 1.0} for name in names})

    def zdt1(columns):
        x = [columns[name] for name in names]
        g = 1 + 9 * sum(x[1:]) / (len(x) - 1)
        return {"one": (1 + x[0])[:, None], "two": (1 + g * (1 - jnp.sqrt(x[0] / g)))[:, None]}

    objectives = (Objective("one", False), Objective("two", False))
    reference = {"one": 2.0, "two": 3.0}
    options = {"points": 3200, "chunk": 64, "reference": reference, "sensitivity_of": "two"}
    evolved, drawn = (
        explore_space(space, zdt1, objectives, method=method, seed=1, **options)
        for method in ("evolution", "random")
    )
    base = [float(overall(evolved.base.metrics[name])[0]) for name in ("one", "two")]
    most = (1 + 2 / 3) / (base[0] * base[1])  # the area above 1 - sqrt(x) up to 2, from 0 to 1
    assert drawn.hypervolume < 0.9 * most
    assert 0.97 * most < evolved.hypervolume <= most


def test_children_stay_in_the_cube_and_lists_keep_their_values():
    units = (
        jnp.asarray(np.random.default_rng(0).random((64, 3)), jnp.float32)
        .at[:, 1]
        .set(jnp.arange(64) % 4 / 4)
    )
    drawn = jnp.asarray(np.random.default_rng(1).random((evolution.DRAWS, 64, 3)), jnp.float32)
    children = evolution.breed(
        drawn, units, jnp.zeros(64, int), jnp.ones(64), jnp.array([False, True, False])
    )
    assert children.shape == (64, 3)
    assert float(children.min()) >= 0
    assert float(children.max()) <= 1
    kept = np.isin(np.asarray(children[:, 1]), np.arange(4) / 4)
    redrawn = np.asarray(drawn[6, :, 1]) < 1 / 3  # one knob of three, on average
    assert kept[~redrawn].all()
    assert not kept[redrawn].any()
    assert not np.isin(np.asarray(children[:, 0]), np.asarray(units[:, 0])).all()


def test_fitness_puts_violations_behind_and_repeats_behind_these():
    values = np.array([[1.0], [2], [3], [1], [4], [5]])
    objectives = np.array([[2.0, 2], [1, 3], [3, 3], [2, 2], [0, 0], [np.nan, 0]])
    rank, _ = evolution.fitness(values, objectives, np.array([0, 0, 0, 0, 0.5, np.inf]))
    assert rank.tolist() == [0, 0, 1, 12, 6, 12]
    assert evolution.select_survivors(rank, np.zeros(6)).tolist() == [0, 1, 2]
