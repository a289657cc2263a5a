"""The pass over a program: no value kept too long, no leaf read too early or twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import encode
from qjax.core.formats import Int
from qjax.core.layout import Layout
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import QTensor

pytestmark = pytest.mark.optimized


def test_activations_on_the_host(kit):
    f, params = kit.model("llama", scan_layers=True)
    batches = [(kit.tokens(2, 12),), (kit.tokens(2, 12, 1),)]
    stream = kit.open_stream(f, params, batches, offload=True)
    for _ in stream:
        held = [x for env in stream.values[0] for x in env.values()]
        made = held if stream.at else []
        assert all(isinstance(x, np.ndarray) for x in made)
    for got, batch in zip(stream.finish(), batches, strict=True):
        assert kit.error(got, jax.jit(f)(params, *batch)) == 0


def layered(params, x, key, unused):
    """Known noise, a random stream, a leaf that is returned, a scan's outputs."""
    noise = jnp.arange(16.0) / 16

    def layer(carry, w):
        h, key = carry
        key, mine = jax.random.split(key)
        h = jnp.tanh(h @ w + noise + 0.1 * jax.random.normal(mine, h.shape))
        return (h, key), h.sum()

    (h, _), sums = jax.lax.scan(layer, (x, key), params["w"])
    return h, sums, params["b"], noise * 2, x


def test_outputs_of_every_kind(kit):
    params = {"w": jax.random.normal(jax.random.key(1), (3, 16, 16)), "b": jnp.ones(4)}
    x, key = jax.random.normal(jax.random.key(2), (5, 16)), jax.random.key(3)
    batch = (x, key, jnp.zeros(3))
    want = jax.jit(layered)(params, *batch)
    for offload in (False, True):
        stream = kit.open_stream(layered, params, [batch], offload=offload)
        for _ in stream:
            pass
        assert kit.error(stream.finish()[0], want) == 0
    assert len(stream.points) == 3


def read_later(tape, place):
    """What operations from `place` on read, and the outputs, made before it."""
    made = {v for op in tape.ops[:place] for v in op.outs} | set(tape.inputs)
    later = [x for op in tape.ops[place:] for x in op.ins if isinstance(x, int)]
    read = {*later, *(x for x in tape.outputs if isinstance(x, int))}
    return (made & read) - set(tape.free)


@pytest.mark.parametrize("scan", [False, True])
def test_an_activation_is_dropped_at_its_last_use(kit, scan):
    f, params = kit.model("llama", layers=4, scan_layers=scan)
    stream = kit.open_stream(f, params, [(kit.tokens(2, 12),)])
    tape = stream.lanes[0].tape
    sizes = []
    for point in stream:
        place = point.places[0][0]
        held = set(stream.values[0][0])
        assert held == {v for v in read_later(tape, place) if v in held | made(tape)}
        sizes.append((point.block, sum(tape.avals[v].size for v in held)))
    blocks = [[n for b, n in sizes if b == f"layers/{i}"] for i in range(4)]
    assert blocks[1] == blocks[2] == blocks[3]  # nothing piles up


def made(tape):
    return {v for op in tape.ops for v in op.outs} - set(tape.free)


def test_inputs_that_nothing_reads_are_dropped_at_once(kit):
    def f(params, x, unused):
        return x @ params["w"]

    batch = (jnp.ones((2, 4)), jnp.ones(1000))
    stream = kit.open_stream(f, {"w": jnp.ones((4, 3))}, [batch])
    assert [x.size for x in stream.values[0][0].values()] == [8]


def lazy(leaf, log, by_layer):
    """A leaf on disk; `log` counts what is read."""

    def read():
        log.append("whole")
        return leaf

    def read_layer(i):
        log.append(i)
        return leaf[i]

    return LazyLeaf(leaf.shape, leaf.dtype, read, read_layer if by_layer else None)


def test_a_lazy_leaf_is_read_when_needed_and_one_layer_at_a_time(kit):
    def f(params, x):
        x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])
        return x @ params["head"]

    w, head = jnp.ones((3, 8, 8)) / 8, jnp.ones((8, 2))
    log, late = [], []
    params = {"w": lazy(w, log, True), "head": lazy(head, late, False)}
    x = jnp.ones((2, 8))
    stream = kit.open_stream(f, params, [(x,), (2 * x,)])
    assert log == []
    for number, _ in enumerate(stream):
        assert log == list(range(min(number, 3)))
        assert late == []
    got = stream.finish()
    assert log == [0, 1, 2]
    assert late == ["whole"]
    assert kit.error(got[0], jax.jit(f)({"w": w, "head": head}, x)) == 0


def rounded(leaf):
    return jnp.round(leaf * 8) / 8


def test_solved_weights_are_used_from_their_point_on(kit):
    f, params = kit.model("qwen2", layers=2)
    batches = [(kit.tokens(2, 12),), (kit.tokens(3, 7),)]
    stream = kit.open_stream(f, params, batches, wanted="layers")
    new = jax.tree.map(lambda x: x, params)
    for point in stream:
        for key, name in zip(point.keys, point.names, strict=True):
            stream.solved[key] = rounded(stream.read(key))
            *path, last = name.split("/")
            node = new
            for part in path:
                node = node[part]
            node[last] = rounded(node[last])
    assert sum(len(p.keys) for p in stream.points) == 14
    for got, batch in zip(stream.finish(), batches, strict=True):
        assert kit.error(got, jax.jit(f)(new, *batch)) == 0


def test_parts_of_a_leaf_that_is_also_read_whole(kit):
    """Layers that were solved are there for what reads the whole stack."""

    def f(params, x):
        x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])
        return x, jnp.sum(params["w"])

    params = {"w": jax.random.normal(jax.random.key(0), (3, 8, 8))}
    batch = (jnp.ones((3, 8)),)
    stream = kit.open_stream(f, params, [batch])
    for point in stream:
        for key in point.keys:
            part = encode(stream.read(key), Int(4))
            layout = Layout("kn", part.shape)
            stream.solved[key] = QTensor.of(part, layout, jnp.float32)
    w = jnp.stack([encode(w, Int(4)).decode(jnp.float32) for w in params["w"]])
    assert len(stream.points) == 3
    assert kit.error(stream.finish()[0], jax.jit(f)({"w": w}, *batch)) == 0


def test_the_full_precision_stream_runs_beside(kit):
    def f(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {
        "a": jax.random.normal(jax.random.key(0), (8, 8)),
        "b": jax.random.normal(jax.random.key(1), (8, 4)),
    }
    x = jax.random.normal(jax.random.key(2), (5, 8))
    stream = kit.open_stream(f, params, [(x,)], full=True)
    seen = []
    for point in stream:
        seen += [
            (np.asarray(q), np.asarray(f)) for _, _, q, f, _ in stream.inputs(point)
        ]
        stream.solved[point.keys[0]] = rounded(params["a"])
    (first, first_full), (second, second_full) = seen
    np.testing.assert_array_equal(first, first_full)
    np.testing.assert_allclose(second, np.tanh(x @ rounded(params["a"])), rtol=1e-6)
    np.testing.assert_allclose(second_full, np.tanh(x @ params["a"]), rtol=1e-6)


def test_another_order_for_another_shape_is_refused(kit):
    def f(params, x):
        order = ("a", "b") if x.shape[0] > 2 else ("b", "a")
        for name in order:
            x = x @ params[name]
        return x

    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    with pytest.raises(
        ValueError, match="in another order for batches of another shape"
    ):
        kit.open_stream(f, params, [(jnp.ones((2, 4)),), (jnp.ones((3, 4)),)])
