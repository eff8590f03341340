"""How a power mean, which needs positive numbers, handles other tokens: one record for each rule.

With m the minimum over the kept tokens of a channel, and all means over the kept tokens:

- "clamp": (mean_n max(x_n, eps)^p)^(1/p). Negative values become eps, as in a ReLU. The usual rule.
- "abs": (mean_n max(|x_n|, eps)^p)^(1/p).
- "shift": (mean_n (x_n - m + eps)^p)^(1/p) + m - eps.
- "signed": sign(s) |s|^(1/p) with s = mean_n sign(x_n) |x_n|^p. Where s is zero (within 1e-30 of
  the largest |x_n|^p), so is the gradient.

A new rule is an entry of `Negatives` and of `RULES` here. It runs as plain JAX everywhere; with
`in_kernel=True` the GPU kernels must know it, too (`kernels/powers.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ggem_jax.pooling.masks import Mask, keep, where_any

Negatives = Literal["clamp", "abs", "shift", "signed"]

LEAST_EPS = 1e-36  # the smallest eps that `check_rule` accepts


@dataclass(frozen=True)
class SignRule:
    """A sign rule: the numbers that are raised to p, and the offset that is added to the root."""

    # (tokens, mask, eps) -> the numbers of at least 0 that are raised to p, `(..., n, d)`, and the
    # offset that is added to the root, `(..., d)`. Tokens and eps come as eighths and the result is
    # multiplied by 8, so both must be proportional to (tokens, eps).
    positive: Callable[[Array, Mask, float], tuple[Array, Array]]
    adds_offset: bool = False  # whether anything is added after the root
    signed: bool = False  # whether powers have the sign of their token
    in_kernel: bool = False  # whether the kernel of the power mean has the rule

    def sign(self, tokens: Array) -> Array | float:
        """Returns the factor of each power: the sign of its token with a signed rule, else 1.

        Args:
            tokens: The tokens, `(..., n, d)`, of any scale.

        Returns:
            An array `(..., n, d)` of -1 and 1, where zero counts as positive; or the number 1.
        """
        return jnp.where(tokens < 0, -1.0, 1.0) if self.signed else 1.0

    def refusal(self, name: str) -> str | None:
        """Returns why the kernels cannot be used with this rule, or None if they can.

        Args:
            name: The name of the rule, for the sentence.
        """
        return None if self.in_kernel else f"the kernels do not have the sign rule {name}"


def _clamp(x: Array, mask: Mask, eps: float) -> tuple[Array, Array]:
    # where and not maximum: at x = eps, maximum would share the gradient with the constant
    return keep(jnp.where(x <= eps, eps, x), mask, 0), _zeros(x)


def _abs(x: Array, mask: Mask, eps: float) -> tuple[Array, Array]:
    return _clamp(jnp.abs(x), mask, eps)


def _shift(x: Array, mask: Mask, eps: float) -> tuple[Array, Array]:
    lowest = where_any(mask, jnp.min(keep(x, mask, jnp.inf), axis=-2))
    return keep(x - lowest[..., None, :] + eps, mask, 0), lowest - eps


def _signed(x: Array, mask: Mask, eps: float) -> tuple[Array, Array]:
    # not abs, whose gradient is 0 at 0: a signed mean with p = 1 is the mean
    return jnp.where(x < 0, -x, x), _zeros(x)


RULES: dict[Negatives, SignRule] = {
    "clamp": SignRule(_clamp, in_kernel=True),
    "abs": SignRule(_abs, in_kernel=True),
    "shift": SignRule(_shift, adds_offset=True, in_kernel=True),
    "signed": SignRule(_signed, signed=True, in_kernel=True),
}


def check_rule(eps: float, negatives: str) -> None:
    """Raises `ValueError` if the rule is unknown or eps is out of range.

    Args:
        eps: Smallest number that is raised to p, from 1e-36 to 1e36.
        negatives: The name of a sign rule, a key of `RULES`.

    Raises:
        ValueError: The rule is not in `RULES`, or eps is not a Python number in the range.
    """
    if negatives not in RULES:
        raise ValueError(
            f"negatives must be one of {', '.join(get_args(Negatives))}, not {negatives!r}"
        )
    if not (isinstance(eps, int | float | np.number) and LEAST_EPS <= eps <= 1e36):
        raise ValueError(f"eps must be a Python number from 1e-36 to 1e36, not {eps!r}")


def _zeros(x: Array) -> Array:
    return jnp.zeros_like(jnp.max(x, axis=-2))
