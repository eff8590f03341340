"""Devices that are described and not there: XLA compiles for them, and nothing runs.

NVIDIA GPUs need the wheels of `make .venv/cuda .venv/pjrt`, JAX's CUDA plugin and compiler without
CUDA:

    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 PYTHONPATH=.venv/cuda:.venv/pjrt ...
"""

import importlib.util

import numpy as np
from jax.experimental import topologies

from ggem_jax.kernels import launch

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


def available() -> bool:
    """Returns whether XLA's GPU compiler is on the path."""
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


def compile_for_h200(function, *arguments):
    """Returns the program that XLA makes of a jitted function, a `jax.stages.Compiled`.

    Args:
        function: The jitted function; `implementation=None` takes the kernels.
        *arguments: Shapes with shardings over `h200s`.
    """
    with launch.compiled_for(CAPABILITY):
        lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options=_OPTIONS)
