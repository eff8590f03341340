"""The functions of SuperGlobal against vectors of the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggem_jax.pooling import gem_pool, regional_gem, relup, superglobal_pool

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden" / "superglobal"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")

    def cases(name):
        """The cases of a file, each as a dictionary without the case's prefix."""
        data = np.load(folder / f"{name}.npz")
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
