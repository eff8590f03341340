"""Evaluates trained pairs of towers: python -m eval.contrastive RUN [OTHER].

Prints recall@k from images to texts and back, beside the recall of a random order, from the newest
checkpoint of a run of `train.contrastive`. A text is right for an image if it is one of the image's
captions, so where captions are class names every image of the class is right. `--zero-shot SOURCE`
classifies images by the words of their classes. With a second run it also prints paired tests on
the same images; `--json` prints one JSON object instead.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from eval.runs import (
    RunOptions,
    RunResult,
    make_console,
    open_checkpoints,
    replace_data,
    require_same_images,
    say_exponents,
)
from eval.statistics import Interval, PairedTest, bootstrap, compare_paired, proportion
from ggem_jax.retrieval.metrics import class_descriptors, found_at
from train.captions import Captioned, Text, choose_class_words, choose_templates
from train.checkpoints import Checkpoints
from train.cli import Refused, one_sentence, parse
from train.contrastive import (
    KAPPAS,
    ContrastiveConfig,
    PairDescriptors,
    describe,
    describe_texts,
    make_steps,
    make_towers,
)
from train.data import open_data
from train.evaluate import compute_outputs
from train.images import Images
from train.loop import read_exponents
from train.pairs import open_captions
from train.run import read_run
from train.tokenizer import Tokenizer, load_run_tokenizer

DIRECTIONS = {"image_to_text": "images -> texts", "text_to_image": "texts -> images"}


@dataclass(frozen=True)
class ContrastiveOptions(RunOptions):
    """How well images and texts find each other, and which of two runs does better."""

    # digits, folder:DIR or tfds:NAME to classify by the words of its classes
    zero_shot: str | None = None
    # templates with {} for the class, of the zero-shot prompts or else of the captions; None: as in
    # the run
    templates: tuple[str, ...] | None = None
    # file with other words for these classes: for each a line of its folder, a tab and its words;
    # None: as in the run
    names: Path | None = None
    split: str | None = None  # evaluate on another split, CSV file or shards than the run did


@dataclass(frozen=True)
class ZeroShot:
    """Images classified by the words of their classes."""

    index: np.ndarray  # (n,) number of the image in its split
    digest: np.ndarray  # (n,) of the images as they were read
    top1: np.ndarray  # (n,) bool: whether the label's class is the nearest
    top5: np.ndarray  # (n,) bool: whether it is among the five nearest
    source: str  # of the images, in the form of --data
    words: tuple[str, ...]  # of the classes, in the order of the labels
    templates: tuple[str, ...]  # of the prompts, with {} for the class


@dataclass(frozen=True)
class ContrastiveResult(RunResult):
    """One run on its evaluation images and captions."""

    descriptors: PairDescriptors  # of the readable images and all captions
    zero_shot: ZeroShot | None  # None: it was not asked for
    scale: float  # learned factor of the similarities


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    with one_sentence("eval.contrastive"):
        options = parse(ContrastiveOptions, argv, "eval.contrastive")
        results = [evaluate_run(run, options) for run in options.runs]
        report = as_json(results, compare(*results) if len(results) == 2 else None)
        if options.json:
            print(json.dumps(report))
        else:
            show(report)


def evaluate_run(run: Path, how: ContrastiveOptions) -> ContrastiveResult:
    """Returns the descriptors of a run's newest checkpoint, and its zero-shot classification.

    Args:
        run: Folder of a run of `train.contrastive`.
        how: Source and split of the images, templates and words of the captions, and the source of
            the zero-shot classification. Its `run` and `other` are not used.

    Returns:
        The result; its `zero_shot` is None where `how.zero_shot` is None.

    Raises:
        Refused: The folder is not such a run or has no checkpoint, or the images cannot be read.
    """
    trained, _ = read_run(run, ContrastiveConfig)
    data = how.data_of(trained.data)
    # another source has its own splits
    kept = data.eval_split if data.source == trained.data.source else None
    data = dataclasses.replace(data, eval_split=how.split or kept)
    checkpoints, config = open_checkpoints(run), replace_data(trained, data)
    asked = (how.templates, how.names)
    _, eval_set = open_captions(
        data, text_of(data.source, trained, *((None, None) if how.zero_shot else asked))
    )
    model = Model(config, load_run_tokenizer(run), checkpoints)
    zero_shot = (
        None
        if how.zero_shot is None
        else classify(model, text_of(how.zero_shot, trained, *asked), how.zero_shot)
    )
    scale = float(model.towers.scale(model.params))
    return ContrastiveResult(
        run=run,
        step=model.step,
        p=read_exponents(model.params),
        descriptors=model.describe(eval_set),
        zero_shot=zero_shot,
        scale=scale,
    )


class Model:
    """The two towers of a run's newest checkpoint.

    Args:
        config: Settings of the run, with the data to evaluate on.
        tokenizer: The tokenizer of the run.
        checkpoints: The checkpoints of the run; the newest one is restored.

    Raises:
        Refused: The checkpoint cannot be read.
    """

    def __init__(self, config: ContrastiveConfig, tokenizer: Tokenizer, checkpoints: Checkpoints):
        self.config, self.tokenizer, self.towers = config, tokenizer, make_towers(config, tokenizer)
        self.steps = make_steps(config, self.towers, total_steps=2)  # nothing is trained
        state = checkpoints.restore(self.steps)
        self.params, self.step = state.evaluated, int(state.step)

    def describe(self, eval_set: Captioned) -> PairDescriptors:
        """Returns the descriptors of the images and captions of a split.

        Args:
            eval_set: Images with their captions.

        Raises:
            Refused: No image can be read.
        """
        return describe(self.steps, self.towers, self.params, eval_set, self.tokenizer, self.config)

    def texts(self, texts: tuple[str, ...]) -> np.ndarray:
        """Returns the descriptors of texts, unit vectors `(t, embed)` in float32.

        Args:
            texts: Texts as they are; each is encoded, and cut off at the run's context.
        """
        return describe_texts(
            self.steps, self.towers, self.params, texts, self.tokenizer, self.config
        )

    def images(self, images: Images) -> dict[str, np.ndarray]:
        """Returns the descriptors of the readable images of a split, with their labels.

        Args:
            images: A split of labelled images.

        Returns:
            "descriptor" `(n, embed)`, unit vectors, and "label", "index" (numbers in the split) and
            "digest" of the images, `(n,)` each.

        Raises:
            Refused: No image can be read.
        """
        return compute_outputs(self.steps, self.params, images, self.config)


def text_of(
    source: str, trained: ContrastiveConfig, templates: tuple[str, ...] | None, names: Path | None
) -> Text:
    """Returns the settings that decide how the captions of a source are made.

    Args:
        source: Source of the images, in the form of `--data`.
        trained: Settings of the run.
        templates: Templates with {} for the class, as `--templates` gives them. None takes the
            run's, unless the source has captions of its own.
        names: File with words for the classes, as `--names` gives it. None takes the run's file if
            the source is the run's own.

    Raises:
        Refused: The settings do not fit each other.
    """
    has_captions = source.startswith(("csv:", "wds:"))
    if templates is None and not has_captions:
        templates = trained.text.templates
    if names is None and source == trained.data.source:
        names = trained.text.names
    try:
        return dataclasses.replace(trained.text, templates=templates, names=names)
    except ValueError as error:
        raise Refused(str(error).replace("--text.", "--")) from None


def classify(model: Model, text: Text, source: str) -> ZeroShot:
    """Classifies each image as the class whose prompts are nearest: zero-shot classification.

    The descriptor of a class is the mean of its prompts over the templates.

    Args:
        model: The towers.
        text: Words and templates that make prompts of class names.
        source: Source of the images, in the form of `--data`. Another source than the run's uses
            its own default split.

    Returns:
        Whether the label's class is the nearest, or among the five nearest, for each image.

    Raises:
        Refused: The images cannot be read, or the file of names lacks a class.

    Reference: Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", 2021, arXiv:2103.00020, section 3.1.
    """
    data = dataclasses.replace(model.config.data, source=source)
    if source != model.config.data.source:
        data = dataclasses.replace(data, eval_split=None)
    _, images = open_data(data)
    words, templates = choose_class_words(images.classes, data, text), choose_templates(data, text)
    prompts = tuple(template.replace("{}", word) for word in words for template in templates)
    classes = class_descriptors(model.texts(prompts).reshape(len(words), len(templates), -1))
    whole = model.images(images)
    right = found_at(
        whole["descriptor"],
        classes,
        np.stack([np.arange(len(whole["label"])), whole["label"]], axis=1),
        kappas=(1, 5),
    )
    return ZeroShot(
        whole["index"], whole["digest"], right[:, 0], right[:, 1], source, words, templates
    )


def compare(first: ContrastiveResult, second: ContrastiveResult) -> dict[str, PairedTest]:
    """Returns paired tests of two runs on the same images and texts, by the name of the measure.

    Args:
        first: Result of one run.
        second: Result of the other run.

    Returns:
        Tests of "image_to_text@1" and "text_to_image@1", and of "zero_shot_top1" where both runs
        have one.

    Raises:
        Refused: The runs were not evaluated on the same images, captions and classes.
    """
    a, b = first.descriptors, second.descriptors
    same: list[tuple[Any, Any]] = [
        (a.captions, b.captions),
        (a.index, b.index),
        (a.digest, b.digest),
        (a.pairs, b.pairs),
    ]
    require_same_images(first.run, second.run, same, "images and captions")
    found, other = a.found((1,)), b.found((1,))
    tests = {
        f"{name}@1": compare_paired(found[name][:, 0], other[name][:, 0]) for name in DIRECTIONS
    }
    if first.zero_shot and second.zero_shot:
        c, d = first.zero_shot, second.zero_shot
        same = [(c.words, d.words), (c.index, d.index), (c.digest, d.digest)]
        require_same_images(first.run, second.run, same, "images and classes")
        tests["zero_shot_top1"] = compare_paired(c.top1, d.top1)
    return tests


def as_json(
    results: list[ContrastiveResult], tests: dict[str, PairedTest] | None
) -> dict[str, Any]:
    """Returns the object that `--json` prints; `show` prints the same for people.

    Args:
        results: One or two evaluated runs.
        tests: Paired tests as `compare` returns them; None where there is one run.

    Returns:
        "runs", a list with an entry for each run, and "paired", the tests or None. Recalls and
        accuracies are from 0 to 1.
    """
    paired_tests = (
        None if tests is None else {name: dataclasses.asdict(test) for name, test in tests.items()}
    )
    return {"runs": [_entry(result) for result in results], "paired": paired_tests}


def _entry(run: ContrastiveResult) -> dict[str, Any]:
    descriptors, zero_shot = run.descriptors, run.zero_shot
    found, chance = descriptors.found(), descriptors.chance()
    return {
        "run": str(run.run),
        "step": run.step,
        "images": len(descriptors.images),
        "texts": len(descriptors.texts),
        "scale": run.scale,
        "p": run.p,
        "retrieval": {
            name: {
                f"recall@{k}": (
                    dataclasses.asdict(bootstrap(found[name][:, i]))
                    | {"chance": float(chance[name][i])}
                )
                for i, k in enumerate(KAPPAS)
            }
            for name in DIRECTIONS
        },
        "zero_shot": (
            None
            if zero_shot is None
            else {
                "source": zero_shot.source,
                "images": len(zero_shot.index),
                "classes": list(zero_shot.words),
                "templates": list(zero_shot.templates),
                "top1": dataclasses.asdict(proportion(zero_shot.top1)),
                "top5": dataclasses.asdict(proportion(zero_shot.top5)),
            }
        ),
    }


def show(report: dict[str, Any]) -> None:
    """Prints a table of recalls for each run, its zero-shot accuracies, and the paired tests.

    Args:
        report: The evaluation as `as_json` returns it.
    """
    console = make_console()
    for run in report["runs"]:
        title = (
            f"{run['run']}, step {run['step']}, {run['images']:,} images, {run['texts']:,} texts"
        )
        table = Table("", title=title, title_justify="left")
        table.add_column("recall [95 % interval]", justify="right")
        table.add_column("chance", justify="right")
        for direction, measures in run["retrieval"].items():
            for measure, found in measures.items():
                table.add_row(
                    f"{DIRECTIONS[direction]}, {measure}",
                    _interval(found),
                    f"{100 * found['chance']:.2f} %",
                )
        console.print(table)
        if zero := run["zero_shot"]:
            said = f"top-1 {_interval(zero['top1'])}   top-5 {_interval(zero['top5'])}"
            kinds = (
                f"{zero['images']:,} images, {len(zero['classes']):,} classes,"
                f" {len(zero['templates'])} template(s)"
            )
            console.print(f"zero-shot on {zero['source']}: {said}   ({kinds})")
        for line in say_exponents(run["p"]):
            console.print(line)
    for name, test in (report["paired"] or {}).items():
        difference = Interval(**test["difference"])
        console.print(
            f"{name}, first less second: {difference}; only the first is right on"
            f" {test['only_first']}, only the second on {test['only_second']}; McNemar's exact test"
            f" p = {test['p_value']:.3g}"
        )


def _interval(found: dict[str, float]) -> str:
    return str(Interval(found["value"], found["low"], found["high"]))


if __name__ == "__main__":
    main()
