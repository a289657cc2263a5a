"""`apply` in the company of other transforms, containers and unusual uses."""

import dataclasses
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from qjax.core.coded import encode
from qjax.core.formats import Int, group
from qjax.core.layout import Layout
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import QTensor, SiteActs
from qjax.core.transforms import Diagonal
from qjax.trace import QuantizationWarning, apply, sites

INT4 = Int(4, group(32))


def normal(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


def coded(w, roles="kn"):
    layout = Layout(roles, w.shape[w.ndim - len(roles) :])
    return QTensor.of(encode(layout.to_matrix(w), INT4), layout, w.dtype)


w, x = normal(64, 64), normal(5, 64)
q = coded(w)
floats = q.dequantize()
close = chex.assert_trees_all_close


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Params:
    w: Any


def test_any_container_and_static_arguments():
    def f(p, x, scale=None, flag=False, mode="a"):
        assert flag is True
        assert mode == "b"
        return (x @ p[0].w) * scale

    got = apply(f)((Params(q), None), x, scale=2.0, flag=True, mode="b")
    close(got, 2 * (x @ floats), rtol=1e-5)


def test_stack_of_quantized_parameters_vmaps():
    stack = coded(normal(3, 64, 64))
    got = jax.vmap(apply(lambda p, x: x @ p), in_axes=(0, None))(stack, x)
    close(got, jnp.einsum("mk,bkn->bmn", x, stack.dequantize()), rtol=1e-4, atol=1e-4)


def test_gradients_of_float_leaves_through_scan_and_checkpoint():
    def f(p, x):
        layer = jax.checkpoint(lambda h, p: jnp.tanh(h @ p["w"] * p["g"]))
        return jax.lax.scan(lambda h, p: (layer(h, p), None), x, p)[0].sum()

    stack, gains = coded(normal(3, 64, 64)), jnp.ones((3, 64))
    got = jax.grad(lambda g: apply(f)({"w": stack, "g": g}, x))(gains)
    want = jax.grad(lambda g: f({"w": stack.dequantize(), "g": g}, x))(gains)
    close(got, want, rtol=1e-4, atol=1e-4)


def test_each_site_of_a_leaf_has_its_own_record():
    """Also behind one jitted function that is traced once."""
    acts = tuple(SiteActs(t_in=Diagonal(jnp.full(64, s))) for s in (2.0, 3.0))
    twice = QTensor.of(q.parts, q.layout, q.dtype, acts)
    layer = jax.jit(lambda w, h: h @ w)
    a, b = apply(lambda p, x: (layer(p, x), layer(p, x)))(twice, x)
    close(2 * b, 3 * a, rtol=1e-5, atol=1e-4)
    close(a, 2 * (x @ floats), rtol=1e-4, atol=1e-4)


def test_out_of_range_rows_follow_the_gather_mode():
    table = coded(normal(10, 32), "nk")
    ids = jnp.array([0, -1, 9, 12])
    modes = (
        lambda p, i: p[i],
        lambda p, i: jnp.take(p, i, axis=0),
        lambda p, i: p.at[i].get(mode="fill", fill_value=7.0),
        lambda p, i: p.at[i].get(mode="clip"),
    )
    for f in modes:
        close(apply(f)(table, ids), f(table.dequantize(), ids), atol=1e-5)


def test_preferred_type_is_kept():
    narrow = coded(w.astype(jnp.bfloat16))
    y = apply(lambda p, x: jnp.dot(x, p, preferred_element_type=jnp.float32))(
        narrow, x.astype(jnp.bfloat16)
    )
    assert y.dtype == jnp.float32


def test_reversed_unrolled_scan_with_outputs():
    def f(p, x):
        def step(carry, w):
            return (jnp.tanh(carry[0] @ w), carry[1] + 1), carry[0].sum()

        return jax.lax.scan(step, (x, 0), p, reverse=True, unroll=2)

    stack = coded(normal(4, 64, 64))
    close(apply(f)(stack, x), f(stack.dequantize(), x), rtol=1e-4, atol=1e-4)


def test_forward_mode():
    f = lambda x: apply(lambda p, x: jnp.sin(x @ p))(q, x)
    got = jax.jvp(f, (x,), (x,))[1]
    close(got, jnp.cos(x @ floats) * (x @ floats), rtol=1e-4, atol=1e-4)


def test_parameter_that_is_returned_is_decoded_and_named():
    with pytest.warns(QuantizationWarning, match="returned by the function"):
        y, same = apply(lambda p, x: (x @ p, p))(q, x)
    close(same, floats)
    close(y, x @ floats, rtol=1e-5)


def test_parameter_that_changes_in_a_loop_is_decoded_and_named():
    def f(p, x):
        return jax.lax.fori_loop(0, 3, lambda _, s: (s[0] @ s[1], s[1] / 2), (x, p))[0]

    with pytest.warns(QuantizationWarning, match="enters scan"):
        got = apply(f)(q, x)
    close(got, f(floats, x), rtol=1e-4)


def test_doubly_stacked_leaf():
    stack = normal(2, 3, 64, 64) / 8

    def f(p, x):
        inner = lambda h, p: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p)
        return jax.lax.scan(lambda h, p: (inner(h, p)[0], None), x, p["layers"])[0]

    (site,) = sites(f, {"layers": stack}, x).sites
    assert site.stacked == (2, 3)
    assert site.names[4] == "layers/1/1"
    low = coded(stack)
    got = apply(f)({"layers": low}, x)
    close(got, f({"layers": low.dequantize()}, x), rtol=1e-4, atol=1e-5)


