"""Explore accelerator designs: a Pareto front of throughput, energy and area.

Every design runs one decode step of the batch. Knobs are fields of the hardware: a list holds the
values to choose from, and a pair is a range. The same call with more `points` and a `folder`
explores millions, and resumes after an interruption.
"""

import numpy as np

import neupims


def main() -> None:
    lengths = np.random.default_rng(0).gamma(2.0, 300.0, size=64).astype(int) + 1
    batch = neupims.make_batch(lengths, channels=np.arange(len(lengths)) % 8)
    found = neupims.explore(
        "neupims",
        "gpt3-7b",
        batch,
        {
            "hbm.num_channels": [8, 16, 32],
            "npu.num_arrays": (2, 8),
            "npu.clock_hz": (0.7e9, 1.5e9, "log"),
        },
        constraints=["area_mm2 < 20000"],
        points=512,
    )
    print(f"{len(found.front)} of {found.points} designs on the front, the fastest first:")
    for design in found.front[:5]:
        knobs = ", ".join(f"{name} {value:.4g}" for name, value in design.knobs.items())
        print(f"{design.metrics['tokens_per_second']:8,.0f} tokens/s  {knobs}")
    name, found_of = max(found.sensitivities.items(), key=lambda each: each[1].first_order)
    share = 100 * found_of.first_order
    print(f"{name} decides most of the throughput: {share:.0f} % of its variance")


if __name__ == "__main__":
    main()
