"""The public functions lowered for CUDA on a machine without a GPU: the kernel is there, once for
the value and once for the gradient.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ggem_jax.kernels import launch
from ggem_jax.models.vit import GGeM, ViT, ViTConfig
from ggem_jax.pooling import gem_pool, ggem_pool, norm_ggem_pool, superglobal_pool

pytestmark = pytest.mark.lowering

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
TOKENS = jax.ShapeDtypeStruct((8, 50, 96), "bfloat16")
EXPONENTS, CHANNELS = (jax.ShapeDtypeStruct((length,), "float32") for length in (4, 96))


def test_the_cuda_plugin_of_this_jax_is_on_the_path():
    assert importlib.util.find_spec("jax_cuda12_plugin") or importlib.util.find_spec(
        "jax_cuda13_plugin"
    )
    assert launch.available()


def lowered(function, *arguments, capability=90, platform="cuda"):
    with launch.compiled_for(capability):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels(text):
    return text.count("@triton_kernel_call")  # also in the name that jax-triton 0.4 gives it


def total(pool):
    return lambda *arguments: jnp.sum(pool(*arguments).astype(jnp.float32))


POOLS = {
    "ggem": (ggem_pool, (TOKENS, EXPONENTS)),
    "gem": (gem_pool, (TOKENS, jax.ShapeDtypeStruct((), "float32"))),
    "per channel": (gem_pool, (TOKENS, CHANNELS)),
    "interleaved": (functools.partial(ggem_pool, layout="interleaved"), (TOKENS, EXPONENTS)),
    "masked": (
        lambda x, p, **options: ggem_pool(x, p, mask=x[..., 0] > 0, **options),
        (TOKENS, EXPONENTS),
    ),
    "shift": (functools.partial(ggem_pool, negatives="shift"), (TOKENS, EXPONENTS)),
    "signed": (functools.partial(ggem_pool, negatives="signed"), (TOKENS, EXPONENTS)),
    "abs": (functools.partial(ggem_pool, negatives="abs"), (TOKENS, EXPONENTS)),
    "float32": (ggem_pool, (TOKENS.update(dtype="float32"), EXPONENTS)),
    "float16": (ggem_pool, (TOKENS.update(dtype="float16"), EXPONENTS)),
    "norm": (norm_ggem_pool, (TOKENS, CHANNELS, CHANNELS, EXPONENTS)),
    "norm masked": (
        lambda x, s, b, p, **options: norm_ggem_pool(x, s, b, p, mask=x[..., 0] > 0, **options),
        (TOKENS, CHANNELS, CHANNELS, EXPONENTS),
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("implementation", [None, "triton"])
def test_value_and_gradient_are_one_kernel_each(name, implementation):
    pool, arguments = POOLS[name]
    chosen = functools.partial(pool, implementation=implementation)
    assert kernels(lowered(chosen, *arguments)) == 1
    wrt = tuple(range(len(arguments)))
    assert kernels(lowered(jax.grad(total(chosen), wrt), *arguments)) == 2


@pytest.mark.parametrize("name", ["ggem", "norm"])
def test_no_kernel_is_lowered_for_a_cpu_or_tpu(name):
    pool, arguments = POOLS[name]
    for platform in ("cpu", "tpu"):
        text = lowered(jax.grad(total(pool)), *arguments, platform=platform)
        assert "triton" not in text
        assert "custom_call" not in text


TRANSFORMED = {
    "vmap over tokens": (
        jax.vmap(ggem_pool, (0, None)),
        (jax.ShapeDtypeStruct((3, 2, 50, 96), "bfloat16"), EXPONENTS),
        1,
    ),
    "vmap over p": (
        jax.vmap(ggem_pool, (None, 0)),
        (TOKENS, jax.ShapeDtypeStruct((3, 4), "float32")),
        1,
    ),
    "vmap over both": (jax.vmap(ggem_pool), (TOKENS, jax.ShapeDtypeStruct((8, 4), "float32")), 1),
    "vmap of grad": (
        jax.vmap(jax.grad(total(ggem_pool), (0, 1)), (0, None)),
        (jax.ShapeDtypeStruct((3, 2, 50, 96), "bfloat16"), EXPONENTS),
        2,
    ),
    "scan": (
        lambda x, p: jax.lax.scan(
            lambda c, _: (c + ggem_pool(x, p), None), jnp.zeros((8, 96), "bfloat16"), length=3
        )[0],
        (TOKENS, EXPONENTS),
        1,
    ),
    "superglobal": (superglobal_pool, (jax.ShapeDtypeStruct((2, 9, 7, 64), "bfloat16"),), 1),
    "gradient of superglobal": (
        jax.grad(total(superglobal_pool)),
        (jax.ShapeDtypeStruct((2, 9, 7, 64), "float32"),),
        0,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(name):
    function, arguments, count = TRANSFORMED[name]
    assert kernels(lowered(function, *arguments)) == count


def test_a_hessian_takes_the_formula_for_its_second_derivative():
    text = lowered(jax.hessian(lambda p, x: total(ggem_pool)(x, p)), EXPONENTS, TOKENS)
    assert kernels(text) == 1  # of the value


@pytest.mark.sampled
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["ggem", "norm"])
def test_shard_map_runs_the_kernel_on_the_local_rows(name, check_vma):
    pool, arguments = POOLS[name]
    specs = (P("data"), *[P()] * (len(arguments) - 1))
    spread = jax.shard_map(
        pool, mesh=MESH, in_specs=specs, out_specs=P("data"), check_vma=check_vma
    )
    text = lowered(jax.grad(total(spread), tuple(range(len(arguments)))), *arguments)
    assert kernels(text) == 2
    reduced = re.findall(r'"stablehlo\.all_reduce".*?\}\) : \(([^)]*)\) ->', text, re.DOTALL)
    assert (
        len(reduced) == text.count("stablehlo.all_reduce") == len(arguments) - 1
    )  # of the parameters' gradients, and of nothing else
    assert set(reduced) <= {"tensor<4xf32>", "tensor<96xf32>"}
    assert "all_gather" not in text
    calls = [line for line in text.splitlines() if "@triton_kernel_call" in line]
    assert all(
        "tensor<1x50x96xbf16>" in line and "tensor<8x50x96xbf16>" not in line for line in calls
    )


def test_jit_with_sharded_tokens_keeps_the_rows_where_they_are():
    """Under plain jit the partitioner lowers the kernel itself, when it compiles. Until then the
    call carries the rule for sharding it.
    """
    tokens = TOKENS.update(sharding=NamedSharding(MESH, P("data")))
    text = lowered(jax.grad(total(ggem_pool), (0, 1)), tokens, EXPONENTS)
    rules = [line for line in text.splitlines() if "sdy.sharding_rule" in line]
    assert len(rules) == 2
    assert all("([i, j, k]" in line and "->([i, " in line for line in rules)


def test_the_program_for_several_devices_says_which_kernel_it_means(monkeypatch):
    """JAX names the kernel by a pointer of this process, which is left out here."""
    tokens = TOKENS.update(sharding=NamedSharding(MESH, P("data")))

    def program(eps=1e-6, capability=90):
        pool = functools.partial(ggem_pool, eps=eps)
        text = lowered(pool, tokens, EXPONENTS, capability=capability)
        return re.sub(r'backend_config = "\d+"', "", text)

    one = program()
    assert program() == one
    assert program(eps=1e-5) != one
    assert program(capability=80) != one
    digest = launch._digest
    monkeypatch.setattr(launch, "_digest", lambda sources: digest(sources[1:]))  # other sources
    jax.clear_caches()
    assert program() != one


@pytest.mark.parametrize("fused_norm", [False, True])
def test_a_vision_transformer_ends_in_one_kernel(fused_norm):
    config = ViTConfig(
        patch=8, width=64, depth=1, heads=4, mlp_width=64, image=32, dtype="bfloat16"
    )
    model = ViT(config, pooling=GGeM(), num_classes=3, fused_norm=fused_norm)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(variables, images):
        return jnp.sum(model.apply(variables, images).logits ** 2)

    text = lowered(lambda v, x: model.apply(v, x).logits, variables, images)
    assert kernels(text) == 1
    (call,) = (line for line in text.splitlines() if "@triton_kernel_call" in line)
    # all tokens: the kernel skips the class token, and cutting it off would copy all others
    assert "tensor<2x17x64xbf16>" in call
    assert kernels(lowered(jax.grad(loss), variables, images)) == 2


def test_without_a_capability_the_missing_gpu_is_named():
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, and JAX runs on cpu here"):
        ggem_pool(jnp.ones((3, 4)), jnp.ones(2), implementation="triton")
