"""SuperGlobal from pixels to mean average precision against vectors of the authors' code, at their
README's tolerances.
"""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggem_jax.descriptors.backbones import Network
from ggem_jax.descriptors.extract import Extractor
from ggem_jax.descriptors.scales import SCALES, rescale
from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.descriptors.superglobal import pool_map, superglobal_descriptors
from ggem_jax.files.images import IMAGENET_MEAN, IMAGENET_STD, crop, normalise, read_image
from ggem_jax.models.resnet import ResNet, ResNetConfig, resnet_config
from ggem_jax.pooling import gem_pool, regional_gem, relup, scale_gem, superglobal_pool
from ggem_jax.retrieval import Ranking, search, superglobal_rerank
from ggem_jax.retrieval.metrics import Difficulty, Relevance, revisited, scores
from ggem_jax.retrieval.rerank import neighbourhood
from ggem_jax.weights.convert import Parameter
from ggem_jax.weights.cvnet import cvnet_table, cvnet_to_variables

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def folder(shared):
    folder = shared / "golden" / "superglobal"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="module")
def golden(folder):
    def cases(name):
        """The cases of a file, each as a dictionary without the case's prefix."""
        data = np.load(folder / f"{name}.npz")
        count = int(data["n"])
        assert count > 0
        return [
            {
                key.removeprefix(f"c{i}_"): data[key]
                for key in data.files
                if key.startswith(f"c{i}_")
            }
            for i in range(count)
        ]

    return cases


def channels_last(x):
    return np.moveaxis(x, -3, -1)


def assert_near_of_largest(got, want, tolerance, name=""):
    """Checks the largest error, relative to the largest entry."""
    assert got.shape == want.shape, name
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert error <= tolerance, f"{name}: {error:.2e} of the largest entry"


def test_relup(golden):
    for case in golden("relup"):
        np.testing.assert_array_equal(
            relup(jnp.asarray(case["x"]), alpha=float(case["alpha"])), case["y"]
        )


def test_regional_gem(golden):
    for case in golden("rgem"):
        got = regional_gem(channels_last(case["x"]), p=float(case["p"]), window=int(case["size"]))
        np.testing.assert_allclose(got, channels_last(case["y"]), rtol=2e-6)


def test_gem_plus(golden):
    for case in golden("gemp"):
        got = gem_pool(np.swapaxes(case["x"], 1, 2), float(case["p"]), eps=float(case["eps"]))
        # where eps to the power p underflows, theirs is 0 and ours eps
        np.testing.assert_allclose(got, case["y"], rtol=2e-6, atol=2e-8)


def test_superglobal_pool_is_both_in_a_row(golden):
    for case in golden("rgem"):
        local = channels_last(case["y"])
        want = gem_pool(local.reshape(len(local), -1, local.shape[-1]), 4.6, eps=1e-8)
        got = jax.jit(
            lambda x, case=case: superglobal_pool(
                x, regional_p=float(case["p"]), window=int(case["size"])
            )
        )(channels_last(case["x"]))
        np.testing.assert_allclose(got, want, rtol=2e-6)


def test_scale_gem(golden):
    """With an infinite p every entry is compared. With a finite p, where the minimum is subtracted
    and added again, errors are relative to the largest entry: there the authors' float32 itself is
    up to 2e-5 of an entry from float64.
    """
    for case in golden("sgem"):
        if int(case["infinity"]):
            np.testing.assert_allclose(scale_gem(case["x"]), case["y"], rtol=2e-6)
        else:
            assert_near_of_largest(scale_gem(case["x"], p=float(case["ps"])), case["y"], 2e-6)


@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
def test_rescale(golden, antialias):
    for case in golden("resize"):
        got = rescale(channels_last(case["x"]), float(case["scale_64"]), antialias=antialias)
        assert got.shape[1:3] == tuple(case["hw"])
        want = channels_last(case["antialias" if antialias else "plain"])
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 if antialias else 2e-6)


