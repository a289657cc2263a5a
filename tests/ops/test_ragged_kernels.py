"""Experts on kernels mean what they mean in XLA, and a refusal says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import qjax
from qjax.core.coded import encode
from qjax.core.formats import Int, group, token
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.ops import Target, ragged_matmul
from qjax.ops.ragged_kernels import ragged_choice
from qjax_kernels.compat import interpret_params

E, K, N, M = 3, 128, 128, 9
TPU = Target("tpu", "v5e")
SIZES = jnp.array([4, 0, 3], jnp.int32)


def experts(format, activation=None):
    acts = () if activation is None else (SiteActs(activation=activation),)
    w = jax.random.normal(jax.random.key(0), (E, K, N)) + 0.1
    layout = Layout("bkn", (0, K, N))
    return QTensor.of(encode(w, format), layout, jnp.bfloat16, acts)


@pytest.mark.parametrize(
    ("format", "activation"),
    [
        (Int(4, group(32), symmetric=False), None),
        (Int(8), Activation(Int(8, token()))),
    ],
    ids=["w4a16", "w8a8"],
)
def test_the_kernel_agrees_with_the_values(format, activation):
    q = experts(format, activation)
    x = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)

    def run(x, implementation, target):
        return ragged_matmul(
            x, q, SIZES, implementation=implementation, target=target,
            dtype=jnp.float32,
        )  # fmt: skip

    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(interpret_params()):
        y, pull = jax.vjp(lambda x: run(x, "pallas", TPU), x)
    expected, pull_xla = jax.vjp(lambda x: run(x, "xla", Target("cpu")), x)
    owner = np.repeat(np.arange(E), SIZES)
    size = np.zeros((M, N))
    w = np.abs(np.asarray(q.core(jnp.float32), np.float64))
    for row, e in enumerate(owner):
        size[row] = np.abs(np.asarray(x[row], np.float64)) @ w[e]
    # XLA's form rounds decoded weights to bfloat16; codes meet codes exactly in both.
    assert (np.abs(y - expected) <= 2.0**-8 * size).all()
    assert (np.asarray(y[len(owner) :]) == 0).all()
    seed = jnp.ones_like(y)
    np.testing.assert_array_equal(pull(seed)[0], pull_xla(seed)[0])


@pytest.mark.parametrize(
    ("format", "target", "why"),
    [
        (Int(3, group(32)), TPU, "no kernel for int3 g32"),
        (Int(4, group(32)), Target("cpu"), "there is no kernel for cpu"),
        (Int(4, group(32)), Target("tpu", "v6e", 4), "use shard_map"),
    ],
)
def test_a_refusal_says_why(format, target, why):
    q, x = experts(format), jnp.ones((M, K), jnp.bfloat16)
    assert why in ragged_choice(q, 0, x, "auto", target).refused
    with pytest.raises(ValueError, match="but") as error:
        ragged_matmul(x, q, SIZES, implementation="pallas", target=target)
    assert why in str(error.value)


def test_explain_names_what_runs_the_experts():
    def f(params, x):
        return jax.lax.ragged_dot(x, params["experts"], SIZES)

    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    q = {"experts": experts(Int(4, group(32)))}
    (site,) = qjax.explain(f, q, x, target=TPU).weights
    assert site.runs.endswith("; pallas v5e")
    (site,) = qjax.explain(f, q, x).weights
    assert site.runs.endswith("; xla, no pallas: there is no kernel for cpu")
    q = {"experts": experts(Int(8), Activation(Int(8, token())))}
    for generation, meet in (("v6e", "int32"), ("v7x", "bfloat16")):
        target = Target("tpu", generation)
        (site,) = qjax.explain(f, q, x, target=target).weights
        assert site.runs.endswith(f" in {meet}; pallas {generation}")
