"""Element-wise work of the vector units: layer norm, residual sum, GELU and softmax.

Results are in core cycles and bytes.

Source: src/operations/{LayerNorm,Add,Gelu}.cc and get_vector_compute_cycles in
    src/NeuPIMSystolicWS.cc of the public simulator.
"""

import jax.numpy as jnp

from neupims.machine.calibration import Calibration
from neupims.machine.division import ceil_divide
from neupims.machine.hardware import Hardware
from neupims.machine.record import Number
from neupims.machine.workload import FLOAT16_BYTES
from neupims.timing.gemm import ACCEPTED, Work, bytes_per_cycle

LATENCY_CYCLES = 35  # of a read, and of the write's acknowledgement
TREE_LEVELS = 4  # of the adder tree: 128^4 elements are more than any row


def layer_norm(
    hardware: Hardware,
    tokens,
    width,
    *,
    calibration: Calibration,
    fidelity: str,
    inherited_bytes=0.0,
    written_bits: Number = 16,
) -> Work:
    """Returns the work of a layer norm: it reads rows and two rows of parameters, and writes rows.

    Args:
        hardware: The machine.
        tokens: The number of rows.
        width: The channels of a row.
        calibration: The fitted constants.
        fidelity: "simulator" or "intended".
        inherited_bytes: The bytes that the operation just before wrote.
        written_bits: The bits of a number that is written: an input of a product.
    """
    passes, tree = _passes(hardware, width)
    compute = 2 * tree + 3 + 5 * passes
    return _element_wise(
        hardware,
        tokens,
        width,
        (tokens + 2) * width,
        tokens * width,
        compute,
        calibration,
        fidelity,
        inherited_bytes,
        written_bits,
    )


def residual_sum(
    hardware: Hardware,
    tokens,
    width,
    *,
    calibration: Calibration,
    fidelity: str,
    inherited_bytes=0.0,
) -> Work:
    """Returns the work of adding two arrays of rows.

    Args:
        hardware: The machine.
        tokens: The number of rows.
        width: The channels of a row.
        calibration: The fitted constants.
        fidelity: "simulator" or "intended".
        inherited_bytes: The bytes that the operation just before wrote.
    """
    passes, _ = _passes(hardware, width)
    return _element_wise(
        hardware,
        tokens,
        width,
        2 * tokens * width,
        tokens * width,
        passes,
        calibration,
        fidelity,
        inherited_bytes,
    )


def activation(
    hardware: Hardware,
    tokens,
    width,
    inputs,
    *,
    calibration: Calibration,
    fidelity: str,
    inherited_bytes=0.0,
    written_bits: Number = 16,
) -> Work:
    """Returns the work of GELU; with a gate (Llama) it reads several rows for each token.

    Args:
        hardware: The machine.
        tokens: The number of rows that are written.
        width: The channels of a row.
        inputs: The rows that are read for each of them: 1, or 2 with a gate.
        calibration: The fitted constants.
        fidelity: "simulator" or "intended".
        inherited_bytes: The bytes that the operation just before wrote.
        written_bits: The bits of a number that is written: an input of a product.
    """
    passes, _ = _passes(hardware, width)
    return _element_wise(
        hardware,
        tokens,
        width,
        inputs * tokens * width,
        tokens * width,
        passes * inputs,
        calibration,
        fidelity,
        inherited_bytes,
        written_bits,
    )


def softmax_cycles(hardware: Hardware, length) -> Number:
    """Returns the core cycles of one vector unit for the softmax of one row.

    Args:
        hardware: The machine.
        length: The numbers of the row; may be an array of lengths.
    """
    passes, tree = _passes(hardware, length)
    return 2 * tree + 3 * passes


def _passes(hardware: Hardware, length) -> tuple[Number, Number]:
    """Returns the passes of one vector unit over a row, and the steps of its adder tree."""
    lanes = hardware.npu.vector_lanes
    passes = ceil_divide(length, lanes)
    tree, left = 1.0 * (passes > 0), passes
    for _ in range(TREE_LEVELS):
        tree = tree + jnp.where(left > 1, left, 0)
        left = ceil_divide(left, lanes)
    return passes, tree


def _element_wise(
    hardware: Hardware,
    tokens,
    width,
    read,
    written,
    compute,
    calibration: Calibration,
    fidelity: str,
    inherited_bytes,
    written_bits: Number = 16,
) -> Work:
    """Returns the work of an element-wise operation, which takes the time of its traffic.

    The traffic is the reads at the pace of the bus, half of the writes, and the other half of what
    the operation just before wrote (`inherited_bytes`). "simulator" issues one row a cycle, and its
    rows take no longer: their length is read after it was moved away. "intended" takes `compute`
    for a row on one of the vector units, and waits for all its writes.
    """
    read_bytes, write_bytes = FLOAT16_BYTES * read * 1.0, written_bits / 8 * written * 1.0
    if fidelity == "simulator":
        traffic = read_bytes + ACCEPTED * (write_bytes + inherited_bytes)
        memory = traffic / bytes_per_cycle(hardware)
        units = 1.0 * tokens
    else:
        traffic = (read_bytes + write_bytes) / calibration.queued_efficiency
        memory = traffic / bytes_per_cycle(hardware)
        units = tokens * compute / hardware.npu.vector_units
    zero = 0.0 * memory
    cycles = jnp.maximum(memory, units) + LATENCY_CYCLES
    return Work(
        jnp.where(tokens > 0, cycles, zero),
        jnp.where(tokens > 0, memory, zero),
        zero,
        read_bytes,
        write_bytes,
        zero,
    )
