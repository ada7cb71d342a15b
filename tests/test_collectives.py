"""The counter of collectives, on short programs and on compiled ones."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import collectives

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%scatter (p: f32[1024,8]) -> f32[128,8] {
  %p = f32[1024,8]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.1 = f32[1024,8]{1,0:T(8,128)} all-reduce(%p), replica_groups={}, to_apply=%sum
  %at = u32[] partition-id()
  ROOT %slice = f32[128,8]{1,0} dynamic-slice(%all-reduce.1, %at, %at), dynamic_slice_sizes={128,8}
}

%body (t: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[] add(%i, %one)
  %v = f32[64]{0} get-tuple-element(%t), index=1
  %all-gather = f32[256]{0} all-gather(%v), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %s = f32[64]{0} slice(%all-gather), slice={[0:64]}
  ROOT %u = (s32[], f32[64]{0}) tuple(%next, %s)
}

%condition (t.1: (s32[], f32[64])) -> pred[] {
  %t.1 = (s32[], f32[64]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

ENTRY %main (a: f32[1024,8], b: f32[64]) -> f32[128,8] {
  %a = f32[1024,8]{1,0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %fusion = f32[128,8]{1,0} fusion(%a), kind=kCustom, calls=%scatter
  %all-reduce-start = f32[64]{0} all-reduce-start(%b), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %all-reduce-done = f32[64]{0} all-reduce-done(%all-reduce-start)
  %tuple = (s32[], f32[64]{0}) tuple(%start, %all-reduce-done)
  %while = (s32[], f32[64]{0}) while(%tuple), condition=%condition, body=%body
  %permute = f32[64]{0} collective-permute(%b), source_target_pairs={{0,1},{1,0},{2,2}}
  %bitcast = f32[8,1,8]{2,1,0} bitcast(%b)
  %send = (f32[8,1,8], u32[], token[]) send(%bitcast, %t), is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %c = f32[128,8]{1,0} copy(%fusion)
}
"""


def test_each_kind_by_the_ring():
    assert collectives.sent(PROGRAM) == {
        "reduce-scatter": 4 * 1024 * 8 * 7 / 8,  # the fusion
        "all-reduce": 4 * 64 * 2 * 1 / 2 + 4 * 64,  # among pairs; between slices
        "all-gather": 5 * 4 * 256 * 3 / 4,  # five iterations
        "collective-permute": 4 * 64,
    }


def test_an_all_reduce_is_one_unless_it_is_fused_with_the_slices_of_all_it_reduces():
    alone = PROGRAM.replace("kind=kCustom, calls=%scatter", "kind=kCustom, calls=%sum").replace(
        "  %zero = s32", "  %all-reduce.2 = f32[1024,8]{1,0} all-reduce(%a), replica_groups={}\n"
        "  %slice.2 = f32[128,8]{1,0} dynamic-slice(%all-reduce.2, %zero)\n  %zero = s32",
    )  # fmt: skip
    whole = PROGRAM.replace("ROOT %slice = f32[128,8]", "ROOT %slice = f32[1024,4]")
    for text in (alone, whole):
        found = collectives.sent(text)
        assert "reduce-scatter" not in found
        assert found["all-reduce"] == 4 * 1024 * 8 * 2 * 7 / 8 + 512


def test_a_collective_that_overlaps_several_fusions_counts_once():
    chain = 'replica_groups={}, frontend_attributes={chain_id="3"}'
    again = PROGRAM.replace("replica_groups={}", chain).replace(
        "  ROOT %c",
        "  %again = f32[128,8]{1,0} fusion(%a), kind=kCustom, calls=%scatter\n  ROOT %c",
    )
    assert collectives.sent(again) == collectives.sent(PROGRAM)
    other = again.replace("calls=%scatter\n  ROOT", "calls=%other\n  ROOT").replace(
        "%body (t", again[again.index("%scatter (") : again.index("%body (t")]
        .replace("%scatter", "%other").replace('"3"', '"4"') + "%body (t",
    )  # fmt: skip
    twice = collectives.sent(PROGRAM)["reduce-scatter"] * 2
    assert collectives.sent(other)["reduce-scatter"] == twice


def test_which_collectives_cross_slices():
    groups = [c.groups for c in collectives.collectives(PROGRAM)]
    slices = [0] * 8 + [1] * 8
    assert [collectives.crossing(g, slices) for g in groups] == [False] * 4 + [True]
    assert collectives.crossing(groups[0], [0] * 4 + [1] * 4)
    assert not collectives.crossing(groups[1], [0] * 4 + [1] * 4)


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,2,2]T(2,1,0)", ((0, 4), (2, 6), (1, 5), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b','a'}", ((0, 4, 1, 5, 2, 6, 3, 7),)),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4], device_ids=([2,4]<=[4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'a'}", ((3, 0), (1, 2))),
    ],
)
def test_groups_in_each_notation(notation, groups):
    assert collectives.groups_of(f"%x), replica_groups={notation}, to_apply=%sum", 8) == groups


def test_unknown_groups_and_loops_are_errors():
    with pytest.raises(ValueError, match="unknown groups"):
        collectives.groups_of("%x), replica_groups=@ring, to_apply=%sum", 8)
    with pytest.raises(ValueError, match="unknown number of iter"):
        collectives.sent(PROGRAM.replace("%five = s32[] constant(5)", "%five = s32[] negate(%i.1)"))


def test_compiled_programs_send_what_was_written():
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
    x = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P()))

    def loop(x):
        x, _ = jax.lax.scan(lambda x, _: (jax.lax.psum(x, "b") / 4, None), x, length=3)
        part = jax.lax.psum_scatter(x, "a", tiled=True)
        return jax.lax.cond(x[0, 0] > 2, lambda: jax.lax.pmax(x, "a"), lambda: x), part

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=P(), out_specs=P("a"), check_vma=False)
    compiled = jax.jit(mapped).lower(x).compile()
    size = 64 * 32 * 4
    assert collectives.sent(compiled) == {
        "all-reduce": 3 * size * 2 * 3 / 4 + size,
        "reduce-scatter": size / 2,
    }
    assert [c.optional for c in collectives.collectives(compiled)].count(True) == 1
