"""Every way in which a parameter meets an activation: found, and run in low bits."""

import importlib.util
from collections import Counter
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import encode
from qjax.core.formats import Int, group
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, dequantize, is_quantized
from qjax.trace import QuantizationWarning, apply, sites

_spec = importlib.util.spec_from_file_location(
    "trace_cases", Path(__file__).with_name("cases.py")
)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
CASES = cases.CASES
INT4 = Int(4, group(32), symmetric=False)
LOW_BIT = {"qmatmul", "qconv", "qragged_matmul", "qembed", "qdequantize"}


def tree(shapes, dtype=jnp.float32):
    """Nested parameters from `a/b` paths."""
    params = {}
    for i, (path, shape) in enumerate(shapes.items()):
        *heads, last = path.split("/")
        node = params
        for head in heads:
            node = node.setdefault(head, {})
        w = jax.random.normal(jax.random.key(i), shape) / np.sqrt(shape[-2])
        node[last] = w.astype(dtype)
    return params


def quantize(f, params, inputs, format=INT4):
    """Quantize every leaf with the layout that tracing found."""
    found = sites(f, params, *inputs)
    layouts = {s.path: s.layout for s in found.weights}

    def one(keys, w):
        layout = layouts["/".join(k.key for k in keys)]
        return QTensor.of(encode(layout.to_matrix(w), format), layout, w.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def operations(closed):
    """How often each low-bit operation stands in a jaxpr, nested ones included."""
    count = Counter()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            name = eqn.params.get("name")
            if name in LOW_BIT:
                count[name] += 1
                continue
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    walk(closed.jaxpr)
    return count


@pytest.mark.parametrize("name", CASES)
def test_sites_are_found(name):
    case = CASES[name]
    params = tree(case.shapes)
    found = sites(case.f, params, *case.inputs)
    assert {s.path: s.layout.roles for s in found.weights} == case.roles
    assert found.unused == ()
    for site in found.weights:
        shape = found.shapes[site.path]
        stacked = len(shape) - len(site.layout.roles)
        assert site.layout.K * site.layout.N * int(np.prod(site.experts)) == int(
            np.prod(shape[stacked:])
        )


@pytest.mark.parametrize("name", CASES)
def test_low_bit_path_is_taken(name):
    """The program holds the low-bit operations and nowhere decodes a leaf by itself."""
    case = CASES[name]
    params = tree(case.shapes)
    qparams = quantize(case.f, params, case.inputs)
    closed = jax.make_jaxpr(apply(case.f))(qparams, *case.inputs)
    assert operations(closed) == case.ops
    taken = {s.runs.split(":")[0] for s in sites(case.f, qparams, *case.inputs).weights}
    assert taken == {"low-bit"}
    sizes = {int(np.prod(s)) for s in case.shapes.values()}
    floats = [v for v in closed.jaxpr.invars if v.aval.dtype == jnp.float32]
    inputs = [x for x in case.inputs if x.dtype == jnp.float32]
    assert not {v.aval.size for v in floats} & (sizes - {x.size for x in inputs})


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_dequantized(name):
    """After the float function has been jitted and run, with and without jit."""
    case = CASES[name]
    params = tree(case.shapes)
    jax.jit(case.f)(params, *case.inputs)
    qparams = quantize(case.f, params, case.inputs)
    want = case.f(dequantize(qparams), *case.inputs)
    chex.assert_trees_all_close(
        apply(case.f)(qparams, *case.inputs), want, rtol=2e-5, atol=2e-5
    )
    got = jax.jit(apply(case.f))(qparams, *case.inputs)
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)
    assert not np.allclose(want, case.f(params, *case.inputs), atol=1e-4)


@pytest.mark.parametrize("name", ["matmul", "scan_of_checkpoint", "attention", "cond"])
def test_gradients_reach_the_inputs(name):
    case = CASES[name]
    qparams = quantize(case.f, tree(case.shapes), case.inputs)

    def loss(p, x):
        return (apply(case.f)(p, x) ** 2).sum()

    got = jax.grad(loss, argnums=1)(qparams, *case.inputs)
    want = jax.grad(lambda p, x: (case.f(p, x) ** 2).sum(), argnums=1)(
        dequantize(qparams), *case.inputs
    )
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_custom_rule_lost_is_said_when_gradients_are_asked_for():
    case = CASES["custom_vjp"]
    qparams = quantize(case.f, tree(case.shapes), case.inputs)
    apply(case.f)(qparams, *case.inputs)
    with pytest.warns(QuantizationWarning, match="custom derivative"):
        jax.grad(lambda x: apply(case.f)(qparams, x).sum())(*case.inputs)


