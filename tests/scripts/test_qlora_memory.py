"""The memory experiment counts what real arrays would take."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.models import rope

SCRIPT = Path(__file__).parents[2] / "experiments/qlora/memory.py"


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("qlora_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_shapes_are_those_of_a_real_step(memory):
    sizes = {"vocabulary": 32, "features": 64, "mlp_features": 128, "layers": 2}
    sizes |= {"heads": 4, "kv_heads": 2, "head_dim": 16, "context": 16}
    ropes = {"rope": rope.plain(16, 1e4), "windows": (None,) * 2}
    config = dataclasses.replace(memory.llama_1b(2), **sizes, **ropes)
    f, params = memory.parameters(config, "NF4_DQ")
    rng = jax.random.key(0)
    plain = memory.parameters(config, None)[1]
    real = jax.tree.map(lambda x: jax.random.normal(rng, x.shape, x.dtype), plain)
    example = (jnp.ones((1, 8), jnp.int32),)
    recipe = qjax.RTN("NF4_DQ")
    real = qjax.quantize(f, real, recipe, example=example, progress=False)
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert shapes(params) == shapes(real)
    assert jax.tree.structure(params) == jax.tree.structure(real)
    options = memory.Options(length=8, rank=2)
    step, arguments = memory.training(f, params, options)
    state, loss = jax.eval_shape(step, *arguments)
    assert shapes(state) == shapes(arguments[0]) and loss.shape == ()
    parts = memory.budget(config, arguments, options)
    kernels = jax.tree.leaves(real["layers"], is_leaf=qjax.is_quantized)
    assert parts["frozen linears"] == sum(leaf.nbytes for leaf in kernels)
    linears = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert parts["frozen linears"] < 0.6 * linears
    assert parts["adapters"] == 4 * 2 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
