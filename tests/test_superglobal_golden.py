"""SuperGlobal against what the authors' code gave: poolings, search, reranking, evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggem_jax.pooling import gem_pool, regional_gem, relup, superglobal_pool
from ggem_jax.retrieval import Ranking, search, superglobal_rerank
from ggem_jax.retrieval.metrics import Difficulty, Relevance, revisited, scores
from ggem_jax.retrieval.rerank import neighbourhood

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden_folder(shared):
    folder = shared / "golden" / "superglobal"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="module")
def golden(golden_folder):

    def cases(name):
        """The cases of a file, each as a dictionary without the case's prefix."""
        data = np.load(golden_folder / f"{name}.npz")
        count = int(data["n"])
        assert count > 0
        return [{key.removeprefix(f"c{i}_"): data[key] for key in data.files if key.startswith(f"c{i}_")} for i in range(count)]

    return cases


def channels_last(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def test_relup(golden):
    for case in golden("relup"):
        np.testing.assert_array_equal(relup(jnp.asarray(case["x"]), alpha=float(case["alpha"])), case["y"])


def test_regional_gem(golden):
    for case in golden("rgem"):
        got = regional_gem(channels_last(case["x"]), p=float(case["p"]), window=int(case["size"]))
        np.testing.assert_allclose(jnp.moveaxis(got, -1, 1), case["y"], rtol=5e-6, atol=1e-6 * np.abs(case["y"]).max())


def test_gem_plus(golden):
    for case in golden("gemp"):
        got = gem_pool(jnp.swapaxes(jnp.asarray(case["x"]), 1, 2), float(case["p"]), eps=float(case["eps"]))
        normal = case["y"] > 2 * case["eps"]  # below, the authors' float32 powers of eps are rounded
        np.testing.assert_allclose(np.where(normal, got, 0), np.where(normal, case["y"], 0), rtol=5e-6)
        np.testing.assert_allclose(np.where(normal, 0, got), np.where(normal, 0, case["y"]), rtol=0.2, atol=float(case["eps"]))


def test_superglobal_pool_is_both_in_a_row(golden):
    for case in golden("rgem"):
        x = channels_last(case["x"])
        local = jnp.moveaxis(jnp.asarray(case["y"]), 1, -1)
        want = gem_pool(local.reshape(len(local), -1, local.shape[-1]), 4.6, eps=1e-8)
        got = jax.jit(lambda x, case=case: superglobal_pool(x, regional_p=float(case["p"]), window=int(case["size"])))(x)
        np.testing.assert_allclose(got, want, rtol=5e-6, atol=1e-7)


@pytest.fixture(scope="module")
def files(golden_folder):
    """All files whose names fit a pattern; none is a failure."""

    def load(pattern):
        paths = sorted(golden_folder.glob(pattern))
        assert paths
        return [np.load(path) for path in paths]

    return load


def agreeing(ids, scores, expected_ids, expected_scores, min_gap):
    """Scores agree to 1e-6. So do the orders, but for entries whose expected scores are closer than that where the file has such."""
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
        agreeing(np.asarray(found.ids), found.scores, ids, np.take_along_axis(similarities, ids, 1), float(data["min_gap"]))


def test_rerank(files):
    for data in [*files("rerank_*.npz"), *files("mini_benchmark*.npz")]:
        initial, final = data["initial_ranks"].T, data["final_ranks"].T
        similarities = np.take_along_axis(data["sim"].T, initial, 1)
        settings = {"num_candidates": int(data["M"]), "num_neighbors": int(data["K"]), "beta": float(data["beta"])}
        found = superglobal_rerank(data["Q"], jnp.asarray(data["X"]), Ranking(similarities, initial), **settings)
        m = data["final_score_in_order1"].shape[1]
        expected = -np.sort(-data["final_score_in_order1"], axis=1)
        agreeing(np.asarray(found.ids[:, :m]), found.scores[:, :m], final[:, :m], expected, float(data["min_gap"]))
        np.testing.assert_array_equal(found.ids[:, m:], final[:, m:])
        np.testing.assert_array_equal(found.scores[:, m:], similarities[:, m:])


def test_the_first_step_of_the_reranker(files):
    for data in files("rerank_*.npz"):
        for query, ids, refined, s1, order in zip(data["Q"], data["cand"], data["refined"], data["s1"], data["order1"], strict=True):
            k = min(int(data["K"]), len(ids) - 1)
            neighbours, weights = neighbourhood(jnp.asarray(data["X"][ids]), num_neighbors=k, beta=float(data["beta"]))
            got = np.einsum("mk,mkd->md", weights, data["X"][ids][np.asarray(neighbours)])
            np.testing.assert_allclose(got[: len(refined)], refined, atol=1e-6, rtol=0)
            np.testing.assert_allclose(got @ query, s1, atol=1e-6, rtol=0)
            own = np.argsort(-(got @ query), kind="stable")
            agreeing(own[None], (got @ query)[own][None], order[None], s1[order][None], float(data["min_gap"]))


def difficulties(data):
    return [
        Difficulty(*(data[f"{kind}_idx"][data[f"{kind}_ptr"][q] : data[f"{kind}_ptr"][q + 1]] for kind in ("easy", "hard", "junk")))
        for q in range(len(data["easy_ptr"]) - 1)
    ]


def test_evaluation(files):
    for data in files("revisitop_*.npz"):
        queries, kappas = difficulties(data), data["kappas"].tolist()
        for key, ranks in (("", "ranks"), ("distr_", "ranks_distr")):
            found = {name[0].upper(): own for name, own in revisited(data[ranks].T, queries, kappas=kappas).items()}
            if not key:
                everything = [Relevance(np.concatenate([query.easy, query.hard]), query.junk[:0]) for query in queries]
                found["nojunk"] = scores(data[ranks].T, everything, kappas=kappas)
            for name, own in found.items():
                compare = {"map": own.mean_average_precision, "mpr": list(own.mean_precision_at.values())}
                compare |= {} if key else {"ap": own.average_precision, "pr": own.precision_at}
                for measure, value in compare.items():
                    np.testing.assert_allclose(value, data[f"{measure}_{key}{name}_64"], atol=1e-12, rtol=0)


def test_the_mini_benchmark_from_its_vectors(files):
    for data in files("mini_benchmark*.npz"):
        queries, database = data["Q"], jnp.asarray(data["X"])
        initial = search(queries, database, k=len(database))
        settings = {"num_candidates": int(data["M"]), "num_neighbors": int(data["K"]), "beta": float(data["beta"])}
        final = superglobal_rerank(queries, database, initial, **settings)
        for stage, ranking in (("initial", initial), ("final", final)):
            for name, own in revisited(np.asarray(ranking.ids), difficulties(data)).items():
                key = f"{stage}_{name[0].upper()}_64"
                np.testing.assert_allclose(own.mean_average_precision, data[f"map_{key}"], atol=1e-12)
                np.testing.assert_allclose(list(own.mean_precision_at.values()), data[f"mpr_{key}"], atol=1e-12)
