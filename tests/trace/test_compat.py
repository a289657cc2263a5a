"""What `trace/compat` reads from equations, one small test per primitive."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qjax.trace import apply, compat, sites

w, x = jnp.ones((4, 4)), jnp.ones((3, 4))


def only(f, *args):
    """The first equation that holds a body."""
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    return next(e for e in jaxpr.eqns if compat.has_bodies(e))


@jax.custom_vjp
def custom_vjp(x, w):
    return x @ w


custom_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def custom_jvp(x, w):
    return x @ w


custom_jvp.defjvp(lambda p, t: (custom_jvp(*p), t[0] @ p[1] + p[0] @ t[1]))


def shard_map(x, w):
    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    return f(x, w)


BODIES = {
    "jit": (lambda x, w: jax.jit(jnp.matmul)(x, w), "jit"),
    "remat": (lambda x, w: jax.checkpoint(jnp.matmul)(x, w), "remat"),
    "custom_vjp": (custom_vjp, "custom"),
    "custom_jvp": (custom_jvp, "custom"),
    "shard_map": (shard_map, "shard_map"),
}


@pytest.mark.parametrize("name", BODIES)
def test_call_bodies(name):
    f, kind = BODIES[name]
    eqn = only(f, x, w)
    assert compat.kind(eqn) == kind
    jaxpr, consts = compat.call_body(eqn)
    inner = [e.primitive.name for e in jaxpr.eqns]
    assert "dot_general" in inner or "jit" in inner
    assert len(jaxpr.constvars) == len(consts)


def test_scan_groups():
    def f(x, w):
        return jax.lax.scan(lambda c, y: (c @ w + y, c.sum()), x, jnp.ones((5, 1)))

    eqn = only(f, x, w)
    assert compat.kind(eqn) == "scan"
    assert compat.scan_groups(eqn) == (1, 1)
    jaxpr, consts = compat.body(eqn.params["jaxpr"])
    assert len(jaxpr.invars) == 3
    assert len(consts) == len(jaxpr.constvars)


def test_cond_branches():
    eqn = only(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), x, w)
    assert compat.kind(eqn) == "cond"
    bodies = [compat.body(branch)[0] for branch in eqn.params["branches"]]
    assert sorted(len(b.eqns) for b in bodies) == [0, 1]


def test_while_bodies():
    def f(x, w):
        return jax.lax.while_loop(lambda s: s.sum() < 9, lambda s: s @ w, x)

    eqn = only(f, x, w)
    assert compat.kind(eqn) == "while"
    assert eqn.params["cond_nconsts"] == 0
    assert eqn.params["body_nconsts"] == 1
    assert compat.body(eqn.params["body_jaxpr"])[0].eqns


def test_remat_options_rebuild_the_policy():
    policy = jax.checkpoint_policies.dots_saveable
    eqn = only(lambda x, w: jax.checkpoint(jnp.matmul, policy=policy)(x, w), x, w)
    assert compat.remat_options(eqn)["policy"] is policy


def test_bind_evaluates_an_equation():
    jaxpr = jax.make_jaxpr(lambda x, w: x @ w)(x, w).jaxpr
    (eqn,) = jaxpr.eqns
    with compat.context(eqn):
        (out,) = compat.bind(eqn, [x, w])
    chex.assert_trees_all_equal(out, x @ w)


def test_name_stack_is_kept():
    def f(p, x):
        with jax.named_scope("attention"):
            return jnp.sin(x @ p["w"])

    from qjax.core.coded import encode
    from qjax.core.formats import Int
    from qjax.core.layout import Layout
    from qjax.core.qtensor import QTensor

    q = {"w": QTensor.of(encode(w, Int(8)), Layout("kn", (4, 4)), w.dtype)}
    text = jax.jit(apply(f)).lower(q, x).as_text(debug_info=True)
    assert "attention" in text


FLAGS = ("jax_remat3", "jax_custom_vjp3")


def flags(on):
    stack = contextlib.ExitStack()
    for name in FLAGS:
        if name in jax.config.values:
            old = jax.config.values[name]
            stack.callback(jax.config.update, name, old)
            jax.config.update(name, on)
    return stack


def test_high_level_primitives_give_the_same_sites():
    """The flags move remat and custom_vjp under `call_hi_primitive`."""

    def f(p, x):
        h = jax.checkpoint(lambda x, w: jnp.sin(x @ w))(x, p["a"])
        return custom_vjp(h, p["b"])

    params = {"a": w, "b": w}
    with flags(False):
        plain = sites(f, params, x)
    with flags(True):
        high = sites(f, params, x)
    assert [s.path for s in plain.weights] == ["a", "b"]
    assert high.weights == plain.weights
