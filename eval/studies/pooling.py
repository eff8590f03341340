"""Compares poolings: which is better, and is it for the reasons given?

    python -m eval.studies.pooling --data DIR

Four parts, each a design of its own:

- planted: tokens with evidence of a known kind (`eval.studies.planted`): does one exponent per
  group find what its channels need?
- imagenette: frozen tokens of EfficientNet-Lite0 on 2,000 photographs of 10 classes; a pooling and
  a linear head are trained (`eval.studies.frozen`). These tokens are not negative, and the network
  has no heads.
- cifar10-frozen: the same on the tokens of a ViT that was trained from scratch with its class
  token, and so for no pooling of patches.
- cifar10: small ViTs trained from scratch with each pooling, end to end (`eval.studies.cifar`).

Differences are taken on the same test images and the same seeds. Their intervals cover both: seeds
and images are resampled with replacement (Owen, "The pigeonhole bootstrap", 2007, arXiv:0712.1111),
and never less than Student's t over seeds. A claim is "supported" where the whole 95 % interval
lies on its side of 0, "not supported" where it lies on the other side, and "undecided" otherwise.
Were there no difference anywhere, about one claim in twenty would still be decided. Dependence is
judged where seeds are trainings of their own, and as the excess of neighbouring blocks over random
ones. What frozen tokens show of dependence and amplification is reported without a verdict, because
a few exponents on one network decide it.

Writes `docs/pooling_study.md`, its charts, and `benchmarks/results/pooling_study.json`. Networks
and finished parts are kept, so that an interrupted study resumes.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from eval.statistics import mean, pigeonhole_bootstrap
from eval.studies import cifar, diagnostics, planted
from eval.studies.frozen import (
    Arm,
    Pool,
    Probe,
    Probed,
    Tokens,
    arms_of,
    freeze,
    pool_test_images,
    probe,
)
from eval.studies.pooling_report import write_report
from eval.studies.retrieval import describe_machine, find_data
from ggem_jax import pooling
from ggem_jax.descriptors.backbones import load_network
from ggem_jax.descriptors.settings import digest
from ggem_jax.files.atomic import write_text
from ggem_jax.pooling import l2_normalize
from train.cli import Refused, one_sentence, parse
from train.metric import score_descriptors
from train.prepare import read_packed

ROOT = Path(__file__).parent.parent.parent
PARTS = ("planted", "imagenette", "cifar10-frozen", "cifar10")
# Channels that are kept of the 1,280 of EfficientNet-Lite0's last map, drawn with a fixed seed. Two
# cores train so many in minutes.
CHANNELS = 192
ASSUMED_HEADS = 8  # groups of a network without heads
EVIDENCE = 1000  # test images that dependence is measured on


@dataclass(frozen=True)
class PoolingStudy:
    """Which pooling is better, and is it for the reasons given?"""

    # folder with imagenette-224-mini and cifar10-jpeg; None: $GGEM_SHARED/data
    data: Path | None = None
    parts: tuple[str, ...] = PARTS  # which of the four to run
    seeds: int = 10  # number of seeds on frozen tokens and of planted
    trainings: int = 3  # seeds of the networks trained end to end
    pictures: int = 10_000  # images of CIFAR-10 that these networks are trained on
    epochs: float = 5.0  # epochs of each of these trainings
    probe_epochs: int = 10  # epochs of each head on frozen tokens
    # file of the network that the part imagenette uses; None: EfficientNet-Lite0
    weights: Path | None = None
    runs: Path = Path("runs/pooling_study")  # networks and intermediate results
    out: Path = ROOT / "docs" / "pooling_study.md"  # the page
    # all numbers
    results: Path = ROOT / "benchmarks" / "results" / "pooling_study.json"
    # results of eval.studies.metric, for the claims on retrieval
    retrieval: Path = ROOT / "benchmarks" / "results" / "metric_study.csv"


def main(argv: list[str] | None = None) -> None:
    """Runs the study."""
    with one_sentence("eval.studies.pooling"):
        study = parse(PoolingStudy, argv, "eval.studies.pooling", default=PoolingStudy())
        check_study(study)
        found = {part: load_or_run(part, study) for part in study.parts}
        write_text(
            study.results,
            json.dumps(
                {"machine": describe_machine(), "study": study_settings(study), "parts": found},
                indent=1,
            )
            + "\n",
        )
        print(
            write_report(
                study.out, found, study_settings(study), describe_machine(), study.retrieval
            )
        )


def check_study(study: PoolingStudy) -> None:
    """Raises `Refused` for settings that no study can be made of.

    Args:
        study: Settings of the study.

    Raises:
        Refused: A part is unknown, a number is too small, or a result cannot be written where it
            should go.
    """
    unknown = [part for part in study.parts if part not in PARTS]
    if unknown or not study.parts:
        raise Refused(
            f"--parts must be among {', '.join(PARTS)}, not {', '.join(unknown) or 'none'}"
        )
    for name, least in (("seeds", 2), ("trainings", 2), ("pictures", 100), ("probe_epochs", 1)):
        if getattr(study, name) < least:
            flag = name.replace("_", "-")
            raise Refused(f"--{flag} must be at least {least}, it is {getattr(study, name)}")
    if not study.epochs > 0:
        raise Refused(f"--epochs must be positive, it is {study.epochs}")
    for path in (study.out, study.results):
        if not path.parent.is_dir():
            raise Refused(f"there is no folder {path.parent} to write {path.name} to")
        if not path.suffix:
            raise Refused(
                f"{path} needs an ending, such as .md: its images go to a folder of that name"
                " without it"
            )


def study_settings(study: PoolingStudy) -> dict[str, Any]:
    """Returns the settings that the results depend on, by name.

    Args:
        study: Settings of the study.
    """
    return {
        name: getattr(study, name)
        for name in ("seeds", "trainings", "pictures", "epochs", "probe_epochs")
    }


def load_or_run(part: str, study: PoolingStudy) -> dict[str, Any]:
    """Returns the results of a part: stored ones with the same settings, otherwise new ones.

    Args:
        part: Name of the part, one of `PARTS`.
        study: Settings of the study; new results are stored in its folder `runs`.

    Returns:
        "arms", "differences" and "machine", and what else the part measures, as JSON values.

    Raises:
        Refused: The data or the weights are missing, or a training is refused.
    """
    path = study.runs / f"{part}.json"
    made_by = {
        **study_settings(study),
        "data": str(study.data),
        "flags": cifar.FLAGS,
        "channels": CHANNELS,
        "probe": dataclasses.asdict(Probe()),
        **({} if study.weights is None else {"weights": digest(study.weights)}),
    }
    try:
        before = json.loads(path.read_text())
        if before["made_by"] == made_by:
            return before["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or incomplete: the part runs again
    match part:
        case "planted":
            found = run_planted(study)
        case "imagenette":
            found = run_frozen(compute_imagenette(find_data(study.data), study.weights), study)
        case "cifar10-frozen":
            found = run_frozen(compute_own_tokens(study), study)
        case _:
            found = run_trained(study)
    found |= {"machine": describe_machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"made_by": made_by, "found": found}))
    return found


def run_planted(study: PoolingStudy) -> dict[str, Any]:
    """Returns the results of the part planted, where the answer is known.

    Args:
        study: Settings of the study.

    Returns:
        "arms" with accuracies and exponents, and "differences" with intervals over seeds.
    """
    results = planted.run(planted.Planted(seeds=study.seeds))
    ggem = results["GGeM"].accuracy  # each seed has its own images: over seeds alone
    less = {
        name: mean(ggem - result.accuracy) for name, result in results.items() if name != "GGeM"
    }
    return {
        "arms": {name: summarise_arm(result.correct, result.p) for name, result in results.items()},
        "differences": {
            f"GGeM less {name}": dataclasses.asdict(interval) for name, interval in less.items()
        },
    }


def run_frozen(tokens: Tokens, study: PoolingStudy) -> dict[str, Any]:
    """Returns the results of every arm of `arms_of` on the same frozen tokens.

    Args:
        tokens: The data set.
        study: Settings of the study.

    Returns:
        "arms", "differences", "dependence", "amplification" and "retrieval", and the sizes of the
        data, as JSON values.
    """
    how = Probe(seeds=study.seeds, epochs=study.probe_epochs)
    arms, results = arms_of(tokens), {}
    for name, arm in arms.items():
        began = time.perf_counter()
        results[name] = probe(tokens, arm, how)
        said = (
            f"{tokens.name}, {name}: top-1 {results[name].accuracy.mean():.2%}"
            f" ({time.perf_counter() - began:.0f} s)"
        )
        print(said, file=sys.stderr, flush=True)
    ggem = results["GGeM"].correct
    differences = {
        f"GGeM less {name}": compare(ggem, result.correct)
        for name, result in results.items()
        if name != "GGeM"
    }
    random = [
        result.correct for name, result in results.items() if name.startswith("GGeM, random groups")
    ]
    differences["GGeM less GGeM, random groups"] = compare(
        ggem, np.mean(random, axis=0)
    )  # all three draws
    return {
        "tokens": list(tokens.test.shape[1:]),
        "pictures": [len(tokens.train), len(tokens.test)],
        "heads": tokens.heads,
        "arms": {name: summarise_arm(result.correct, result.p) for name, result in results.items()},
        "differences": differences,
        "dependence": measure_pooled_dependence(tokens, arms, results),
        "amplification": measure_amplification(tokens, arms, results),
        "retrieval": sweep_retrieval(tokens),
    }


def measure_pooled_dependence(
    tokens: Tokens, arms: dict[str, Arm], results: dict[str, Probed]
) -> dict[str, Any]:
    """Returns scores of dependence between the blocks of the pooled vector.

    The blocks are of neighbouring channels, as many as heads; random blocks are the null.

    Args:
        tokens: The data set; its first `EVIDENCE` test images are used.
        arms: The poolings, by name.
        results: Their results, by name.

    Returns:
        Arm -> "blocks" or "random" -> score -> a value for each seed, at most three.
    """
    names = ("average", "positive average", "GeM", "GGeM")
    blocks = {
        "blocks": diagnostics.contiguous(tokens.channels, tokens.heads),
        "random": diagnostics.random_blocks(tokens.channels, tokens.heads, 0),
    }
    few = dataclasses.replace(
        tokens, test=tokens.test[:EVIDENCE], test_labels=tokens.test_labels[:EVIDENCE]
    )
    values = {}
    for name in names:
        params = results[name].params if arms[name].start else results[name].params[:1]
        # three seeds are enough: the scores hardly differ
        pooled = [pool_test_images(few, arms[name], own) for own in params[:3]]
        values[name] = measure_dependence(pooled, blocks)
    return values


def measure_dependence(
    descriptors: list[np.ndarray], blocks: dict[str, np.ndarray]
) -> dict[str, dict[str, list[float]]]:
    """Returns kind of blocks -> score -> its mean over pairs of blocks, for each array.

    Args:
        descriptors: Arrays `(n, d)`, such as one for each seed.
        blocks: Blocks `(groups, d / groups)` by kind.
    """
    return {
        kind: {
            score: [
                float(diagnostics.block_dependence(x, own, function).mean()) for x in descriptors
            ]
            for score, function in diagnostics.DEPENDENCE.items()
        }
        for kind, own in blocks.items()
    }


def measure_amplification(
    tokens: Tokens, arms: dict[str, Arm], results: dict[str, Probed]
) -> dict[str, Any]:
    """Returns whether channels that separate the classes are amplified more than others.

    It is the rank correlation of amplification and Fisher score over the channels. That every
    channel is larger than under the average of positive values follows from the inequality of power
    means, so that alone is no evidence.

    Args:
        tokens: The data set, of which the test images are used.
        arms: The poolings, by name.
        results: Their results, by name.

    Returns:
        "rank_correlation" and "gini" of "GeM" and of "GGeM", a list over seeds each, and
        "gini_of_reference".
    """
    reference = pool_test_images(tokens, arms["positive average"], {})
    usefulness = diagnostics.fisher_scores(reference, tokens.test_labels)
    found: dict[str, Any] = {}
    for name in ("GeM", "GGeM"):
        pooled = [pool_test_images(tokens, arms[name], params) for params in results[name].params]
        ratios = [diagnostics.amplification(x, reference) for x in pooled]
        found[name] = {
            "rank_correlation": [
                diagnostics.rank_correlation(ratio, usefulness) for ratio in ratios
            ],
            "gini": [diagnostics.gini((x**2).mean(axis=0)) for x in pooled],
        }
    found["gini_of_reference"] = diagnostics.gini((reference**2).mean(axis=0))
    return found


def sweep_retrieval(tokens: Tokens) -> dict[str, Any]:
    """Returns recall@1 and mAP@R among the test images for fixed poolings, without any training.

    Args:
        tokens: The data set, of which the first 2,000 test images are used.

    Returns:
        Pooling -> "recall@1" and "map@r", from 0 to 1.
    """
    pools: dict[str, Any] = {"average": pooling.avg_pool, "max": pooling.max_pool}
    pools |= {f"GeM, p = {p:g}": lambda x, p=p: pooling.gem_pool(x, p) for p in (1, 2, 3, 4, 6, 10)}
    found = {}
    count = min(len(tokens.test), 2000)
    for name, pool in pools.items():
        x = pool_test_images(
            dataclasses.replace(tokens, test=tokens.test[:count]),
            Arm(_without_parameters(pool)),
            {},
        )
        means = score_descriptors(
            np.asarray(l2_normalize(jnp.asarray(x))), tokens.test_labels[:count]
        ).means()
        found[name] = {"recall@1": means["recall@1"], "map@r": means["map@r"]}
    return found


def _without_parameters(pool: Callable[[Array], Array]) -> Pool:
    return lambda _, tokens: pool(tokens)


def run_trained(study: PoolingStudy) -> dict[str, Any]:
    """Returns the results of networks trained end to end on CIFAR-10.

    Args:
        study: Settings of the study.

    Returns:
        "arms", "differences" and "dependence", as JSON values.

    Raises:
        Refused: The data are missing, or a training is refused.
    """
    data = cifar.read_cifar10(find_data(study.data) / "cifar10-jpeg", study.pictures)
    correct: dict[str, list[np.ndarray]] = {arm: [] for arm in cifar.ARMS}
    exponents: dict[str, list[np.ndarray]] = {arm: [] for arm in cifar.ARMS}
    scores: dict[str, list[dict[str, Any]]] = {arm: [] for arm in cifar.ARMS}
    for seed in range(study.trainings):
        for arm in cifar.ARMS:
            network = cifar.train_network(arm, seed, data, study.runs / "cifar10", study.epochs)
            correct[arm].append(network.predictions.top(1))
            exponents[arm].append(network.p)
            scores[arm].append(measure_head_dependence(network, data))
            print(
                f"cifar10, {arm}, seed {seed}: top-1 {correct[arm][-1].mean():.2%}",
                file=sys.stderr,
                flush=True,
            )
    arrays = {arm: np.array(values) for arm, values in correct.items()}
    differences = {
        f"GGeM less {arm}": compare(arrays["GGeM"], values)
        for arm, values in arrays.items()
        if arm != "GGeM"
    }
    return {
        "arms": {
            arm: summarise_arm(values, np.array(exponents[arm])) for arm, values in arrays.items()
        },
        "differences": differences,
        "dependence": {arm: merge_seeds(values) for arm, values in scores.items()},
    }


def measure_head_dependence(network: cifar.Network, data: Any) -> dict[str, Any]:
    """Returns scores of dependence between heads, and between blocks of the descriptor.

    The heads are those of the last attention, before its output projection mixes them. The blocks
    of the descriptor are neighbouring channels, as many as heads. Random blocks are the null of
    both.

    Args:
        network: A trained network.
        data: Training and test images; the first `EVIDENCE` test images are used.

    Returns:
        Kind of blocks -> score -> a list of one value.
    """
    heads, descriptor = cifar.describe_heads(network, data[1].take(np.arange(EVIDENCE)))
    d, count = descriptor.shape[1], network.config.model.heads
    named, drawn = diagnostics.contiguous(d, count), diagnostics.random_blocks(d, count, 0)
    of_heads = measure_dependence([heads], {"heads": named, "random channels of heads": drawn})
    return of_heads | measure_dependence([descriptor], {"blocks": named, "random": drawn})


def merge_seeds(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns kind of blocks -> score -> one list over seeds.

    Args:
        values: Results of `measure_head_dependence`, one for each seed.
    """
    return {
        kind: {score: [own[kind][score][0] for own in values] for score in values[0][kind]}
        for kind in values[0]
    }


