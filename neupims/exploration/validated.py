"""What of an exploration is inside the envelope of the validated runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from neupims.envelope import (
    CLOSE,
    ExpectedError,
    envelope,
    expected_error,
    join_errors,
    spelling_of,
)
from neupims.exploration.space import Space
from neupims.exploration.workloads import Workload, deal
from neupims.machine.case import Case
from neupims.machine.hardware import Hardware

OF_A_SYSTEM = ("sub_batches", "pim.row_buffers")  # knobs with which designs are of several systems


def base_error(
    space: Space, hardware: Hardware, workloads: Sequence[Workload], options: Mapping[str, Any]
) -> ExpectedError:
    """Returns the expected error of the base design over its workloads.

    Args:
        space: The space of designs.
        hardware: The base design.
        workloads: Models and batches.
        options: The options of `make_evaluate`.
    """
    if several := [name for name in OF_A_SYSTEM if name in space.names]:
        reason = f"designs of several systems ({', '.join(several)}), each with an error of its own"
        return ExpectedError(None, (reason,), None)
    cases = [base_case(hardware, each, options) for each in workloads]
    return join_errors([expected_error(case, path="closed") for case in cases])


def base_case(hardware: Hardware, workload: Workload, options: Mapping[str, Any]) -> Case:
    """Returns the case of the base design with one workload.

    Args:
        hardware: The base design.
        workload: Model and batch.
        options: The options of `make_evaluate`.
    """
    batch = workload.batch
    if options["schedule"] == "dealt":
        lengths = jnp.sort(jnp.asarray(batch.seq_lens))[::-1]
        batch = deal(lengths, int(hardware.hbm.num_channels))
    choices = (options["system"], options["sub_batches"], options["fidelity"])
    return Case(hardware, workload.model, batch, workload.parallel, *choices)


def count_validated(
    space: Space,
    workloads: Sequence[Workload],
    options: Mapping[str, Any],
    values: Float[np.ndarray, "n k"],
) -> int:
    """Returns the number of designs whose knobs are inside the envelope of their system.

    Args:
        space: The space of designs.
        workloads: Models and batches.
        options: The options of `make_evaluate`.
        values: Knob values of the designs, (n, k).
    """
    limits = envelope(spelling_of(base_case(Hardware(), workloads[0], options)))
    inside = np.ones(len(values), bool)
    for name, column in zip(space.names, values.T, strict=True):
        if name == "parallel.tp":
            name, columns = (
                "model.heads_of_device",
                [each.model.heads / column for each in workloads],
            )
        else:
            columns = [column]
        low, high = limits.get(name, (-np.inf, np.inf))
        for each in columns:
            inside &= (low * (1 - CLOSE) <= each) & (each <= high * (1 + CLOSE))
    return int(inside.sum())
