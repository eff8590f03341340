"""neupims/timing/gemv.py: cycles of attention in memory, by the controller's rule and in closed
form.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.config import load_model
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.systems import FIDELITIES
from neupims.machine.workload import Parallel
from neupims.timing import gemv, pim_commands
from neupims.timing.gemv_exact import channel_cycles_exact
from neupims.timing.layout import logit_groups

MODEL, PARALLEL = load_model("gpt3-7b"), Parallel(4, 1)
SINGLE = replace(Hardware(), "pim.row_buffers", 1)
WHOLE_REFRESH = replace(Hardware(), "hbm.trefi_cycles", 10**6)

request_work = jax.jit(gemv.request_work, static_argnames="fidelity")


def exact(hardware, lengths, operation, phase=0.0, ready=None, model=MODEL):
    ready = jnp.zeros(len(lengths)) if ready is None else jnp.asarray(ready)
    return float(
        channel_cycles_exact(
            hardware,
            model,
            jnp.asarray(lengths),
            PARALLEL,
            jnp.float32(phase),
            ready,
            operation=operation,
        )
    )


def test_one_tile_by_hand():
    """A request of 32 tokens, 8 heads of 128: two groups (rows of 4 heads) of one tile each, before
    the first refresh.

    GWRITE of a closed row 14 + 97; open and first product 106, three more of 18, 5 to close: 165;
    GWRITE 97; close 32 more: 197. Less the last 5, and 16 until the result is back.
    """
    assert exact(Hardware(), [32], "logit") == 14 + 97 + 165 + 97 + 197 - 5 + 16


@pytest.mark.parametrize(
    ("hardware", "lengths", "operation", "cycles"),
    [  # streams measured on the public simulator's memory library alone, one channel
        (Hardware(), [2048], "attend", 27710),
        (Hardware(), [2048], "logit", 35564),
        (SINGLE, [300, 100, 812], "attend", 35548),
        (SINGLE, [2048], "attend", 41424),
    ],
)
def test_measured_streams(hardware, lengths, operation, cycles):
    assert exact(hardware, lengths, operation) == pytest.approx(cycles, abs=1)


def test_a_tile_takes_its_seven_eighths_of_a_refresh_interval():
    """7 logit tiles start in an interval of 1950 cycles: 1 + floor((1950 - 256 - 334) / 197)."""
    long = exact(Hardware(), [32 * 64] * 8, "logit")
    assert long / (8 * 2 * 64) == pytest.approx(1950 / 7, rel=0.005)


def test_without_refresh_groups_add_up():
    """Attend: 8 heads of GWRITE 97 and 4 tiles of 143; the first row was closed (14) and the first
    tile opens 32 cycles sooner.
    """
    assert exact(WHOLE_REFRESH, [512], "attend") == 8 * (97 + 4 * 143) + 14 - 32 - 5 + 16


def test_the_closed_form_sums_to_the_recurrence():
    rng = np.random.default_rng(0)
    for row_buffers, bound in ((2, 0.01), (1, 0.025)):
        hardware = replace(Hardware(), "pim.row_buffers", row_buffers)
        for column, operation in enumerate(("logit", "attend")):
            errors = []
            for _ in range(6):
                lengths = rng.integers(20, 1200, size=8)
                followed = np.mean(
                    [exact(hardware, lengths, operation, phase) for phase in (0.1, 0.35, 0.6, 0.85)]
                )
                errors.append(
                    float(request_work(hardware, MODEL, lengths, PARALLEL)[:, column].sum())
                    / followed
                    - 1
                )
            assert np.abs(errors).mean() < bound


def whole_numbers(hardware, lengths):
    """Attend with two row buffers in Python's integers, by the rule in the simulator's reference; 8
    heads of 128 channels.
    """
    interval, boundary, rank, last, now = 1950, 1950, 0, None, 0
    row_open = opened = False

    def wait(estimate):
        nonlocal now, boundary, rank, last, row_open
        while boundary - now <= estimate:
            now, last, boundary = max(now, boundary + 30), boundary, boundary + interval
            row_open, rank = row_open and rank != 0, 1 - rank

    for length in lengths:
        for _ in range(8):
            for part in range(0, length, 512):
                products = -(-min(512, length - part) // 16)
                wait(96)
                if not row_open:
                    now = max(now, last + 290 if rank == 1 and last is not None else 0) + 14
                row_open, now = True, now + 97
                for _ in range(4):
                    wait(
                        (160 if opened else 0) + 104 + 2 * max(1 << (products - 1).bit_length(), 6)
                    )
                    first = now + (138 if opened else 106)
                    now, opened = max(first, last + 394 if last is not None else first) + 5, True
    return now - 5 + 16


def test_long_lists_are_counted_exactly():
    """300 requests of up to 100,000 tokens take 2 x 10^8 cycles: beyond 2^24 float32 holds no odd
    numbers, so only the last sum is rounded.
    """
    lengths = np.random.default_rng(5).integers(1, 100_000, 300).tolist()
    assert whole_numbers(Hardware(), [2048]) == 27710
    followed = whole_numbers(Hardware(), lengths)
    assert followed > 2**27
    assert exact(Hardware(), lengths, "attend") == pytest.approx(followed, rel=2e-7)


@pytest.mark.parametrize(
    ("bursts", "fits"), [(600, True), (635, False), (639, False), (2000, False)]
)
def test_a_gwrite_that_never_fits_takes_for_ever(bursts, fits):
    """Between refreshes are 1950 - 30 cycles; a GWRITE takes 3 for each burst, and 14 more for a
    closed row. From 631 to 639 bursts it fits only with its row open, which a refresh closes.
    """
    hardware = jax.tree.map(float, replace(Hardware(), "pim.gwrite_bursts", bursts))
    assert np.isfinite(exact(hardware, [300], "logit")) == fits


@pytest.mark.parametrize("row_buffers", [1, 2])
@pytest.mark.parametrize(
    "change",
    [
        ("hbm.trefi_cycles", 600),
        ("hbm.trefi_cycles", 16),
        ("pim.gwrite_bursts", 10**4),
        ("hbm.tfaw_cycles", 10**4),
    ],
)
def test_tiles_that_never_fit_between_refreshes_take_for_ever(row_buffers, change):
    hardware = replace(replace(Hardware(), "pim.row_buffers", row_buffers), *change)
    for column, operation in enumerate(("logit", "attend")):
        assert exact(jax.tree.map(float, hardware), [300, 40], operation) == np.inf
        for fidelity in FIDELITIES:
            assert request_work(
                jax.tree.map(float, hardware),
                MODEL,
                jnp.array([300, 0]),
                PARALLEL,
                fidelity=fidelity,
            )[:, column].tolist() == [np.inf, 0]


def test_short_refresh_intervals_and_other_numbers_of_ranks():
    """An interval as short as a tile with its GWRITE; and one rank or four, whose refresh closes
    the row of GWRITE always or every fourth time.
    """
    for change in (
        ("hbm.trefi_cycles", 900),
        ("hbm.trefi_cycles", 1100),
        ("hbm.ranks", 1),
        ("hbm.ranks", 4),
    ):
        hardware = jax.tree.map(float, replace(Hardware(), *change))
        lengths = [300, 700, 90, 1500]
        for column, operation in enumerate(("logit", "attend")):
            closed = float(
                request_work(hardware, MODEL, jnp.array(lengths), PARALLEL)[:, column].sum()
            )
            assert closed == pytest.approx(exact(hardware, lengths, operation), rel=0.04), change


def test_lists_add_up_and_nothing_takes_nothing():
    work = request_work(Hardware(), MODEL, jnp.array([300, 0, 700]), PARALLEL)
    assert work[1].tolist() == [0, 0]
    assert exact(Hardware(), [300, 0, 700], "logit") == exact(Hardware(), [300, 700], "logit")
    assert exact(Hardware(), [0, 0], "attend") == 0


def test_a_request_waits_until_its_commands_arrive():
    late = exact(Hardware(), [32, 32], "logit", ready=[0.0, 50_000.0])
    assert 50_000 < late < 51_500
    half = exact(Hardware(), [32, 32], "logit", phase=0.5, ready=[0.0, 50_000.0])
    assert (
        50_000 < half < 51_500
    )  # after the operation's start, wherever in the round of refreshes that is


def test_in_the_simulator_grouped_queries_read_keys_again_for_every_query():
    """Llama-3 8B on 4 devices: 2 key heads a device serve 8 query heads, so a row of 2 heads is
    read 4 times: the same products as 8 heads in 4 rows.
    """
    grouped, last = logit_groups(Hardware(), load_model("llama3-8b"), jnp.array([320.0]), PARALLEL)
    assert (
        float(grouped.groups[0]),
        float(last.groups[0]),
        float(last.tiles[0]),
        float(last.results),
    ) == (0, 4, 10, 2)


@pytest.mark.parametrize(
    "knob",
    [
        "hbm.tfaw_cycles",
        "hbm.trcd_read_cycles",
        "hbm.trfc_cycles",
        "hbm.trp_cycles",
        "hbm.trtp_cycles",
    ],
)
def test_slower_timings_are_never_faster_in_the_smooth_form(knob):
    start = getattr(Hardware().hbm, knob.split(".")[1])
    designs = jax.vmap(
        lambda value: gemv.request_work(
            replace_traced(knob, value), MODEL, jnp.array([700]), PARALLEL, fidelity="intended"
        )
    )(start * jnp.linspace(0.5, 2, 40))
    assert (jnp.diff(designs, axis=0) >= -1e-3 * designs[:-1]).all()


def replace_traced(knob, value):
    hardware = Hardware()
    object.__setattr__(getattr(hardware, knob.split(".")[0]), knob.split(".")[1], value)
    return hardware


def test_powers_of_two_are_exact():
    numbers = np.unique(np.concatenate([np.arange(1, 5000), 2 ** np.arange(24), [2**24 - 1, 1.5]]))
    expected = [2.0 ** math.ceil(math.log2(number)) for number in numbers]
    assert pim_commands.power_of_two(jnp.asarray(numbers)).tolist() == expected
    assert pim_commands.power_of_two(0.0) == 1


@pytest.mark.parametrize("row_buffers", [1, 2])
def test_the_timings_that_depend_on_a_wait_are_named(row_buffers):
    hardware = replace(Hardware(), "pim.row_buffers", row_buffers)
    alone, beside = (pim_commands.pim_timing(hardware, wait) for wait in (None, 50.0))
    differing = {name for name in alone._fields if getattr(alone, name) != getattr(beside, name)}
    assert differing == set(pim_commands.WAITING)