def test_lazy_leaf_is_refused_by_name():
    lazy = {"deep": [LazyLeaf((64, 64), jnp.float32, lambda: w)]}
    with pytest.raises(TypeError, match="deep/0 is still on disk"):
        apply(lambda p, x: x @ p["deep"][0])(lazy, x)


def test_whole_number_activations_meet_the_float_weight():
    def f(p, x):
        return jax.lax.dot_general(
            x, p, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    whole = jnp.arange(2 * 64).reshape(2, 64)
    close(apply(f)(q, whole), f(floats, whole), rtol=1e-4, atol=1e-3)


def test_numbers_reach_the_function_as_they_are():
    def f(p, x, times):
        for _ in range(times):
            x = x @ p["w"] * p["s"]
        return x

    close(
        apply(f)({"w": q, "s": 0.5}, x, 2),
        f({"w": floats, "s": 0.5}, x, 2),
        rtol=1e-4,
        atol=1e-4,
    )


def test_leaves_with_one_path_are_refused():
    with pytest.raises(ValueError, match="path 'a/b'"):
        apply(lambda p, x: x @ p["a/b"])({"a/b": q, "a": {"b": q}}, x)


def test_float_leaf_joined_with_quantized_ones():
    def f(p, x):
        return x @ jnp.concatenate([p["q"], p["v"]], axis=1)

    text = str(jax.make_jaxpr(apply(f))({"q": q, "v": w[:, :8]}, x))
    assert "qmatmul" in text
    assert "qdequantize" not in text
    got = apply(f)({"q": q, "v": w[:, :8]}, x)
    close(got, f({"q": floats, "v": w[:, :8]}, x), rtol=1e-4, atol=1e-4)


def test_experts_vmap_and_index():
    experts = normal(3, 64, 64)
    layout = Layout("bkn", (0, 64, 64))
    leaf = QTensor.of(encode(experts, INT4), layout, experts.dtype)
    got = jax.vmap(apply(lambda p, x: x @ p), in_axes=(0, None))(leaf, x)
    close(got, jnp.einsum("mk,ekn->emn", x, leaf.dequantize()), rtol=1e-4, atol=1e-4)
    close(leaf[1].dequantize(), leaf.dequantize()[1])
    with pytest.raises(IndexError, match="leading axes"):
        leaf[1][0]


def test_bias_is_never_lost_in_silence():
    biased = QTensor.of(q.parts, q.layout, q.dtype, bias=jnp.ones(64))
    close(apply(lambda p, x: x @ p)(biased, x), x @ floats + 1, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="would lose the bias"):
        apply(lambda p, x: x * p[:5])(biased, x)


def test_nested_jit_keeps_its_shardings():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    inner = jax.jit(lambda w, x: x @ w, out_shardings=place)
    y = jax.jit(apply(lambda p, x: inner(p, x)))(q, x)
    assert y.sharding.is_equivalent_to(place, 2)


def test_leaf_scanned_alone_is_named_as_unrolled():
    def f(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, p["layers"]["w"])[0]

    (site,) = sites(f, {"layers": {"w": normal(3, 64, 64)}}, x).sites
    assert site.names == ("layers/0/w", "layers/1/w", "layers/2/w")


def test_placement_of_a_quantized_leaf_is_not_ignored_in_silence():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))

    def f(p, x):
        return x @ jax.lax.with_sharding_constraint(p["w"], place)

    with pytest.warns(QuantizationWarning, match="w is not placed"):
        got = apply(f)({"w": q}, x)
    close(got, x @ floats, rtol=1e-4, atol=1e-4)
    found = sites(f, {"w": q}, x)
    assert found.weights[0].runs.startswith("low-bit")
    assert [use.path for use in found.other_uses] == ["w"]
