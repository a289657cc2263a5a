"""Counts of a step against closed formulas, and of single operations by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from qjax.plan import layouts
from qjax.plan.counting import count
from qjax.plan.machines import machine
from qjax.plan.serving import serving
from qjax.plan.shapes import nbytes, quantized_shapes
from qjax.plan.steps import Load, make_step

B, S, T, L, D, F, V, H, G, d = 4, 128, 32, 3, 256, 512, 384, 8, 2, 32
FIELDS = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": G,
}
LAYOUT = layouts.from_fields("small", FIELDS)
LINEARS = L * (2 * D * H * d + 2 * D * G * d + 3 * D * F)


def step(scheme: str, kind: str = "decode", batch: int = B):
    """On one device, in the forms of a machine with several."""
    load, place = Load(kind, batch, S, T), machine("v5e:2x4")
    return make_step(LAYOUT, serving(scheme), place, load, jax.devices()[:1])


@functools.cache
def counted(scheme: str, kind: str = "decode", batch: int = B):
    made = step(scheme, kind, batch)
    return count(made.f, *made.arguments)


@pytest.mark.parametrize(("kind", "tokens"), [("decode", B), ("prefill", T)])
def test_operations_are_those_of_the_formula(kind: str, tokens: int):
    """Two for each weight and token; four for each feature of a query and slot."""
    exact = tokens * (2 * (LINEARS + D * V) + 4 * L * H * d * S)
    found = counted("bf16", kind)
    assert found.operations == exact
    assert set(found.matrix) == {"bfloat16"}
    assert not found.uncounted


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "W4A8-KV8", "FP8_DYNAMIC"])
def test_a_scheme_changes_formats_and_not_operations(scheme: str):
    found = counted(scheme)
    assert found.operations == counted("bf16").operations
    coded = {"W8A8": "int8", "W4A8-KV8": "int8", "FP8_DYNAMIC": "float8"}.get(scheme)
    if coded:
        assert found.matrix[coded] == B * 2 * LINEARS


@pytest.mark.parametrize("scheme", ["bf16", "W8A8", "W4A16", "W4A8-KV8", "W8A8-KVFP8"])
def test_a_token_reads_the_weights_and_the_cache(scheme: str):
    made = step(scheme, batch=1)
    params, cache, _ = made.arguments
    table = nbytes(params["embed"])
    exact = nbytes(params) - table + table // V + nbytes((cache.k, cache.v))
    found = count(made.f, *made.arguments)
    assert found.read == pytest.approx(exact, rel=0.01)
    # The new keys and values, the token, the mask and the length.
    assert found.written == pytest.approx(nbytes((cache.k, cache.v)) / S, abs=300)


def test_a_loop_reads_each_slice_once():
    def f(stack, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    stack = jax.ShapeDtypeStruct((5, 64, 64), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
    found = count(f, stack, x)
    assert found.operations == 5 * 2 * 8 * 64 * 64
    assert found.read == 2 * (5 * 64 * 64 + 8 * 64)
    assert found.written == 2 * 8 * 64


def test_what_no_result_needs_is_not_counted():
    def f(x, w):
        jnp.sin(w).sum()
        return x @ x

    shape = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    assert count(f, shape, shape).read == 4 * 16 * 16


def test_shapes_are_what_quantize_makes():
    """Arrays of `qjax.quantize` on a model that is small enough to have."""
    from flax import nnx

    import qjax
    from qjax.models import functional, llama

    _, shapes = LAYOUT.shapes()
    f, params = functional(
        llama.Llama(
            LAYOUT.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, scan_layers=True
        )
    )
    tokens = jnp.zeros((1, 16), jnp.int32)
    made = qjax.quantize(f, params, qjax.RTN("W4A8"), example=(tokens,), progress=False)
    planned = quantized_shapes(f, shapes, "W4A8")
    assert jax.tree.structure(made) == jax.tree.structure(planned)
    pairs = zip(jax.tree.leaves(made), jax.tree.leaves(planned))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
