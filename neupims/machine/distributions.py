"""Requests drawn from a distribution of lengths, named by a text such as "sharegpt:256".

- `sharegpt:256`, `alpaca:256`: 256 requests with input and output tokens like those of the two data
  sets of the paper. Inputs and outputs are independent and log-normal with the mean and the median
  of the data set, rounded up, and a request has at most 2,048 tokens. The shape is an assumption:
  only means and medians are taken from the data.
- `const:2048x128`: 128 requests of 2,048 tokens.
- `uniform:512-4096x128`: 128 requests of 512 to 4,096 tokens, each length equally likely.

Source: Heo et al., "NeuPIMs", ASPLOS 2024, gives the means of input and output: ShareGPT 80 and 296
    tokens, Alpaca 12 and 56. Medians and more exact means are counted in
    trace-generator/share-gpt2/stats.tsv and trace-generator/alpaca/stats.tsv of the public
    simulator (commit f299af3fc8), whose trace generator cuts requests at 2,048 tokens.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from neupims.machine.workload import LONGEST

MOST_TOKENS = 2048  # of a request of a data set, input and output together
MOST_REQUESTS = 10**6


class LogNormal(NamedTuple):
    """A log-normal distribution of numbers of tokens."""

    mean: float  # tokens
    median: float  # tokens

    def sample(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Returns numbers of tokens, rounded up, (count,).

        The mean of exp(N(m, s^2)) is exp(m + s^2 / 2), and its median exp(m).

        Args:
            random: The random numbers.
            count: The number of requests.
        """
        spread = math.sqrt(2 * math.log(self.mean / self.median))
        return np.ceil(random.lognormal(math.log(self.median), spread, count)).astype(np.int64)


# Input and output tokens by data set.
DATA_SETS = {
    "sharegpt": (LogNormal(80.3, 17), LogNormal(295.0, 261)),
    "alpaca": (LogNormal(12.1, 11), LogNormal(55.8, 40)),
}
FORMS = "sharegpt:256, alpaca:256, const:2048x128 and uniform:512-4096x128"
TEXT = re.compile(r"([A-Za-z_]\w+):(.*)", re.DOTALL)


def is_distribution(text: str) -> bool:
    """Returns whether a text has the form of a distribution, NAME:NUMBERS, and is no path.

    Args:
        text: A path, or the text of a distribution.
    """
    return bool(TEXT.fullmatch(text)) and not {"/", "\\"} & set(text)


def sample_tokens(
    text: str, random: np.random.Generator
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tokens of requests by role, as `trace_files.read_table_of` does, and notes.

    Args:
        text: The distribution.
        random: The random numbers.

    Raises:
        ValueError: The distribution is unknown, or a number is impossible.
    """
    name, _, numbers = text.partition(":")
    name = name.lower()
    forms = {"const": r"(\d+)x(\d+)", "uniform": r"(\d+)-(\d+)x(\d+)"} | dict.fromkeys(
        DATA_SETS, r"(\d+)"
    )
    match = re.fullmatch(forms.get(name, "(?!)"), numbers.strip(), re.ASCII)
    if not match:
        raise ValueError(f"there is no distribution {text[:80]!r}; there are {FORMS}")
    *ends, count = (int(number[:20]) for number in match.groups())
    if not 1 <= count <= MOST_REQUESTS:
        raise ValueError(f"{text[:80]} must have from 1 to {MOST_REQUESTS} requests, not {count}")
    if ends and not (1 <= ends[0] <= ends[-1] <= LONGEST):
        raise ValueError(f"{text[:80]}: lengths must be from 1 to {LONGEST}, the smaller one first")
    if name == "const":
        return {"length": np.full(count, ends[0])}, []
    if name == "uniform":
        return {"length": random.integers(ends[0], ends[1] + 1, count)}, []
    inputs, outputs = (each.sample(random, count) for each in DATA_SETS[name])
    inputs = np.minimum(inputs, MOST_TOKENS - 1)
    outputs = np.minimum(outputs, MOST_TOKENS - inputs)
    note = (
        "inputs and outputs are assumed to be log-normal, with the data set's means and medians,"
        f" and at most {MOST_TOKENS} tokens together"
    )
    return {"input": inputs, "output": outputs}, [note]
