"""Simulate your accelerator: a batch of requests on a machine of yours, against others.

The machine is the published one with twice the memory channels and a faster clock. Each line is one
decode step of GPT-3 7B for 128 requests that are dealt to the channels in turn.
"""

import numpy as np

import neupims


def main() -> None:
    model, parallel = neupims.load_model("gpt3-7b"), neupims.load_parallel("gpt3-7b")
    published = neupims.load_hardware("neupims")
    mine = neupims.replace(published, "hbm.num_channels", 64)
    mine = neupims.replace(mine, "npu.clock_hz", 1.2e9)

    lengths = np.random.default_rng(0).gamma(2.0, 300.0, size=128).astype(int) + 1

    for name, hardware, system in (
        ("published", published, "npu-only"),
        ("published", published, "neupims"),
        ("mine", mine, "neupims"),
    ):
        count = int(hardware.hbm.num_channels)
        channels = np.arange(len(lengths)) % count
        batch = neupims.make_batch(lengths, channels=channels, num_channels=count)
        step = neupims.simulate(hardware, model, batch, parallel, system=system)
        print(
            f"{name:9} {system:8} {1e3 * float(step.iteration_seconds):6.2f} ms "
            f"{float(step.tokens_per_second):8,.0f} tokens/s "
            f"PIM busy {100 * float(step.pim_utilization):3.0f} %"
        )


if __name__ == "__main__":
    main()
