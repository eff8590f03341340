"""How a search makes genomes: at random, by mutation, and from two parents.

Each function makes one genome; searches map them over populations.
"""

import jax
import jax.numpy as jnp
import numpy as np

from neupims.scheduling.comparison import choose
from neupims.scheduling.decision import Choices, Genome, repair
from neupims.scheduling.objective import Problem

CROSSED = 0.3  # share of an evolution's children that have two parents
INHERITED = 0.25  # share of the second parent's places in such a child
MUTATIONS = 2  # at most, of one child
# Share of mutations that touch the order, the number of sub-batches or a knob, where those are
# searched.
RELOCATIONS = 0.1
KNOB_STEP = 0.2  # standard deviation of a knob's mutation, as a share of its range


def random_genome(choices: Choices, problem: Problem, key) -> Genome:
    """Returns a genome drawn uniformly from the choices, and repaired.

    Args:
        choices: What may be chosen.
        problem: The problem; its requests and residents matter.
        key: The source of randomness.
    """
    return repair(choices, problem.resident, draw_genome(choices, problem, key))


def draw_genome(choices: Choices, problem: Problem, key) -> Genome:
    """Returns a genome drawn uniformly from the choices; it is not repaired.

    Args:
        choices: What may be chosen.
        problem: The problem; only the number of its requests matters.
        key: The source of randomness.
    """
    requests = problem.seq_lens.shape[0]
    place_key, priority_key, mode_key, knob_key = jax.random.split(key, 4)
    return Genome(
        jax.random.randint(place_key, (requests,), 0, 2 * choices.channels),
        (
            jax.random.randint(priority_key, (requests,), 0, choices.priorities)
            if choices.priorities > 1
            else jnp.zeros(requests, jnp.int32)
        ),
        (
            jax.random.bernoulli(mode_key)
            if len(choices.sub_batches) == 2
            else jnp.array(2 in choices.sub_batches)
        ),
        set_knobs(choices, jax.random.uniform(knob_key, (len(choices.knobs),))),
    )


def mutate(choices: Choices, problem: Problem, key, genome: Genome) -> Genome:
    """Returns the genome with 1 to MUTATIONS changes of places; fewer changes are more likely.

    A change moves a request, swaps two, or flips the sub-batch of one (`relocate`). The order of
    requests, the number of sub-batches and the knobs change too, where they are searched.

    Args:
        choices: What may be chosen.
        problem: The problem.
        key: The source of randomness.
        genome: The genome to change.
    """
    count_key, other_key, key = jax.random.split(key, 3)
    count = jnp.minimum(1 + jnp.floor(jax.random.exponential(count_key)), MUTATIONS)
    keys = jax.random.split(key, MUTATIONS)
    for index in range(MUTATIONS):
        moved = relocate(choices, problem, keys[index], genome)
        genome = choose(index < count, moved, genome)
    changeable = (choices.priorities > 1, len(choices.sub_batches) == 2, len(choices.knobs) > 0)
    if any(changeable):
        genome = _change_others(choices, other_key, genome)
    return repair(choices, problem.resident, genome)


def relocate(choices: Choices, problem: Problem, key, genome: Genome) -> Genome:
    """Returns the genome with one request moved, swapped with another, or in the other sub-batch.

    With probability 1/8 it exchanges two whole channels, or the two sub-batches, instead. Half of
    the time the request comes from the fullest channel of a sub-batch (by logit, attend or both),
    and half of the time it goes to the emptiest channel of a sub-batch: only such changes make the
    slowest channel faster.

    Args:
        choices: What may be chosen.
        problem: The problem; its work gives the loads of the channels.
        key: The source of randomness.
        genome: The genome to change. The result is not repaired.
    """
    places = genome.places
    numbers = 2 * choices.channels
    draws = jax.random.bits(key, (8,), jnp.uint32)
    half = (draws[0] % 2).astype(jnp.int32)
    loads = jax.ops.segment_sum(problem.work, places, numbers)
    load = loads @ jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[draws[1] % 3]
    parity = jnp.arange(numbers) & 1
    fullest = jnp.argmax(jnp.where(parity == half, load, -1.0))
    request = jnp.where(
        draws[2] % 2 == 0, _somewhere(places == fullest, draws[3]), draws[3] % places.shape[0]
    ).astype(jnp.int32)
    here = places[request]
    emptiest = jnp.argmin(jnp.where(parity == draws[4] % 2, load, jnp.inf))
    elsewhere = (here + 1 + (draws[5] % (numbers - 1)).astype(jnp.int32)) % numbers
    there = jnp.where((draws[4] % 4 < 2) & (emptiest != here), emptiest, elsewhere)
    kind = draws[6] % 8
    there = jnp.where(kind == 0, here ^ 1, there).astype(places.dtype)  # flip
    on_there, requests = places == there, jnp.arange(places.shape[0])
    swapped = on_there & (requests == _somewhere(on_there, draws[7])) & (kind >= 3)
    changed = jnp.where(requests == request, there, jnp.where(swapped, here, places))
    # Bits, because a signed quotient or remainder is ten operations: another channel is reached
    # from one of the two by the bits in which they differ.
    one, other = here >> 1, elsewhere >> 1
    channel = places >> 1
    either = (channel == one) | (channel == other)
    exchanged = jnp.where(one == other, 1, jnp.where(either, 2 * (one ^ other), 0)) ^ places
    wholesale = draws[7] // 65536 % 8 == 0
    return genome._replace(places=jnp.where(wholesale, exchanged, changed))


