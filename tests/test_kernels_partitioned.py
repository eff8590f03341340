"""XLA's own GPU compiler, on a machine without a GPU: what becomes of the kernels on one and on
eight H200, under plain `jit` with sharded arrays.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import ahead_of_time, xla_traffic
from ggem_jax.models.vit import vit_config
from ggem_jax.pooling import ggem_pool, norm_ggem_pool, superglobal_pool
from train import dry_run, step
from train.cli import load_config
from train.config import Config, Pool

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not ahead_of_time.available(), reason="needs the wheel of make .venv/pjrt"),
]

# Mesh, how the images are spread, how the parameters are; images of one device.
LAYOUTS = {
    "1": ((1, 1), P("data"), P(), 16),
    "8": ((8, 1), P("data"), P(), 2),
    "4 x 2": ((4, 2), P(("data", "fsdp")), P(), 2),
    "4 x 2, parameters over fsdp": ((4, 2), P("data"), P("fsdp"), 4),
}
MOVES = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"


def masked(pool, **options):
    return lambda tokens, *rest: pool(tokens, *rest, mask=tokens[..., 0] > 0, **options)


POOLS = {
    "ggem": (ggem_pool, 0),
    "masked": (masked(ggem_pool), 0),
    "shift masked": (masked(ggem_pool, negatives="shift"), 0),
    "norm": (norm_ggem_pool, 2),
    "norm masked": (masked(norm_ggem_pool), 2),
}


@functools.cache
def mesh(shape):
    devices = ahead_of_time.devices(shape[0] * shape[1]).reshape(shape)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def kernel_calls(text):
    return [line for line in text.splitlines() if 'custom_call_target="triton_kernel' in line]


def moved(text):
    """What travels between devices: pairs of the operation and the shapes of its results."""
    found = re.findall(rf"= (.*?) ({'|'.join(MOVES)})(?:-start)?\(", text)
    return [(name, re.findall(r"\w+\[[\d,]*\]", shapes)) for shapes, name in found]


@pytest.mark.sampled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POOLS)
def test_images_stay_on_their_devices_in_value_and_gradient(name, layout):
    pool, per_channel = POOLS[name]
    shape, images, parameters, local = LAYOUTS[layout]

    def argument(shape_, dtype, spec):
        return jax.ShapeDtypeStruct(shape_, dtype, sharding=NamedSharding(mesh(shape), spec))

    tokens = argument((16, 50, 96), "bfloat16", images)
    lengths = [96] * per_channel + [4]
    arguments = [tokens, *(argument((length,), "float32", parameters) for length in lengths)]

    def loss(*arguments):
        return jnp.sum(pool(*arguments).astype(jnp.float32) ** 2)

    def total(*arguments):  # images are added up per device first
        return jax.grad(loss, tuple(range(len(arguments))))(*arguments)

    for function, kernels in ((pool, 1), (total, 2)):
        text = ahead_of_time.compiled(jax.jit(function), *arguments)
        calls = kernel_calls(text)
        assert len(calls) == kernels
        assert all(f"bf16[{local},50,96]" in call for call in calls)
        for move, shapes in moved(text):
            assert move in ("all-gather", "all-reduce"), (move, shapes)
            assert all(re.fullmatch(r"f32\[\d+\]", shape) for shape in shapes), (move, shapes)
            # the sum of the parameters' gradients, or the whole of a parameter that is split
            assert move == "all-reduce" or parameters != P()
    if shape != (1, 1):
        assert [move for move, _ in moved(text)].count("all-reduce") == 1


def test_superglobal_keeps_its_maps():
    maps = jax.ShapeDtypeStruct(
        (8, 9, 7, 64), "float32", sharding=NamedSharding(mesh((4, 2)), P(("data", "fsdp")))
    )
    text = ahead_of_time.compiled(jax.jit(superglobal_pool), maps)
    (call,) = kernel_calls(text)
    assert "f32[1,9,7,64]" in call
    assert not moved(text)


def test_a_training_step_moves_weights_but_no_tokens():
    config = load_config(Config, [*TINY, "--pool.kind", "ggem", "--fsdp", "2"])
    steps = step.make_steps(config, 10, 100, devices=tuple(ahead_of_time.devices(8)))
    side, batch = config.model.image, config.batch
    images = {
        "image": jax.ShapeDtypeStruct((batch, side, side, 3), "uint8"),
        "label": jax.ShapeDtypeStruct((batch,), "int32"),
    }
    text = ahead_of_time.compiled(steps.train, jax.eval_shape(steps.init, 0), images, 0)
    calls = kernel_calls(text)
    assert len(calls) == 2
    assert all("f32[4,17,16]" in call for call in calls)  # 32 images on 8 devices
    shapes = [shape for _, moved_ in moved(text) for shape in moved_]
    assert shapes
    assert not [shape for shape in shapes if re.fullmatch(r"\w+\[\d+,1[67],16\]", shape)]


@pytest.mark.parametrize(("name", "times"), [("ggem", 5), ("norm_ggem", 19)])
def test_plain_jax_moves_fewer_bytes_than_the_formula(name, times):
    """Times the bytes of the tokens; what two passes share is computed twice and not written."""
    shape = (256, 196, 768)
    kernels, plain, formula = (
        xla_traffic.value_and_gradient(f"{name}, {kind}", shape)[0]
        for kind in ("kernels", "plain JAX", "formula")
    )
    assert kernels < plain < times * 2 * 256 * 196 * 768 < formula


@pytest.mark.parametrize(("remat", "devices"), [(False, 1), (True, 1), (True, 8)])
def test_the_dry_run_estimates_the_memory_of_a_step(remat, devices):
    model = vit_config("S/16", class_token=False, dtype="bfloat16", remat=remat)
    config = Config(model=model, batch=1024, pool=Pool(kind="avg"))
    steps = step.make_steps(config, 1000, 10, devices=dry_run.find_devices(f"h200:{devices}"))
    state = jax.eval_shape(steps.init, 0)
    estimated = dry_run.estimate_memory(config, steps, state).total
    compiled = dry_run.used_bytes(dry_run.compile_step(config, steps, state, f"h200:{devices}"))
    assert compiled / 1.15 < estimated < compiled * 1.15


def test_bytes_of_a_program_are_those_of_its_steps():
    program = """
%inner { %a = f32[99]{0} add(f32[99]{0} %b, f32[99]{0} %b) }

ENTRY %main {
  %x = bf16[2,3]{1,0} parameter(0)
  %pair = (f32[2]{0}, pred[3]{0}) fusion(%x), kind=kInput
  %first = f32[2]{0} get-tuple-element(%pair), index=0
  ROOT %y = f32[] custom-call(%first, %first, %x)
}
"""
    assert xla_traffic.count(program) == ((12 + 8 + 3) + (8 + 12 + 4), 2)
