"""The operations of a decoder layer, and the stages in which a system runs them.

Systems: in "neupims" NPU and PIM work side by side, on one batch or on two interleaved
sub-batches; in "npu-pim" they take turns, with one row buffer; "npu-only" has no PIM; "gpu" is a
roofline. With two sub-batches, layer l of sub-batches 1 and 2 takes six stages:

    A  NPU: qkv 1            B  NPU: qkv 2             PIM: attention 1
    C  NPU: the rest and the next layer's qkv of 1     PIM: attention 2
    D  NPU: the rest and the next layer's qkv of 2     PIM: attention 1 of the next layer
    E  NPU: the rest of 1    PIM: attention 2          F  NPU: the rest of 2

With one sub-batch it takes A (qkv), B (attention) and E (the rest), one after the other. A stage
ends when both sides have ended. Operations have the names that the public simulator gives them.

Source: src/StageProgram.cc and src/scheduler/Scheduler.h of the public simulator; section 6 of the
    paper.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from neupims.machine.calibration import DEFAULT
from neupims.machine.record import Number
from neupims.machine.systems import System
from neupims.timing import npu, shapes
from neupims.timing.gemm import Tiling, Work
from neupims.timing.npu import Context, WorkFunction, on_gpu
from neupims.timing.shapes import SidesFunction

STAGES = "ABCDEF"

Kind = Literal["gemm", "vector", "attention", "pim"]
Platform = Literal["SA", "PIM"]


class Operation(NamedTuple):
    """An operation of a layer, or of a stage of it."""

    name: str  # as the public simulator names it
    kind: Kind  # "attention" is attention on the NPU
    work: WorkFunction | None  # None: `attention.attention_cycles` times those of PIM together
    sides: SidesFunction | None = None  # of a matrix product
    element_operations: int = 0  # of the vector units, on each element that it writes
    stage: str = ""  # the name of the stage that runs it
    routed: bool = False  # whether it is computed for each expert that has tokens

    @property
    def platform(self) -> Platform:
        """Where it runs: "SA" is the NPU with its systolic arrays."""
        return "PIM" if self.kind == "pim" else "SA"


class Stage(NamedTuple):
    """A stage: operations of one sub-batch on the NPU beside attention of another on PIM."""

    name: str  # a letter of STAGES, or "all"
    npu: tuple[Operation, ...]  # operations of the NPU in their order
    npu_sub_batch: int  # 0 or 1; -1 if the NPU has no work
    pim_sub_batch: int  # 0 or 1; -1 if PIM has no work

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The operations of the stage, those of the NPU first."""
        listed = (*self.npu, *(ATTENTION if self.pim_sub_batch >= 0 else ()))
        return tuple(each._replace(stage=self.name) for each in listed)


QKV = (
    Operation("attn.ln", "vector", npu.normalize, element_operations=5),
    Operation(
        "attn.QKVgen",
        "gemm",
        npu.matrix_product(shapes.qkv_sides, of_latents=shapes.latent_queries),
        shapes.qkv_sides,
    ),
)
REST = (
    Operation(
        "attn.proj",
        "gemm",
        npu.matrix_product(shapes.projection_sides, of_latents=shapes.latent_values),
        shapes.projection_sides,
    ),
    Operation("attn.res", "vector", npu.add_residual, element_operations=1),
    Operation("ffn.ln", "vector", npu.normalize, element_operations=5),
    Operation(
        "ffn.fc1",
        "gemm",
        npu.matrix_product(shapes.fc1_sides, "stuck_after_norm", routed=True),
        shapes.fc1_sides,
        routed=True,
    ),
    Operation("ffn.gelu", "vector", npu.activate, element_operations=1),
    Operation(
        "ffn.fc2",
        "gemm",
        npu.matrix_product(shapes.fc2_sides, "stuck_after_activation", routed=True),
        shapes.fc2_sides,
        routed=True,
    ),
    Operation("ffn.res", "vector", npu.add_residual, element_operations=1),
)
PRODUCTS = tuple(each for each in (*QKV, *REST) if each.kind == "gemm")
ATTENTION = (
    Operation("attn.NeuPIMSLogitSoftmax", "pim", None),
    Operation("attn.NeuPIMSAttend", "pim", None),
)
NPU_ATTENTION = Operation("attn.attn.FusedMHA", "attention", npu.attend)

