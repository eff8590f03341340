"""Requests of a batch, from trace files as people have them and from distributions.

A request's length is the number of tokens whose keys and values a decode step reads. A trace gives
it as such (`seq_len`), or as the input and output tokens of the request. A request in a batch has
generated a part of its output, so its length is then

    length = input + floor(share * output)

with another share for each request, uniform from 0 to 1, or with one share for all. Channels are
those of the trace; where it has none, a packing deals them (`neupims.scheduling.packing`).
"""

import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from neupims.machine.distributions import is_distribution, sample_tokens
from neupims.machine.hardware import Hardware
from neupims.machine.record import check_seed
from neupims.machine.trace_files import read_table_of
from neupims.machine.workload import LONGEST, Batch, Decoder, Parallel, make_batch

UNIFORM: Literal["uniform"] = "uniform"
TO_DEAL = "give a packing, which deals the requests to the machine's channels (--packing greedy)"

# (hardware, model, length of each request, parallel) -> the same requests with their channels
Packing = Callable[[Hardware, Decoder, Any, Parallel], Batch]


@dataclass(frozen=True)
class Requests:
    """The requests of a trace, in its order."""

    name: str  # of the file without its ending, or the text of the distribution
    seq_lens: Int[np.ndarray, " r"]  # tokens whose keys and values are read
    channels: Int[np.ndarray, " r"] | None  # channel that holds them, None where the trace has none
    notes: tuple[str, ...] = ()  # sentences: what was assumed or left out


def read_requests(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    generated: float | Literal["uniform"] = UNIFORM,
    draw: int | None = None,
    seed: int = 0,
) -> Requests:
    """Returns the requests of a trace file, or of a distribution.

    A file is CSV (also with tabs or semicolons) or JSON, one request a row. Columns are found by
    their names, in any order, spelling `seq_len` like `SeqLen`; other columns are ignored:

    - one column, with a name or without: the lengths;
    - `seq_len`, or `seq_len,ch_idx` as the public simulator writes it;
    - input and output tokens: `input,output`, `ContextTokens,GeneratedTokens` of the Azure traces,
      `input_length,output_length` of the Mooncake traces (JSON lines or CSV), and the like.

    A distribution is `sharegpt:256`, `alpaca:256`, `const:2048x128` or `uniform:512-4096x128`
    (`neupims.machine.distributions`); the last number is that of the requests.

    Args:
        source: The file, or the text of a distribution.
        columns: Column name by role, "length", "channel", "input" or "output"; a number counts
            columns from 1 (default: found by name).
        generated: The share of its output that each request has generated, from 0 to 1, or
            "uniform": another share for each request, from `seed`. Without effect where lengths are
            given as such.
        draw: Number of requests drawn at random from the trace, in its order (default: all).
        seed: Seed of all random numbers.

    Raises:
        ValueError: The columns are ambiguous, or a row is impossible; the sentence names the line.
        OSError: The file cannot be read.

    Example:
        >>> from neupims import read_requests
        >>> read_requests("const:2048x3").seq_lens.tolist()
        [2048, 2048, 2048]
    """
    check_seed(seed)
    _check_generated(generated)
    random = np.random.default_rng(seed)
    name, text = Path(source).stem, os.fspath(source)
    notes: list[str] = []
    if not is_distribution(text):
        found = read_table_of(text, columns)
    elif columns:
        raise ValueError(f"{text} is a distribution, which has no columns")
    else:
        name = text
        found, notes = sample_tokens(text, random)
    if "output" in found:
        answered = found["output"] > 0
        if missing := int((~answered).sum()):
            notes.append(f"{missing} requests without output are left out")
        found = {role: column[answered] for role, column in found.items()}
    count = len(next(iter(found.values())))
    if not count:
        raise ValueError(f"{name} holds no request")
    if draw is not None:
        if not 1 <= draw <= count:
            raise ValueError(
                f"{name} has {count} requests: the number to draw must be from 1 to {count}, not"
                f" {draw}"
            )
        chosen = np.sort(random.choice(count, draw, replace=False))
        found = {role: column[chosen] for role, column in found.items()}
        notes.append(f"{draw} of the {count} requests, drawn with seed {seed}")
    if "length" in found:
        lengths = found["length"]
    else:
        share = random.random(len(found["output"])) if generated == UNIFORM else generated
        lengths = np.maximum(found["input"] + np.floor(share * found["output"]).astype(int), 1)
        notes.append(
            f"each request is at a random point of its output (seed {seed})"
            if generated == UNIFORM
            else f"each request has generated {generated:g} of its output"
        )
    if lengths.max() > LONGEST:
        raise ValueError(f"{name} has a request of {lengths.max()} tokens, more than {LONGEST}")
    return Requests(name, lengths, found.get("channel"), tuple(notes))


def _check_generated(generated: float | str) -> None:
    right = generated == UNIFORM or (
        isinstance(generated, numbers.Real)
        and not isinstance(generated, bool)
        and 0 <= generated <= 1
    )
    if not right:
        raise ValueError(
            f"the share that is generated must be from 0 to 1, or {UNIFORM}, not {generated!r}"
        )


def place_requests(requests: Requests, num_channels: int, *, mend: str = TO_DEAL) -> Batch:
    """Returns the batch of requests on the channels of their trace, halved by the simulator's rule.

    Args:
        requests: The requests.
        num_channels: The channels of the machine.
        mend: The end of the sentence of an error: how to do without the trace's channels.

    Raises:
        ValueError: The trace has no channels, or a channel that the machine does not have.
    """
    name, channels = requests.name, requests.channels
    if channels is None:
        raise ValueError(f"{name} has no channels (ch_idx): {mend}")
    wrong = np.flatnonzero((channels < 0) | (channels >= num_channels))
    if wrong.size:
        raise ValueError(
            f"{name}: the channel of request {wrong[0]} must be from 0 to {num_channels - 1}, not"
            f" {channels[wrong[0]]}, because the machine has {num_channels} channels; to ignore the"
            f" trace's channels, {mend}"
        )
    return make_batch(requests.seq_lens, channels, num_channels=num_channels)


def read_trace(path: str | Path, *, num_channels: int = 32) -> Batch:
    """Returns the batch of a trace of the public simulator; its rule halves it into sub-batches.

    Args:
        path: A file with columns seq_len and ch_idx, as `read_requests` reads it.
        num_channels: The channels of the machine.

    Raises:
        ValueError: The file is not a trace, or a row is impossible; the sentence names the line.
        OSError: The file cannot be read.

    Example:
        >>> from neupims import read_trace
        >>> read_trace("trace.csv").seq_lens.tolist()  # 300 tokens on channel 0, 40 on channel 1
        [300, 40]
    """
    return place_requests(read_requests(path), num_channels)
