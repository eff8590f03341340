"""Flags of impossible designs, in batches of any size, and workloads padded to one length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neupims
from neupims.exploration.evaluation import make_evaluate
from neupims.exploration.workloads import Workload
from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.workload import Batch, make_batch
from neupims.timing.iteration import simulate

MODEL, PARALLEL = load_model("gpt3-7b"), load_parallel("gpt3-7b")
RNG = np.random.default_rng(0)
BATCH = make_batch(RNG.integers(1, 400, 96), RNG.integers(0, 32, 96))


@pytest.mark.parametrize("macs", [5, 7])
@pytest.mark.parametrize("system", ["neupims", "npu-pim"])
def test_requests_of_length_0_change_nothing(system, macs):
    """A workload of 96 requests beside one of 512 gives what it gives alone."""
    hardware = replace(Hardware(), "pim.macs_per_bank", macs)
    padded = Batch(*(jnp.pad(part, (0, 416)) for part in jax.tree.leaves(BATCH)))
    one, two = (
        simulate(hardware, MODEL, batch, PARALLEL, system=system) for batch in (BATCH, padded)
    )
    for name in ("tokens_per_second", "pim_utilization", "energy_joules", "channel_cycles"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-6)
    assert not bool(two.flagged)


@pytest.mark.parametrize(
    ("system", "alike"), [("neupims", True), ("npu-pim", True), ("npu-only", False)]
)
def test_designs_that_cannot_run_are_flagged_in_blocks_of_any_size(system, alike):
    """Tiles of 256 ranks never start between two refreshes. In large blocks the compiler's maximum
    drops the NaN that they leave.
    """
    ranks = jnp.asarray(np.tile([2, 256], 2048), jnp.int32)
    evaluate = make_evaluate(
        [Workload("chat", MODEL, PARALLEL, BATCH)], schedule="trace", system=system, block=4096
    )
    flagged = jax.jit(evaluate)({"hbm.ranks": ranks})["flagged"].ravel()
    assert not flagged[::2].any()
    assert flagged[1::2].all() == alike
    assert bool(
        simulate(
            replace(Hardware(), "hbm.ranks", 256), MODEL, BATCH, PARALLEL, system=system
        ).flagged
    ) == (alike)


def test_a_scratchpad_must_hold_three_blocks_in_its_half():
    """Three blocks of 128 x 128 numbers of 2 bytes are 98,304 bytes."""
    for system, count in (("neupims", 2), ("npu-only", 1), ("gpu", 1)):
        for size, fits in ((65536, False), (131072, False), (196607, False), (196608, True)):
            hardware = replace(Hardware(), "npu.scratchpad_bytes", size)
            found = simulate(hardware, MODEL, BATCH, PARALLEL, system=system, sub_batches=count)
            assert bool(found.flagged) == (not fits and system != "gpu")
            case = neupims.make_case(
                "gpt3-7b", BATCH, system=system, changes={"npu.scratchpad_bytes": size}
            )
            for prefill in (False, True):
                if fits or system == "gpu":
                    neupims.simulate_case(case, path="closed", prefill=prefill)
                    continue
                with pytest.raises(ValueError, match=f"at least 196608, not {size}"):
                    neupims.simulate_case(case, path="closed", prefill=prefill)


def test_too_small_a_scratchpad_is_on_no_front():
    found = neupims.explore(
        "neupims",
        "gpt3-7b",
        BATCH,
        {"npu.scratchpad_bytes": [65536, 131072, 262144, 1048576], "npu.array_width": [64, 128]},
        method="grid",
    )
    assert found.flagged == 2
    for design in found.front:
        assert design.knobs["npu.scratchpad_bytes"] >= 12 * design.knobs["npu.array_width"] ** 2
