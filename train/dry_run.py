"""What a training would take, without its data: python -m train.classify --dry-run --config NAME

It prints parameters, FLOPs, the memory of each device by part and the time, compiles the step, and
counts what the program sends between devices. Nothing is trained or written. `train.metric`
and `train.contrastive` have it too. Besides the flags of the script:

    --classes N   classes to train on, not of train.contrastive (default: opens the data)
    --images N    training images of the data (default: opens the data)
    --on D        devices to compile for: "here", "none", or some that need not be there: "h200:8",
                  "v5e:8", "v5p:8", "v6e:8"

Memory is an estimate from sizes. A compiled program may keep more or less, as its compiler decides.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ggem_jax.models.config import ViTConfig
from ggem_jax.models.text import TextConfig
from train import topologies
from train.cli import Refused, first_line, load_config, take_flag
from train.collectives import expected_bytes, find_transfers
from train.config import Config
from train.loop import check_batch
from train.step import State, Steps
from train.throughput import PEAK_FLOPS

C = TypeVar("C", bound=Config)
Devices = tuple[jax.Device, ...] | None  # to compile for; None: all of this process
Sizes = tuple[int, int]  # classes (1 where they do not matter) and images to train on

UTILISATION = 0.4  # of the peak, assumed for the times
TIMED = (("NVIDIA H200", 1), ("NVIDIA H200", 8), ("TPU v5 lite", 8))


@dataclass(frozen=True)
class Plan:
    """What the task decides of a run: its steps and their examples."""

    steps: Steps
    flops: float  # of training on an example
    text: TextConfig | None = None  # the text tower beside the image tower
    sent_bytes: float = 0  # that each device sends for its loss


@dataclass(frozen=True)
class Memory:
    """Bytes of one device during a training step, by what they hold."""

    weights: int
    collected: int  # copies of weights that are split over devices, each whole
    average: int  # the moving average of the weights
    optimizer: int
    gradients: int
    images: int  # one batch
    activations: int  # kept from the forward pass for the backward pass

    @property
    def total(self) -> int:
        """The sum of all parts."""
        parts = self.weights, self.collected, self.average, self.optimizer, self.gradients
        return sum(parts) + self.images + self.activations


def is_asked(flags: list[str]) -> bool:
    """Returns whether `--dry-run` is among the flags.

    Args:
        flags: The flags of a script.
    """
    return any(flag.replace("_", "-") == "--dry-run" for flag in flags)


def main(
    flags: list[str],
    kind: type[C],
    plan: Callable[[C, int, int, Devices], Plan],
    open_sizes: Callable[[C], Sizes],
) -> None:
    """Prints what a run would take.

    Args:
        flags: The flags of the script, and those of the dry run.
        kind: The class of its settings.
        plan: A function from settings, classes, steps of the run and devices to its plan.
        open_sizes: A function from settings to the sizes of the data.

    Raises:
        Refused: A flag is wrong, or the data are not there and their sizes are not given.
    """
    flags = [flag for flag in flags if flag.replace("_", "-") != "--dry-run"]
    needs_classes = kind.tool != "train.contrastive"
    classes = _count(flags, "--classes") if needs_classes else 1
    images = _count(flags, "--images")
    where = take_flag(flags, "--on") or "here"
    config = load_config(kind, flags, kind.tool)
    if classes is None or images is None:
        try:
            found = open_sizes(config)
        except Refused as error:
            sizes = "--classes N and --images N" if needs_classes else "--images N"
            raise Refused(f"{error}; a dry run without the data needs {sizes}") from None
        classes, images = classes or found[0], images or found[1]
    check_batch(config, images)
    total = max(round(config.epochs * images / config.batch), 1)
    devices = find_devices(where)
    for line in describe(config, plan(config, classes, total, devices), images, where):
        print(line, flush=True)


def describe(config: Config, plan: Plan, images: int, where: str = "here") -> Iterator[str]:
    """Yields lines for people: sizes, memory, time, and the compiled program.

    Args:
        config: The settings of the run.
        plan: What the task decides.
        images: Training images of the data.
        where: Devices to compile for: "here", "none", or a name and a number, "h200:8".

    Raises:
        Refused: The devices do not divide the batch, or have too little memory.
    """
    steps, flops, text = plan.steps, plan.flops, plan.text
    count = steps.mesh.size
    if config.batch % (count * config.optimizer.accumulate):
        raise Refused(
            f"--batch must be a multiple of the {count} device(s) times --optimizer.accumulate"
            f" {config.optimizer.accumulate}, it is {config.batch}"
        )
    total = max(round(config.epochs * images / config.batch), 1)
    state = jax.eval_shape(steps.init, 0)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    yield (
        f"model         {parameters:,} parameters, {flops / 1e9:.3g} GFLOP to train on an image,"
        f" {flops * config.batch / 1e12:.3g} TFLOP a step of {config.batch:,} images"
    )
    memory = estimate_memory(config, steps, state, text)
    yield f"a device      one of {count}, with {config.batch // count:,} images of a step"
    named = {
        "weights": memory.weights,
        "collected": memory.collected,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "average": memory.average,
        "images": memory.images,
        "activations": memory.activations,
    }
    for name, size in named.items():
        if size:
            yield f"  {name:<12}{_size(size)}"
    other = activation_bytes(config, count, remat=not config.model.remat, text=text)
    without = "without" if config.model.remat else "with"
    yield f"  in all      {_size(memory.total)}, estimated"
    difference = memory.total - memory.activations + other
    yield f"  {without} --model.remat {_size(difference)}, estimated"
    yield f"the run       {total:,} steps: {config.epochs:g} epochs of {images:,} images"
    accelerator = topologies.ACCELERATORS.get(where.partition(":")[0])
    described = [] if accelerator is None else [(accelerator.kind, count)]
    for kind, number in dict.fromkeys([*TIMED, *described]):
        seconds = flops * config.batch * total / (PEAK_FLOPS[kind] * number * UTILISATION)
        yield (
            f"  {number} x {kind:<12}{_time(seconds)} at {UTILISATION:.0%} of the bfloat16 peak:"
            " computed, not measured"
        )
    if where != "none":
        place = "the devices here" if where == "here" else where
        program = compile_step(config, steps, state, where, text)
        used = used_bytes(program)
        room = "" if accelerator is None else f", of {_size(accelerator.memory_bytes)} each"
        yield f"compiled      {_size(used)} for {place}{room}"
        if accelerator is not None:
            products = flops * config.batch / count / PEAK_FLOPS[accelerator.kind]
            yield (
                f"a step        at least {_time(products)} of products at the bfloat16 peak, and"
                f" {_time(2 * used / accelerator.bytes_per_second)} to write and read its memory"
                " once: computed"
            )
        if count > 1:
            yield from _describe_transfers(config, plan, state, program.as_text() or "")


def _describe_transfers(config: Config, plan: Plan, state: State, program: str) -> Iterator[str]:
    sent: dict[str, float] = {}
    for transfer in find_transfers(program, plan.steps.mesh.size):
        sent[transfer.kind] = sent.get(transfer.kind, 0) + transfer.sent_bytes
    gradient = jnp.dtype(config.model.dtype).itemsize
    layout = plan.steps.state_sharding.params
    expected = expected_bytes(state.params, layout, gradient) + plan.sent_bytes
    total = math.fsum(sent.values())
    yield f"a step sends  {_size(total)} from each device, {_size(expected)} by formula"
    for kind, size in sent.items():
        yield f"  {kind:<20}{_size(size)}"


def estimate_memory(
    config: Config, steps: Steps, state: State, text: TextConfig | None = None
) -> Memory:
    """Returns what a step keeps on each device.

    Args:
        config: The settings of the run.
        steps: The steps of the run, for the layout on the devices.
        state: Shapes of the state.
        text: The text tower beside the image tower.
    """

    def share(shapes, layout) -> int:
        pieces = jax.tree.map(
            lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)), shapes, layout
        )
        sizes = jax.tree.map(lambda leaf, piece: piece * leaf.dtype.itemsize, shapes, pieces)
        return sum(jax.tree.leaves(sizes))

    layout, count = steps.state_sharding, steps.mesh.size
    weights = share(state.params, layout.params)
    sizes = jax.tree.map(
        lambda leaf, sharding: (not sharding.is_fully_replicated) * leaf.size * leaf.dtype.itemsize,
        state.params,
        layout.params,
    )
    return Memory(
        weights=weights,
        collected=sum(jax.tree.leaves(sizes)),
        average=share(state.ema, layout.ema),
        optimizer=share(state.opt_state, layout.opt_state),
        gradients=weights,
        images=config.batch // count * config.model.image**2 * 3,
        activations=activation_bytes(config, count, remat=config.model.remat, text=text),
    )


def activation_bytes(
    config: Config, devices: int, *, remat: bool, text: TextConfig | None = None
) -> int:
    """Returns the bytes of activations that each device keeps for the backward pass.

    A block keeps for each token, in `dtype`: both inputs of its residual branches after their
    norms, queries, keys (twice), values (twice), what attention returns, and the outputs of both
    branches; the hidden channels of the MLP before and after the activation; and the shares of
    attention, in float32 and, in some programs of XLA and not in others, which counts as a half, in
    `dtype`. With `remat` it is the input of every block and all that one block keeps.

    Args:
        config: The settings of the run.
        devices: Devices that a batch is split over.
        remat: Whether blocks are computed again in the backward pass.
        text: The text tower beside the image tower, with a text for each image.
    """
    model = config.model
    examples = config.batch // devices // config.optimizer.accumulate
    size = jnp.dtype(model.dtype).itemsize
    patches = (model.image // model.patch) ** 2 + model.prefix_tokens
    towers: list[tuple[ViTConfig | TextConfig, int]] = [(model, patches)]
    if text is not None:
        towers.append((text, text.context))
    blocks = [_token_bytes(tower, tokens, size) * examples * tokens for tower, tokens in towers]
    if not remat:
        return sum(tower.depth * block for (tower, _), block in zip(towers, blocks, strict=True))
    inputs = sum(tower.depth * tokens * tower.width for tower, tokens in towers)
    return examples * inputs * size + max(blocks)


def _token_bytes(model: ViTConfig | TextConfig, tokens: int, size: int) -> int:
    """What a block keeps for a token; a gated MLP has a third array of hidden channels."""
    streams = 10 * model.width * size
    hidden = (3 if model.mlp == "swiglu" else 2) * model.mlp_width * size
    return streams + hidden + model.heads * tokens * (8 + size) // 2


def compile_step(
    config: Config, steps: Steps, state: State, where: str, text: TextConfig | None = None
) -> jax.stages.Compiled:
    """Returns XLA's program of a training step.

    Args:
        config: The settings of the run.
        steps: The steps of the run on the devices to compile for.
        state: Shapes of the state.
        where: The devices, as for `describe`.
        text: The text tower beside the image tower.

    Raises:
        Refused: The devices have too little memory.
    """
    side = config.model.image
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        steps.state_sharding,
    )
    shapes = {"image": (jnp.uint8, side, side, 3), "label": (jnp.int32,)}
    if text is not None:
        shapes["ids"] = (jnp.int32, text.context)
    batch = {
        name: jax.ShapeDtypeStruct((config.batch, *shape), dtype, sharding=steps.batch_sharding)
        for name, (dtype, *shape) in shapes.items()
    }
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(steps.mesh, P()))
    if where == "here":
        return steps.train.lower(placed, batch, seed).compile()
    try:
        return topologies.compile_described(steps.train, placed, batch, seed)
    except jax.errors.JaxRuntimeError as error:  # of compilers that know the limit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cause = first_line(error).removeprefix("RESOURCE_EXHAUSTED: ").removesuffix(".")
        raise Refused(
            f"--on {where}: the step does not fit. XLA: {cause}. Take a smaller --batch, or more of"
            " --optimizer.accumulate, --model.remat, --fsdp or devices"
        ) from None


def used_bytes(program: jax.stages.Compiled) -> int:
    """Returns the memory that a program takes on each device.

    Args:
        program: The program; outputs that take the place of arguments count once.
    """
    used: Any = program.memory_analysis()
    made = used.output_size_in_bytes - used.alias_size_in_bytes
    return used.argument_size_in_bytes + made + used.temp_size_in_bytes


def find_devices(where: str) -> Devices:
    """Returns the devices to compile for; None: all of this process.

    Args:
        where: "here", "none", or a name and a number, "h200:8".

    Raises:
        Refused: The name or the number is unknown, or XLA's compiler for it is not installed.
    """
    if where in ("here", "none"):
        return None
    known = ", ".join(f"{name}:N" for name in topologies.ACCELERATORS)
    found = re.fullmatch(r"(\w+):([1-9]\d{0,3})", where)
    if found is None or found[1] not in topologies.ACCELERATORS:
        raise Refused(f"--on must be here, none or one of {known}, such as h200:8, not {where}")
    name, count = found[1], int(found[2])
    slices = topologies.ACCELERATORS[name].slices
    if slices and count not in slices:
        raise Refused(f"{name} comes in slices of {', '.join(map(str, slices))} chips, not {count}")
    if not topologies.available(name):
        kind, package = ("TPUs", "jax[tpu]") if slices else ("NVIDIA GPUs", "jax[cuda12]")
        raise Refused(
            f"--on {where} needs XLA's compiler for {kind}: install {package}, which works without"
            " the device, or take --on none"
        )
    devices = topologies.tpus(name, count) if slices else topologies.h200s(count)
    return tuple(devices.ravel())


def _count(flags: list[str], name: str) -> int | None:
    text = take_flag(flags, name)
    if text is not None and not re.fullmatch(r"[1-9]\d{0,11}", text):
        raise Refused(f"{name} must be a whole number of at least 1, not {text}")
    return None if text is None else int(text)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    if seconds >= 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:.2g} seconds" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
