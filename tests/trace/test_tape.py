"""The straight line of a program: what is opened, what is known, what is a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.trace.tape import Meeting, Region

x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)


def tape_of(kit, f, shapes, *inputs):
    return kit.lanes(f, kit.tree(shapes), [inputs or (x,)])[0].tape


def keys(tape):
    return [(m.weight.leaf, m.weight.index) for m in tape.meetings]


def test_every_case_meets_its_leaves(kit):
    """What `sites` finds, the tape finds; only `shard_map` stays closed."""
    for name, case in kit.CASES.items():
        tape = tape_of(kit, case.f, case.shapes, *case.inputs)
        met = {leaf for leaf, _ in keys(tape)}
        closed = {leaf for leaf, _ in tape.closed}
        assert met | closed == set(range(len(case.shapes))), name
        assert bool(closed) == ("shard_map" in name), name


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: f])
def test_calls_are_opened(kit, wrap):
    def f(params, x):
        return wrap(lambda w, h: jnp.tanh(h @ w))(params["w"], x)

    tape = tape_of(kit, f, {"w": (8, 8)})
    assert [op.eqn.primitive.name for op in tape.ops] == ["dot_general", "tanh"]


def test_layers_of_a_scan_follow_each_other(kit):
    def f(params, x):
        return jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w), h.sum()), x, params["w"], reverse=True
        )

    tape = tape_of(kit, f, {"w": (3, 8, 8)})
    assert keys(tape) == [(0, (2,)), (0, (1,)), (0, (0,))]
    assert len(tape.seams) == 4
    assert not any(isinstance(op, Region) for op in tape.ops)


@pytest.mark.parametrize("index", [0, 2, -1, 7])
def test_a_layer_taken_by_a_number(kit, index):
    """A number outside is moved inside, as the operation does."""

    def f(params, x):
        return x @ jax.lax.dynamic_index_in_dim(params["w"], index, keepdims=False)

    params = kit.tree({"w": (3, 8, 8)})
    tape = kit.lanes(f, params, [(x,)])[0].tape
    assert keys(tape) == [(0, (min(index % 3 if index < 0 else index, 2),))]
    (got,) = kit.through(f, params, [(x,)])
    assert kit.error(got, jax.jit(f)(params, x)) == 0


@pytest.mark.parametrize("turned", [False, True])
def test_a_loop_that_counts_through_layers(kit, turned):
    def f(params, x):
        def step(i, h):
            return jnp.tanh(h @ params["w"][2 - i if turned else i] @ params["shared"])

        return jax.lax.fori_loop(0, 3, step, x)

    params = kit.tree({"w": (3, 8, 8), "shared": (8, 8)})
    tape = kit.lanes(f, params, [(x,)])[0].tape
    layers = [index for leaf, index in keys(tape) if leaf == 1]
    assert layers == [(2 - i if turned else i,) for i in range(3)]
    (got,) = kit.through(f, params, [(x,)])
    assert kit.error(got, jax.jit(f)(params, x)) == 0


def test_a_loop_over_time_is_a_region(kit):
    def f(params, x):
        step = lambda h, row: (jnp.tanh(row @ params["w"] + h), None)
        return jax.lax.scan(step, jnp.zeros(8), x)[0]

    tape = tape_of(kit, f, {"w": (8, 8)})
    regions = [op for op in tape.ops if isinstance(op, Region)]
    assert [(r.kind, len(r.meetings)) for r in regions] == [("scan", 1)]


def test_a_branch_that_is_known_is_taken(kit):
    def f(params, x):
        def layer(i, h):
            branches = [lambda h: h @ params["a"], lambda h: h @ params["b"]]
            return jax.lax.switch(i, branches, h)

        for i in (1, 0, 1):
            x = jax.jit(layer)(i, x)
        return x

    shapes = {"a": (8, 8), "b": (8, 8)}
    tape = tape_of(kit, f, shapes)
    assert all(
        isinstance(op, Region) for op in tape.ops if op.eqn.primitive.name == "cond"
    )
    params = kit.tree(shapes)
    (got,) = kit.through(f, params, [(x,)])
    assert kit.error(got, jax.jit(f)(params, x)) == 0

    def known(params, x):
        return jax.lax.scan(
            lambda h, i: (
                jax.lax.switch(
                    i,
                    [lambda h, w: h @ w, lambda h, w: jnp.sin(h @ w)],
                    h,
                    params["w"][i],
                ),
                None,
            ),
            x,
            jnp.arange(2),
        )[0]

    tape = tape_of(kit, known, {"w": (2, 8, 8)})
    assert keys(tape) == [(0, (0,)), (0, (1,))]
    names = [op.eqn.primitive.name for op in tape.ops]
    assert names.count("sin") == 1
    assert "cond" not in names


def joined(params, x):
    together = jnp.concatenate([params["q"], params["k"]], axis=1)
    return x @ together, together.sum(), jnp.concatenate([together, together], axis=0)


def test_joined_leaves(kit):
    """Met one by one; where something else reads them, one array."""
    params = kit.tree({"q": (8, 6), "k": (8, 2)})
    tape = kit.lanes(joined, params, [(x,)])[0].tape
    assert len(tape.meetings) == 2
    assert tape.meetings[0].source == tape.meetings[1].source
    (got,) = kit.through(joined, params, [(x,)])
    assert kit.error(got, jax.jit(joined)(params, x)) <= 1e-6


def test_a_leaf_joined_with_what_is_none(kit):
    def f(params, x):
        return x @ jnp.concatenate([params["w"], jnp.ones((8, 2)) * x.sum()], axis=1)

    params = kit.tree({"w": (8, 6)})
    tape = kit.lanes(f, params, [(x,)])[0].tape
    assert keys(tape) == [(0, ())]
    (got,) = kit.through(f, params, [(x,)])
    assert kit.error(got, jax.jit(f)(params, x)) <= 1e-6


def test_a_leaf_through_two_dtypes(kit):
    """It is rounded as the program rounds it, and still met."""

    def f(params, x):
        narrow = params["w"].astype(jnp.bfloat16).T
        return x @ narrow.astype(jnp.float32)

    params = kit.tree({"w": (6, 8)})
    tape = kit.lanes(f, params, [(x,)])[0].tape
    assert keys(tape) == [(0, ())]
    (got,) = kit.through(f, params, [(x,)])
    assert kit.error(got, jax.jit(f)(params, x)) == 0


def test_meetings_of_one_leaf_are_numbered(kit):
    def f(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"] @ params["v"]

    tape = tape_of(kit, f, {"w": (8, 8), "v": (8, 8)})
    assert [(m.weight.leaf, m.number) for m in tape.meetings] == [
        (1, 0),
        (1, 1),
        (0, 0),
    ]


def sources(kit, f, shapes, *inputs):
    return [m.source for m in tape_of(kit, f, shapes, *inputs).meetings]


def test_equal_activations_have_one_source(kit):
    """Copies in another dtype or shape too; the order of K tells readings apart."""

    def copies(params, x):
        h = jnp.sin(x)
        return [h.astype(jnp.bfloat16) @ params[n] for n in "ab"], h @ params["a"]

    a, b, c = sources(kit, copies, {"a": (8, 4), "b": (8, 5)})
    assert a == b != c

    def orders(params, x):
        h = jnp.sin(x).reshape(5, 2, 4)
        same = [jnp.einsum("thd,hdn->tn", h, params[n]) for n in "ab"]
        return same, jnp.einsum("thd,dhn->tn", h, params["c"])

    a, b, c = sources(kit, orders, {"a": (2, 4, 3), "b": (2, 4, 5), "c": (4, 2, 3)})
    assert a == b != c


def test_kernels_of_one_image(kit):
    """Two layouts of a kernel read the image in two orders of K."""
    image = jnp.ones((1, 5, 5, 2))

    def conv(x, w, spec, stride=1):
        numbers = ("NHWC", spec, "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=numbers
        )

    def f(params, x):
        outs = [conv(x, params[n], "HWIO") for n in "ab"]
        return outs, conv(x, params["c"], "OIHW"), conv(x, params["a"], "HWIO", 2)

    shapes = {"a": (3, 3, 2, 4), "b": (3, 3, 2, 5), "c": (4, 2, 3, 3)}
    a, b, c, d = sources(kit, f, shapes, image)
    assert a == b
    assert len({a, c, d}) == 3


def test_known_values_are_made_where_they_are_read(kit):
    """A table of positions, a captured array: known in every program that reads it."""
    table = jnp.linspace(0.0, 1.0, 8)

    def f(params, x):
        angles = jnp.cos(jnp.arange(5)[:, None] * table)
        for n in "ab":
            x = (x * angles) @ params[n]
        return x

    tape = tape_of(kit, f, {"a": (8, 8), "b": (8, 8)})
    free = {
        op.eqn.primitive.name
        for i, op in enumerate(tape.ops)
        if i in tape.free.values()
    }
    assert "cos" in free
    assert {"dot_general"} & free == set()
    assert [v.shape for v in tape.written.values()] == [(8,)]
    large = jnp.ones((64, 65))  # too large to write into every program

    def g(params, x):
        return (x @ params["a"]).sum() * jnp.sin(large)

    tape = tape_of(kit, g, {"a": (8, 8)})
    assert not tape.written
    assert "sin" not in {tape.ops[i].eqn.primitive.name for i in tape.free.values()}


def test_effects_are_not_evaluated_while_the_tape_is_written(kit, capfd):
    def f(params, x):
        jax.debug.print("three {}", 3)
        return x @ params["w"]

    tape = tape_of(kit, f, {"w": (8, 8)})
    jax.effects_barrier()
    assert "three" not in capfd.readouterr().out
    assert sum(isinstance(op, Meeting) for op in tape.ops) == 1


def test_an_empty_scan_is_a_region(kit):
    def f(params, x):
        return jax.lax.scan(lambda h, w: (h @ w, h), x, params["w"])

    tape = kit.lanes(f, {"w": jnp.ones((0, 8, 8))}, [(x,)])[0].tape
    assert [type(op) for op in tape.ops] == [Region]
    assert [tape.avals[v].shape for v in tape.outputs] == [(5, 8), (0, 5, 8)]