def _somewhere(mask, draw):
    """Returns the index of one of the true elements, 0 if there is none."""
    size = mask.shape[0]
    turn = (draw % size).astype(jnp.int32)
    turned = jnp.arange(size) + turn
    last = jnp.max(jnp.where(mask, jnp.where(turned < size, turned, turned - size), -1))
    return jnp.where(last < 0, 0, (last - turn) % size)


def _change_others(choices: Choices, key, genome: Genome) -> Genome:
    keys = jax.random.split(key, 6)
    if choices.priorities > 1:
        changes = jax.random.bernoulli(keys[0], RELOCATIONS, genome.priorities.shape)
        genome = genome._replace(
            priorities=jnp.where(
                changes,
                jax.random.randint(keys[1], genome.priorities.shape, 0, choices.priorities),
                genome.priorities,
            )
        )
    if len(choices.sub_batches) == 2:
        genome = genome._replace(
            interleaved=genome.interleaved ^ jax.random.bernoulli(keys[2], RELOCATIONS)
        )
    if choices.knobs:
        low, high, _ = knob_ranges(choices)
        step = KNOB_STEP * (high - low) * jax.random.normal(keys[3], genome.knobs.shape)
        wants = jax.random.bernoulli(keys[4], 0.5, genome.knobs.shape)
        moved = jnp.clip((genome.knobs + step - low) / jnp.maximum(high - low, 1e-30), 0, 1)
        genome = genome._replace(knobs=jnp.where(wants, set_knobs(choices, moved), genome.knobs))
    return genome


def knob_ranges(choices: Choices):
    """Returns the lowest and the highest value of each knob, and whether it is whole, (3, k).

    Args:
        choices: What may be chosen; it has k knobs.
    """
    columns = [[knob.low, knob.high, knob.whole] for knob in choices.knobs]
    return jnp.asarray(np.array(columns, np.float32).reshape(-1, 3)).T


def set_knobs(choices: Choices, shares):
    """Returns the values of knobs at shares of their ranges, (k,); whole knobs are rounded.

    Args:
        choices: What may be chosen; it has k knobs.
        shares: Share of each range, from 0 to 1, (k,).
    """
    low, high, whole = knob_ranges(choices)
    values = low + shares * (high - low)
    return jnp.where(whole > 0, jnp.clip(jnp.round(values), jnp.ceil(low), jnp.floor(high)), values)


def genome_hash(genome: Genome):
    """Returns a hash of all parts of a genome, an unsigned number of 32 bits.

    Args:
        genome: One genome.
    """
    parts = [
        genome.places,
        genome.priorities,
        genome.interleaved[None],
        jax.lax.bitcast_convert_type(genome.knobs, jnp.int32),
    ]
    numbers = jnp.concatenate([part.astype(jnp.uint32) for part in parts])
    odd = np.random.default_rng(0).integers(0, 2**31, numbers.shape[0], np.uint32) * 2 + 1
    mixed = (numbers + 1) * odd
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32) * jnp.uint32(2654435769)


def cross(key, mother: Genome, father: Genome) -> Genome:
    """Returns a child of two genomes: the mother's, with some of the father's places.

    A child has two parents with probability CROSSED. It then inherits each place and priority from
    the father with probability INHERITED.

    Args:
        key: The source of randomness.
        mother: The first genome.
        father: The second genome.
    """
    whether_key, which_key = jax.random.split(key)
    share = jnp.where(jax.random.bernoulli(whether_key, CROSSED), INHERITED, 0.0)
    theirs = jax.random.bernoulli(which_key, share, mother.places.shape)
    return mother._replace(
        places=jnp.where(theirs, father.places, mother.places),
        priorities=jnp.where(theirs, father.priorities, mother.priorities),
    )
