"""neupims/timing/layout.py: rows of keys and values, and grouped queries that share them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.config import load_model
from neupims.machine.hardware import Hardware, banks
from neupims.machine.record import replace
from neupims.machine.systems import FIDELITIES
from neupims.machine.workload import Decoder, Parallel, kv_cache_bytes, make_batch
from neupims.timing.attention import attention_counts
from neupims.timing.capacity import request_tiles
from neupims.timing.gemv import request_work
from neupims.timing.gemv_exact import channel_cycles_exact
from neupims.timing.layout import (
    attend_groups,
    key_layout,
    logit_groups,
    products_of_command,
    value_layout,
)

LLAMA = load_model("llama3-8b")  # 32 query heads of 128, 8 key heads
ONE_HEAD = Parallel(8, 1)  # of keys on a device, which serves 4 query heads
OPERATIONS = ("logit", "attend")

intended_work, intended_tiles, intended_counts = (
    jax.jit(partial(function, fidelity="intended"))
    for function in (request_work, request_tiles, attention_counts)
)


@partial(jax.jit, static_argnames=("operation", "fidelity"))
def mean_exact(hardware, model, lengths, parallel, *, operation, fidelity="intended"):
    """The mean over starts within a round of refreshes."""
    one = partial(channel_cycles_exact, hardware, model, lengths, parallel)
    ready = jnp.zeros(lengths.shape[0])
    phases = (jnp.arange(4) + 0.5) / 4
    return jax.vmap(lambda phase: one(phase, ready, operation=operation, fidelity=fidelity))(
        phases
    ).mean()


def test_four_queries_share_one_opening_by_hand():
    """128 tokens are one tile: 4 tokens in each of 32 banks, and 4 queries of 8 commands each.

    GWRITE of a closed row 14 + 97; open and first product 106, 15 more of 18, 16 until the last
    result is back. The values are a tile of 4 channels for 128 tokens, with the same commands.
    """
    for operation in OPERATIONS:
        cycles = channel_cycles_exact(
            Hardware(),
            LLAMA,
            jnp.array([128]),
            ONE_HEAD,
            jnp.float32(0),
            jnp.zeros(1),
            operation=operation,
            fidelity="intended",
        )
        assert float(cycles) == 14 + 97 + 106 + 15 * 18 + 16


def test_the_last_tile_holds_the_remaining_tokens():
    """300 tokens are 10 in a bank: rows of 4, 4 and 2 tokens, each for 4 queries."""
    none, keys = logit_groups(Hardware(), LLAMA, jnp.array([300.0]), ONE_HEAD, fidelity="intended")
    assert float(none.groups[0]) == 0
    assert [float(each[0]) for each in (keys.groups, keys.tiles, keys.results)] == [1, 3, 16]
    assert (float(keys.last_results[0]), float(keys.products)) == (8, 8)
    full, last = attend_groups(Hardware(), LLAMA, jnp.array([300.0]), ONE_HEAD, fidelity="intended")
    assert (float(full.groups[0]), float(last.groups[0])) == (2, 1)  # of 128 tokens, and 44
    assert (float(full.products), float(last.products[0])) == (8, 3)


def test_a_row_holds_the_heads_that_the_buffer_can_serve():
    """Groups of 2 queries: a row of 4 vectors has 2 tokens of 2 heads. A group of 8 takes 2 passes
    with 4 queries, over rows with 4 tokens of one head.
    """
    twos = key_layout(Hardware(), Decoder(32, 4096, 32, 16, 16384), Parallel(1, 1))
    assert (twos.passes, twos.queries, twos.heads, twos.tokens) == (1, 2, 2, 2)
    eights = key_layout(Hardware(), Decoder(32, 4096, 32, 4, 16384), Parallel(1, 1))
    assert (eights.passes, eights.queries, eights.heads, eights.tokens) == (2, 4, 1, 4)


def test_long_tiles_that_do_not_fit_between_refreshes_take_more_passes():
    rare, often = (
        value_layout(replace(Hardware(), "hbm.trefi_cycles", cycles), LLAMA, ONE_HEAD)
        for cycles in (3900, 1100)
    )
    assert (rare.passes, rare.queries) == (1, 4)
    assert often.passes > 1
    assert np.isfinite(
        intended_work(
            jax.tree.map(float, replace(Hardware(), "hbm.trefi_cycles", 1100)),
            LLAMA,
            jnp.array([700]),
            ONE_HEAD,
        )
    ).all()


def test_a_request_takes_no_more_tiles_than_its_bytes():
    """Llama-3 8B on 8 devices: 2,048 tokens with 128 KiB each in 32 layers, one of the 8 heads."""
    tile = 1024 * 32
    needed = {
        fidelity: float(
            request_tiles(Hardware(), LLAMA, [2048], ONE_HEAD, fidelity=fidelity)[0] * tile
        )
        for fidelity in ("simulator", "intended")
    }
    assert needed["intended"] == kv_cache_bytes(LLAMA, 2048) / 8
    assert needed["simulator"] == 2.5 * needed["intended"]


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_cache_of_8_bits_takes_half_of_the_rows_and_products(fidelity):
    """1,024 tokens of Llama-3 8B on one device: whole rows at both widths."""
    narrow = dataclasses.replace(LLAMA, kv_bits=8)
    batch, device = make_batch([1024] * 3, [0, 1, 2]), Parallel(1, 1)
    tiles, halves = (
        request_tiles(Hardware(), model, [1024], device, fidelity=fidelity)[0]
        for model in (LLAMA, narrow)
    )
    assert tiles == 2 * halves
    counts, half = (
        attention_counts(Hardware(), model, batch, device, fidelity=fidelity)
        for model in (LLAMA, narrow)
    )
    assert counts.products == 2 * half.products
    whole, short = (
        request_work(Hardware(), model, batch.seq_lens, device, fidelity=fidelity).sum()
        for model in (LLAMA, narrow)
    )
    assert 0.4 < short / whole < 0.8


def test_groups_of_four_against_keys_and_values_of_their_own():
    """The ratios of docs/accelerator/model.md."""
    own = dataclasses.replace(LLAMA, kv_heads=LLAMA.heads)
    grouped, single = (
        intended_work(Hardware(), each, jnp.array([2048]), Parallel(1, 1))[0]
        for each in (LLAMA, own)
    )
    assert (grouped / single).round(2).tolist() == pytest.approx([0.57, 0.81])


TIMINGS = (
    ("hbm.tfaw_cycles", (16, 30, 60)),
    ("hbm.trcd_read_cycles", (7, 14, 28)),
    ("hbm.trefi_cycles", (3000, 3900, 7800)),
)


def draw_machine(rng, timings: bool = True) -> Hardware:
    """Returns a machine whose pages, banks and row buffers vary, and timings where asked for."""
    hardware = Hardware()
    for name, choices in (
        *(TIMINGS if timings else ()),
        ("hbm.ranks", (1, 2)),
        ("hbm.banks_per_group", (2, 4)),
        ("hbm.row_bytes", (2048,)),
        ("pim.page_bytes", (512, 1024, 2048)),
        ("pim.macs_per_bank", (8, 16, 32)),
        ("pim.row_buffers", (1, 2)),
    ):
        hardware = replace(hardware, name, int(rng.choice(choices)))
    return jax.tree.map(float, hardware)


def draw_model(rng, groups=(1, 2, 4, 8)) -> Decoder:
    """Returns a model with the given sizes of groups, and numbers of 16, 8 or 4 bits."""
    kv_heads, group, width = (int(rng.choice(each)) for each in ((1, 2, 4, 8), groups, (64, 128)))
    heads, bits = kv_heads * group, int(rng.choice((16, 8, 4)))
    return Decoder(4, width * heads, heads, kv_heads, 4 * width * heads, kv_bits=bits)


def test_the_closed_form_sums_to_the_recurrence_of_grouped_queries():
    """Pages, banks and row buffers vary; timings are those of the default machine.
    Whole tiles are packed into refresh intervals, which the closed form of "intended" does in the
    mean: where few fit, some machines lose more, and some less.
    """
    rng, errors = np.random.default_rng(0), []
    for _ in range(16):
        hardware, model = draw_machine(rng, timings=False), draw_model(rng, (1, 2, 3, 4, 7, 8))
        lengths = jnp.asarray(rng.integers(100, 2000, 8))
        sums = intended_work(hardware, model, lengths, Parallel(1, 1)).sum(axis=0)
        for column, operation in enumerate(OPERATIONS):
            followed = mean_exact(hardware, model, lengths, Parallel(1, 1), operation=operation)
            errors.append(float(sums[column]) / float(followed) - 1)
    assert abs(np.mean(errors)) < 0.02
    assert np.abs(errors).mean() < 0.04
    assert np.abs(errors).max() < 0.2


@pytest.mark.parametrize("seed", range(12))
def test_grouped_queries_are_never_slower_and_never_larger(seed):
    """Against the same query heads with keys and values of their own, for each length."""
    rng = np.random.default_rng(seed)
    hardware, model = draw_machine(rng), draw_model(rng)
    own = dataclasses.replace(model, kv_heads=model.heads)
    lengths = jnp.asarray([1, 31, 32, 33, *rng.integers(1, 4000, 20)])
    grouped, single = (
        intended_work(hardware, each, lengths, Parallel(1, 1)) for each in (model, own)
    )
    assert (grouped <= single * (1 + 1e-6)).all()
    grouped, single = (
        intended_tiles(hardware, each, lengths, Parallel(1, 1)) for each in (model, own)
    )
    assert (grouped <= single).all()


@pytest.mark.parametrize("seed", range(12))
def test_products_are_those_of_attention_and_rounding(seed):
    """Each token meets each query once in logit and once in attend; whole commands round up."""
    rng = np.random.default_rng(seed)
    hardware, model = draw_machine(rng), draw_model(rng)
    width = model.width // model.heads
    lengths = rng.integers(1, 4000, 8)
    batch = make_batch(lengths, np.zeros(8, int))
    counts = intended_counts(hardware, model, batch, Parallel(1, 1))
    of_command = float(banks(hardware.hbm) * products_of_command(hardware, model))
    exact = 2 * width * model.heads * lengths.sum() / of_command
    full = [
        2 * width * model.heads * (-(-lengths // 512) * 512).sum() / of_command,
        model.heads * len(lengths) * 4 * max(1, width * 512 / of_command),
    ]
    assert exact <= float(counts.products) <= sum(full)
    stored = intended_tiles(hardware, model, lengths, Parallel(1, 1)).sum()
    held = float(stored) * float(banks(hardware.hbm)) * float(hardware.pim.page_bytes)
    assert held >= sum(kv_cache_bytes(model, int(length)) for length in lengths)


@pytest.mark.parametrize("knob", ["tfaw_cycles", "trcd_read_cycles", "trfc_cycles", "trtp_cycles"])
@pytest.mark.parametrize("kv_heads", [1, 8, 32])
def test_slower_timings_are_never_faster(knob, kv_heads):
    """For long requests; and for a short one as long as the layout stays the same, because its
    last row is filled less or more by another layout.
    """
    model = dataclasses.replace(LLAMA, kv_heads=kv_heads)
    start = getattr(Hardware().hbm, knob)

    @jax.vmap
    def of(value):
        hardware = replace(Hardware(), f"hbm.{knob}", value)
        work = request_work(
            hardware, model, jnp.array([700, 2**17]), Parallel(1, 1), fidelity="intended"
        )
        return work, [
            layout(hardware, model, Parallel(1, 1)).passes for layout in (key_layout, value_layout)
        ]

    cycles, passes = of(start * jnp.linspace(0.5, 2, 40))
    rises = jnp.diff(cycles, axis=0) >= -1e-3 * cycles[:-1]
    same = jnp.diff(jnp.stack(passes, axis=-1), axis=0) == 0
    assert rises[:, 1].all()
    assert (rises[:, 0] | ~same).all()
    assert same.sum() >= 2 * 38