def test_apply_vmaps_over_inputs():
    case = CASES["matmul"]
    qparams = quantize(case.f, tree(case.shapes), case.inputs)
    batch = jnp.stack([case.inputs[0], 2 * case.inputs[0]])
    got = jax.vmap(apply(case.f), in_axes=(None, 0))(qparams, batch)
    chex.assert_trees_all_close(got[1], 2 * got[0], rtol=1e-5)


FALLBACKS = {
    "sum_of_parameters": (
        lambda p, x: x @ (p["w"] + p["d"]),
        {"w": (64, 48), "d": (64, 48)},
        "read by add",
    ),
    "elementwise": (lambda p, x: x * p["w"], {"w": (5, 64)}, "read by mul"),
    "sliced_outputs": (
        lambda p, x: x @ p["w"][:, :16],
        {"w": (64, 48)},
        "reshaped by slice",
    ),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_no_rule_dequantizes_and_says_so(name):
    f, shapes, reason = FALLBACKS[name]
    params, x = tree(shapes), cases.normal(5, 64)
    roles = jax.tree.map(lambda w: "kn", params)

    def code(w, r):
        return QTensor.of(encode(w, Int(4, group(32))), Layout(r, w.shape), w.dtype)

    qparams = jax.tree.map(code, params, roles)
    want = f(dequantize(qparams), x)
    with pytest.warns(QuantizationWarning, match=reason):
        got = apply(f)(qparams, x)
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    uses = sites(f, qparams, x).other_uses
    assert {u.path for u in uses} == set(shapes)
    assert all(reason in u.reason for u in uses)


def test_other_orientation_dequantizes_and_says_so():
    """Coded along one axis, contracted along the other."""
    f, w = (lambda p, x: x @ p["w"]), cases.normal(64, 48)
    transposed = quantize(lambda p, x: x @ p["w"].T, {"w": w}, (cases.normal(5, 48),))
    x = cases.normal(5, 64)
    with pytest.warns(QuantizationWarning, match="coded with axes 'nk'"):
        got = apply(f)(transposed, x)
    chex.assert_trees_all_close(got, f(dequantize(transposed), x), rtol=1e-6)


def test_float_parameters_are_the_function_itself():
    case = CASES["attention"]
    params = tree(case.shapes)
    plain = jax.jit(case.f).lower(params, *case.inputs).as_text()
    assert jax.jit(apply(case.f)).lower(params, *case.inputs).as_text() == plain


def test_equal_layers_are_lowered_once():
    case = CASES["nested_jit"]
    qparams = quantize(case.f, tree(case.shapes), case.inputs)
    text = jax.jit(apply(case.f)).lower(qparams, *case.inputs).as_text()
    assert text.count("func.func private @qmatmul") == 1
    assert text.count("call @qmatmul") == 1


def test_activation_meetings_are_listed():
    found = sites(CASES["attention"].f, tree(CASES["attention"].shapes), cases.x3)
    assert [s.kind for s in found.sites].count("activation") == 2


def test_shared_inputs_have_one_number():
    found = sites(CASES["attention"].f, tree(CASES["attention"].shapes), cases.x3)
    number = {s.path: s.input for s in found.weights}
    assert number["q"] == number["k"] != number["o"]


def test_scanned_sites_are_named_by_layer():
    case = CASES["scan_of_checkpoint"]
    found = sites(case.f, tree(case.shapes), *case.inputs)
    assert found.of("layers/a")[0].names == tuple(f"layers/{i}/a" for i in range(3))
    assert found.of("layers/a")[0].stacked == (3,)


def test_captured_arrays_are_reported():
    w = cases.normal(64, 48)
    found = sites(lambda p, x: (x @ w) * p["g"], {"g": jnp.ones(48)}, cases.x2)
    assert [c.shape for c in found.constants] == [(64, 48)]
    assert [u.path for u in found.other_uses] == ["g"]


def test_unused_leaf_is_reported():
    found = sites(
        lambda p, x: x @ p["a"],
        {"a": jnp.ones((64, 2)), "b": 1.0 * jnp.ones(3)},
        cases.x2,
    )
    assert found.unused == ("b",)


def test_sites_need_no_arrays():
    case = CASES["scan_of_checkpoint"]
    shapes = jax.eval_shape(lambda: tree(case.shapes))
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.inputs]
    found = sites(case.f, shapes, *abstract)
    assert found.weights == sites(case.f, tree(case.shapes), *case.inputs).weights


def test_quantized_leaf_count():
    case = CASES["tied"]
    qparams = quantize(case.f, tree(case.shapes), case.inputs)
    assert len(jax.tree.leaves(qparams, is_leaf=is_quantized)) == 1
