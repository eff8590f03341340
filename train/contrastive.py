"""Trains an image tower and a text tower on images with captions.

    python -m train.contrastive --config NAME [flags]

The losses are CLIP's and SigLIP's (`ggem_jax.losses.contrastive`), computed over all devices
without the whole matrix of similarities on any of them. `train.pairs` describes the sources of
data. `--init FILE` starts the image tower from a published ViT. `train.loop` describes the run's
folder, and how a run stops and resumes.
"""

import functools
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from ggem_jax.losses import contrastive
from ggem_jax.models.text import TextConfig, TextTransformer
from ggem_jax.retrieval import metrics
from train import dry_run
from train.batches import train_batches
from train.build import build_model
from train.captions import Captioned, Text
from train.cli import Refused, load_config, one_sentence, require
from train.config import Config, Data, Optimizer
from train.digest import describe_data
from train.evaluate import compute_outputs, put_on_devices
from train.loop import Evaluation, Task, TrainedRun, check_batch, check_devices, run, run_tool
from train.pairs import open_captions
from train.run import has_checkpoint, join_processes
from train.samplers import draw_distinct
from train.step import Problem, Steps, compile_steps, make_mesh
from train.stopping import check_keep
from train.throughput import forward_flops, text_forward_flops
from train.tokenizer import (
    Tokenizer,
    load_run_tokenizer,
    read_tokenizer,
    save_run_tokenizer,
    train_tokenizer,
)
from train.towers import Towers

KAPPAS = (1, 5, 10)
AXES = ("data", "fsdp")


@dataclass(frozen=True)
class ContrastiveConfig(Config):
    """One training of an image tower and a text tower on pairs."""

    tool: ClassVar[str] = "train.contrastive"

    out: Path = Path("runs/contrastive")
    # the loss of CLIP (softmax, arXiv:2103.00020) or of SigLIP (sigmoid, arXiv:2303.15343)
    loss: Literal["softmax", "sigmoid"] = "softmax"
    embed: int = 512  # channels of the space that images and texts share
    # first factor of the similarities; None: 1/0.07 with softmax (CLIP), 10 with sigmoid (SigLIP)
    init_scale: float | None = None
    init_bias: float = -10.0  # first bias of the sigmoid (SigLIP); a softmax has none
    max_scale: float = 100.0  # largest factor of the similarities (CLIP, section 2.5)
    text: Text = field(default_factory=Text)

    @property
    def first_scale(self) -> float:
        """The first factor of the similarities: `init_scale`, or the published one of the loss."""
        published = {"softmax": 1 / 0.07, "sigmoid": 10.0}[self.loss]
        return published if self.init_scale is None else self.init_scale

    def __post_init__(self):
        super().__post_init__()
        require("embed", self.embed, "at least 1", self.embed >= 1)
        require("max_scale", self.max_scale, "positive", 0 < self.max_scale < math.inf)
        require(
            "init_scale",
            self.init_scale,
            f"above 0 and at most --max-scale {self.max_scale:g}",
            0 < self.first_scale <= self.max_scale,
        )
        require("init_bias", self.init_bias, "finite", math.isfinite(self.init_bias))
        parts = self.optimizer.accumulate
        require(
            "optimizer.accumulate",
            parts,
            "1: the negatives of a pair are those of its batch, and a part of a batch has fewer",
            parts == 1,
        )
        self.augment.require_no_mixing("there are no labels to mix")


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    flags = sys.argv[1:] if argv is None else argv
    if dry_run.is_asked(flags):
        with one_sentence(ContrastiveConfig.tool):
            dry_run.main(flags, ContrastiveConfig, plan, open_sizes)
    else:
        run_tool(
            ContrastiveConfig.tool,
            lambda flags: train(load_config(ContrastiveConfig, flags)),
            flags,
        )


