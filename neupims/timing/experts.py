"""How the tokens of a sub-batch meet the experts of a layer: which are hit, by how many tokens."""

from typing import NamedTuple

import jax.numpy as jnp

from neupims.machine.layer_kinds import ALIKE, Mix
from neupims.machine.record import Number
from neupims.machine.workload import Decoder, Parallel

ONE_DEVICE = Parallel(1, 1)


class Routing(NamedTuple):
    """How the tokens of a sub-batch meet the MLPs of a layer on one device.

    With a skew, both are arrays over experts, from the most popular one on.
    """

    # MLPs that have tokens: 1, or the expected number of experts that are hit. With a skew, the
    # chance of each expert.
    products: Number
    tokens: Number  # of each of them, in the mean

    @property
    def rows(self) -> Number:
        """The tokens of all MLPs together."""
        return jnp.sum(self.products * self.tokens)


def route(
    model: Decoder, tokens: Number, parallel: Parallel = ONE_DEVICE, mix: Mix = ALIKE
) -> Routing:
    """Returns the experts that a sub-batch hits, with independent routing of its tokens.

        experts hit = E (1 - (1 - k / E)^n),  tokens of each = n k / experts hit

    for n tokens that each visit k of E experts, with uniform routing. With a skew, expert e is hit
    with the chance 1 - (1 - v_e)^n, and then has n v_e / chance tokens, for the shares v_e of
    tokens that visit it (`visits`). Weights of other experts are not read. Without experts there is
    one MLP with all tokens.

    Where experts are dealt to groups of devices (`Parallel.ep`), these are the experts of the first
    group, whose most popular expert is that of the layer: no other group has more tokens.

    Args:
        model: The model.
        tokens: The tokens of the sub-batch.
        parallel: Over how many groups of devices the experts are dealt.
        mix: Whether there is a skew.
    """
    there = jnp.asarray(model.experts) > 0
    if mix.skewed:
        visited = visits(model, mix.skewed)
        place = jnp.arange(mix.skewed)
        chance = 1 - (1 - visited) ** tokens
        each = tokens * visited / jnp.maximum(chance, 1e-9)
        dealt = jnp.where(place % parallel.ep == 0, chance, 0.0)  # to the first group
        return Routing(jnp.where(there, dealt, 1.0 * (place == 0)), jnp.where(there, each, tokens))
    experts = jnp.maximum(1.0 * model.experts, 1)
    share = model.active_experts / experts
    hit = experts * (1 - (1 - share) ** tokens)
    each = tokens * model.active_experts / jnp.maximum(hit, 1e-9)
    return Routing(jnp.where(there, hit / parallel.ep, 1.0), jnp.where(there, each, tokens))


def visits(model: Decoder, most: int) -> Number:
    """Returns the share of tokens that visits each expert, (most,), from the most popular one on.

        v_e = min(1, c e^-s),  sum over e of v_e = k

    for the exponent s (`expert_skew`) and k active experts: an expert that would get more than all
    tokens gets all, and the others share the rest.

    Args:
        model: The model.
        most: The length of the result; shares beyond the experts of the model are 0.
    """
    place = jnp.arange(most)
    weight = jnp.where(place < model.experts, (place + 1.0) ** (-1.0 * model.expert_skew), 0.0)
    # c where the `place` most popular experts are visited by all tokens
    rest = jnp.maximum(jnp.cumsum(weight[::-1])[::-1], 1e-30)
    factor = (model.active_experts - place) / rest
    full = jnp.argmax(factor * weight <= 1)  # how many are
    return jnp.where(place < full, 1.0, jnp.minimum(factor[full] * weight, 1.0))
