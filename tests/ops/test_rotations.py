"""A rotated input means the same on a kernel and in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

import qjax
from qjax.core.coded import encode
from qjax.core.formats import Int, group
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, SiteActs
from qjax.core.transforms import Diagonal, Hadamard, chained
from qjax.ops import Target, matmul
from qjax.ops.matmul import rotation_for
from qjax_kernels.compat import interpret_params

K, N, M = 256, 128, 8
TPU = Target("tpu", "v5e")


def rotated():
    w = jax.random.normal(jax.random.key(0), (K, N))
    signs = jnp.where(jax.random.bernoulli(jax.random.key(1), shape=(K,)), 1.0, -1.0)
    acts = SiteActs(t_in=chained(Diagonal(jnp.full(K, 0.5)), Hadamard(signs)))
    coded = encode(w, Int(4, group(64)))
    return QTensor.of(coded, Layout("kn", (K, N)), jnp.bfloat16, (acts,))


def test_the_kernel_rotates_as_xla_does():
    q = rotated()
    x = jax.random.normal(jax.random.key(2), (M, K), jnp.bfloat16)

    def run(x, implementation, target):
        return matmul(
            x, q, implementation=implementation, target=target, dtype=jnp.float32
        )

    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(interpret_params()):
        y, pull = jax.vjp(lambda x: run(x, "pallas", TPU), x)
    exact = np.asarray(x, np.float64) @ np.asarray(q.matrix(jnp.float32), np.float64)
    # The rotated input is rounded to bfloat16 once.
    turned = np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True)
    columns = np.linalg.norm(np.asarray(q.core(jnp.float32), np.float64), axis=0)
    assert (np.abs(y - exact) <= 2.0**-8 * turned * columns).all()
    _, pull_xla = jax.vjp(lambda x: run(x, "xla", Target("cpu")), x)
    seed = jnp.ones_like(y)
    np.testing.assert_array_equal(pull(seed)[0], pull_xla(seed)[0])


def test_the_choice_and_explain_say_what_rotates():
    q, x = rotated(), jnp.ones((M, K), jnp.bfloat16)
    assert rotation_for(x, q, 0, "auto", TPU).name == "pallas v5e"
    assert "for cpu" in rotation_for(x, q, 0, "pallas", Target("cpu")).refused
    assert "asked for" in rotation_for(x, q, 0, "xla", TPU).refused

    def f(params, x):
        return x @ params["w"]

    (site,) = qjax.explain(f, {"w": q}, x, target=TPU).weights
    assert "rotated by pallas v5e; pallas v5e" in site.runs
