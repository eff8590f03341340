"""The evaluation of accelerator designs on workloads, and requests that are dealt to channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.exploration.evaluation import make_evaluate, map_blocks
from neupims.exploration.impossible import REASONS
from neupims.exploration.space import make_space
from neupims.exploration.workloads import Workload, deal
from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.workload import make_batch
from neupims.timing.iteration import simulate

LENGTHS = np.random.default_rng(0).integers(1, 512, 64)
BATCH = make_batch(LENGTHS, np.arange(64) % 32)
WORKLOADS = [
    Workload(name, load_model(name), load_parallel(name), BATCH) for name in ("gpt3-7b", "gpt3-13b")
]
MACHINES = make_space(
    {
        "pim.page_bytes": [512, 1024, 2048],
        "hbm.tfaw_cycles": {"low": 12, "high": 40},
        "parallel.tp": [4, 8, 3],
    }
)


def test_the_usual_evaluation_is_a_loop_over_simulate():
    """The last three are impossible: 3 devices for 32 heads, a tFAW of NaN, and pages longer
    than rows.
    """
    pages, faw = np.array([512, 1024, 1024, 1024, 2048]), np.array([12.5, 30, 30, np.nan, 30])
    columns = {"pim.page_bytes": pages, "hbm.tfaw_cycles": faw, "parallel.tp": [4, 4, 3, 4, 4]}
    found = jax.jit(make_evaluate(WORKLOADS, schedule="trace", most_channels=32))(
        {name: jnp.asarray(each) for name, each in columns.items()}
    )
    reasons = [[REASONS[code] for code in each] for each in found["flagged"].tolist()]
    assert reasons == [[""] * 2] * 2 + [
        ["heads do not divide over the devices of a layer"] * 2,
        ["not timed: a time or an energy is not finite"] * 2,
        ["pages longer than a row"] * 2,
    ]
    for place, each in enumerate(WORKLOADS):
        alone = simulate(Hardware(), each.model, each.batch, each.parallel, most_channels=32)
        assert found["tokens_per_second"][1, place] == pytest.approx(
            float(alone.tokens_per_second), rel=1e-4
        )
        assert found["energy_joules_per_token"][1, place] == pytest.approx(
            float(alone.energy_joules) * each.parallel.tp / 64, rel=1e-4
        )
    assert np.isfinite(found["tokens_per_second"][:3]).all()


@pytest.mark.parametrize("block", [None, 2])
def test_no_designs_have_no_metrics(block):
    for rows, found in ((0, (0, 3)), (5, (5, 3))):
        columns = {"a": jnp.arange(rows), "b": jnp.ones(rows)}
        result = map_blocks(lambda row: {"c": row["a"] * jnp.ones(3)}, columns, block)
        assert result["c"].shape == found


@pytest.mark.parametrize("channels", [1, 5, 32, 64])
def test_dealt_requests_are_balanced(channels):
    """Each channel gets one request of every lap, so counts differ by one at most, and so do the
    halves; long and short requests are paired.
    """
    lengths = jnp.sort(jnp.asarray(np.random.default_rng(1).integers(1, 2048, 256)))[::-1]
    batch = deal(lengths, channels)
    counts = np.bincount(batch.channels, minlength=channels)
    halves = np.bincount(batch.sub_batches, minlength=2)
    loads = np.bincount(batch.channels, weights=lengths, minlength=channels)
    assert np.ptp(counts) <= 1
    assert abs(halves[0] - halves[1]) <= max(1, channels // 32)
    if 256 % (2 * channels) == 0:
        assert loads.max() <= 1.03 * loads.mean()