def test_preprocessing(golden):
    """Our images are RGB, theirs BGR."""
    for case in golden("preprocess"):
        rgb = case["bgr_u8"][..., ::-1]
        np.testing.assert_allclose(
            normalise(rgb)[..., ::-1], channels_last(case["db_chw"]), rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(
            normalise(crop(rgb, case["bbx_64"]))[..., ::-1],
            channels_last(case["query_chw"]),
            rtol=0,
            atol=1e-6,
        )
        decoded = read_image(case["jpeg"].tobytes()).astype(int)  # with another decoder
        assert decoded.shape == rgb.shape
        assert np.abs(decoded - rgb).max() <= 2


def weights_by_formula(table: dict[str, Parameter], seed: int) -> dict[str, np.ndarray]:
    """Parameters of the README's splitmix64 formula, under their published names."""
    return {
        name: value_by_formula(name, parameter.shape, seed) for name, parameter in table.items()
    }


def value_by_formula(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if name == "head.pool.p":
        return np.full(shape, 2.75, np.float32)
    start = np.uint64((seed << 32) | zlib.crc32(name.encode("ascii")))
    z = start + np.arange(1, np.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    u = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 2.0**53
    signed = 2 * u - 1
    match name.split(".")[-2:]:
        case ["fc", "weight"]:
            values = signed * np.sqrt(3 / shape[1])
        case ["fc", "bias"]:
            values = signed * 0.01
        case [norm, "weight"] if norm.endswith("bn"):
            values = 0.1 + 0.4 * u if norm == "c_bn" else 0.6 + 0.6 * u
        case [_, "weight"]:
            values = signed * np.sqrt(6 / np.prod(shape[1:]))
        case [_, "bias"]:
            values = signed * 0.1
        case [_, "running_mean"]:
            values = signed * 0.2
        case _:
            values = 0.6 + 0.8 * u
    return values.astype(np.float32).reshape(shape)


def pytest_generate_tests(metafunc):
    """One case for each network file; without any, `network` itself skips or fails."""
    if "network_name" in metafunc.fixturenames:
        from conftest import SHARED

        names = sorted(
            path.stem for path in (SHARED / "golden" / "superglobal").glob("model_*.npz")
        )
        metafunc.parametrize("network_name", names or ["model_*"], scope="module")


@pytest.fixture(scope="module")
def network(folder, network_name):
    """The file of a network, a network of the same depths with weights by formula, the images in
    RGB, and the published parameters.
    """
    data = np.load(folder / f"{network_name}.npz")
    model, variables, weights = network_by_formula(data)
    return data, model, variables, normalise(data["bgr_u8"][..., ::-1]), weights


def network_by_formula(data):
    depths = tuple(int(blocks) for blocks in data["stages"])
    weights = weights_by_formula(cvnet_table(depths), int(data["weight_seed"]))
    variables = jax.device_put(
        cvnet_to_variables(
            {f"encoder_q.{name}": value for name, value in weights.items()}, depths=depths
        )
    )
    return ResNet(ResNetConfig(depths)), variables, weights


def test_weights_and_images_of_a_network(network):
    data, model, _, images, weights = network
    named = {
        name.removeprefix("check/"): data[name] for name in data.files if name.startswith("check/")
    }
    assert named
    for name, first in named.items():
        np.testing.assert_array_equal(weights[name].ravel()[: len(first)], first)
    np.testing.assert_allclose(images[..., ::-1], channels_last(data["x"]), rtol=0, atol=1e-6)
    published = {resnet_config(str(depth)).depths: depth for depth in (50, 101)}
    depth = int(data["depth"])
    assert published.get(model.config.depths, depth) == depth


OFF = {
    "all": [],
    "no_gemp": ["gemp"],
    "no_rgem": ["rgem"],
    "no_sgem": ["sgem"],
    "no_relup": ["relup"],
    "none": ["gemp", "rgem", "sgem", "relup"],
}
DESCRIPTOR = re.compile(f"desc_({'|'.join(OFF)})_(aa|plain)(?:_nscale([0-9]+))?(_l2)?")


def test_descriptors_of_a_network(network):
    """Every `desc_` of the file, and every `fc_`: the output of the head at three scales."""
    data, model, variables, images, _ = network
    keys = [key for key in data.files if key.startswith("desc_")]
    compared = set()
    assert "desc_all_aa" in keys
    for key in keys:
        flags, resize, scales, unit = DESCRIPTOR.fullmatch(key).groups()
        options = {"scales": SCALES[int(scales or 3)], "antialias": resize == "aa"} | dict.fromkeys(
            OFF[flags], False
        )
        got = superglobal_descriptors(model, variables, images, **options)
        np.testing.assert_allclose(
            got.descriptor if unit else got.raw, data[key], rtol=0, atol=2e-6, err_msg=key
        )
        if flags == "all" and scales is None:
            found = {f"fc_{resize}_s{i}": value for i, value in enumerate(got.by_scale)}
            for name in found.keys() & set(data.files):
                assert_near_of_largest(found[name], data[name], 2e-5, name)
                compared.add(name)
    assert compared == {key for key in data.files if key.startswith("fc_")}
    assert compared


def test_maps_of_a_network(network):
    """Compares the intermediate maps in the file, each relative to its largest entry."""
    data, model, variables, images, _ = network
    compared = set()
    for i, scale in enumerate(SCALES[3]):
        shrunk = rescale(images, scale, antialias=True)
        maps = dict(
            zip(
                ("stem", "s1", "s2", "s3", "s4"),
                jax.jit(lambda v, x: model.apply(v, x, method="maps"))(variables, shrunk),
                strict=True,
            )
        )
        maps["rgem"] = regional_gem(maps["s4"])
        found = {f"pool_aa_s{i}": pool_map(model, variables, maps["s4"])}
        maps = {name: np.asarray(value) for name, value in maps.items()}
        for name, value in maps.items():
            key = f"{name}_aa_s{i}"
            found |= {
                f"{key}_chmean": np.mean(value, axis=(1, 2)),
                f"{key}_ch0to3": np.moveaxis(value[..., :4], -1, 1),
            }
            found[key] = np.moveaxis(value[..., :256], -1, 1)
        for key in found.keys() & set(data.files):
            assert_near_of_largest(found[key], data[key], 2e-5, key)
            compared.add(key)
    wanted = {
        key
        for key in data.files
        if re.fullmatch("(stem|s[1-4]|rgem|pool)_(aa|plain)_s[0-9].*", key)
    }
    assert wanted == compared
    assert wanted


@pytest.fixture(scope="module")
def files(folder):
    """All files whose names fit a pattern; none is a failure."""

    def load(pattern):
        paths = sorted(folder.glob(pattern))
        assert paths
        return [np.load(path) for path in paths]

    return load


def agreeing(ids, scores, expected_ids, expected_scores, min_gap):
    """Scores agree to 1e-6. So do the orders, except where the file has entries whose expected
    scores are closer than that.
    """
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6, rtol=0)
    if min_gap > 1e-6:
        np.testing.assert_array_equal(ids, expected_ids)
    for own, other, values in zip(ids, expected_ids, expected_scores, strict=True):
        value = dict(zip(other.tolist(), values.tolist(), strict=True))
        assert set(own.tolist()) == set(other.tolist())
        assert np.abs(np.array([value[i] for i in own.tolist()]) - values).max() <= 1e-6


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_search(files, kind):
    for data in [*files("rerank_*.npz"), *files("mini_benchmark*.npz")]:
        ids, similarities = data["initial_ranks"].T, data["sim"].T
        found = search(data["Q"], kind(data["X"]), k=len(data["X"]))
        agreeing(
            np.asarray(found.ids),
            found.scores,
            ids,
            np.take_along_axis(similarities, ids, 1),
            float(data["min_gap"]),
        )


def test_rerank(files):
    for data in [*files("rerank_*.npz"), *files("mini_benchmark*.npz")]:
        initial, final = data["initial_ranks"].T, data["final_ranks"].T
        similarities = np.take_along_axis(data["sim"].T, initial, 1)
        found = superglobal_rerank(
            data["Q"], jnp.asarray(data["X"]), Ranking(similarities, initial), **settings_of(data)
        )
        m = data["final_score_in_order1"].shape[1]
        expected = -np.sort(-data["final_score_in_order1"], axis=1)
        agreeing(
            np.asarray(found.ids[:, :m]),
            found.scores[:, :m],
            final[:, :m],
            expected,
            float(data["min_gap"]),
        )
        np.testing.assert_array_equal(found.ids[:, m:], final[:, m:])
        np.testing.assert_array_equal(found.scores[:, m:], similarities[:, m:])


def test_the_first_step_of_the_reranker(files):
    for data in files("rerank_*.npz"):
        for query, ids, refined, s1, order in zip(
            data["Q"], data["cand"], data["refined"], data["s1"], data["order1"], strict=True
        ):
            k = min(int(data["K"]), len(ids) - 1)
            neighbours, weights = neighbourhood(
                jnp.asarray(data["X"][ids]), num_neighbors=k, beta=float(data["beta"])
            )
            got = np.einsum("mk,mkd->md", weights, data["X"][ids][np.asarray(neighbours)])
            np.testing.assert_allclose(got[: len(refined)], refined, atol=1e-6, rtol=0)
            np.testing.assert_allclose(got @ query, s1, atol=1e-6, rtol=0)
            own = np.argsort(-(got @ query), kind="stable")
            agreeing(
                own[None],
                (got @ query)[own][None],
                order[None],
                s1[order][None],
                float(data["min_gap"]),
            )


def difficulties(data):
    return [
        Difficulty(
            *(
                data[f"{kind}_idx"][data[f"{kind}_ptr"][q] : data[f"{kind}_ptr"][q + 1]]
                for kind in ("easy", "hard", "junk")
            )
        )
        for q in range(len(data["easy_ptr"]) - 1)
    ]


def test_evaluation(files):
    for data in files("revisitop_*.npz"):
        queries, kappas = difficulties(data), data["kappas"].tolist()
        for key, ranks in (("", "ranks"), ("distr_", "ranks_distr")):
            found = {
                name[0].upper(): own
                for name, own in revisited(data[ranks].T, queries, kappas=kappas).items()
            }
            if not key:
                everything = [
                    Relevance(np.concatenate([query.easy, query.hard]), query.junk[:0])
                    for query in queries
                ]
                found["nojunk"] = scores(data[ranks].T, everything, kappas=kappas)
            for name, own in found.items():
                compare = {
                    "map": own.mean_average_precision,
                    "mpr": list(own.mean_precision_at.values()),
                }
                compare |= {} if key else {"ap": own.average_precision, "pr": own.precision_at}
                for measure, value in compare.items():
                    np.testing.assert_allclose(
                        value, data[f"{measure}_{key}{name}_64"], atol=1e-12, rtol=0
                    )


def settings_of(data):
    return {
        "num_candidates": int(data["M"]),
        "num_neighbors": int(data["K"]),
        "beta": float(data["beta"]),
    }


def assert_stored_scores(data, stage, ids):
    """Compares mean average precision and mean precision of the three set-ups with the file's, for
    the ranking before or after reranking.
    """
    for name, own in revisited(np.asarray(ids), difficulties(data)).items():
        key = f"{stage}_{name[0].upper()}_64"
        np.testing.assert_allclose(
            own.mean_average_precision, data[f"map_{key}"], atol=1e-12, rtol=0
        )
        np.testing.assert_allclose(
            list(own.mean_precision_at.values()), data[f"mpr_{key}"], atol=1e-12, rtol=0
        )


def test_the_mini_benchmark_from_its_vectors(files):
    for data in files("mini_benchmark*.npz"):
        queries, database = data["Q"], jnp.asarray(data["X"])
        initial = search(queries, database, k=len(database))
        assert_stored_scores(data, "initial", initial.ids)
        assert_stored_scores(
            data, "final", superglobal_rerank(queries, database, initial, **settings_of(data)).ids
        )


def test_the_mini_benchmark_from_its_images(files):
    """Crop, network, search, reranking and evaluation, each on the output of the one before."""
    for data in files("mini_benchmark*.npz"):
        model, variables, _ = network_by_formula(data)
        settings = DescriptorSettings(
            "resnet50", weights="by formula", antialias=True, sizes="exact", longest_side=0
        )
        extractor = Extractor(
            settings,
            batch=1,
            network=Network(model, variables, IMAGENET_MEAN, IMAGENET_STD, stride=32),
        )
        names = {
            kind: [f"{kind}_{i:02}" for i in range(int(data[f"n_{kind}"]))]
            for kind in ("query", "db")
        }
        rgb = {name: data[f"{name}_bgr_u8"][..., ::-1] for kind in names.values() for name in kind}
        queries = np.stack(
            [extractor.describe(rgb[name], data[f"{name}_bbx_64"]) for name in names["query"]]
        )
        database = np.stack(list(extractor(rgb[name] for name in names["db"])))
        np.testing.assert_allclose(queries, data["Q"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(database, data["X"], rtol=0, atol=2e-6)

        initial = search(queries, database, k=len(database))
        final = superglobal_rerank(queries, database, initial, **settings_of(data))
        ids, similarities, m = (
            data["initial_ranks"].T,
            data["sim"].T,
            data["final_score_in_order1"].shape[1],
        )
        agreeing(
            np.asarray(initial.ids),
            initial.scores,
            ids,
            np.take_along_axis(similarities, ids, 1),
            float(data["min_gap"]),
        )
        expected = -np.sort(-data["final_score_in_order1"], axis=1)
        agreeing(
            np.asarray(final.ids[:, :m]),
            final.scores[:, :m],
            data["final_ranks"].T[:, :m],
            expected,
            float(data["min_gap"]),
        )
        if float(data["min_gap"]) > 1e-6:
            assert_stored_scores(data, "initial", initial.ids)
            assert_stored_scores(data, "final", final.ids)
