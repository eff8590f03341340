"""One training step and one evaluation step, compiled for a mesh of devices.

The mesh has the axes `data` and `fsdp`. A batch is split over both; weights, optimizer state and
moving average are split over `fsdp` and repeated over `data`. With one device both axes have length
1 and nothing is split.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from ggem_jax.files.normalisation import normalise_pixels
from ggem_jax.models.vit import ViT
from ggem_jax.optimizer import optimizer as build_optimizer
from ggem_jax.optimizer import scale_by_muon_and_adam, scale_by_parameter
from train.build import build_model
from train.cli import Refused
from train.config import Augment, Config, Data, Optimizer
from train.freezing import drop_frozen

Batch = dict[str, Array]


@struct.dataclass
class State:
    """Everything that a checkpoint holds."""

    step: Int[Array, ""]  # steps that are done
    params: Any
    opt_state: Any  # of the optimizer
    ema: Any  # moving average of the parameters, or None

    @property
    def evaluated(self) -> Any:
        """The parameters that evaluations use."""
        return self.params if self.ema is None else self.ema


@dataclass(frozen=True)
class Steps:
    """The compiled functions of a run, and the layout of their arguments on the devices."""

    mesh: Mesh  # of all devices, `(data, fsdp)`
    batch_sharding: NamedSharding  # of every array of a batch
    state_sharding: State  # a `NamedSharding` for each array of a state
    init: Any  # (seed) -> State
    train: Any  # (State, batch, seed) -> (State, {"loss", "grad_norm"})
    # (parameters, batch) -> the batch with the outputs of the problem in place of its images, whole
    # on every device
    evaluate: Any


def make_mesh(fsdp: int, devices: tuple[jax.Device, ...] | None = None) -> Mesh:
    """Returns devices as a mesh `(data, fsdp)`.

    Args:
        fsdp: Devices that the weights are split over.
        devices: The devices; None takes all of this process and of those it has joined.

    Raises:
        Refused: `fsdp` does not divide the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or count % fsdp:
        raise Refused(f"--fsdp must divide the number of devices, {count}; it is {fsdp}")
    return jax.make_mesh(
        (count // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


@dataclass(frozen=True)
class Problem:
    """The part of a training that its task decides: parameters, loss and outputs.

    Images come normalised to the loss and the outputs.
    """

    init: Callable[[PRNGKeyArray], Any]  # key -> parameters
    # batch, key -> the batch as it is trained on: pixels mixed, labels smoothed
    prepare: Callable[[Batch, PRNGKeyArray], Batch]
    # parameters, (a part of) a prepared batch, key -> mean loss
    loss: Callable[[Any, Batch, PRNGKeyArray], Array]
    # parameters, images -> arrays with a row for each image
    outputs: Callable[[Any, Array], dict[str, Array]]
    # parameters -> factor of the learning rate of each, besides those of ggem_jax.optimizer
    scales: Callable[[Any], Any] | None = None


def make_steps(
    config: Config,
    num_classes: int,
    total_steps: int,
    *,
    several: bool = False,
    class_weights: tuple[float, ...] | None = None,
    devices: tuple[jax.Device, ...] | None = None,
) -> Steps:
    """Returns the compiled steps of a classifier.

    Its loss is the cross-entropy of a softmax or, where an image may have several labels, the mean
    over classes of that of a sigmoid.

    Configs that differ only in seed, folder or logging share one compilation.

    Args:
        config: The settings of the run.
        num_classes: Outputs of the head.
        total_steps: Steps of the run.
        several: Whether an image may have several labels.
        class_weights: Factor of the loss of each class; None: all are 1.
        devices: The devices, which may be described ones (`train.topologies`); None: all.
    """
    return _classifier_steps(
        build_model(config, num_classes),
        config.data,
        config.augment,
        config.optimizer,
        config.fsdp,
        total_steps,
        several,
        class_weights,
        devices,
    )


@functools.cache
def _classifier_steps(
    model: ViT,
    data: Data,
    augment: Augment,
    optimizer: Optimizer,
    fsdp: int,
    total_steps: int,
    several: bool,
    class_weights: tuple[float, ...] | None,
    devices: tuple[jax.Device, ...] | None,
) -> Steps:
    side = model.config.image

    def logits_of(params, images, **options) -> Float[Array, "b classes"]:
        output: Any = model.apply({"params": params}, images, **options)
        return output.logits.astype(jnp.float32)

    def prepare(batch: Batch, key: PRNGKeyArray) -> Batch:
        smoothing = augment.label_smoothing
        if several:
            targets = batch["label"] * (1 - smoothing) + smoothing / 2
        else:
            targets = optax.smooth_labels(
                jax.nn.one_hot(batch["label"], model.num_classes), smoothing
            )
        images, targets = mix(batch["image"], targets, augment, key)
        return {"image": images, "target": targets}

    def loss(params, batch: Batch, key: PRNGKeyArray) -> Array:
        logits = logits_of(params, batch["image"], train=True, rngs={"dropout": key})
        if several:
            return optax.sigmoid_binary_cross_entropy(logits, batch["target"]).mean()
        targets = batch["target"]
        if class_weights is not None:  # -sum_c w_c t_c log p_c
            targets = targets * jnp.array(class_weights)
            return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()
        return optax.softmax_cross_entropy(logits, targets).mean()

    probability = jax.nn.sigmoid if several else jax.nn.softmax
    problem = Problem(
        init=lambda key: model.init(key, jnp.zeros((1, side, side, 3)))["params"],
        prepare=prepare,
        loss=loss,
        outputs=lambda params, images: {"probability": probability(logits_of(params, images))},
    )
    return compile_steps(problem, data, optimizer, fsdp, total_steps, devices)


def compile_steps(
    problem: Problem,
    data: Data,
    optimizer: Optimizer,
    fsdp: int,
    total_steps: int,
    devices: tuple[jax.Device, ...] | None = None,
) -> Steps:
    """Returns the compiled steps of a problem, laid out over devices.

    Args:
        problem: Parameters, loss and outputs.
        data: Settings of the data, of which mean and deviation of the images are used.
        optimizer: Settings of the optimizer.
        fsdp: Devices that the weights are split over.
        total_steps: Steps of the run.
        devices: The devices; None: all.

    Raises:
        Refused: The settings of the model and of its pooling do not go together, or `fsdp` does not
            divide the number of devices.
    """
    mesh = make_mesh(fsdp, devices)
    transform = make_optimizer(optimizer, total_steps)
    if problem.scales is not None:
        transform = optax.chain(transform, scale_by_parameter(problem.scales))

    def init(seed: Int[Array, ""]) -> State:
        params = problem.init(keys(seed)[0])
        ema = None if optimizer.ema is None else jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, transform.init(params), ema)

    @jax.custom_vjp
    def whole(params):
        """The parameters collected from `fsdp`, so that no token is split instead of them."""
        return jax.lax.with_sharding_constraint(params, everywhere)

    # their gradients are summed in parts, each where its parameters are; those of tables of ids as
    # a whole, since XLA would split the tokens that they come from
    whole.defvjp(
        lambda params: (whole(params), None),
        lambda _, slope: (jax.lax.with_sharding_constraint(slope, slope_sharding),),
    )

    def train(state: State, batch: Batch, seed: Int[Array, ""]):
        mix_key, drop_key = jax.random.split(jax.random.fold_in(keys(seed)[1], state.step))
        prepared = problem.prepare(batch, mix_key)
        prepared = prepared | {"image": normalise(prepared["image"], data)}
        loss, grads = accumulate_gradient(
            lambda params, *rest: problem.loss(whole(params), *rest),
            state.params,
            prepared,
            drop_key,
            optimizer.accumulate,
        )
        grads = drop_frozen(grads, optimizer.freeze)
        norm = optax.tree.norm(grads)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        updates = drop_frozen(updates, optimizer.freeze)  # of the weight decay
        params = optax.apply_updates(state.params, updates)
        ema = None
        if optimizer.ema is not None:
            # the initial weights are forgotten quickly, as in TensorFlow's ExponentialMovingAverage
            # with num_updates
            decay = jnp.minimum(optimizer.ema, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(params, state.ema, 1 - decay)
        return State(state.step + 1, params, opt_state, ema), {"loss": loss, "grad_norm": norm}

    def evaluate(params, batch: Batch) -> Batch:
        # The labels travel with their images, whatever order of devices and processes the mesh
        # has.
        rest = {name: array for name, array in batch.items() if name != "image"}
        return rest | problem.outputs(whole(params), normalise(batch["image"], data))

    everywhere = NamedSharding(mesh, P())
    batch_sharding = NamedSharding(mesh, P(("data", "fsdp")))
    try:
        shapes = jax.eval_shape(init, 0)
    except ValueError as error:  # settings of the model and its pooling that do not go together
        raise Refused(str(error)) from None
    state_sharding = jax.tree.map(
        lambda leaf: NamedSharding(mesh, split_over_fsdp(leaf.shape, fsdp)), shapes
    )
    slope_sharding = jax.tree_util.tree_map_with_path(
        lambda path, sharding: everywhere if path[-1].key == "embedding" else sharding,
        state_sharding.params,
    )
    return Steps(
        mesh,
        batch_sharding,
        state_sharding,
        jax.jit(init, out_shardings=state_sharding),
        jax.jit(
            train,
            in_shardings=(state_sharding, batch_sharding, everywhere),
            out_shardings=(state_sharding, everywhere),
            donate_argnums=0,
        ),
        jax.jit(
            evaluate, in_shardings=(state_sharding.params, batch_sharding), out_shardings=everywhere
        ),
    )


def keys(seed: Int[Array, ""]) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Returns a key for the initial weights and one for the steps.

    The input pipeline draws its own numbers from the seed.

    Args:
        seed: The seed of the run, a whole number.
    """
    initial, steps = jax.random.split(jax.random.key(seed))
    return initial, steps


def split_over_fsdp(shape: tuple[int, ...], fsdp: int) -> P:
    """Returns the layout of a parameter: its longest axis that `fsdp` divides is split.

    Vectors, and parameters without such an axis, are repeated on every device.

    Args:
        shape: Shape of the parameter.
        fsdp: Devices along the axis `fsdp` of the mesh.
    """
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or not axes or len(shape) < 2:
        return P()
    longest = max(axes, key=lambda axis: shape[axis])
    return P(*(None,) * longest, "fsdp")


# Gradients to directions, by --optimizer.name
DIRECTIONS: dict[str, Callable[[Optimizer], optax.GradientTransformation]] = {
    "adamw": lambda o: optax.scale_by_adam(b1=o.beta1, b2=o.beta2),
    "lion": lambda o: optax.scale_by_lion(b1=o.beta1, b2=o.beta2),
    "muon": lambda o: scale_by_muon_and_adam(o.beta1, o.beta2),
    "sgd": lambda o: optax.trace(o.beta1),
}


def make_optimizer(optimizer: Optimizer, total_steps: int) -> optax.GradientTransformation:
    """Returns gradient clipping, then the optimizer with a warm-up and a cosine decay.

    Args:
        optimizer: Its settings; a `clip` of None leaves out the clipping.
        total_steps: Steps of the run, at the end of which the learning rate is 0.
    """
    warmup = min(optimizer.warmup, total_steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, optimizer.lr, warmup, total_steps)
    transform = build_optimizer(
        DIRECTIONS[optimizer.name](optimizer),
        schedule,
        weight_decay=optimizer.weight_decay,
        exponent_lr=optimizer.exponent_lr,
        layer_decay=optimizer.layer_decay,
    )
    return (
        transform
        if optimizer.clip is None
        else optax.chain(optax.clip_by_global_norm(optimizer.clip), transform)
    )


def normalise(images: Num[Array, "b h w 3"], data: Data) -> Float[Array, "b h w 3"]:
    """Returns (pixel / 255 - mean) / std of each channel, as the model takes images.

    Args:
        images: Images, `(b, h, w, 3)`: pixels from 0 to 255.
        data: Settings of the data, with mean and deviation of the channels.

    Returns:
        The images, `(b, h, w, 3)` float32.
    """
    return normalise_pixels(images, data.mean, data.std)


def mix(images, targets, augment: Augment, key: PRNGKeyArray):
    """Mixes each image with its opposite in the batch, by mixup or CutMix.

    The opposite may be on another device, to which images travel as they are: 8-bit pixels are a
    quarter of the bytes of normalised ones.

    Args:
        images: Images, `(b, h, w, 3)`: pixels, or floats.
        targets: Probabilities of the classes, `(b, classes)`.
        augment: The strengths of both; with both on, each batch takes one of them at random.
        key: Source of the random numbers.

    Returns:
        Mixed images and targets, of the same shapes, in floats where they are mixed.

    Reference: Zhang et al., "mixup", 2018, arXiv:1710.09412; Yun et al., "CutMix", 2019,
        arXiv:1905.04899.
    """
    if not augment.mixup and not augment.cutmix:
        return images, targets
    coin, ratio_key, place = jax.random.split(key, 3)
    cut = (
        jax.random.bernoulli(coin)
        if augment.mixup and augment.cutmix
        else jnp.bool_(augment.cutmix > 0)
    )
    alpha = jnp.where(cut, augment.cutmix, augment.mixup)
    keep = jax.random.beta(ratio_key, alpha, alpha)
    height, width = images.shape[1:3]
    box = jnp.sqrt(1 - keep) / 2  # half the box's sides over the image's
    y, x = jax.random.uniform(place, (2,))
    rows, columns = (jnp.arange(height) + 0.5) / height, (jnp.arange(width) + 0.5) / width
    inside = (jnp.abs(rows - y) < box)[:, None] & (jnp.abs(columns - x) < box)
    keep = jnp.where(cut, 1 - inside.mean(), keep)
    weight = jnp.where(cut, jnp.where(inside, 0.0, 1.0), keep)[None, :, :, None]
    return weight * images + (1 - weight) * images[::-1], keep * targets + (1 - keep) * targets[
        ::-1
    ]


def accumulate_gradient(loss_of, params, batch: Batch, key: PRNGKeyArray, parts: int):
    """Returns loss and gradient of a batch, processed in equal parts to save memory.

    Args:
        loss_of: Function from parameters, a batch and a key to the mean loss.
        params: The parameters.
        batch: Arrays with a row for each image, by name.
        key: Source of the random numbers.
        parts: Number of parts; it divides the rows of each device.

    Returns:
        The loss, a scalar, and the gradient, both averaged over the parts.
    """
    if parts == 1:
        return jax.value_and_grad(loss_of)(params, batch, key)
    # each device splits its own rows
    split = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0), batch
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, *part)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, (split, jax.random.split(key, parts)))
    return jax.tree.map(lambda x: x / parts, total)
