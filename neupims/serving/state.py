"""The records of continuous batching: requests, memory, rules, and the state of the loop.

`serving.loop` has the rules themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int

from neupims.serving.clock import Instant

NOBODY = 2**30  # the number of no request; more than any


class Spent(NamedTuple):
    """What an iteration takes of one device."""

    time: Instant
    joules: Float[Array, ""]
    npu_seconds: Float[Array, ""]  # with products in the arrays
    pim_seconds: Float[Array, ""]  # with PIM commands, in the mean of the channels
    bus_seconds: Float[Array, ""]  # in which the buses of the memory move data


class Requests(NamedTuple):
    """Requests in their order of arrival, and `window` more that never arrive."""

    arrival: Instant  # (n,)
    lengths: Int[Array, " n"]  # tokens whose keys and values are in memory when it is decoded first
    prompts: Int[Array, " n"]  # tokens to be computed before: the same, or 0 if they come computed
    outputs: Int[Array, " n"]  # tokens to be made here
    keys: Int[Array, " n"]  # the order in which those that wait are admitted


class Memory(NamedTuple):
    """Blocks of keys and values."""

    needed: Int[Array, " lengths"]  # by a request of 0, 1, 2, ... tokens
    room: Int[Array, " rows"]  # of each channel; 0 for a row that the machine does not have
    spare: Int[Array, ""]  # that are free after an admission
    loads: Float[Array, " lengths"]  # of a channel, by a request of 0, 1, ... tokens, for packing
    rows: Int[Array, ""]  # channels of the machine, the first ones
    places: Int[Array, ""]  # requests of a channel, at most


class Channels(NamedTuple):
    """What a packing may look at. Rows are channels."""

    loads: Float[Array, " rows"]  # of the requests that are there
    counts: Int[Array, " rows"]  # requests that are there
    admitted: Int[Array, ""]  # requests that were admitted before
    rows: Int[Array, ""]  # channels that the machine has, the first ones


# The channel with the least value that can take the request gets it.
Packing = Callable[[Channels], Float[Array, " rows"]]


class Costs(Protocol):
    """What iterations cost. Equal costs are equal objects, so that a run is compiled once."""

    def decode(self, tables: Any, lengths: Int[Array, "rows places"], holds: Any) -> Spent:
        """Returns what one token of each request takes, of which the lengths are in memory.

        Args:
            tables: What the costs need to know.
            lengths: The tokens of each place.
            holds: Whether a request in that place is computed, (rows, places).
        """
        ...

    def prefill(self, tables: Any, prompts: Int[Array, " prompts"]) -> Spent:
        """Returns what the prefill of prompts takes.

        Args:
            tables: What the costs need to know.
            prompts: The tokens of each prompt; those of length 0 do not count.
        """
        ...

    def mixed(
        self,
        tables: Any,
        lengths: Int[Array, "rows places"],
        holds: Any,
        before: Int[Array, " prompts"],
        chunks: Int[Array, " prompts"],
    ) -> Spent:
        """Returns what one token of each request takes, beside chunks of prompts.

        Args:
            tables: What the costs need to know.
            lengths: The tokens of each place.
            holds: Whether a request in that place is decoded, (rows, places).
            before: The tokens of each prompt that were computed before.
            chunks: The tokens of each prompt that are computed; 0 does not count.
        """
        ...


class Rules(NamedTuple):
    """What is fixed before a run is compiled."""

    rows: int  # channels, of the largest machine
    places: int  # of each channel, of the machine that has most
    batch: int  # the most requests at once
    prompts: int  # the most prompts of one prefill
    prefill_tokens: int  # the most tokens of one prefill, if it has more than one prompt
    chunk: int  # tokens of an iteration, decoded ones too; 0 computes prompts whole
    window: int  # requests that the waiting room shows to the policy
    packing: Packing
    costs: Costs
    ahead: int = 1  # decode steps that are computed together, at most (`serving.ahead`)
    few: int = 0  # the first places of each channel, to which such steps are limited


class Places(NamedTuple):
    """The places of all channels; each field is (rows, places)."""

    request: Int[Array, "rows places"]  # NOBODY where the place is free
    length: Int[Array, "rows places"]  # tokens whose keys and values it needs
    prompt: Int[Array, "rows places"]  # of these, the tokens that are to be computed
    left: Int[Array, "rows places"]  # tokens to be made
    paused: Bool[Array, "rows places"]
    pauses: Int[Array, "rows places"]  # how often it was paused
    admitted: Instant
    first: Instant  # when its first token came; high is -1 before


class State(NamedTuple):
    """The state at a boundary."""

    now: Instant
    arrived: Int[Array, ""]  # requests that have joined the waiting room
    admitted: Int[Array, ""]  # requests that have left it
    waiting: Int[Array, " window"]  # the waiting room; NOBODY where nobody waits
    places: Places
    # Of each request: admitted, first token, and end (two words each), and how often it was paused.
    served: Int[Array, "n 7"]


class Step(NamedTuple):
    """What happened in one iteration."""

    now: Instant  # at its end
    spent: Spent  # zeros if there was no iteration
    computed: Int[Array, ""]  # requests that got a token
    prompt_tokens: Int[Array, ""]  # tokens of prompts that were computed
    waiting: Int[Array, ""]  # requests in the waiting room
    blocks: Int[Array, ""]  # in use in all channels, during it
    fullest: Int[Array, ""]  # blocks in use in the fullest channel
    paused: Int[Array, ""]  # requests that lost their keys and values at its start
