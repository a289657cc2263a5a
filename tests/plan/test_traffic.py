"""What a compiled program moves, by hand and on a program of this machine."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.plan.compiling import out_of_memory
from qjax.plan.hlo import parse
from qjax.plan.traffic import traffic

pytestmark = pytest.mark.optimized

# A loop of 5 turns; each reads a slice of 4 x 8 bfloat16 in a fusion, updates a row of
# 8 floats in place, and sums 16 floats over 4 of 8 devices. %in_vmem lies elsewhere.
LOOP = """
HloModule step

%update (p.0: f32[10,8], p.1: f32[8], p.2: s32[]) -> f32[10,8] {
  %p.0 = f32[10,8]{1,0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %p.2 = s32[] parameter(2)
  %row = f32[1,8]{1,0} bitcast(%p.1)
  ROOT %put = f32[10,8]{1,0} dynamic-update-slice(%p.0, %row, %p.2, %p.2)
}

%inner (q.0: bf16[5,4,8]) -> bf16[5,4,8] {
  %q.0 = bf16[5,4,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %again = bf16[5,4,8]{2,1,0} copy(%q.0)
}

%take (p.3: bf16[5,4,8], p.4: s32[]) -> f32[8] {
  %p.3 = bf16[5,4,8]{2,1,0} parameter(0)
  %tiled = bf16[5,4,8]{2,1,0} fusion(%p.3), kind=kLoop, calls=%inner
  %p.4 = s32[] parameter(1)
  %slice = bf16[1,4,8]{2,1,0} dynamic-slice(%tiled, %p.4, %p.4, %p.4)
  ROOT %sum = f32[8]{0} reduce(%slice), dimensions={0,1}
}

%body (arg: (s32[], bf16[5,4,8], f32[10,8])) -> (s32[], bf16[5,4,8], f32[10,8]) {
  %arg = (s32[], bf16[5,4,8]{2,1,0}, f32[10,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %w = bf16[5,4,8]{2,1,0} get-tuple-element(%arg), index=1
  %c = f32[10,8]{1,0} get-tuple-element(%arg), index=2
  %in_vmem = f32[8]{0:T(128)S(1)} fusion(%w, %i), kind=kLoop, calls=%take
  %new = f32[10,8]{1,0} fusion(%c, %in_vmem, %i), kind=kLoop, calls=%update
  %pair = f32[16]{0:T(128)S(1)} broadcast(%in_vmem)
  %over = f32[16]{0:T(128)S(1)} all-reduce(%pair), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %out = (s32[], bf16[5,4,8]{2,1,0}, f32[10,8]{1,0}) tuple(%i, %w, %new)
}

%test (arg.1: (s32[], bf16[5,4,8], f32[10,8])) -> pred[] {
  %arg.1 = (s32[], bf16[5,4,8]{2,1,0}, f32[10,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %five), direction=LT
}

ENTRY %main (a: bf16[5,4,8], b: f32[10,8]) -> f32[10,8] {
  %a = bf16[5,4,8]{2,1,0} parameter(0)
  %b = f32[10,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[5,4,8]{2,1,0}, f32[10,8]{1,0}) tuple(%zero, %a, %b)
  %loop = (s32[], bf16[5,4,8], f32[10,8]) while(%start), condition=%test, body=%body
  ROOT %end = f32[10,8]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_slices_updates_and_places_by_hand():
    found = traffic(parse(LOOP), 8)
    index = 4
    assert found.memory == 5 * (2 * 4 * 8 + 4 * 8 + index)  # a slice needs no index
    assert found.sent == 5 * 2 * 3 / 4 * 4 * 16
    assert found.collectives == 5


@pytest.mark.parametrize(
    "groups",
    ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "mesh['x'=2,'y'=4] {'y'}"],
)
def test_groups_of_devices_are_read_in_every_form(groups: str):
    text = LOOP.replace("{{0,1,2,3},{4,5,6,7}}", groups)
    assert traffic(parse(text), 8).sent == 5 * 2 * 3 / 4 * 4 * 16


BESIDE = """
%on_sparse_cores (r.0: f32[16], r.1: token[]) -> f32[16] {
  %r.0 = f32[16]{0:T(128)S(1)} parameter(0)
  %r.1 = token[] parameter(1)
  ROOT %sum = f32[16]{0:T(128)S(1)} all-reduce(%r.0), replica_groups={{0,1,2,3}}
}, execution_thread="sparsecore"

%body (arg"""


@pytest.mark.parametrize("start", ["call-start to_apply", "async-start calls"])
def test_what_runs_beside_is_counted(start: str):
    """As a v7x runs its collectives and copies; what starts them moves nothing."""
    opcode, attribute = start.split()
    begun = (
        f"%begun = ((f32[16], token[]), f32[16]) {opcode}(%pair), "
        f"{attribute}=%on_sparse_cores\n  %over = f32[16] "
        f"{opcode.removesuffix('start')}done(%begun)"
    )
    summed = next(line.strip() for line in LOOP.splitlines() if "all-reduce" in line)
    text = LOOP.replace("\n%body (arg", BESIDE).replace(summed, begun)
    assert traffic(parse(text), 8) == traffic(parse(LOOP), 8)


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="how often the loop loop runs"):
        traffic(parse(LOOP.replace("%five = s32[] constant(5)", "")), 8)


def test_a_program_of_this_machine():
    """Twelve products cut along K end in twelve sums over eight devices."""
    mesh = Mesh(jax.devices(), ("x",))

    def placed(shape, *spec):
        where = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    def f(stack, x):
        def body(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(body, x, stack)[0]

    w, x = placed((12, 64, 64), None, "x", None), placed((16, 64))
    compiled = jax.jit(f).lower(w, x).compile()
    found = traffic(parse(compiled.as_text()), 8)
    assert found.collectives == 12
    assert found.sent == 12 * 2 * 7 / 8 * 4 * 16 * 64
    assert found.memory > 4 * (12 * 64 * 64 / 8)


def test_a_refusal_is_read():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (20.18G) exceeds available HBM (15.75G).\nmore"
    )
    found = out_of_memory(said)
    assert found.needed == int(20.18 * 2**30)
    assert found.available == int(15.75 * 2**30)
    assert not found.fits(10**15)
    assert found.message.startswith("Ran out of memory on HBM")
