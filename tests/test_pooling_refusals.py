"""ggem_jax/pooling/tokens.py: what is refused, in one sentence each."""

import jax.numpy as jnp
import numpy as np
import pytest

from ggem_jax.pooling import avg_pool, cls_pool, gem_pool, ggem_pool, lse_pool, max_pool

TOKENS = np.zeros((2, 9, 12), np.float32)
REFUSED = {
    "integer tokens": (
        TypeError,
        "floating point, not int32",
        lambda: gem_pool(np.zeros((2, 9, 12), np.int32), 3.0),
    ),
    "bool tokens": (
        TypeError,
        "floating point, not bool",
        lambda: avg_pool(np.zeros((2, 9), bool)),
    ),
    "one axis": (ValueError, r"\(\.\.\., n, d\)", lambda: max_pool(np.zeros(9, np.float32))),
    "no token": (
        ValueError,
        "at least one token",
        lambda: cls_pool(np.zeros((2, 0, 12), np.float32)),
    ),
    "no channel": (ValueError, "one channel", lambda: avg_pool(np.zeros((2, 3, 0), np.float32))),
    "groups": (
        ValueError,
        "groups dividing the 12 channels",
        lambda: ggem_pool(TOKENS, np.ones(5)),
    ),
    "no groups": (ValueError, "groups dividing", lambda: ggem_pool(TOKENS, np.ones(0))),
    "scalar p of ggem": (ValueError, r"p must be \(groups,\)", lambda: ggem_pool(TOKENS, 3.0)),
    "p of gem": (ValueError, r"scalar or \(12,\)", lambda: gem_pool(TOKENS, np.ones(3))),
    "r of lse": (
        ValueError,
        r"r must be a scalar or \(12,\)",
        lambda: lse_pool(TOKENS, np.ones(3)),
    ),
    "p zero": (ValueError, "p must be positive", lambda: gem_pool(TOKENS, 0.0)),
    "p negative": (ValueError, "p must be positive", lambda: ggem_pool(TOKENS, [3.0, -1.0])),
    "p nan": (ValueError, "p must be positive", lambda: gem_pool(TOKENS, np.nan)),
    "layout": (
        ValueError,
        "layout must be one of contiguous, interleaved, not 'rows'",
        lambda: ggem_pool(TOKENS, np.ones(3), layout="rows"),
    ),
    "sign rule": (
        ValueError,
        "negatives must be one of clamp, abs, shift, signed",
        lambda: gem_pool(TOKENS, 3.0, negatives="relu"),
    ),
    "p infinite": (ValueError, "p must be positive and finite", lambda: gem_pool(TOKENS, np.inf)),
    "p text": (ValueError, "p must be a number", lambda: gem_pool(TOKENS, "3")),
    "p complex": (ValueError, "p must be real", lambda: gem_pool(TOKENS, 3 + 0j)),
    "eps": (ValueError, "eps must be", lambda: gem_pool(TOKENS, 3.0, eps=0.0)),
    "eps none": (
        ValueError,
        "eps must be a Python number",
        lambda: gem_pool(TOKENS, 3.0, eps=None),
    ),
    "eps infinite": (ValueError, "eps must be", lambda: gem_pool(TOKENS, 3.0, eps=1e300)),
    "mask of one truth": (
        ValueError,
        r"mask must be bool of shape \(2, 9\)",
        lambda: avg_pool(TOKENS, mask=True),
    ),
    "mask shape": (
        ValueError,
        r"mask must be bool of shape \(2, 9\)",
        lambda: avg_pool(TOKENS, mask=np.ones((2, 8), bool)),
    ),
    "mask dtype": (
        ValueError,
        "mask must be bool",
        lambda: gem_pool(TOKENS, 3.0, mask=np.ones((2, 9), np.float32)),
    ),
    "implementation": (
        ValueError,
        "implementation must be None or one of xla, triton",
        lambda: gem_pool(TOKENS, 3.0, implementation="cuda"),
    ),
    "triton": (
        NotImplementedError,
        "pass implementation=None",
        lambda: ggem_pool(TOKENS, np.ones(3), implementation="triton"),
    ),
}


@pytest.mark.parametrize(("error", "sentence", "call"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_refused_in_one_sentence(error, sentence, call):
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("skip", [-1, 9, 1.0])
def test_a_wrong_number_of_skipped_tokens_is_refused(skip):
    with pytest.raises(ValueError, match="skip must be a whole number from 0 to 8, for 9 tokens"):
        ggem_pool(jnp.ones((2, 9, 8)), jnp.ones(2), skip=skip)
