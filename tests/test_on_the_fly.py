"""Quantization while loading: the same tree, and one float leaf at a time."""

import weakref
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import on_the_fly
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import is_quantized
from qjax.io.huggingface import load_weights
from qjax.methods import AWQ, EETQ, GPTQ, RTN
from qjax.on_the_fly import load_quantized
from qjax.quantize import quantize

# torch's own, when transformers first imports it for the tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
MODEL = Path(qjax.__file__).parent / "models/tiny_llama"
TOKENS = jnp.arange(12)[None]


def bits(tree):
    return [np.asarray(x).view(np.uint8) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("recipe", "scan_layers"),
    [
        (EETQ(), False),
        (RTN("W8A16"), True),
        (RTN("NF4"), True),
        (RTN("FP8_DYNAMIC", ignore="layers/0/mlp"), False),
        (RTN("NVFP4A16"), False),
    ],
)
def test_equals_quantizing_the_loaded_model(recipe, scan_layers):
    _, qparams, tokenizer, config = load_quantized(
        MODEL, recipe, scan_layers=scan_layers, progress=False
    )
    f, params, _ = load_weights(MODEL, scan_layers=scan_layers)
    expected = quantize(f, params, recipe, [(TOKENS,)], progress=False)
    assert jax.tree.structure(qparams) == jax.tree.structure(expected)
    for ours, theirs in zip(bits(qparams), bits(expected)):
        np.testing.assert_array_equal(ours, theirs)
    assert tokenizer is not None and config.layers == 8


def test_it_runs():
    f, qparams, _, _ = load_quantized(
        MODEL, EETQ(), dtype=jnp.float32, scan_layers=True, progress=False
    )
    _, params, _ = load_weights(MODEL, dtype=jnp.float32, scan_layers=True)
    got = jax.jit(qjax.apply(f))(qparams, TOKENS)
    assert jnp.abs(got - f(params, TOKENS)).max() < 0.5


class Watch:
    """Counts the bytes of float arrays that were read and are still alive."""

    def __init__(self, kept):
        self.kept, self.alive, self.most = kept, [], 0

    def lazy(self, path, leaf):
        def read():
            value = leaf.read()
            self.alive = [ref for ref in self.alive if ref() is not None]
            if path not in self.kept:
                self.alive.append(weakref.ref(value))
                live = [ref() for ref in self.alive]
                self.most = max(self.most, sum(x.nbytes for x in live))
            return value

        return replace(leaf, read=read)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_one_float_leaf_is_alive_at_a_time(monkeypatch, scan_layers):
    load, found = on_the_fly.load_weights, {}

    def watched(folder, **options):
        f, params, config = load(folder, **options)
        shapes = [x.shape for x in jax.tree.leaves(params)]
        watch = found["watch"] = Watch({"embed/embedding"})
        found["largest"] = max(2 * int(np.prod(s)) for s in shapes if s != (4096, 256))
        params = jax.tree_util.tree_map_with_path(
            lambda keys, x: watch.lazy("/".join(k.key for k in keys), x), params
        )
        assert all(isinstance(x, LazyLeaf) for x in jax.tree.leaves(params))
        return f, params, config

    monkeypatch.setattr(on_the_fly, "load_weights", watched)
    _, qparams, _, _ = load_quantized(
        MODEL, RTN("W4A16"), scan_layers=scan_layers, progress=False
    )
    leaves = jax.tree.leaves(qparams, is_leaf=is_quantized)
    # What the recipe leaves in float (norms) is read last and stays.
    floats = sum(x.nbytes for x in leaves if not is_quantized(x)) - 2 * 4096 * 256
    assert found["watch"].most <= max(found["largest"], floats)


@pytest.mark.parametrize("recipe", [GPTQ("W4A16"), AWQ("W4A16"), RTN("FP8")])
def test_methods_that_need_data_are_refused(recipe):
    with pytest.raises(ValueError, match="needs calibration data, which loading has"):
        load_quantized(MODEL, recipe)
