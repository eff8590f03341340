"""Attention in the memory: the time of requests, in closed form.

The products are logit (keys times query) and attend (values times weights). The work of a request
is a list of groups of PIM commands (`timing.layout`), and `request_work` adds up what each group
takes (`timing.pim_commands`): its mean time in an endless repetition of the group.
`gemv_exact.channel_cycles_exact` follows the same rule command by command.

Source: the commands of src/operations/NeuPIMSLogitSoftmax.cc and NeuPIMSAttend.cc of the public
simulator (github.com/casys-kaist/NeuPIMs).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neupims.machine.division import ceil_divide, divide
from neupims.machine.hardware import Hardware
from neupims.machine.record import Number
from neupims.machine.systems import Fidelity
from neupims.machine.workload import Decoder, Parallel
from neupims.timing.layout import attend_groups, logit_groups
from neupims.timing.pim_commands import (
    WAITING,
    Groups,
    Timing,
    group_cycles,
    pim_timing,
    smooth_group_cycles,
)

# Tiles of a group whose costs the closed form computes once for all requests.
TABULATED = 8
ENDLESS = 64.0  # tiles of a group that shows what one more tile takes
# Products of a tile whose costs the closed form computes once; a row of 512 numbers has 32 commands
# of 16.
PRODUCTS = 32


def request_work(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Int[Array, " r"],
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
    wait: Number | None = None,
) -> Float[Array, "r 2"]:
    """Returns the core cycles that each request takes of its channel, refreshes included.

    They add over the requests of a channel.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,); a request of length 0 takes no time.
        parallel: How many devices share a layer.
        fidelity: "simulator" packs whole tiles into refresh intervals, as the controller does; in
            "intended" an interval loses its mean share of a tile.
        wait: As in `pim_timing`.

    Returns:
        Core cycles of logit and of attend, (r, 2).
    """
    return request_works(hardware, model, seq_lens, parallel, fidelity=fidelity, waits=(wait,))[0]


def request_works(
    hardware: Hardware,
    model: Decoder,
    seq_lens: Int[Array, " r"],
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
    waits: tuple[Number | None, ...],
) -> Float[Array, "waits r 2"]:
    """Returns `request_work` for several waits, (waits, r, 2). One loop computes all of them.

    Args:
        hardware: As in `request_work`.
        model: As in `request_work`.
        seq_lens: As in `request_work`.
        parallel: As in `request_work`.
        fidelity: As in `request_work`.
        waits: Values of `wait` as in `pim_timing`, each memory cycles or None.
    """
    lengths = jnp.asarray(seq_lens) * 1.0
    to_core = hardware.npu.clock_hz / hardware.hbm.clock_hz
    kinds = [
        groups_of(hardware, model, lengths, parallel, fidelity=fidelity)
        for groups_of in (logit_groups, attend_groups)
    ]
    each = [pim_timing(hardware, wait) for wait in waits]
    if fidelity == "simulator":
        logit, attend = _look_up(_stack(each, Timing._fields), *kinds)
    else:
        times = _stack(each, WAITING)
        logit, attend = (
            sum(
                jnp.where(group.groups > 0, group.groups * smooth_group_cycles(times, group), 0.0)
                for group in kind
            )
            for kind in kinds
        )
    return jnp.where(lengths[:, None] > 0, jnp.stack([logit, attend], axis=-1) * to_core, 0.0)


def _stack(each: list[Timing], names: tuple[str, ...]) -> Timing:
    """Returns timings whose named fields are arrays, (waits, 1); others are those of the first."""
    columns = {
        name: jnp.stack([jnp.asarray(getattr(times, name), jnp.float32) for times in each])
        for name in names
    }
    return each[0]._replace(**{name: column[:, None] for name, column in columns.items()})


def _look_up(
    times: Timing, logit: tuple[Groups, Groups], attend: tuple[Groups, Groups]
) -> tuple[Number, Number]:
    """Returns the cycles of each request's logit and attend, (waits, r) each, from tables.

    One loop makes the tables.

    Groups of logit differ in their number of tiles: the tables have the first few, and each further
    tile takes the same time, as a group of many tiles hides its GWRITE in the rest of an interval.
    The last groups of attend differ in their products: the table has as many numbers as a row has
    commands, evenly spaced, rounded up.
    """
    (full_row, last_row), (full_page, last_page) = logit, attend
    numbers = jnp.append(jnp.arange(1.0, TABULATED + 1), ENDLESS)
    heads = jnp.max(last_page.groups)
    spacing = jnp.maximum(ceil_divide(jnp.max(last_page.products), PRODUCTS), 1)
    parts = [
        (jnp.max(full_row.groups), numbers, full_row.results, full_row.products),
        (jnp.max(last_row.groups), numbers, last_row.results, last_row.products),
        (heads, full_page.tiles, full_page.results, full_page.products * jnp.ones(1)),
        (heads, last_page.tiles, last_page.results, spacing * jnp.arange(1.0, PRODUCTS + 1)),
    ]
    sizes = (len(numbers), len(numbers), 1, PRODUCTS)
    weight, tiles, results, products = (
        jnp.concatenate(
            [
                jnp.broadcast_to(jnp.asarray(part[column], jnp.float32), (size,))
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        for column in range(4)
    )
    table = group_cycles(times, Groups(1.0, tiles, results, products, results), weight)
    full, last, page, rest = (
        table[:, end - size : end]
        for end, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True)
    )
    place = jnp.clip(last_row.tiles, 1, TABULATED)
    row = place.astype(jnp.int32) - 1
    beyond = (last_row.tiles - place) * (full[:, -1:] + last[:, -1:]) / ENDLESS
    pages = divide(full_page.groups, jnp.maximum(heads, 1e-9))
    return (
        full[:, row] + last[:, row] + jnp.where(last_row.tiles > place, beyond, 0.0),
        jnp.where(pages > 0, pages * page, 0.0)
        + rest[:, ceil_divide(last_page.products, spacing).astype(jnp.int32) - 1],
    )
