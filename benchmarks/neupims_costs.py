"""Compares energies of memories, and the roofline of a GPU, with published figures.

    python -m benchmarks.neupims_costs

Published figures are in benchmarks/published_energy.csv (picojoules of a bit) and
benchmarks/published_serving.csv (tokens a second of serving stacks), each with its source and,
where ours differs, the reason. A run of a serving stack is replayed at the roofline: all prompts at
once, then one decode step after another, with the requests that are not finished.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from neupims.machine.config import load_hardware, load_model, set_fields
from neupims.machine.costs import EnergyCosts
from neupims.machine.hardware import Hardware
from neupims.machine.model import Decoder
from neupims.machine.workload import Batch, Parallel
from neupims.timing.iteration import simulate
from neupims.timing.prefill import prefill

HERE = Path(__file__).parent
ALONE = Parallel(1, 1)


class Comparison(NamedTuple):
    """One published figure beside ours."""

    what: str  # what was measured or calculated, in words
    published: float  # pJ of a bit, or tokens a second
    ours: float  # the same
    source: str  # of the published figure
    why: str  # why they differ, or ""
    prompts: float = 0.0  # share of the roofline's time that prompts take

    @property
    def factor(self) -> float:
        """Ours over the published figure."""
        return self.ours / self.published


def main() -> None:
    print("\n".join(energy_table()))
    print()
    print("\n".join(serving_table()))


def energy_table() -> list[str]:
    """Returns the lines of the table of energies of a bit, in pJ."""
    lines = [
        "| memory, action | ours, pJ a bit | published | factor | source | why |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    return lines + [
        f"| {each.what} | {each.ours:.2f} | {each.published:.2f} | {each.factor:.2f} |"
        f" {each.source} | {each.why} |"
        for each in compare_energy()
    ]


def serving_table() -> list[str]:
    """Returns the lines of the table of tokens a second."""
    lines = [
        "| stack, GPU, model, requests | roofline, tokens/s | of it prompts | published |"
        " of the roofline | source | why |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    return lines + [
        f"| {each.what} | {each.ours:,.0f} | {each.prompts:.0%} | {each.published:,.0f} |"
        f" {1 / each.factor:.0%} | {each.source} | {each.why} |"
        for each in compare_serving()
    ]


def compare_energy() -> list[Comparison]:
    """Returns every published energy of a bit beside ours."""
    found = []
    for line in _read("published_energy.csv"):
        changes = {} if line["memory"] == "default" else {"energy.memory": line["memory"]}
        costs, bits = set_fields(Hardware(), changes).energy, float(line["bits"])
        ours = access_picojoules(costs, bits) if line["quantity"] == "access" else costs.pim_bit
        words = (
            f"{bits:,.0f} bits of a row" if line["quantity"] == "access" else "product in a bank"
        )
        what = f"{line['memory']}, {words}"
        found.append(Comparison(what, float(line["picojoules"]), ours, line["source"], line["why"]))
    return found


def access_picojoules(costs: EnergyCosts, bits: float) -> float:
    """Returns the energy of reading one bit, as far as the NPU.

    Args:
        costs: The energies of the memory.
        bits: Bits that are read from each row that is opened; at most a row of 1024 bytes is paid.
    """
    opened = max(bits, 8192) / 8192 * costs.activate_kilobyte
    return opened / bits + costs.read_bit + costs.interface_bit


def compare_serving() -> list[Comparison]:
    """Returns every published run of a serving stack beside the roofline's tokens a second."""
    found = []
    for line in _read("published_serving.csv"):
        inputs, outputs = _lengths(line["inputs"], line["outputs"])
        hardware, model = load_hardware(line["machine"]), load_model(line["model"])
        first, rest = replay(hardware, model, inputs, outputs)
        if line["measures"] == "decode":
            first, tokens = 0.0, outputs.sum() - len(outputs)
        else:
            tokens = outputs.sum()
        requests = (
            f"{line['inputs']} + {line['outputs']}"
            if " x " in line["inputs"]
            else f"{len(inputs)} of {inputs.sum():,} + {outputs.sum():,} in all"
        )
        only = ", decoding" if line["measures"] == "decode" else ""
        what = f"{line['stack']} ({line['date']}), {line['machine']}, {line['model']}, {requests}"
        found.append(
            Comparison(
                what + only,
                float(line["tokens_per_second"]),
                float(tokens / (first + rest)),
                line["source"],
                line["why"],
                first / (first + rest),
            )
        )
    return found


def replay(
    hardware: Hardware, model: Decoder, inputs: np.ndarray, outputs: np.ndarray
) -> tuple[float, float]:
    """Returns the seconds of a GPU at its roofline for a batch that starts together.

    The time of a step grows linearly with the keys and values while the same requests run, so the
    step in the middle of such a stretch stands for all of its steps.

    Args:
        hardware: The machine; its GPU runs.
        model: The model, on one GPU.
        inputs: Tokens of each prompt, (r,).
        outputs: Tokens that each request gets, (r,), the first by its prompt.

    Returns:
        The seconds of the prompts, and those of all later tokens.
    """
    prompts = prefill(hardware, model, _batch(inputs), ALONE, system="gpu")
    rest, begin = 0.0, 1
    for end in np.unique(outputs):
        if end > begin:
            middle = inputs + (begin + end) / 2
            batch = _batch(np.where(outputs >= end, np.round(middle), 0))
            step = simulate(hardware, model, batch, ALONE, system="gpu", sub_batches=1)
            rest += float(end - begin) * float(step.iteration_seconds)
            begin = end
    return float(prompts.iteration_seconds), rest


def _batch(lengths: np.ndarray) -> Batch:
    numbers = jnp.asarray(np.asarray(lengths), jnp.int32)
    return Batch(numbers, jnp.zeros_like(numbers), jnp.zeros_like(numbers))


def _lengths(inputs: str, outputs: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts and outputs of "384 x 128" and "128", or of one number a request."""
    if " x " in inputs:
        requests, length = map(int, inputs.split(" x "))
        return np.full(requests, length), np.full(requests, int(outputs))
    return np.array(inputs.split(), int), np.array(outputs.split(), int)


def _read(name: str) -> list[dict[str, str]]:
    with open(HERE / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
