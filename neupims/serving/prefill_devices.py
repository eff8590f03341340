"""Prompts on devices of their own: groups that compute one prompt after another, first come first.

A group is as many devices as decode, of the same kind, without PIM's help. The keys and values of a
prompt and its first token then go over the link to the devices that decode.
"""

import heapq
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neupims.machine.hardware import Hardware
from neupims.machine.workload import Batch
from neupims.serving.requests import Arrivals
from neupims.serving.tables import Setting
from neupims.timing.capacity import request_bytes
from neupims.timing.prefill import prefill

AT_ONCE = 1024  # prompts whose time is computed together


class Prefilled(NamedTuple):
    """What became of the prompts; times in nanoseconds, (n,) each."""

    began: Int[np.ndarray, " n"]  # when a group of devices took the prompt
    end: Int[np.ndarray, " n"]  # when its first token was there
    arrived: Int[np.ndarray, " n"]  # when its keys and values were where it is decoded
    joules: float  # of one device of every group


def prefill_apart(
    setting: Setting, hardware: Hardware, requests: Arrivals, *, groups: int
) -> Prefilled:
    """Returns when the prompts are ready: each goes to the group that is free first.

    Args:
        setting: The model and the system.
        hardware: A device of these groups.
        requests: The requests in their order of arrival.
        groups: The number of groups.
    """
    lengths, which = np.unique(requests.inputs, return_inverse=True)
    seconds, joules, sent = (
        np.concatenate(parts)
        for parts in zip(
            *(
                _measure(setting, hardware, lengths[begin : begin + AT_ONCE])
                for begin in range(0, len(lengths), AT_ONCE)
            ),
            strict=True,
        )
    )
    took = np.round(seconds.astype(np.float64) * 1e9).astype(np.int64)[which]
    way = np.round(sent.astype(np.float64) * 1e9).astype(np.int64)[which]
    began, end = follow_queue(requests.nanoseconds, took, groups)
    return Prefilled(began, end, end + way, float(joules[which].astype(np.float64).sum()))


def follow_queue(
    arrivals: Int[np.ndarray, " n"], took: Int[np.ndarray, " n"], groups: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns when each prompt begins and ends, first come first served.

    Args:
        arrivals: When each comes, in rising order.
        took: How long each takes.
        groups: The groups of devices.
    """
    free = [0] * min(groups, len(arrivals))
    began, end = np.empty_like(arrivals), np.empty_like(arrivals)
    for number, (came, takes) in enumerate(zip(arrivals.tolist(), took.tolist(), strict=True)):
        began[number] = max(came, heapq.heappop(free))
        end[number] = began[number] + takes
        heapq.heappush(free, int(end[number]))
    return began, end


def _measure(setting: Setting, hardware: Hardware, lengths: np.ndarray) -> list[np.ndarray]:
    """Returns seconds and joules of the prefill of each prompt alone, and seconds of its way."""
    padded = np.pad(lengths, (0, AT_ONCE - len(lengths)), constant_values=1)
    found = _measure_all(setting, jax.tree.map(jnp.float32, hardware), jnp.asarray(padded))
    return [np.asarray(each)[: len(lengths)] for each in found]


@partial(jax.jit, static_argnames="setting")
def _measure_all(setting: Setting, hardware: Hardware, lengths: Int[Array, " n"]):
    system: Literal["gpu", "npu-only"] = "gpu" if setting.system == "gpu" else "npu-only"
    model, parallel = setting.model, setting.parallel

    def one(length) -> tuple[Float[Array, ""], ...]:
        batch = Batch(length[None], 0 * length[None], 0 * length[None])
        done = prefill(hardware, model, batch, parallel, system=system)
        moved = request_bytes(hardware, model, length[None], parallel, system=system)[0]
        link = hardware.link
        way = moved / link.bandwidth_bytes_per_second + link.latency_seconds
        return done.iteration_seconds, done.energy_joules, way

    return jax.vmap(one)(lengths)