def compute_imagenette(data: Path, weights: Path | None = None) -> Tokens:
    """Returns the tokens of a frozen network on Imagenette.

    Args:
        data: Folder of the packed sets.
        weights: File of a network with tokens or a feature map. None takes EfficientNet-Lite0,
            whose last map has 7 x 7 places. Of a network without heads, `CHANNELS` channels are
            kept.

    Raises:
        Refused: The data or the weights cannot be read.
    """
    _, splits = read_packed(data / "imagenette-224-mini")
    try:
        network = load_network(weights=weights)
    except (ValueError, ModuleNotFoundError) as error:
        raise Refused(str(error)) from None
    channels = None
    if network.heads is None:
        width = network.describe_tokens(jnp.zeros((1, 224, 224, 3)))[0].shape[-1]
        channels = np.sort(np.random.default_rng(0).permutation(width)[:CHANNELS])
    found: dict[str, Any] = {}
    test = next(name for name in ("val", "test") if name in splits)
    for name, split in (("train", "train"), ("test", test)):
        images = [load() for load, _ in splits[split]]
        tokens, cls = freeze(network, images, channels=channels)
        labels = np.array([label for _, label in splits[split]])
        found |= {name: tokens, f"{name}_labels": labels}
        found |= {} if cls is None else {f"{name}_cls": cls}
    return Tokens("imagenette", heads=network.heads or ASSUMED_HEADS, **found)