# After the last layer, for the whole batch.
HEAD = (
    Operation("head.ln", "vector", npu.normalize, element_operations=5),
    Operation("head.product", "gemm", npu.matrix_product(shapes.head_sides), shapes.head_sides),
)

INTERLEAVED = (
    Stage("A", QKV, 0, -1),
    Stage("B", QKV, 1, 0),
    Stage("C", REST + QKV, 0, 1),
    Stage("D", REST + QKV, 1, 0),
    Stage("E", REST, 0, 1),
    Stage("F", REST, 1, -1),
)
SERIAL = (Stage("A", QKV, 0, -1), Stage("B", (), -1, 0), Stage("E", REST, 0, -1))
NPU_ONLY = (Stage("all", (*QKV, NPU_ATTENTION, *REST), 0, -1),)


def stages(system: System, sub_batches: int) -> tuple[Stage, ...]:
    """Returns the stages of a system in the order in which they run.

    Args:
        system: "neupims", "npu-pim", "npu-only" or "gpu".
        sub_batches: 1, or 2 interleaved ones; only "neupims" interleaves.
    """
    if system in ("npu-only", "gpu"):
        return NPU_ONLY
    return INTERLEAVED if system == "neupims" and sub_batches == 2 else SERIAL


def operations(system: System, sub_batches: int) -> tuple[Operation, ...]:
    """Returns the operations of a system, stage by stage, those of the NPU first.

    Args:
        system: "neupims", "npu-pim", "npu-only" or "gpu".
        sub_batches: 1, or 2 interleaved ones; only "neupims" interleaves.
    """
    return tuple(each for stage in stages(system, sub_batches) for each in stage.operations)


def head_work(context: Context, tokens: Number) -> Work:
    """Returns the work of the LM head and the layer norm before it; none where it is left out.

    It follows the last layer, for all tokens together. Its numbers have 16 bits.

    Args:
        context: The hardware, the model, the batch, and the system that runs it.
        tokens: The tokens that get a successor: those of the batch, or one of each prompt.

    Returns:
        The work on one of the devices that share the vocabulary.
    """
    wide = context._replace(mix=context.mix._replace(narrow=False))
    norm, product = HEAD
    first = npu_operation(norm, wide, tokens)
    second = npu_operation(product, wide, tokens, first.write_bytes)
    there = jnp.asarray(context.model.lm_head) > 0
    return jax.tree.map(lambda a, b: jnp.where(there, a + b, 0.0), first, second)


def npu_operation(
    operation: Operation,
    context: Context,
    tokens: Number,
    written_before: Number = 0.0,
    tile: Tiling | None = None,
) -> Work:
    """Returns the work of one operation of the NPU; on a GPU where the system is "gpu".

    Args:
        operation: The operation; not one of PIM.
        context: The hardware, the model, the batch, and the system that runs it.
        tokens: The tokens of the sub-batch.
        written_before: The bytes that the operation just before wrote.
        tile: The tiling of a matrix product; computed if not given.

    Returns:
        The work on one of the devices that share a layer.

    Raises:
        ValueError: The operation runs on PIM.
    """
    if operation.work is None:
        raise ValueError(f"{operation.name} runs on PIM, not on the NPU")
    records, fixed = context[:5], context[5:]  # traced, and static: system, fidelity and mix
    return _work(operation, fixed, records, tokens, written_before, tile)


@partial(jax.jit, static_argnums=(0, 1))
def _work(operation, fixed, records, tokens, written_before, tile) -> Work:
    """The work of an operation. Stages repeat operations: under `jit`, each is traced once."""
    context = Context(*records, *fixed)
    if context.system == "gpu":
        plain = context._replace(calibration=DEFAULT, fidelity="intended")
        work = operation.work(plain, tokens, 0.0, None)
        # Products are at the roofline already, each at the rate of its numbers.
        return work if operation.kind == "gemm" else on_gpu(context.hardware, work)
    return operation.work(context, tokens, written_before, tile)
