"""Control flow that is not opened: its sites are watched while it runs by steps."""

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.trace.tape import Region


def recurrent(params, x):
    """A cell over time; its input, its state and its gate are three activations."""

    def step(h, x):
        gate = jax.nn.sigmoid(h @ params["gate"])
        h = gate * jnp.tanh(x @ params["w"] + h @ params["u"])
        return h, h

    _, ys = jax.lax.scan(step, jnp.zeros((x.shape[1], 8)), x)
    return ys @ params["out"]


def cell_params():
    shapes = {"gate": (8, 8), "w": (6, 8), "u": (8, 8), "out": (8, 3)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys)}


def replayed(params, x):
    """By hand: what `w` and `u` see, over time."""
    h, seen = jnp.zeros((x.shape[1], 8)), []
    for row in x:
        seen.append(h)
        gate = jax.nn.sigmoid(h @ params["gate"])
        h = gate * jnp.tanh(row @ params["w"] + h @ params["u"])
    return x.reshape(-1, 6), jnp.concatenate(seen)


def test_a_cell_over_time_is_watched(kit):
    params, x = cell_params(), jax.random.normal(jax.random.key(1), (11, 4, 6))
    stream = kit.open_stream(recurrent, params, [(x,), (2 * x,)])
    names = [p.names for p in stream.points]
    assert names == [("gate", "u"), ("w",), ("out",)]
    assert [p.inside for p in stream.points] == ["scan", "scan", ""]
    for point in stream:
        by_batch = {0: [], 1: []}
        for number, op, a, _, _ in stream.inputs(point):
            by_batch[number].append(np.asarray(a).reshape(-1, op.call.layout.K))
        for number, scale in ((0, 1), (1, 2)) if point.inside else ():
            rows, states = replayed(params, scale * x)
            want = states if point.names[0] == "gate" else rows
            got = np.concatenate(by_batch[number])
            np.testing.assert_allclose(got, want, atol=1e-6)
    assert kit.error(stream.finish()[0], jax.jit(recurrent)(params, x)) == 0


def branching(params, x):
    def left(x):
        return x @ params["a"]

    def right(x):
        return jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ params["b"]), x)

    y = jax.lax.cond(x.sum() > 0, left, right, x)

    def more(state):
        count, h = state
        return (jnp.linalg.norm(h @ params["test"]) > 0.1) & (count < 6)

    def step(state):
        return state[0] + 1, 0.5 * (state[1] @ params["b"])

    return jax.lax.while_loop(more, step, (0, y))[1]


def test_branches_and_loops_are_watched(kit):
    params = {
        n: 0.6 * jax.random.normal(jax.random.key(i), (8, 8))
        for i, n in enumerate("ab")
    } | {"test": jnp.eye(8)}
    x = 1 + jax.random.normal(jax.random.key(7), (5, 8))
    stream = kit.open_stream(branching, params, [(x,), (-x,), (x,)])
    assert all(p.inside for p in stream.points)
    visits = {}
    for point in stream:
        for number, _, a, _, _ in stream.inputs(point):
            per_visit = np.asarray(a).reshape(-1, 5, 8)
            visits.setdefault((point.names[0], number), []).append(per_visit)
    # `b` is met first in the branch that only the second batch takes.
    assert {n for n, number in visits if number == 0} == {"a", "test"}
    assert {n for n, number in visits if number == 1} == {"b", "test"}
    np.testing.assert_array_equal(visits["a", 0][0][0], x)
    states = np.concatenate(visits["b", 1])
    np.testing.assert_array_equal(states[0], -x)
    np.testing.assert_allclose(states[1], np.tanh(-x @ params["b"]), atol=1e-6)
    y, count = x @ params["a"], 0
    for got in np.concatenate(visits["test", 0]):
        np.testing.assert_allclose(got, y, atol=1e-5)
        y, count = 0.5 * (y @ params["b"]), count + 1
    assert count == 7 or np.linalg.norm(got) <= 0.1


def test_a_region_runs_with_its_quantized_weights_and_activations(kit):
    """What `apply` does inside control flow is what the pass does."""

    def f(params, x):
        def step(h, x):
            return jnp.tanh(x @ params["w"] + h @ params["u"]), None

        return jax.lax.scan(step, jnp.zeros((x.shape[1], 8)), x)[0]

    params = {"w": cell_params()["w"], "u": cell_params()["u"]}
    x = jax.random.normal(jax.random.key(1), (5, 4, 6))
    scheme = qjax.RTN("W8A8", targets=("w", "u"))
    qparams = qjax.quantize(f, params, scheme, [(x,)], progress=False)
    stream = kit.open_stream(f, params, [(x,)])
    for point in stream:
        for key, name in zip(point.keys, point.names, strict=True):
            stream.solved[key] = qparams[name]
    want = jax.jit(qjax.apply(f))(qparams, x)
    assert kit.error(stream.finish()[0], want) <= 1e-6
    assert kit.error([jax.jit(f)(params, x)], want) > 1e-3


def test_a_leaf_inside_shard_map_is_named(kit):
    case = kit.CASES["shard_map_outputs"]
    tape = kit.lanes(case.f, kit.tree(case.shapes), [case.inputs])[0].tape
    assert tape.closed == ((0, "shard_map"),)
    assert any(isinstance(op, Region) for op in tape.ops)
