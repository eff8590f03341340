"""train/collectives.py: what a compiled program sends between devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train.collectives import Transfer, expected_bytes, find_transfers

PROGRAM = """
%body (x: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%other (x: f32[2]) -> f32[2] {
  %r = (f32[6]{0}, bf16[3]{0}) all-reduce-start(%x), replica_groups=[2,4]<=[8]
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %w = f32[4,8]{1,0} while(%a), body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %g = (f32[2]{0}, f32[16]{0}) all-gather-start(%a), replica_groups={{0,1,2,3,4,5,6,7}}
  %d = f32[16]{0} all-gather-done(%g)
  %s = f32[5] reduce-scatter(%a), replica_groups=mesh['x'=2,'y'=4], device_ids=([8]) {'y'}
  %q = ((u8[4], s32[2]), (u8[4], s32[2]), u32[], u32[]) collective-permute-start(%a, %b)
  %c = f32[2]{0} async-start(%a), calls=%other
}
"""

CHAIN = """
%first (x: f32[2]) -> f32[16] {
  %g = f32[16] all-gather(%x), channel_id=3, replica_groups=[1,8]<=[8], attributes={chain_id="0"}
}

%second (x: f32[2]) -> f32[16] {
  %g = f32[16] all-gather(%x), channel_id=3, replica_groups=[1,8]<=[8], attributes={chain_id="0"}
  %h = f32[8] all-gather(%x), channel_id=4, replica_groups=[1,8]<=[8], attributes={chain_id="0"}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %b = f32[16] fusion(%a), calls=%first
  %c = f32[16] fusion(%b), calls=%second
  %p = f32[2] collective-permute(%a), channel_id=1
  %q = f32[3] collective-permute(%b), channel_id=1
}
"""


def test_transfers_are_found_in_loops_and_calls():
    loop, gather, scatter, passed, reduce = find_transfers(PROGRAM, 8)
    assert loop == Transfer("collective-permute", ((4, 8),), 128, 8, 7)
    assert gather == Transfer("all-gather", ((16,),), 64, 8, 1)
    assert scatter == Transfer("reduce-scatter", ((5,),), 20, 4, 1)
    assert reduce == Transfer("all-reduce", ((6,), (3,)), 24 + 6, 4, 1)
    assert passed == Transfer("collective-permute", ((4,), (2,)), 4 + 8, 8, 1)
    sent = [each.sent_bytes for each in (loop, gather, scatter, reduce)]
    assert sent == [128 * 7, 64 * 7 / 8, 20 * 3, 2 * 30 * 3 / 4]


LOOP = """
%less (x: (f32[2], u32[])) -> pred[] {
  %four = u32[] constant(4)
  %x = (f32[2]{0:T(128)}, /*index=1*/u32[]{:T(128)}) parameter(0)
  %i = u32[] get-tuple-element(%x), index=1
  ROOT %less.1 = pred[] compare(%i, %four), direction=DIRECTION
}

%pass (x: (f32[2], u32[])) -> (f32[2], u32[]) {
  %two = u32[] constant(2)
  %x = (f32[2]{0:T(128)}, /*index=1*/u32[]{:T(128)}) parameter(0)
  %a = f32[2] get-tuple-element(%x), index=0
  %i = u32[] get-tuple-element(%x), index=1
  %p = f32[2] collective-permute(%a), channel_id=1
  %j = u32[] add(%i, %two), metadata={op_name="x"}
  ROOT %t = (f32[2]{0:T(128)}, /*index=1*/u32[]{:T(128)}) tuple(%p, /*index=1*/%j)
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %w = (f32[2], u32[]) while(%a), condition=%less, body=%pass, metadata={op_name="x"}
}
"""


@pytest.mark.parametrize(("direction", "times"), [("LT", 2), ("NE", 1)])
def test_a_loop_that_does_not_say_how_often_it_runs_is_counted(direction, times):
    """0, 2 are less than 4; what ends otherwise counts once."""
    (passed,) = find_transfers(LOOP.replace("DIRECTION", direction), 8)
    assert (passed.times, passed.sent_bytes) == (times, 8 * times)


def test_a_transfer_that_several_fusions_carry_counts_once():
    """Only those of a chain: other transfers may share a channel and are different."""
    found = [(each.kind, each.shapes) for each in find_transfers(CHAIN, 8)]
    gathers = [("all-gather", ((16,),)), ("all-gather", ((8,),))]
    assert found == [*gathers, ("collective-permute", ((2,),)), ("collective-permute", ((3,),))]


@pytest.mark.parametrize(("split", "kinds"), [(P(), {"all-reduce"}), (P("fsdp"), {"all-gather"})])
def test_the_formula_is_what_xla_does(split, kinds):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    layout, rows = NamedSharding(mesh, split), NamedSharding(mesh, P(("data", "fsdp")))
    w = jax.ShapeDtypeStruct((16, 12), jnp.float32, sharding=layout)
    x = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=rows)

    def forward(w, x):
        return x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))

    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum(forward(w, x) ** 2))(w)

    function = gradient if split == P() else forward
    found = find_transfers(
        jax.jit(function, out_shardings=layout if split == P() else rows)
        .lower(w, x)
        .compile()
        .as_text(),
        8,
    )
    assert {each.kind for each in found} == kinds
    gradient_bytes = 4 if split == P() else 0
    expected = expected_bytes(w, layout, gradient_bytes)
    assert sum(each.sent_bytes for each in found) == expected


def test_weights_that_are_split_are_collected_and_their_gradients_summed():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    w = jax.ShapeDtypeStruct((16, 12), jnp.float32)
    collected, in_parts, over_data = 3 * 48 * 4, 3 * 48 * 2, 2 * (1 / 2) * 48 * 2
    expected = expected_bytes(w, NamedSharding(mesh, P("fsdp")), 2)
    assert expected == collected + in_parts + over_data
    assert Transfer("all-to-all", ((8,),), 32, 4, 1).sent_bytes == 24
