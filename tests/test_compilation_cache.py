"""JAX's persistent compilation cache and arrays that are sharded over eight devices."""

import json
import os
import subprocess
import sys

from conftest import ROOT

# Prints, for each variant of a program, the events of the cache and the result.
PROGRAM = """
import json, sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from ggem_jax.kernels import launch
from ggem_jax.pooling import dispatch

jax.config.update("jax_num_cpu_devices", 8)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
tokens = jax.device_put(jnp.ones((16, 3, 2)), NamedSharding(mesh, P("data")))


def compiled(factor):
    def step(tokens):
        body = lambda tokens: (factor * jnp.sum(tokens, axis=1),)
        return dispatch.over_rows(body, [tokens])[0]

    events.clear()
    result = jax.jit(step)(tokens)
    told = [event for event in events if event in ("cache_hits", "cache_misses")]
    return [told, float(np.asarray(result)[0, 0])]


found = {}
for name in sys.argv[1:]:
    if name == "other code":
        with mock.patch.object(launch, "describe_code", lambda caller: "another kernel"):
            found[name] = compiled(2.0)
    else:
        found[name] = compiled({"program": 2.0, "other body": 5.0}[name])
print(json.dumps(found))
"""


def run(folder, *variants):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "true",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", PROGRAM, *variants]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_second_process_finds_the_program_but_not_one_of_other_code(tmp_path):
    """The programs differ only in what a pointer names: in the function, or in its kernel."""
    assert run(tmp_path, "program") == {"program": [["cache_misses"], 6.0]}
    assert run(tmp_path, "other body", "other code", "program") == {
        "other body": [["cache_misses"], 15.0],
        "other code": [["cache_misses"], 6.0],
        "program": [["cache_hits"], 6.0],
    }
