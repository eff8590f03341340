"""Work of the operations that run on the NPU, and the same work on a GPU.

Each function computes one operation of a decoder layer, on one of the devices that share the
layer. It takes a `Context` (hardware, model, batch and system), the tokens of the sub-batch, the
bytes that the operation just before wrote (some of them still have to reach the memory), and for a
matrix product its tiling; it returns the `Work`. Cycles are core cycles. `timing.stages` lists
which operation uses which function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neupims.machine.calibration import DEFAULT, Calibration
from neupims.machine.division import ceil_divide, divide
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import Mix, shared_mlp
from neupims.machine.record import Number
from neupims.machine.systems import Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.timing import vector
from neupims.timing.experts import Routing, route
from neupims.timing.gemm import (
    SIXTEEN,
    Bits,
    Tiling,
    Work,
    bytes_per_cycle,
    gemm,
    one_tile,
    products_at_once,
    stuck_chance,
)
from neupims.timing.layout import heads_of_device
from neupims.timing.shapes import Product, ProductsFunction, SidesFunction, mlp_channels
from neupims.timing.vector import softmax_cycles

TO_SOFTMAX = 9  # core cycles from the last product of a head's logit to its softmax, as measured


class Context(NamedTuple):
    """The inputs of an operation apart from its tokens: hardware, model, batch and system."""

    hardware: Hardware  # one device
    model: Decoder  # its dimensions
    batch: Batch  # the requests, (r,)
    parallel: Parallel  # how many devices share a layer
    calibration: Calibration = DEFAULT  # the fitted constants
    system: System = "neupims"  # one of SYSTEMS
    fidelity: Fidelity = "simulator"  # or "intended"
    mix: Mix = Mix()  # static: what the layers have, such as shared experts


# (context, tokens, written_before, tile) -> Work
WorkFunction = Callable[[Context, Number, Number, Tiling | None], Work]


def product_bits(context: Context, *, routed: bool = False) -> Bits:
    """Returns the widths of the numbers that a product with weights multiplies.

    Args:
        context: The model; without narrow numbers in its `mix` all have 16 bits.
        routed: Whether the weights are those of routed experts, where the model has them.
    """
    model = context.model
    if not context.mix.narrow:
        return SIXTEEN
    experts = jnp.asarray(model.experts) > 0
    weights = jnp.where(experts & routed, model.expert_bits, model.weight_bits)
    return Bits(model.activation_bits, weights)


def matrix_product(
    sides: SidesFunction,
    stuck_after: str | None = None,
    *,
    routed: bool = False,
    of_latents: ProductsFunction | None = None,
) -> WorkFunction:
    """Returns the function that computes one matrix product of a layer.

    Args:
        sides: Function that gives the inner channels and the output features.
        stuck_after: The field of `Calibration` with the chance that a product of few tokens finds a
            write stuck; None for products in which none was seen.
        routed: Whether tokens are routed to experts, where the model has them. The product is then
            computed for each expert that has tokens, one after another, and then for the shared
            experts, which are one MLP for all tokens.
        of_latents: Function that gives the products that are computed too where the model has
            latent attention.

    Returns:
        A `WorkFunction`. Its result is 0 everywhere where there are no tokens.
    """

    def work(context: Context, tokens, written_before, tile=None) -> Work:
        model, parallel, mix = context.model, context.parallel, context.mix
        routing, skewed = Routing(1.0, tokens), routed and mix.skewed
        if routed:
            routing = route(model, tokens, parallel, mix)
        few = getattr(context.calibration, stuck_after) if stuck_after else 0.0
        found = product_work(
            context,
            routing.tokens,
            Product(routing.products, *sides(model, parallel)),
            bits=product_bits(context, routed=routed),
            stuck=stuck_chance(context.hardware, written_before, few),
            inherited_bytes=written_before,
            tile=None if skewed else tile,  # with a skew each expert has its tokens, and its tiles
        )
        if skewed:
            found = jax.tree.map(jnp.sum, found)
        beside: list[Product] = []
        if routed and mix.shared:
            there = 1.0 * (jnp.asarray(model.shared_experts) > 0)
            beside.append(Product(there, *sides(shared_mlp(model), parallel)))
        if of_latents and mix.latent:
            beside += of_latents(model, parallel)
        for each in beside:
            found = jax.tree.map(jnp.add, found, product_work(context, tokens, each))
        return jax.tree.map(lambda value: jnp.where(tokens > 0, value, 0.0), found)

    return work


def product_work(
    context: Context,
    tokens: Number,
    product: Product,
    *,
    bits: Bits | None = None,
    stuck: Number = 0.0,
    inherited_bytes: Number = 0.0,
    tile: Tiling | None = None,
) -> Work:
    """Returns the work of products with weights, one after another.

    Args:
        context: The hardware, the model and the system; on a GPU the work is that of its roofline.
        tokens: The tokens of each of them.
        product: Their number and their shape.
        bits: The widths of the numbers (default: those of weights that are not routed experts').
        stuck: As for `gemm`, of each of them.
        inherited_bytes: As for `gemm`, of each of them.
        tile: The tiling (default: computed). A GPU reads each matrix once.
    """
    bits = product_bits(context) if bits is None else bits
    on_board = context.system == "gpu"
    inner = jnp.maximum(product.inner, 1)
    one = gemm(
        context.hardware,
        tokens,
        inner,
        product.features,
        npu_only=context.system == "npu-only",
        stuck=stuck,
        inherited_bytes=inherited_bytes,
        tile=one_tile(tokens, inner, product.features) if on_board else tile,
        calibration=context.calibration,
        fidelity=context.fidelity,
        bits=bits,
    )
    if on_board:
        one = on_gpu(context.hardware, one, products_at_once(context.hardware.gpu, bits))
    return jax.tree.map(lambda value: jnp.where(product.count > 0, product.count * value, 0.0), one)


def normalize(context: Context, tokens, written_before, tile=None) -> Work:
    """Returns the work of a layer norm.

    Args:
        context: The hardware, the model and the system.
        tokens: The tokens of the sub-batch.
        written_before: The bytes that the operation just before wrote.
        tile: Not used.
    """
    width = 1.0 * context.model.width
    options = _vector_options(context, written_before)
    written_bits = product_bits(context).inputs
    return vector.layer_norm(context.hardware, tokens, width, written_bits=written_bits, **options)


def add_residual(context: Context, tokens, written_before, tile=None) -> Work:
    """Returns the work of a residual sum.

    Args:
        context: As in `normalize`.
        tokens: As in `normalize`.
        written_before: As in `normalize`.
        tile: Not used.
    """
    width = 1.0 * context.model.width
    options = _vector_options(context, written_before)
    return vector.residual_sum(context.hardware, tokens, width, **options)


def activate(context: Context, tokens, written_before, tile=None) -> Work:
    """Returns the work of the MLP's activation, with its gate where the model has one.

    Args:
        context: As in `normalize`.
        tokens: As in `normalize`.
        written_before: As in `normalize`.
        tile: Not used.
    """
    mlp = divide(mlp_channels(context.model), context.parallel.tp)
    inputs = context.model.mlp_matrices - 1.0
    options = _vector_options(context, written_before)
    rows = mlp_rows(context, tokens)
    written_bits = product_bits(context).inputs
    return vector.activation(
        context.hardware, rows, mlp, inputs, written_bits=written_bits, **options
    )


def mlp_rows(context: Context, tokens: Number) -> Number:
    """Returns the rows of a layer: one of each token in each MLP.

    A row has the channels of an MLP, or of an expert, that a device has if all share each expert.
    Where experts are dealt to groups of devices, its channels are more, and count as more rows.

    Args:
        context: The model, and whether it has shared experts.
        tokens: The tokens of the sub-batch.
    """
    routing = route(context.model, tokens, context.parallel, context.mix)
    there = jnp.asarray(context.model.experts) > 0
    rows = routing.rows * jnp.where(there, context.parallel.ep, 1)
    return rows + tokens * context.model.shared_experts if context.mix.shared else rows


def _vector_options(context: Context, written_before) -> dict[str, Any]:
    return {
        "calibration": context.calibration,
        "fidelity": context.fidelity,
        "inherited_bytes": written_before,
    }


def attend(context: Context, tokens, written_before, tile=None) -> Work:
    """Returns the work of the attention of the whole batch on the NPU (`npu_attention`).

    Args:
        context: The hardware, the model, the batch and the system.
        tokens: Not used.
        written_before: Not used.
        tile: Not used.
    """
    return npu_attention(
        context.hardware,
        context.model,
        context.batch,
        context.parallel,
        calibration=context.calibration,
        fidelity=context.fidelity,
        written_bits=product_bits(context).inputs,
    )


def npu_attention(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    calibration: Calibration,
    fidelity: Fidelity,
    written_bits: Number = 16,
) -> Work:
    """Returns the work of attention on the arrays, with keys and values read from the memory.

    In "simulator" fidelity the heads of all requests follow each other through one pipeline as
    products of one row, and each product fills and drains the arrays. In "intended" fidelity
    the queries of a group are the rows of one product, and groups are spread over the arrays, so
    that the memory is the bound. A latent is read once, as keys and as values of all heads.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests; only their lengths matter.
        parallel: How many devices share a layer.
        calibration: The fitted constants; only the efficiencies of the memory are used.
        fidelity: "simulator" or "intended".
        written_bits: The bits of the results, which the output projection takes.

    Returns:
        The work on one device.

    Reference:
        src/operations/FusedMHA.cc in the NPU-only branch of the public simulator.
    """
    npu = hardware.npu
    heads, kv_heads = heads_of_device(model, parallel)
    key, value = 1.0 * model.key_dim, 1.0 * model.attended_dim
    cached = jnp.where(jnp.asarray(model.kv_rank) > 0, key, kv_heads * (key + value))
    simulated = fidelity == "simulator"
    number_bytes = model.kv_bits / 8
    lengths = batch.seq_lens * 1.0
    there = lengths > 0
    fill = 2.0 * npu.array_height - 1
    columns = npu.array_width
    depth = 1.0 if simulated else ceil_divide(key, npu.array_height)  # blocks of a long key
    logit = depth * (fill + lengths / npu.num_arrays) + TO_SOFTMAX
    blocks = ceil_divide(lengths + columns - 1, columns)
    weighted = blocks * (fill + value / npu.num_arrays)
    softmax = softmax_cycles(hardware, lengths)
    one = jnp.where(there, logit + weighted, 0).sum()
    softmaxes = jnp.where(there, softmax, 0).sum()
    read = jnp.where(there, number_bytes * lengths * cached, 0).sum()
    written = written_bits / 8 * value * heads * there.sum()
    rate = bytes_per_cycle(hardware)
    efficiency = calibration.shallow_efficiency if simulated else calibration.queued_efficiency
    memory = read / rate / efficiency
    # nothing hides the read of the first request, which is the first that is there
    first = (number_bytes * lengths * (key + value) / rate)[jnp.argmax(there)]
    if simulated:
        busy = heads * (one + softmaxes)
        cycles = jnp.maximum(memory, busy + first)
    else:
        products = kv_heads * ceil_divide(
            divide(heads, kv_heads), columns
        )  # of the queries of a group
        busy = (products * one + heads * softmaxes) / npu.num_arrays
        cycles = jnp.maximum(memory, busy) + fill
    macs = heads * (key + value) * jnp.where(there, lengths, 0).sum()
    return Work(
        cycles, jnp.maximum(memory - busy, 0), jnp.minimum(busy, cycles), read, written, macs
    )


def on_gpu(hardware: Hardware, work: Work, at_once: Number = 1.0) -> Work:
    """Returns the same work at the roofline of a GPU: its arithmetic or its traffic takes longer.

        seconds = max(2 macs / at_once / flops_per_second, bytes / bytes_per_second)

    Args:
        hardware: The machine; `hardware.gpu` holds the roofline.
        work: The work on the NPU. Only its products and its bytes are used.
        at_once: The products in the time of one of 16 bits, `gemm.products_at_once`.

    Returns:
        The work on the GPU, in core cycles of the NPU's clock, so that systems compare.
    """
    arithmetic = 2 * work.macs / at_once / hardware.gpu.flops_per_second
    traffic = (work.read_bytes + work.write_bytes) / hardware.gpu.bytes_per_second
    cycles = jnp.maximum(arithmetic, traffic) * hardware.npu.clock_hz
    return work._replace(
        cycles=cycles, memory_cycles=cycles, busy_cycles=arithmetic * hardware.npu.clock_hz
    )
