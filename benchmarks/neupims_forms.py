"""Compares the closed form of PIM time with the exact recurrence, on random lists of requests.

    python -m benchmarks.neupims_forms

Draws lists of 1 to 24 requests of one channel with ShareGPT's lengths (GGEM_SHARED, by default
../shared), and compares the sum of the closed forms of the requests with the mean of the recurrence
over the phases of the refresh round. Rows go to benchmarks/results/neupims_forms.csv.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import append, machine
from neupims.machine.config import load_model, load_parallel, names
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.systems import FIDELITIES
from neupims.timing import gemv
from neupims.timing.gemv_exact import channel_cycles_exact

LONGEST, PHASES, CHUNK = 24, 8, 1000
SIZES = {"1": (1, 1), "2 to 4": (2, 4), "5 to 24": (5, 24)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lists", type=int, default=10_000)
    parser.add_argument("--model", default="gpt3-7b", choices=names("models"))
    options = parser.parse_args()
    lengths, counts = draw(options.lists)
    for row_buffers in (2, 1):
        hardware = replace(Hardware(), "pim.row_buffers", row_buffers)
        for operation in ("logit", "attend"):
            exact, steps, smooth = compare(hardware, options.model, lengths, operation)
            for name, (low, high) in SIZES.items():
                chosen = (counts >= low) & (counts <= high)
                for form, value in (("steps", steps), ("smooth", smooth)):
                    error = 100 * np.abs(value[chosen] / exact[chosen] - 1)
                    row = {
                        "model": options.model,
                        "row_buffers": row_buffers,
                        "operation": operation,
                        "form": form,
                        "requests": name,
                        "lists": int(chosen.sum()),
                    }
                    append(
                        "neupims_forms",
                        machine()
                        | row
                        | {
                            "mean_percent": f"{error.mean():.2f}",
                            "max_percent": f"{error.max():.2f}",
                        },
                    )


def draw(lists: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random lengths `(lists, LONGEST)` in tokens, and the sizes `(lists,)` of the lists.

    Lengths beyond the end of a list are 0.
    """
    path = (
        Path(os.environ.get("GGEM_SHARED", "../shared"))
        / "data"
        / "llm-traces"
        / "sharegpt_lengths.csv"
    )
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    table = table[table[:, 1] > 0]
    rng = np.random.default_rng(0)
    chosen = table[rng.integers(len(table), size=lists * LONGEST)]
    lengths = (
        np.clip(chosen[:, 0] + np.ceil(rng.random(len(chosen)) * chosen[:, 1]), 1, 2048)
        .astype(np.int32)
        .reshape(lists, LONGEST)
    )
    counts = rng.integers(1, LONGEST + 1, size=lists)
    return np.where(np.arange(LONGEST) < counts[:, None], lengths, 0), counts


def compare(
    hardware: Hardware, model: str, lengths: np.ndarray, operation: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns cycles of each list by the recurrence, and by the closed form with and without steps.

    The recurrence is averaged over the phases of the refresh round. All three are `(lists,)`.

    Args:
        hardware: The machine.
        model: Name of the model.
        lengths: Lengths `(lists, LONGEST)` of the requests of one channel, as `draw` returns them.
        operation: "logit" or "attend".
    """
    decoder, parallel = load_model(model), load_parallel(model)
    phases = (jnp.arange(PHASES) + 0.5) / PHASES
    one = partial(channel_cycles_exact, hardware, decoder, operation=operation)

    @jax.jit
    def exact(lists):
        start = jnp.zeros(LONGEST)
        return jax.vmap(
            lambda each: jax.vmap(lambda phase: one(each, parallel, phase, start))(phases).mean()
        )(lists)

    parts = [
        np.asarray(exact(jnp.asarray(lengths[at : at + CHUNK])))
        for at in range(0, len(lengths), CHUNK)
    ]
    column = ("logit", "attend").index(operation)
    closed = []
    for fidelity in FIDELITIES:  # with and without steps
        works = jax.vmap(
            lambda each, fidelity=fidelity: gemv.request_work(
                hardware, decoder, each, parallel, fidelity=fidelity
            )
        )(lengths)
        closed.append(np.asarray(works)[..., column].sum(axis=1))
    return np.concatenate(parts), *closed


if __name__ == "__main__":
    main()