def compute_own_tokens(study: PoolingStudy) -> Tokens:
    """Returns the patch tokens of the ViT of CIFAR-10 with a class token and seed 0.

    The network is trained first, unless its run is complete.

    Args:
        study: Settings of the study.

    Raises:
        Refused: The data are missing, or the training is refused.
    """
    data = cifar.read_cifar10(find_data(study.data) / "cifar10-jpeg", study.pictures)
    network = cifar.train_network("class token", 0, data, study.runs / "cifar10", study.epochs)
    arrays: dict[str, np.ndarray] = {}
    for split, images in zip(("train", "test"), data, strict=True):
        few = images.take(np.arange(min(len(images), 4000)))  # their order mixes the classes
        tokens = cifar.compute_tokens(network, few)
        arrays |= {
            split: tokens[:, 1:],
            f"{split}_cls": tokens[:, 0],
            f"{split}_labels": few.labels(),
        }
    return Tokens("cifar10-frozen", heads=network.config.model.heads, **arrays)


def summarise_arm(correct: np.ndarray, p: np.ndarray) -> dict[str, Any]:
    """Returns the accuracy with its interval over seeds, that of every seed, and the exponents.

    Args:
        correct: Right and wrong answers `(seeds, images)`.
        p: Learned exponents `(seeds, exponents)`.
    """
    accuracy = correct.mean(axis=1)
    return {
        "accuracy": dataclasses.asdict(mean(accuracy)),
        "by_seed": accuracy.tolist(),
        "p": np.asarray(p).tolist(),
    }


def compare(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Returns the accuracy of one arm less that of another, with its interval.

    Args:
        first: Answers `(seeds, images)` of one arm, as 0 and 1, or means of several.
        second: Answers `(seeds, images)` of the other arm, with the same seeds and images.
    """
    return dataclasses.asdict(pigeonhole_bootstrap(first.astype(float) - second))


if __name__ == "__main__":
    main()
