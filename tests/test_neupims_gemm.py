"""neupims/timing/gemm.py: tiles, cycles and bytes of matrix products, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.calibration import DEFAULT
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.timing.gemm import FINISH_CYCLES, bytes_per_cycle, gemm, stuck_chance, tiling

FAST = replace(Hardware(), "hbm.clock_hz", np.asarray(1e15))  # memory that is never waited for
tiled, product = (
    jax.jit(tiling),
    jax.jit(gemm, static_argnames=("calibration", "fidelity", "npu_only")),
)


def cycles_of(hardware, tokens, inner, features, fidelity="intended", **options):
    return product(
        jax.tree.map(float, hardware),
        tokens,
        inner,
        features,
        calibration=DEFAULT,
        fidelity=fidelity,
        **options,
    )


@pytest.mark.parametrize(
    ("tokens", "inner", "features", "sides", "tiles"),
    # of tokens, inner channels and features; half of the scratchpad is 68,719,616 bytes (reference
    # of the public simulator)
    [
        (512, 4096, 4096, (512, 4096, 4096), (1, 1, 1)),  # 7B, FC1 on one of 4 devices: one tile
        (
            256,
            7168,
            5376,
            (256, 3584, 5376),
            (1, 2, 1),
        ),  # 30B, QKV: 2 x (7168 x 5376 + ...) = 83 MB, inner halved once
        (
            256,
            7168,
            7168,
            (256, 3584, 7168),
            (1, 2, 1),
        ),  # 30B, FC1: of equal sides the inner one first
        (256, 12288, 4608, (256, 6144, 4608), (1, 2, 1)),  # 175B, QKV
        (256, 12288, 6144, (256, 3072, 6144), (1, 4, 1)),  # 175B, FC1: 6144 x 6144 is still 75 MB
    ],
)
def test_tiles_halve_the_longest_side(tokens, inner, features, sides, tiles):
    found = [
        float(value) for value in tiled(jax.tree.map(float, Hardware()), tokens, inner, features)
    ]
    assert (tuple(found[:3]), tuple(found[3:])) == (sides, tiles)


def test_odd_sides_are_halved_upwards():
    """3 x (100 x 301) in blocks of 128: 2 x (128 x 384 + 384 x 384 + 384 x 128) bytes = 491,520;
    half of 491,519 holds no more than two halvings.
    """
    small = replace(Hardware(), "npu.scratchpad_bytes", 2 * 491519)
    found = tiled(jax.tree.map(float, small), 100, 301, 301)
    assert (float(found.inner), float(found.inner_tiles)) == (151, 2)
    roomy = replace(Hardware(), "npu.scratchpad_bytes", 2 * 491520)
    assert float(tiled(jax.tree.map(float, roomy), 100, 301, 301).inner_tiles) == 1


def test_passes_by_hand():
    """300 tokens are 3 blocks, 512 channels 4, 1024 features 8; 8 arrays stream a block of 128
    features in 16 cycles. A pass is 4 x (128 + 7 x 16) = 960; three of them, and what fills and
    drains the arrays: twice 254 + 16 (the first and the last), and the end.
    """
    work = cycles_of(FAST, 300, 512, 1024)
    assert float(work.cycles) == pytest.approx(3 * 960 + 2 * (254 + 16) + FINISH_CYCLES)
    assert float(work.busy_cycles) == 3 * 960


def test_preload_of_the_npu_only_branch_is_not_hidden():
    """A block of weights waits for the arrays to drain: 271 instead of 128 cycles."""
    hidden = cycles_of(FAST, 300, 512, 1024, "simulator")
    serial = cycles_of(FAST, 300, 512, 1024, "simulator", npu_only=True)
    assert float(serial.busy_cycles) - float(hidden.busy_cycles) == 3 * 4 * (271 - 128)


def test_bytes_and_products_by_hand():
    """Weights once, tokens once. In `intended` fidelity the whole result is written, in `simulator`
    fidelity only the features of the first blocks: 128 for up to 128 tokens.
    """
    meant, coded = (
        cycles_of(Hardware(), 100, 512, 1024, fidelity) for fidelity in ("intended", "simulator")
    )
    assert float(meant.read_bytes) == float(coded.read_bytes) == 2 * (512 * 1024 + 512 * 100)
    assert (float(meant.write_bytes), float(coded.write_bytes)) == (2 * 100 * 1024, 2 * 100 * 128)
    assert float(meant.macs) == 100 * 512 * 1024


def test_weights_arrive_at_memory_speed():
    """One token: 2 x 4096 x 4096 bytes at 95.4 % of 1024 bytes a cycle hide all products of the
    only pass.
    """
    assert bytes_per_cycle(Hardware()) == 1024
    work = cycles_of(Hardware(), 1, 4096, 4096)
    loading = 2 * (4096 * 4096 + 4096) / (DEFAULT.queued_efficiency * 1024)
    assert float(work.cycles) == pytest.approx(loading + 254 + 16 + FINISH_CYCLES, rel=1e-6)


def test_a_stuck_write_only_delays():
    free, certain = (
        float(cycles_of(Hardware(), 1, 4096, 1024, "simulator", stuck=chance).cycles)
        for chance in (0.0, 1.0)
    )
    half = float(cycles_of(Hardware(), 1, 4096, 1024, "simulator", stuck=0.5).cycles)
    assert certain > 1.2 * free
    assert half == pytest.approx((free + certain) / 2, rel=1e-6)


def test_chance_of_a_stuck_write():
    """32 channels of 64-byte bursts: 96 bursts each are 196,608 bytes, and are one in two. Where
    only every second channel has a write, the chance is half of that after few writes.
    """
    bursts = jnp.array([0.0, 0.5, 1.0, 5.9, 6.0, 96.0, 288.0])
    chances = stuck_chance(Hardware(), bursts * 2048, 0.3)
    assert chances.tolist() == pytest.approx([0, 0.15, 0.3, 0.3, 6 / 102, 0.5, 0.75])


def simulated(hardware=None, tokens=1, inner=4096, features=4096, **options):
    return cycles_of(hardware or Hardware(), tokens, inner, features, "simulator", **options)


def test_the_bank_that_is_behind_ends_last():
    """8 rows are queued in a bank. With tCCD_L of 4 cycles and bursts of 2, a bank is behind by all
    of them: the products of 8 x 1 MiB of 4096 x 4096 weights follow the last byte, without what
    the arrays do while the 8 rows come, 5 + 14 + 14 + 32 cycles each. A pass is 32 x (128 + 31 x
    16) = 19,968 cycles.
    """
    work = simulated(replace(Hardware(), "hbm.tccd_l_cycles", 4))
    first_bytes = 2 * (4096 * 4096 + 4096)
    loading = first_bytes / (DEFAULT.streaming_efficiency * 1024)
    behind = 8 * (19968 * 2**20 / first_bytes - 65)
    assert float(work.cycles) == pytest.approx(
        loading + behind + 254 + 16 + FINISH_CYCLES, rel=1e-5
    )


def test_banks_drift_apart_as_in_a_random_walk():
    """Four times the weights: twice the rows behind, and the same products for each of them."""

    def behind(inner):
        loading = 2 * (inner * 4096 + inner) / (DEFAULT.streaming_efficiency * 1024)
        cycles = float(simulated(inner=inner).cycles)
        return cycles - loading - 254 - 16 - FINISH_CYCLES

    assert behind(4096) == pytest.approx(2 * behind(1024), rel=1e-3)


def test_writes_of_the_operation_before_come_first():
    """Half of the bus time of 1 MiB passed before the product: 512 cycles are left."""
    later = float(simulated(inherited_bytes=2**20).cycles)
    assert later - float(simulated().cycles) == pytest.approx(512, rel=1e-3)
    plain, inherited = (
        float(cycles_of(Hardware(), 1, 4096, 4096, "intended", inherited_bytes=size).cycles)
        for size in (0.0, 2.0**20)
    )
    assert plain == inherited


def test_each_refresh_stops_tiles_of_one_block():
    """256 KiB hold one block of 128 x 128 x 128: 1,024 tiles, each computed in 128 cycles. Every
    1,950 cycles one of them comes late: it waits 30 + 260 + 14 - 128 / 2 = 240 cycles, and the
    arrays, which ran empty, lose 254 + 16 + 127.
    """
    small = replace(Hardware(), "npu.scratchpad_bytes", 256 * 1024)
    streaming = 2 * (128 * 128 + 64 * 128) / (DEFAULT.streaming_efficiency * 1024)
    pace = 128 / (1 - (streaming + 240 - 128 + 254 + 16 + 127) / 1950)
    work = simulated(small, tokens=64)
    assert float(work.cycles) == pytest.approx(1024 * pace, rel=0.01)
    # beside PIM more of them come late
    assert float(work.memory_cycles) > 0
    large = simulated(replace(Hardware(), "npu.scratchpad_bytes", 2**23), tokens=256)
    assert float(large.cycles) < 0.45 * float(simulated(small, tokens=256).cycles)


def test_only_what_waits_for_the_memory_is_slower_beside_pim():
    """Slow arrays hide the weights of 64 channels; fast arrays wait for them."""
    wide = replace(Hardware(), "hbm.num_channels", 64)
    assert float(simulated(replace(wide, "npu.clock_hz", 0.3e9)).memory_cycles) == 0
    loading = 2 * (4096 * 4096 + 4096) / (DEFAULT.streaming_efficiency * 1024)
    assert float(simulated().memory_cycles) == pytest.approx(loading, rel=1e-3)


@pytest.mark.parametrize("fidelity", ["simulator", "intended"])
def test_a_scratchpad_that_holds_nothing_is_slow_but_finite(fidelity):
    tiny = replace(Hardware(), "npu.scratchpad_bytes", np.asarray(1))
    assert jnp.isfinite(cycles_of(tiny, 300, 512, 1024, fidelity).cycles)
    assert (
        cycles_of(tiny, 300, 512, 1024, fidelity).cycles
        > cycles_of(Hardware(), 300, 512, 1024, fidelity).cycles
    )
