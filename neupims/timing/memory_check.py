"""Whether a batch fits the memory of its devices: a sentence that says what does not, and a mend.

What does not fit is refused. One thing is timed with a warning, because the public simulator times
it too and the published figures have it: with PIM and in "simulator" fidelity, requests that each
fit may overflow the memory together.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neupims.machine.hardware import Hardware
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel, check_parallel
from neupims.timing.capacity import (
    Overflow,
    device_bytes,
    device_weight_bytes,
    find_overflow,
    free_bytes,
    pieces,
    request_bytes,
    tile_bytes,
)
from neupims.timing.split import group_of_channels

SPARE = 1e-3  # of the memory: what fits without it fits whatever the rounding of float32
ANYWAY = "--allow-overflow (allow_overflow=True) goes on without the memory"


def check_memory(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System = "neupims",
    fidelity: Fidelity = "simulator",
    prefill: bool = False,
    allow_overflow: bool = False,
) -> tuple[str, ...]:
    """Returns warnings about the memory of a device: none where all fits.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests, (r,).
        parallel: How the model is spread over devices.
        system: The system; "gpu" has the GPU's memory.
        fidelity: "simulator" or "intended".
        prefill: Whether all tokens of the requests are computed together, not one of each.
        allow_overflow: Whether to warn of everything instead of raising.

    Raises:
        ValueError: Weights, activations, keys and values do not fit; the sentence says how many
            devices would do.
    """
    given = (hardware, model, batch, parallel)
    options: dict[str, Any] = {"system": system, "fidelity": fidelity, "prefill": prefill}
    if _fits_easily(*given, **options):
        return _check_pipeline(*given, **options)
    over = find_overflow(*given, **options)
    if not any(over):
        return _check_pipeline(*given, **options)
    sentence = describe_overflow(*given, over, **options)
    is_simulated = fidelity == "simulator" and system in PIM_SYSTEMS and not prefill
    if allow_overflow or (is_simulated and not (over.weights or over.request)):
        return (f"{sentence}: the batch would not fit",)
    mends = list_mends(*given, **options)
    if not (over.weights or over.request or over.batch):
        mends.append("the whole memory would hold it, so `neupims search` may find a schedule")
    raise ValueError("; ".join((sentence, *mends, ANYWAY)))


def describe_overflow(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    over: Overflow,
    *,
    system: System = "neupims",
    fidelity: Fidelity = "simulator",
    prefill: bool = False,
) -> str:
    """Returns a sentence about the first thing that does not fit.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests, (r,).
        parallel: How the model is spread over devices.
        over: What overflows, `find_overflow`.
        system: The system.
        fidelity: As for `check_memory`.
        prefill: As for `check_memory`.
    """
    memory = format_bytes(float(device_bytes(hardware, system)))
    if over.weights:
        weights = format_bytes(float(device_weight_bytes(model, parallel)))
        return f"the weights take {weights} of each device, which has {memory}"
    lengths = np.asarray(batch.seq_lens)
    tokens = int(lengths.sum() if prefill else (lengths > 0).sum())
    options: dict[str, Any] = {"system": system, "fidelity": fidelity}
    needed = np.asarray(request_bytes(hardware, model, lengths, parallel, **options))
    one, every = map(float, free_bytes(hardware, model, parallel, system, tokens))
    worst = int(needed.argmax())
    if system in PIM_SYSTEMS:
        tile = float(tile_bytes(hardware))
        if over.request:
            return (
                f"request {worst} of {int(lengths[worst])} tokens needs"
                f" {needed[worst] / tile:.0f} tiles of its channel, which has"
                f" {max(one, 0) / tile:.0f} beside weights and activations"
            )
        if over.batch:
            return (
                f"the keys and values of {int((lengths > 0).sum())} requests need"
                f" {needed.sum() * pieces(parallel, system) / tile:.0f} tiles, all channels"
                f" together have {every / tile:.0f} beside weights and activations"
            )
        groups = np.asarray(group_of_channels(batch.channels, hardware, parallel))
        loads = np.bincount(groups, weights=needed)
        return (
            f"the requests of channel {int(loads.argmax())} need {loads.max() / tile:.0f} tiles, it"
            f" has {one / tile:.0f} beside weights and activations"
        )
    if over.request:
        what = f"the keys and values of request {worst} of {int(lengths[worst])} tokens"
        size = needed[worst]
    else:
        what, size = f"the keys and values of {int((lengths > 0).sum())} requests", needed.sum()
    return (
        f"{what} take {format_bytes(float(size))} of each device, which has"
        f" {format_bytes(max(every, 0.0))} of its {memory} beside weights and activations"
    )


def list_mends(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System = "neupims",
    fidelity: Fidelity = "simulator",
    prefill: bool = False,
) -> list[str]:
    """Returns how many devices would hold a batch, and whether a split of keys takes fewer.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests, (r,).
        parallel: How the model is spread over devices now.
        system: The system.
        fidelity: As for `check_memory`.
        prefill: As for `check_memory`.
    """
    given = (hardware, model, batch, parallel)
    options: dict[str, Any] = {"system": system, "prefill": prefill}
    more = spread_more(*given, fidelity=fidelity, **options)
    mends = [say_devices(parallel, more)]
    if system not in PIM_SYSTEMS or prefill:
        return mends
    channels = int(hardware.hbm.num_channels)
    splits = [split for split in range(2, channels + 1) if channels % split == 0]
    split = spread_more(*given, fidelity="intended", kv_splits=splits, **options)
    if split and (more is None or split.tp * split.pp < more.tp * more.pp):
        mends.append(_say_split(parallel, split, fidelity))
    return mends


def spread_more(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System = "neupims",
    fidelity: Fidelity = "simulator",
    prefill: bool = False,
    kv_splits: Sequence[int] = (),
) -> Parallel | None:
    """Returns the fewest devices whose memory holds a batch; of equally many, more for each layer.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests, (r,).
        parallel: How the model is spread over devices now.
        system: The system.
        fidelity: As for `check_memory`.
        prefill: As for `check_memory`.
        kv_splits: Channels that may share a request; the fewest are taken (default: as now).

    Returns:
        How the model is spread over them, or None if no number of devices would do.
    """
    options: dict[str, Any] = {"system": system, "fidelity": fidelity, "prefill": prefill}
    shares = [
        tp
        for tp in range(parallel.tp, model.heads + 1)
        if _divides(model, Parallel(tp, parallel.pp, ep=parallel.ep))
    ]
    groups = [pp for pp in range(parallel.pp, model.layers + 1) if model.layers % pp == 0]
    candidates = [
        Parallel(tp, pp, split, parallel.ep)
        for tp in shares
        for pp in {parallel.pp, *groups}
        for split in kv_splits or [parallel.kv_split]
    ]
    candidates.sort(key=lambda spread: (spread.tp * spread.pp, spread.pp, spread.kv_split))
    if not candidates:
        return None
    columns = jax.tree.map(lambda *numbers: jnp.array(numbers), *candidates)
    channels = int(hardware.hbm.num_channels)
    over = _find_overflows(hardware, model, batch, columns, most_channels=channels, **options)
    for place in np.flatnonzero(~np.any(np.asarray(over), axis=0)):  # in float32: roughly
        if not any(find_overflow(hardware, model, batch, candidates[place], **options)):
            return candidates[place]
    return None


def _fits_easily(hardware: Hardware, model, batch, parallel, **options) -> bool:
    """Whether the memory would do if it were smaller by `SPARE`: one program finds that quickly."""
    hbm = dataclasses.replace(hardware.hbm, rows=max(int((1 - SPARE) * hardware.hbm.rows), 1))
    gpu = dataclasses.replace(
        hardware.gpu, memory_bytes=max((1 - SPARE) * hardware.gpu.memory_bytes, 1e6)
    )
    less = dataclasses.replace(hardware, hbm=hbm, gpu=gpu)
    floats = jax.tree.map(float, (less, model))
    one = jax.tree.map(lambda number: jnp.array([number]), parallel)
    channels = int(hardware.hbm.num_channels)
    over = _find_overflows(*floats, batch, one, most_channels=channels, **options)
    return not np.any(np.asarray(over))


@partial(jax.jit, static_argnames=("system", "fidelity", "prefill", "most_channels"))
def _find_overflows(hardware, model, batch, spreads: Parallel, **options) -> Overflow:
    """Returns what overflows for each way to spread the model, (n,)."""

    def one(spread: Parallel) -> Overflow:
        return find_overflow(hardware, model, batch, spread, **options)

    return jax.vmap(one)(spreads)


def _divides(model: Decoder, parallel: Parallel) -> bool:
    try:
        check_parallel(model, parallel)
    except ValueError:
        return False
    return True


def say_devices(now: Parallel, more: Parallel | None) -> str:
    """Returns how many devices would do, with the flags, in words.

    Args:
        now: How the model is spread over devices now.
        more: `spread_more`; None where no number of devices would do.
    """
    if more is None:
        return "no number of devices would hold it"
    return f"{more.tp * more.pp} devices would do ({' '.join(_list_flags(now, more))})"


def _list_flags(now: Parallel, more: Parallel) -> list[str]:
    return [
        f"--{name} {getattr(more, name)}"
        for name in ("tp", "pp")
        if getattr(more, name) != getattr(now, name)
    ]


def _say_split(now: Parallel, split: Parallel, fidelity: Fidelity) -> str:
    """Returns that a split of the keys of each request over channels would do, with the flags."""
    devices = split.tp * split.pp
    fewer = "these devices" if devices == now.tp * now.pp else f"{devices} devices"
    flags = _list_flags(now, split)
    flags += [f"--kv-split {split.kv_split}"]
    flags += ["--fidelity intended"] if fidelity == "simulator" else []
    return f"{fewer} would do with each request on {split.kv_split} channels ({' '.join(flags)})"


def _check_pipeline(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System,
    fidelity: Fidelity,
    prefill: bool,
) -> tuple[str, ...]:
    """Returns a warning if a full pipeline, with a batch in each group, would not fit."""
    if prefill or parallel.pp == 1:
        return ()
    options: dict[str, Any] = {"system": system, "fidelity": fidelity}
    of_request = request_bytes(hardware, model, batch.seq_lens, parallel, **options)
    needed = of_request.sum() * pieces(parallel, system) * parallel.pp
    tokens = jnp.sum(jnp.asarray(batch.seq_lens) > 0)
    _, every = free_bytes(hardware, model, parallel, system, tokens)
    if needed <= every:
        return ()
    return (
        f"a full pipeline has {parallel.pp} such batches in flight, whose keys and values take"
        f" {format_bytes(float(needed))} of each device, which has {format_bytes(float(every))}"
        " beside weights and activations: the throughput is that of a pipeline which would not fit",
    )


def format_bytes(size: float) -> str:
    """Returns bytes as text in GB (10^9 bytes), in MB below 0.1 GB, or in bytes below 1 MB.

    Args:
        size: The bytes.
    """
    if size < 1e6:
        return f"{size:,.0f} bytes"
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
