"""Modules of three libraries as pure functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.models import Function, functional

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


class Net(nnx.Module):
    """Two linears in a list and a batch norm, whose statistics are no parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(12)])
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.norm(x)

    def first(self, x):
        return self.blocks[0](x)


def paths(params) -> set[str]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(str(key.key) for key in path) for path, _ in flat}


def test_nnx_gives_the_modules_output():
    model = Net(nnx.Rngs(0))
    f, params = functional(model)
    np.testing.assert_allclose(jax.jit(f)(params, X), model(X), rtol=1e-6)
    blocks = {f"blocks/{i}/{leaf}" for i in range(12) for leaf in ("kernel", "bias")}
    assert paths(params) == blocks | {"norm/scale", "norm/bias"}


def test_nnx_leaves_land_where_their_paths_say():
    model = Net(nnx.Rngs(0))
    f, params = functional(model)
    params["blocks"]["10"]["kernel"] = 2 * params["blocks"]["10"]["kernel"]
    changed = f(params, X)
    model.blocks[10].kernel[...] = 2 * model.blocks[10].kernel[...]
    np.testing.assert_allclose(changed, model(X), rtol=1e-6)


def test_the_function_holds_no_parameters():
    model = Net(nnx.Rngs(0))
    f, params = functional(model)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert not np.allclose(f(doubled, X), f(params, X))
    jaxpr = jax.make_jaxpr(f)(params, X)
    assert all(np.size(const) <= 4 for const in jaxpr.consts)
    np.testing.assert_array_equal(f(zeros, X), np.zeros((3, 4)))


def test_a_gradient_has_the_parameters_tree():
    f, params = functional(Net(nnx.Rngs(0)))
    gradient = jax.grad(lambda p: jnp.sum(f(p, X) ** 2))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


def test_another_method():
    model = Net(nnx.Rngs(0))
    f, params = functional(model, method="first")
    np.testing.assert_allclose(f(params, X), model.first(X), rtol=1e-6)


def test_linen():
    model = nn.Dense(5)
    variables = model.init(jax.random.key(0), X)
    f, params = functional(model, variables)
    assert set(params) == {"kernel", "bias"}
    np.testing.assert_array_equal(f(params, X), model.apply(variables, X))


def test_linen_keeps_other_collections():
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), X)
    f, params = functional(model, variables)
    assert set(params) == {"scale", "bias"}
    np.testing.assert_array_equal(f(params, X), model.apply(variables, X))


@pytest.mark.parametrize("variables", [None, {"kernel": X}])
def test_linen_without_its_variables(variables):
    with pytest.raises(TypeError, match="a Linen module needs its variables"):
        functional(nn.Dense(5), variables)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, depth=2, key=jax.random.key(0))
    f, params = functional(model)
    assert isinstance(params, eqx.nn.MLP)
    np.testing.assert_array_equal(f(params, X[0]), model(X[0]))
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {type(X)}
    gradient = jax.grad(lambda p: jnp.sum(f(p, X[0])))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


def test_what_is_no_module():
    with pytest.raises(TypeError, match="bring your own pair"):
        functional(lambda x: x)
    with pytest.raises(TypeError, match="variables are for Linen modules only"):
        functional(Net(nnx.Rngs(0)), {"params": {}})


def test_a_function_without_cache():
    assert Function(lambda params: params).init_cache is None
