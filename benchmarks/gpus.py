"""Published figures of the GPUs for which the kernels are modelled."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A GPU as its maker describes it.

    Peak numbers are those of data sheets. A multiprocessor has four schedulers, each of which
    issues one warp instruction a cycle.
    """

    name: str
    capability: int  # compute capability, such as 90
    multiprocessors: int
    peak_flops: float  # of float32 outside of the tensor cores
    peak_bandwidth: float  # of the memory, bytes a second
    lanes: int  # of a multiprocessor that multiply and add float32 numbers
    warps: int  # most resident warps of a multiprocessor
    programs: int  # most resident programs of a multiprocessor
    shared_bytes: int  # of a multiprocessor

    @property
    def boost_hz(self) -> float:
        """The clock that follows from the peak: every lane adds and multiplies in each cycle."""
        return self.peak_flops / (2 * self.lanes * self.multiprocessors)


# Lanes, warps, programs and shared memory: CUDA C++ programming guide 12.9, tables "Technical
# Specifications per Compute Capability" and "Throughput of Native Arithmetic Instructions".
H200 = GPU(
    # "NVIDIA H200 Tensor Core GPU" data sheet, SXM: 67 TFLOPS, 4.8 TB/s
    "H200", 90, 132, 67e12, 4.8e12,
    lanes=128, warps=64, programs=32, shared_bytes=228 * 1024,
)  # fmt: skip
A100 = GPU(
    # "NVIDIA A100 Tensor Core GPU" data sheet, 80 GB SXM: 19.5 TFLOPS, 2,039 GB/s
    "A100", 80, 108, 19.5e12, 2.039e12,
    lanes=64, warps=64, programs=32, shared_bytes=164 * 1024,
)  # fmt: skip
RTX_4090 = GPU(
    # "NVIDIA Ada GPU Architecture" white paper, appendix A: 82.6 TFLOPS, 1,008 GB/s
    "RTX 4090", 89, 128, 82.6e12, 1.008e12,
    lanes=128, warps=48, programs=24, shared_bytes=100 * 1024,
)  # fmt: skip
B200 = GPU(
    # "NVIDIA HGX B200" data sheet: 600 TFLOPS and 64 TB/s for eight; 148 multiprocessors
    "B200", 100, 148, 75e12, 8e12,
    lanes=128, warps=64, programs=32, shared_bytes=228 * 1024,
)  # fmt: skip
GPUS = (H200, A100, RTX_4090, B200)
