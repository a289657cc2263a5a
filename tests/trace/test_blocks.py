"""Blocks: pure functions of leaves and live values, which chain to the program."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.observe import namer
from qjax.quantize import quantize_with_report
from qjax.trace.blocks import find_blocks, spans_of, whole_blocks
from qjax.trace.segments import evaluate, live
from qjax.trace.sites import sites


def opened(kit, f, params, *inputs):
    lane = kit.lanes(f, params, [inputs])[0]
    name = namer(sites(f, params, *inputs), lane.program)
    return lane, find_blocks(lane.tape, name)


def leaves_of(lane, keys):
    return [lane.program.leaves[leaf][index] for leaf, index in keys]


def chained(lane, blocks, inputs):
    """The program, block by block, with what lies between them."""
    tape, place = lane.tape, 0
    env = dict(zip(tape.inputs, inputs, strict=True))

    def between(stop):
        segment = live(tape, place, stop)
        held = leaves_of(lane, segment.leaves)
        constants = [tape.constants[c] for c in segment.constants]
        values = [env[v] for v in segment.ins]
        run = jax.jit(lambda *a: evaluate(tape, segment, *a))
        env.update(zip(segment.outs, run(held, constants, values), strict=True))

    for block in blocks:
        between(block.start)
        out = jax.jit(block)(
            leaves_of(lane, block.leaves), [env[v] for v in block.live_in]
        )
        env.update(zip(block.live_out, out, strict=True))
        place = block.stop
    between(len(tape.ops))
    return [env[v] for v in tape.outputs]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2", "opt_350m", "bert"])
def test_blocks_chain_to_the_program(kit, name, scan):
    f, params = kit.model(name, layers=3, scan_layers=scan)
    batch = (kit.tokens(2, 12),)
    lane, blocks = opened(kit, f, params, *batch)
    assert [b.name for b in blocks] == ["layers/0", "layers/1", "layers/2"]
    assert all(a.stop <= b.start for a, b in pairwise(blocks))
    got = chained(lane, blocks, batch)
    assert kit.error(got, jax.jit(f)(params, *batch)) <= 1e-6


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_blocks_of_equal_structure_are_one_program(kit, name, scan):
    f, params = kit.model(name, layers=4, scan_layers=scan)
    _, blocks = opened(kit, f, params, kit.tokens(2, 12))
    assert len({b.segment.key for b in blocks}) == 1
    assert len({(len(b.live_in), len(b.live_out)) for b in blocks}) == 1


def test_layers_that_differ_are_two_programs(kit):
    def f(params, x):
        for i, layer in enumerate(params["layers"]):
            x = jnp.tanh(x @ layer["w"]) if i != 1 else jnp.sin(x @ layer["w"])
        return x

    params = {"layers": [{"w": jnp.ones((4, 4))} for _ in range(3)]}
    _, blocks = opened(kit, f, params, jnp.ones((2, 4)))
    assert [b.name for b in blocks] == ["layers/0", "layers/1", "layers/2"]
    a, b, c = (block.segment.key for block in blocks)
    assert a == b == c  # a block ends behind its last leaf
    f, params = kit.model("qwen3_moe", layers=2)
    _, blocks = opened(kit, f, params, kit.tokens(2, 12))
    _, others = opened(kit, f, params, kit.tokens(2, 9))
    assert blocks[0].segment.key == blocks[1].segment.key != others[0].segment.key


def middle(kit, scan=True):
    f, params = kit.model("llama", layers=3, scan_layers=scan)
    batch = (kit.tokens(2, 12),)
    lane, blocks = opened(kit, f, params, *batch)
    block = blocks[1]
    avals = [lane.tape.avals[v] for v in block.live_in]
    rng = np.random.default_rng(0)

    def value(aval):
        if jnp.issubdtype(aval.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=aval.shape), aval.dtype)
        return jnp.ones(aval.shape, aval.dtype)

    return block, leaves_of(lane, block.leaves), [value(a) for a in avals]


def test_a_gradient_through_a_block(kit):
    """By its leaves and by its input; checked against a difference."""
    block, leaves, live_in = middle(kit)
    floats = [i for i, x in enumerate(live_in) if x.dtype == jnp.float32]

    def loss(leaves, x):
        given = list(live_in)
        given[floats[0]] = x
        return sum(jnp.sum(jnp.sin(y)) for y in block(leaves, given))

    x = live_in[floats[0]]
    by_leaf, by_input = jax.jit(jax.grad(loss, argnums=(0, 1)))(leaves, x)
    assert all(np.isfinite(g).all() and np.any(np.asarray(g) != 0) for g in by_leaf)
    step = 1e-2 * jnp.asarray(
        np.random.default_rng(1).normal(size=x.shape), jnp.float32
    )
    change = loss(leaves, x + step) - loss(leaves, x - step)
    np.testing.assert_allclose(change, 2 * jnp.vdot(by_input, step), rtol=2e-2)


def test_a_block_with_quantized_leaves(kit):
    """Weights alone are decoded; coded activations run as `apply` runs them."""
    block, leaves, live_in = middle(kit)
    exact = block(leaves, live_in)
    for scheme, bound in (("W8A16", 0.02), ("W8A8", 0.1)):
        method = qjax.RTN(scheme)
        coded = [coded_leaf(method, w) if w.ndim == 2 else w for w in leaves]
        got = jax.jit(block)(coded, live_in)
        for a, b in zip(got, exact, strict=True):
            distance = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            assert 0 < distance < bound


def coded_leaf(method, w):
    def f(params, x):
        return x @ params["w"]

    example = (jnp.ones((2, w.shape[0])),)
    return qjax.quantize(f, {"w": w}, method, example=example, progress=False)["w"]


def test_without_numbered_layers_there_are_no_blocks(kit):
    def f(params, x):
        return x @ params["a"] @ params["b"]

    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    assert opened(kit, f, params, jnp.ones((2, 4)))[1] == ()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2", "bert"])
def test_whole_blocks_carry_the_residual_stream_alone(kit, name, scan):
    f, params = kit.model(name, layers=3, scan_layers=scan)
    lane = kit.lanes(f, params, [(kit.tokens(2, 12),)])[0]
    called = namer(sites(f, params, kit.tokens(2, 12)), lane.program)
    spans = spans_of(lane.tape, called, lambda b: b.rsplit("/", 1)[-1].isdigit())
    blocks = whole_blocks(lane.tape, spans).values()
    assert [b.name for b in blocks] == ["layers/0", "layers/1", "layers/2"]
    for block in blocks:
        (out,) = [
            v for v, yes in zip(block.live_out, block.made_from(block.leaves)) if yes
        ]
        assert lane.tape.avals[out].shape == (2, 12, 32)
        assert block.start <= spans[block.name][0] < spans[block.name][1] <= block.stop
    assert len({b.segment.key for b in blocks}) == 1


def test_blocks_that_take_turns_are_refused(kit):
    def f(params, x):
        for name in ("a", "b"):
            for layer in params["layers"]:
                x = jnp.tanh(x @ layer[name])
        return x

    params = {"layers": [dict.fromkeys("ab", jnp.ones((4, 4))) for _ in range(2)]}
    with pytest.raises(
        ValueError, match="layers/1 is read before layers/0 is finished"
    ):
        lane = kit.lanes(f, params, [(jnp.ones((2, 4)),)])[0]
        called = namer(sites(f, params, jnp.ones((2, 4))), lane.program)
        whole_blocks(lane.tape, spans_of(lane.tape, called, lambda block: True))


INT3 = {"weights": qjax.Int(3, qjax.group(8)), "batch_size": 4}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("mixtral", qjax.AutoRound(**INT3, iters=30)),
        ("qwen3_moe", qjax.AutoRound(**INT3, iters=30)),
        ("qwen3_moe", qjax.BRECQ(**INT3, iters=400)),
        ("qwen3_moe", qjax.OmniQuant(**INT3, iters=30)),
        ("qwen3_moe", qjax.EfficientQAT(**INT3, iters=30)),
        ("qwen3_moe", qjax.ZeroQuantLKD(**INT3, iters=30, lr=1e-4)),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_blocks_of_experts_are_learned(name, method, kit):
    """Two batches a step, whose groups of rows JAX cannot run side by side."""
    f, params = kit.model(name, layers=2, scan_layers=name == "mixtral")
    batches = [(kit.tokens(2, 8, seed=i),) for i in range(4)]
    _, report = quantize_with_report(
        f, params, method, batches, key=jax.random.key(0), progress=False
    )
    experts = [row for row in report.sites if "experts" in row.name]
    assert len(experts) == 6 and {row.measured for row in experts} == {"block"}
    assert all(row.error < row.error_before for row in experts)
