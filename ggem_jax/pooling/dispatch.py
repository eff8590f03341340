"""One operation, two bodies: a fused kernel on an NVIDIA GPU, plain JAX elsewhere.

A kernel takes arrays that begin with a rows axis and returns such arrays. Some of its arguments
begin with a sets axis instead, whose length divides that of the rows: row i uses set
i // (rows / sets). `vmap` and the partitioner need to know no more: a mapped axis is folded into
the rows, and rows can be spread over devices, each of which runs the kernel on its own rows.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ggem_jax.kernels import launch

Implementation = Literal["xla", "triton", "interpret"]
Body = Callable[..., tuple[Array, ...]]


def choose_implementation(
    implementation: Implementation | None, tokens: Array, refused: Callable[[], str | None]
) -> Implementation | None:
    """Returns which implementation to run; None defers the choice to lowering.

    Args:
        implementation: "xla" for plain JAX, "triton" or "interpret" for a kernel, or None to choose
            the kernel where it can be used.
        tokens: The tokens `(..., n, d)`, or a feature map.
        refused: Function that returns why the kernel cannot run this call, or None if it can.

    Returns:
        "xla", "triton" or "interpret"; or None: the kernel if the computation is lowered for an
        NVIDIA GPU, plain JAX otherwise.

    Raises:
        ValueError: The implementation is unknown.
        NotImplementedError: The kernel that was asked for by name cannot be used.
    """
    if not (
        implementation is None
        or (isinstance(implementation, str) and implementation in get_args(Implementation))
    ):
        raise ValueError(
            f"implementation must be None or one of {', '.join(get_args(Implementation))}, not"
            f" {implementation!r}"
        )
    if implementation == "xla":
        return "xla"
    refusal = _unknown_size(tokens) or refused() or _unfit_mesh(tokens)
    if implementation is None:
        return None if refusal is None and launch.available() else "xla"
    if refusal is not None:
        raise NotImplementedError(f"{refusal}, or pass implementation=None")
    launch.check(implementation)
    return implementation


def _unknown_size(tokens: Array) -> str | None:
    """Returns why symbolic shapes cannot be used, or None."""
    if all(isinstance(length, int) for length in tokens.shape):
        return None
    return (
        f"the kernels take shapes that are known, not {tokens.shape}: export with"
        " implementation='xla'"
    )


def _unfit_mesh(tokens: Array) -> str | None:
    """Returns why the mesh of the tokens cannot be used, or None."""
    kinds = set(jax.typeof(tokens).sharding.mesh.axis_types)
    if AxisType.Explicit in kinds:
        return (
            "the kernels do not work on a mesh with explicit axis types: use jax.shard_map or"
            " jax.sharding.auto_axes"
        )
    if len(kinds) > 1:
        return (
            "the kernels do not work where jax.shard_map is over some axes of a mesh: give it all"
            " of them"
        )
    return None


def run_implementation(
    implementation: Implementation | None, kernel: Body, plain: Body, *arrays: Array | None
) -> tuple[Array, ...]:
    """Returns `kernel(implementation, *arrays)` or `plain(*arrays)`.

    The derivative of either is that of `plain`.

    Args:
        implementation: The result of `choose_implementation`.
        kernel: The body that calls a kernel.
        plain: The body in plain JAX.
        *arrays: Arguments of both bodies; they may be None.

    Returns:
        The results of the body.
    """
    if implementation == "xla":
        return plain(*arrays)
    bodies = (_Options.of(body) for body in (kernel, plain))
    return _run_implementation(implementation, *bodies, *arrays)


@dataclass(frozen=True)
class _Options:
    """A function with keyword arguments, as `functools.partial`, but compared by value."""

    function: Callable
    options: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def of(function: Callable) -> "_Options":
        if isinstance(function, partial) and not function.args:
            return _Options(function.func, tuple(function.keywords.items()))
        return _Options(function)

    def __call__(self, *arguments):
        return self.function(*arguments, **dict(self.options))


# Outside of jit, JAX would choose for its default device, not for the device of the arrays.
@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _run_implementation(
    implementation: Implementation | None,
    kernel: Body,
    plain: Body,
    *arrays: Array | None,
) -> tuple[Array, ...]:
    by_kernel = with_missing(partial(kernel, implementation or "triton"), arrays)
    by_plain = with_missing(plain, arrays)

    @jax.custom_jvp
    def operation(*given):
        if implementation is None:
            return lax.platform_dependent(
                *given,
                cuda=lambda *a: _varying_as(by_kernel(*a), a),
                default=lambda *a: _varying_as(by_plain(*a), a),
            )
        return _varying_as(by_kernel(*given), given)

    operation.defjvp(
        lambda given, tangents: (operation(*given), jax.jvp(by_plain, given, tangents)[1])
    )
    return operation(*(array for array in arrays if array is not None))


def with_missing(body: Body, arrays: Sequence[Array | None]) -> Body:
    """Returns `body` as a function of those of its arguments that are not None.

    Args:
        body: Function of as many arrays as `arrays`.
        arrays: Its arguments; those that are None stay None.
    """
    present = [i for i, array in enumerate(arrays) if array is not None]

    def call(*given):
        every = dict(zip(present, given, strict=True))
        return tuple(body(*(every.get(i) for i in range(len(arrays)))))

    return call


def over_rows(
    body: Body, arrays: Sequence[Array | None], sets: Sequence[int] = (), spread: bool = True
) -> tuple[Array, ...]:
    """Returns `body(*arrays)`, with rules for `vmap` and for arrays sharded along the rows.

    Args:
        body: The kernel: a function of arrays `(rows, ...)` and `(sets, ...)`.
        arrays: Its arguments; they may be None.
        sets: Positions of the arguments that begin with a sets axis.
        spread: Whether to add the rule for sharded arrays. Host callbacks need False: JAX does not
            keep them alive in a body that the partitioner lowers.

    Returns:
        The outputs, `(rows, ...)` each.
    """
    present = [i for i, array in enumerate(arrays) if array is not None]
    body, sets = with_missing(body, arrays), [k for k, i in enumerate(present) if i in sets]
    operation = custom_vmap(partition_rows(body, sets) if spread else body)

    @operation.def_vmap
    def fold(size: int, batched: Sequence[bool], *arrays: Array) -> tuple[Any, Any]:
        if size == 0:
            each = (
                jax.ShapeDtypeStruct(a.shape[1:] if b else a.shape, a.dtype)
                for a, b in zip(arrays, batched, strict=True)
            )
            outputs = jax.tree.map(
                lambda o: jnp.zeros((0, *o.shape), o.dtype), jax.eval_shape(operation, *each)
            )
            return outputs, jax.tree.map(lambda _: True, outputs)
        if not batched[0]:  # one after the other, so that the large array is not copied
            mapped = [a for a, b in zip(arrays, batched, strict=True) if b]

            def one(mapped):
                rest = iter(mapped)
                return operation(
                    *(next(rest) if b else a for a, b in zip(arrays, batched, strict=True))
                )

            outputs = lax.map(one, mapped)
            return outputs, jax.tree.map(lambda _: True, outputs)
        keep_sets = not any(batched[i] for i in sets) and all(len(arrays[i]) == 1 for i in sets)
        folded = []
        for i, (array, mine) in enumerate(zip(arrays, batched, strict=True)):
            if i in sets and keep_sets:
                folded.append(array)
            else:
                array = array if mine else jnp.broadcast_to(array, (size, *array.shape))
                folded.append(array.reshape(-1, *array.shape[2:]))
        outputs = operation(*folded)
        return jax.tree.map(lambda o: o.reshape(size, -1, *o.shape[1:]), outputs), jax.tree.map(
            lambda _: True, outputs
        )

    return operation(*(arrays[i] for i in present))


def partition_rows(body: Body, sets: Sequence[int] = ()) -> Body:
    """Returns `body` with a rule for the partitioner of `jit`.

    Rows stay on their devices, all other axes are whole on every device, and each device runs
    `body` on its own rows.

    JAX's program names the rule and the body by pointers of this process, which are part of the key
    of its persistent compilation cache. A digest of both is therefore in the program too, as an
    attribute of the call. With `jax_remove_custom_partitioning_ptr_from_cache_key`, another process
    then finds the compiled program, but not that of another body or of other code.

    Args:
        body: Function of arrays `(rows, ...)` and `(sets, ...)`.
        sets: Positions of the arguments that begin with a sets axis.
    """

    def call(*arrays):
        several = any(len(arrays[i]) != 1 for i in sets)  # rows then stay with their sets
        traced, outputs = jax.make_jaxpr(body, return_shape=True)(*arrays)
        capability = launch.capability()

        def local_body(*arrays):  # traced by the partitioner, when the program is compiled
            with launch.compiled_for(capability):
                return body(*arrays)

        def specs(rows, like, own_sets=()):
            return [
                P(None if i in own_sets or several else rows, *[None] * (a.ndim - 1))
                for i, a in enumerate(like)
            ]

        def partition(mesh, arguments, _):
            rows = (*arguments[0].sharding.spec, None)[0]
            out = tuple(NamedSharding(mesh, s) for s in specs(rows, outputs))
            into = tuple(NamedSharding(mesh, s) for s in specs(rows, arrays, sets))
            return mesh, local_body, out, into

        whole: list[str] = []  # in the order of the rule, as JAX requires

        def factor():
            whole.append(f"w{len(whole)}")
            return whole[-1]

        def names(like, own_sets=()):
            return ", ".join(
                " ".join(
                    [
                        factor() if i in own_sets or several else "rows",
                        *(factor() for _ in a.shape[1:]),
                    ]
                )
                for i, a in enumerate(like)
            )

        rule = f"{names(arrays, sets)} -> {names(outputs)}"
        spread = custom_partitioning(body)
        spread.def_partition(
            partition=partition, sharding_rule=rule, need_replication_factors=tuple(whole)
        )
        identity = f"{rule}\n{traced}\n{launch.describe_code(Path(__file__))}"
        with set_xla_metadata(ggem_jax_body=hashlib.sha256(identity.encode()).hexdigest()):
            return spread(*arrays)

    return call


def vary_alike(*arrays: Array | None) -> list[Array | None]:
    """Returns the arrays, all varying over the same mesh axes, for use under `shard_map`.

    The gradient of an array that did not vary over an axis is then summed over it.

    Args:
        *arrays: The arguments of an operation; they may be None.
    """
    axes = frozenset().union(*(_varying(a) for a in arrays if a is not None))
    return [a if a is None else _varying_over(a, axes) for a in arrays]


def _varying_as(outputs, inputs):
    axes = frozenset().union(*map(_varying, inputs))
    return jax.tree.map(lambda o: _varying_over(o, axes), outputs)


def _varying(array):
    return jax.typeof(array).manual_axis_type.varying


def _varying_over(array, axes):
    missing = tuple(sorted(axes - _varying(array)))
    return lax.pcast(array, missing, to="varying") if missing else array
