"""Each site reads its own activation record, however the program is nested."""

import chex
import jax
import jax.numpy as jnp
import pytest

from qjax.core.coded import encode
from qjax.core.formats import Int
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, SiteActs
from qjax.core.transforms import Diagonal
from qjax.trace import apply, sites

w = jax.random.normal(jax.random.key(0), (16, 16)) / 4
x = jax.random.normal(jax.random.key(1), (3, 16))
layer = jax.jit(lambda w, h: h @ w)


def cond(p, x):
    h = x @ p
    h = jax.lax.cond(h.sum() > 0, lambda: h @ p, lambda: -(h @ p))
    return h @ p


def switch(p, x):
    branches = [lambda h: h @ p, lambda h: (h @ p) @ p, lambda h: h @ p]
    return jax.lax.switch(1, branches, x)


def loop(p, x):
    def test(state):
        return (state[1] @ p).sum() * 0 + state[0] < 2

    return jax.lax.while_loop(test, lambda s: (s[0] + 1, s[1] @ p), (0, x @ p))[1]


def twice_in_one_call(p, x):
    return jax.jit(lambda a, b, h: (h @ a) @ b)(p, p, x)


def cached(p, x):
    return layer(p, layer(p, x))


CASES = {
    "cond": (cond, 4),
    "switch": (switch, 4),
    "while": (loop, 3),
    "twice_in_one_call": (twice_in_one_call, 2),
    "cached": (cached, 2),
}


def recorded(count):
    """The weight with another factor at every site."""
    factors = [2.0 ** (i + 1) for i in range(count)]
    acts = [SiteActs(t_in=Diagonal(jnp.full(16, s))) for s in factors]
    coded = encode(w, Int(8))
    return QTensor.of(coded, Layout("kn", w.shape), w.dtype, acts), factors


@pytest.mark.parametrize("name", CASES)
def test_sites_are_numbered_in_program_order(name):
    f, count = CASES[name]
    q, _ = recorded(count)
    assert [s.index for s in sites(f, w, x).weights] == list(range(count))
    assert [s.index for s in sites(f, q, x).weights] == list(range(count))


def test_records_are_taken_by_number():
    q, factors = recorded(4)
    plain = QTensor.of(q.parts, q.layout, q.dtype)
    for start in (x, -x):
        # JAX keeps the branch of False first.
        taken = factors[2] if (start @ plain.dequantize()).sum() > 0 else factors[1]
        want = cond(plain.dequantize(), start) * factors[0] * taken * factors[3]
        chex.assert_trees_all_close(apply(cond)(q, start), want, rtol=1e-4, atol=1e-4)


def test_layers_taken_by_index_are_numbered_each():
    def f(p, x):
        for i in range(2):
            x = (x @ p[i]) @ p[i]
        return x

    found = sites(f, jnp.stack([w, w]), x).weights
    assert [s.index for s in found] == [0, 1, 0, 1]
