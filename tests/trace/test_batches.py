"""A bare array is no batch: its rows are not taken for inputs."""

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.core.statistics import Hessian

PARAMS = {"w": jnp.ones((8, 4))}
X = jnp.ones((2, 8))
RTN = qjax.RTN(weights=qjax.Int(8))
GPTQ = qjax.GPTQ(weights=qjax.Int(8))
WORDS = "is an array; each batch is a tuple of f's inputs"


def f(params, x):
    return x @ params["w"]


BATCHES = {
    "observe": lambda batches: qjax.observe(f, PARAMS, batches, Hessian()),
    "quantize": lambda batches: qjax.quantize(f, PARAMS, GPTQ, batches),
    "fake_quantize": lambda batches: qjax.fake_quantize(f, PARAMS, RTN, batches),
    "allocate": lambda batches: qjax.MixedPrecision(target_bits=6).allocate(
        f, PARAMS, batches
    ),
    "search": lambda batches: qjax.search_zeroquant(f, PARAMS, batches),
}
EXAMPLES = {
    "quantize": lambda x: qjax.quantize(f, PARAMS, RTN, example=x),
    "fake_quantize": lambda x: qjax.fake_quantize(f, PARAMS, RTN, example=x),
    "lora": lambda x: qjax.lora(
        f, PARAMS, rank=2, targets="w", example=x, key=jax.random.key(0)
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_an_array_among_the_batches_is_refused(name):
    for batches, number in (([X], 0), ([(X,), X], 1), (X, 0)):
        with pytest.raises(TypeError, match=rf"batches\[{number}\] {WORDS}"):
            BATCHES[name](batches)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_array_as_example_is_refused(name):
    with pytest.raises(TypeError, match=f"example {WORDS}"):
        EXAMPLES[name](X)