def plan(
    config: ContrastiveConfig, _classes: int, total: int, devices: dry_run.Devices
) -> dry_run.Plan:
    """Returns what a dry run needs to know.

    Each device passes its texts on around all others, with a sum of each where the loss is a
    softmax, and their gradients back.

    Args:
        config: The settings of the run.
        total: Steps of the run.
        devices: The devices; None: all.
    """
    if config.text.tokenizer is None:
        size, end = config.text.vocabulary, config.text.vocabulary - 1
    else:
        tokenizer = read_tokenizer(config.text.tokenizer)
        size, end = tokenizer.size, tokenizer.end
    towers = build_towers(config, size, end)
    steps = make_steps(config, towers, total, devices=devices)
    numbers = config.embed + (config.loss == "softmax")
    return dry_run.Plan(
        steps,
        training_flops(config, towers),
        towers.text.config,
        2 * (steps.mesh.size - 1) * (config.batch // steps.mesh.size) * numbers * 4,
    )


def open_sizes(config: ContrastiveConfig) -> dry_run.Sizes:
    """Returns 1, as classes do not matter, and the number of training images of the data.

    Args:
        config: The settings of the run.
    """
    return 1, len(open_pairs(config)[0])


def training_flops(config: ContrastiveConfig, towers: Towers) -> float:
    """Returns the FLOPs of one training step, per image with its text.

    Args:
        config: The settings of the run.
        towers: The towers of the run.
    """
    text = text_forward_flops(towers.text.config, config.embed)
    return 3 * (forward_flops(config.model, config.embed) + text)


def train(config: ContrastiveConfig, *, quiet: bool = False) -> TrainedRun:
    """Trains the towers that a config describes, or resumes their run.

    Args:
        config: The settings of the run.
        quiet: Whether nothing is printed.

    Returns:
        The run; its result is the `PairDescriptors` of the last evaluation.

    Raises:
        Refused: The settings, the data or the run's folder do not fit.
    """
    join_processes()
    train_set, eval_set = open_pairs(config)
    check_devices(config)
    check_batch(config, len(train_set))
    directions = ("image_to_text", "text_to_image")
    check_keep(config, tuple(f"{name}@{k}" for name in directions for k in KAPPAS))
    total = max(round(config.epochs * len(train_set) / config.batch), 1)
    given = None if config.text.tokenizer is None else read_tokenizer(config.text.tokenizer)
    tokens = None if given is None else zlib.crc32(given.text.encode())
    facts = describe_data(config, train_set.images, eval_set.images) | {
        "classes": list(train_set.classes),
        "captions": train_set.digest(),
        "tokenizer": tokens,
    }

    def task() -> Task:
        tokenizer = open_tokenizer(config, given, train_set)
        towers = make_towers(config, tokenizer)
        steps = make_steps(config, towers, total)

        def evaluation(state) -> Evaluation:
            described = describe(steps, towers, state.evaluated, eval_set, tokenizer, config)
            values = {
                f"{name}@{k}": float(found[:, i].mean())
                for name, found in described.found().items()
                for i, k in enumerate(KAPPAS)
            }
            said = "  ".join(
                f"{name.replace('_', '-')} recall@1 {values[f'{name}@1']:.2%}"
                for name in directions
            )
            scale = float(towers.scale(state.evaluated))
            facts = {"scale": scale, "images": len(described.images), "texts": len(described.texts)}
            return Evaluation(described, values | facts, f"{said}  scale {scale:.1f}")

        beside = caption_sampler(train_set, tokenizer, config.text.context)
        places = {"process": jax.process_index(), "processes": jax.process_count()}
        texts = len(eval_set.texts()[0])
        draw = draw_distinct(len(train_set), config.batch, config.seed)
        shown = 1 - len(train_set) % config.batch / len(train_set)
        return Task(
            about=(
                f"{len(train_set):,} images to train, of which an epoch shows {shown:.1%}, none"
                f" twice in a batch; {len(eval_set):,} with {texts:,} texts to"
                f" evaluate, {tokenizer.size:,} pieces of text"
            ),
            total=total,
            steps=steps,
            flops=training_flops(config, towers),
            batches=lambda start: train_batches(
                train_set.images,
                config,
                start=start,
                draw=draw,
                same_class=False,
                beside=beside,
                **places,
            ),
            evaluate=evaluation,
            curves=("image_to_text@1", "text_to_image@1"),
        )

    return run(config, task, facts, quiet=quiet)


def open_pairs(config: ContrastiveConfig) -> tuple[Captioned, Captioned]:
    """Returns the training and the evaluation images of a run, with their captions.

    Args:
        config: The settings of the run; with `text.shuffle_captions` training images have each
            other's captions.

    Raises:
        Refused: The source cannot be read, or its settings do not fit it.
    """
    train_set, eval_set = open_captions(config.data, config.text)
    return (
        train_set.shuffled(config.seed) if config.text.shuffle_captions else train_set
    ), eval_set


def open_tokenizer(
    config: ContrastiveConfig, given: Tokenizer | None, train_set: Captioned
) -> Tokenizer:
    """Returns the tokenizer of a run.

    A run that resumes reads it from its folder. A run that starts stores the given tokenizer there,
    that of the run it continues, or one trained on its captions.

    Args:
        config: The settings of the run.
        given: The tokenizer that the settings name; None trains one.
        train_set: The training images, with the captions to train a tokenizer on.

    Raises:
        Refused: The tokenizer in the folder is not the one that the run started with, or the given
            one is not that of the run that is continued.
    """
    if has_checkpoint(config.out):
        return load_run_tokenizer(config.out)
    if config.resume_from is not None:
        tokenizer = load_run_tokenizer(config.resume_from)
        if given is not None and given.text != tokenizer.text:
            raise Refused(f"--text.tokenizer is not the tokenizer of {config.resume_from}")
    else:
        captions = (caption for each in train_set.captions for caption in each)
        tokenizer = given or train_tokenizer(captions, config.text.vocabulary)
    if jax.process_index() == 0:
        save_run_tokenizer(config.out, tokenizer)
    return tokenizer


def caption_sampler(
    train_set: Captioned, tokenizer: Tokenizer, context: int
) -> Callable[[int, np.random.Generator], dict[str, Any]]:
    """Returns a function that draws one of an image's captions, as ids.

    Args:
        train_set: The training images with their captions.
        tokenizer: The tokenizer of the run.
        context: Ids of a text, start, end and padding included.

    Returns:
        A function from the number of an image and random numbers to {"ids": `(context,)` int32}.
    """

    def drawn(image: int, rng: np.random.Generator) -> dict[str, Any]:
        captions = train_set.captions[image]
        return {"ids": tokenizer.row(captions[rng.integers(len(captions))], context)}

    return drawn


def make_towers(config: ContrastiveConfig, tokenizer: Tokenizer) -> Towers:
    """Returns the towers that a config describes.

    Args:
        config: The settings of the run.
        tokenizer: The tokenizer of the run, which sets the vocabulary and the id that ends a text.
    """
    return build_towers(config, tokenizer.size, tokenizer.end)


def build_towers(config: ContrastiveConfig, vocabulary: int, end: int) -> Towers:
    """Returns the towers that a config describes.

    The text tower uses the dtype, dropout, activation and rematerialisation of the image tower.

    Args:
        config: The settings of the run.
        vocabulary: Number of ids.
        end: The id that ends a text.
    """
    own, image = config.text, config.model
    text = TextConfig(
        vocabulary=vocabulary, width=own.width, depth=own.depth, heads=own.heads,
        mlp_width=own.mlp_width, context=own.context,
        end_id=end, dropout=image.dropout, gelu=image.gelu, dtype=image.dtype,
        param_dtype=image.param_dtype, remat=image.remat,
    )  # fmt: skip
    bias = config.init_bias if config.loss == "sigmoid" else None
    return Towers(
        build_model(config, 0),
        TextTransformer(text, config.embed),
        config.first_scale,
        bias,
        config.max_scale,
    )


def make_steps(
    config: ContrastiveConfig,
    towers: Towers,
    total_steps: int,
    *,
    devices: tuple[jax.Device, ...] | None = None,
) -> Steps:
    """Returns the compiled steps of a run.

    Configs that differ only in seed, folder or logging share one compilation.

    Args:
        config: The settings of the run.
        towers: The towers, as `make_towers` returns them.
        total_steps: Steps of the run.
        devices: The devices, which may be described ones (`train.topologies`); None: all.
    """
    return _steps(towers, config.data, config.optimizer, config.fsdp, total_steps, devices)


@functools.cache
def _steps(
    towers: Towers,
    data: Data,
    optimizer: Optimizer,
    fsdp: int,
    total_steps: int,
    devices: tuple[jax.Device, ...] | None,
) -> Steps:
    mesh = make_mesh(fsdp, devices)

    def loss(params, batch, key: PRNGKeyArray) -> Array:
        image_key, text_key = jax.random.split(key)
        images = towers.describe_images(
            params, batch["image"], train=True, rngs={"dropout": image_key}
        )
        texts = towers.describe_texts(params, batch["ids"], train=True, rngs={"dropout": text_key})
        if "bias" in params:
            return contrastive.sharded_siglip_loss(
                images, texts, towers.scale(params), params["bias"], mesh=mesh, axes=AXES
            )
        return contrastive.sharded_clip_loss(
            images, texts, towers.scale(params), mesh=mesh, axes=AXES
        )

    problem = Problem(
        init=towers.init,
        prepare=lambda batch, key: batch,
        loss=loss,
        outputs=lambda params, images: {"descriptor": towers.describe_images(params, images)},
    )
    return compile_steps(problem, data, optimizer, fsdp, total_steps, devices)


@functools.cache
def _text_step(towers: Towers, fsdp: int):
    """The compiled text tower: (parameters, {"ids", "index"}) -> {"descriptor", "index"}.

    The outputs are whole on every device.
    """
    mesh = make_mesh(fsdp)

    def outputs(params, batch):
        return {"descriptor": towers.describe_texts(params, batch["ids"]), "index": batch["index"]}

    return jax.jit(outputs, out_shardings=NamedSharding(mesh, P()))


@dataclass(frozen=True)
class PairDescriptors:
    """The readable evaluation images and all distinct captions of a split, in the shared space."""

    images: np.ndarray  # (n, embed), of length 1
    index: np.ndarray  # (n,) number of the image in its split
    digest: np.ndarray  # (n,) CRC-32 of the image as it was read
    texts: np.ndarray  # (t, embed), of length 1
    captions: tuple[str, ...]  # (t,) the texts themselves
    pairs: np.ndarray  # (m, 2): (image, text), by their rows here

    def found(self, kappas: tuple[int, ...] = KAPPAS) -> dict[str, np.ndarray]:
        """Returns whether a right answer is among the kappa most similar ones.

        Texts whose images cannot be read are left out.

        Args:
            kappas: Numbers of answers that are looked at.

        Returns:
            "image_to_text" `(n, kappas)` and "text_to_image" `(t, kappas)`, bool; t counts the
            texts that have an image.
        """
        back = self.pairs[:, ::-1]
        to_image = metrics.found_at(self.texts, self.images, back, kappas=kappas)
        return {
            "image_to_text": metrics.found_at(self.images, self.texts, self.pairs, kappas=kappas),
            "text_to_image": to_image[np.unique(back[:, 0])],
        }

    def chance(self, kappas: tuple[int, ...] = KAPPAS) -> dict[str, np.ndarray]:
        """Returns the average of `found` for random descriptors.

        Args:
            kappas: Numbers of answers that are looked at.

        Returns:
            "image_to_text" and "text_to_image", `(kappas,)` each.
        """
        asked, text = np.unique(self.pairs[:, 1], return_inverse=True)
        back = np.stack([text, self.pairs[:, 0]], axis=1)
        return {
            "image_to_text": metrics.chance_at(
                self.pairs, len(self.images), len(self.texts), kappas=kappas
            ),
            "text_to_image": metrics.chance_at(back, len(asked), len(self.images), kappas=kappas),
        }


def describe(
    steps: Steps,
    towers: Towers,
    params,
    eval_set: Captioned,
    tokenizer: Tokenizer,
    config: ContrastiveConfig,
) -> PairDescriptors:
    """Returns the descriptors of every readable image and every distinct caption of a split.

    All processes get all of them.

    Args:
        steps: The compiled steps of the run.
        towers: The towers of the run.
        params: The parameters of both towers.
        eval_set: The evaluation images with their captions.
        tokenizer: The tokenizer of the run.
        config: The settings of the run.

    Raises:
        Refused: No image can be read.
    """
    whole = compute_outputs(steps, params, eval_set.images, config)
    captions, pairs = eval_set.texts()
    place = np.full(len(eval_set), -1)
    place[whole["index"]] = np.arange(len(whole["index"]))
    pairs = np.stack([place[pairs[:, 0]], pairs[:, 1]], axis=1)
    texts = describe_texts(steps, towers, params, captions, tokenizer, config)
    return PairDescriptors(
        whole["descriptor"],
        whole["index"],
        whole["digest"],
        texts,
        captions,
        pairs[pairs[:, 0] >= 0],
    )


def describe_texts(
    steps: Steps,
    towers: Towers,
    params,
    texts: tuple[str, ...],
    tokenizer: Tokenizer,
    config: ContrastiveConfig,
) -> Float[np.ndarray, "t embed"]:
    """Returns the descriptors of texts in the shared space, in their order.

    Args:
        steps: The compiled steps of the run.
        towers: The towers of the run.
        params: The parameters of both towers.
        texts: The texts, t of them.
        tokenizer: The tokenizer of the run.
        config: The settings of the run: batch size, context and mesh.

    Returns:
        The vectors, `(t, embed)` float32, of length 1; all processes get all of them.
    """
    step = _text_step(towers, config.fsdp)
    descriptors = np.zeros((len(texts), config.embed), np.float32)
    for start in range(0, len(texts), config.batch):
        places = np.arange(start, start + config.batch, dtype=np.int32)
        index = np.minimum(places, len(texts) - 1)  # the last text fills up the last batch
        mine = index[jax.process_index() :: jax.process_count()]
        ids = tokenizer.encode([texts[i] for i in mine], config.text.context)
        found = jax.device_get(step(params, put_on_devices({"ids": ids, "index": mine}, steps)))
        descriptors[found["index"]] = found["descriptor"]
    return descriptors


if __name__ == "__main__":
    main()
