"""Devices that are described and not there: XLA compiles for them, and nothing runs.

NVIDIA GPUs need the wheels of `make .venv/cuda .venv/pjrt`, JAX's CUDA plugin and compiler without
CUDA:

    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 PYTHONPATH=.venv/cuda:.venv/pjrt ...

TPUs need libtpu, which `make .venv/tpu` installs (200 MB to download, 680 MB on disk):

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/tpu ...
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.experimental import topologies

from ggem_jax.kernels import launch


@dataclass(frozen=True)
class Accelerator:
    """A device that can be described. Its peak is in `train.throughput`, by its kind."""

    kind: str  # JAX's name
    memory_bytes: float
    bytes_per_second: float  # of its memory
    slices: Mapping[int, str] = field(default_factory=dict)  # of TPUs: chips -> their arrangement


_FLAT = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
_CUBES = {4: "2x2x1", 8: "2x2x2", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}

# Sources: NVIDIA H200 data sheet; docs.cloud.google.com/tpu/docs/v5e, v5p and v6e, whose GB of
# memory are GiB (XLA names the limit of a v5e as 15.75 GiB), with slices up to 256 chips.
ACCELERATORS = {
    "h200": Accelerator("NVIDIA H200", 141e9, 4800e9),
    "v5e": Accelerator("TPU v5 lite", 16 * 2**30, 819e9, _FLAT),
    "v5p": Accelerator("TPU v5", 95 * 2**30, 2765e9, _CUBES),
    "v6e": Accelerator("TPU v6 lite", 32 * 2**30, 1640e9, _FLAT),
}

# What libtpu asks a machine with a TPU, so that it does not ask and complain; and processes without
# a TPU need not wait for each other.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

CAPABILITY = 90
# What XLA wants to know of a device. H200 SXM: NVIDIA H200 data sheet (memory, bandwidth, clock)
# and CUDA programming guide, technical specifications of compute capability 9.0 (the rest).
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 62914560
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""

# Nothing can be timed here, and XLA's Triton refuses some small products that it has not tuned.
_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def available(name: str = "h200") -> bool:
    """Returns whether XLA's compiler for an accelerator is on the path.

    Args:
        name: One of `ACCELERATORS`.
    """
    if ACCELERATORS[name].slices:
        return _found("libtpu")
    return any(_found(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def h200s(count: int) -> np.ndarray:
    """Returns H200s of one machine, for meshes and shardings of functions that are compiled.

    Args:
        count: Number of devices.
    """
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=H200, topology=f"1x1x{count}"
    )
    return np.array(topology.devices)


def tpus(name: str, count: int) -> np.ndarray:
    """Returns the chips of a slice of TPUs, for meshes and shardings.

    Args:
        name: "v5e", "v5p" or "v6e".
        count: Chips, which the slices of `ACCELERATORS` have.
    """
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    arrangement = ACCELERATORS[name].slices[count]
    # on one host there are four chips at least, unless it is said
    alone = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    topology = topologies.get_topology_desc(f"{name}:{arrangement}", platform="tpu", **alone)
    return np.array(topology.devices)


def compile_described(function, *arguments) -> jax.stages.Compiled:
    """Returns the program that XLA makes of a jitted function for devices that are described.

    Args:
        function: The jitted function.
        *arguments: Shapes with shardings over `h200s` or `tpus`.
    """
    device = next(iter(arguments[-1].sharding.device_set))
    if device.platform == "tpu":
        return function.lower(*arguments).compile()
    return compile_for_h200(function, *arguments)


def compile_for_h200(function, *arguments):
    """Returns the program that XLA makes of a jitted function, a `jax.stages.Compiled`.

    Args:
        function: The jitted function; `implementation=None` takes the kernels.
        *arguments: Shapes with shardings over `h200s`.
    """
    with launch.compiled_for(CAPABILITY):
        lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options=_OPTIONS)
