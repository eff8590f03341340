"""Times value and gradient of `ggem_pool` beside the plain formula.

    python -m benchmarks.bench_pooling

Three contestants take turns in one run: ours, the plain formula under jit and autodiff, and the
same formula in PyTorch where it is installed. Rows go to benchmarks/results/pooling.csv. A ratio
above 1 means that ours is faster.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import append, machine, median_and_spread, time_in_turns
from ggem_jax.pooling import ggem_pool

# batch, tokens, channels, groups: S/16 at 224 px, B/14 at 518 px
SHAPES = ((64, 196, 384, 6), (16, 1369, 768, 12))


def plain(tokens, p, eps=1e-6):
    """Returns the formula as papers print it: (mean_n max(x_n, eps)^p)^(1/p) by group, `(b, d)`."""
    b, n, d = tokens.shape
    x = jnp.maximum(tokens, eps).reshape(b, n, len(p), -1)
    return (jnp.mean(x ** p[:, None], axis=1) ** (1 / p[:, None])).reshape(b, d)


def in_jax(pool, tokens, p, cotangent):
    """Returns a call that computes the value and the gradients and waits for them."""
    step = jax.jit(
        jax.value_and_grad(lambda tokens, p: jnp.sum(pool(tokens, p) * cotangent), (0, 1))
    )
    return lambda: jax.block_until_ready(step(tokens, p))


def in_torch(torch, tokens, p, cotangent):
    """Returns a call that computes the gradients of the formula in PyTorch."""
    x, q, g = (torch.tensor(np.array(array)) for array in (tokens, p, cotangent))
    x.requires_grad_()
    q.requires_grad_()
    b, n, d = x.shape

    def call():
        x.grad = q.grad = None
        grouped = x.clamp(min=1e-6).view(b, n, len(q), -1)
        pooled = grouped.pow(q[:, None]).mean(1).pow(1 / q[:, None]).reshape(b, d)
        (pooled * g).sum().backward()
        return x.grad, q.grad

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    try:
        import torch
    except ImportError:
        torch = None
    versions = machine() | {"torch": "" if torch is None else torch.__version__}
    for b, n, d, groups in SHAPES:
        tokens = jax.random.normal(jax.random.key(0), (b, n, d))
        cotangent, p = jax.random.normal(jax.random.key(1), (b, d)), jnp.full(groups, 3.0)
        calls = {
            "ours": in_jax(ggem_pool, tokens, p, cotangent),
            "plain": in_jax(plain, tokens, p, cotangent),
        }
        if torch is not None:
            calls["torch"] = in_torch(torch, tokens, p, cotangent)
        check(calls)
        times = {
            name: median_and_spread(seconds)
            for name, seconds in time_in_turns(calls, rounds).items()
        }
        row = versions | {
            "batch": b,
            "tokens": n,
            "channels": d,
            "groups": groups,
            "dtype": "float32",
            "rounds": rounds,
        }
        for name in ("ours", "plain", "torch"):
            milliseconds, spread = times.get(name, (float("nan"), float("nan")))
            row |= {f"{name}_ms": f"{milliseconds:.2f}", f"{name}_spread": f"{spread:.2f}"}
        row |= {
            f"{name}_over_ours": f"{times[name][0] / times['ours'][0]:.2f}" if name in times else ""
            for name in ("plain", "torch")
        }
        append("pooling", row)


def check(calls) -> None:
    """Raises `AssertionError` unless the gradients of all contestants agree."""
    _, (by_tokens, by_p) = calls["ours"]()
    others = {"plain": calls["plain"]()[1]} | (
        {"torch": calls["torch"]()} if "torch" in calls else {}
    )
    for name, (tokens, p) in others.items():
        np.testing.assert_allclose(
            np.asarray(tokens), by_tokens, rtol=2e-4, atol=1e-6, err_msg=name
        )
        np.testing.assert_allclose(np.asarray(p), by_p, rtol=2e-3, atol=1e-4, err_msg=name)


if __name__ == "__main__":
    main()
