"""What the papers claim, on the bundled model and its outlier variant.

KL divergence of the logits to full precision, on text that was not calibrated with.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import models
from qjax.data import encode_text, load_text
from qjax.io.huggingface import load_weights, read_tokenizer

FOLDER = Path(models.__file__).parent / "tiny_llama"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.optimized,
]
ROWS, LENGTH = 24, 256
W3_ASYM = qjax.Int(3, qjax.group(128), symmetric=False, zero="int")


@cache
def model():
    f, params, _ = load_weights(FOLDER, dtype=jnp.float32)
    return f, params


@cache
def text():
    """Calibration from the end of the language reference, evaluation from its start."""
    tokens = encode_text(read_tokenizer(FOLDER), load_text("pydoc"))
    tail, head = tokens[-ROWS * LENGTH :], tokens[: 8 * LENGTH]
    return tail.reshape(ROWS, LENGTH), head.reshape(8, LENGTH)


def with_outliers(params):
    """The same function; some channels of activations are 32 or 64 times as large."""
    rng = np.random.default_rng(0)
    layers = {}
    for name, layer in params["layers"].items():
        new = jax.tree.map(lambda x: x, layer)
        readers = {"attn_norm": ("attn", "qkv"), "mlp_norm": ("mlp", ("gate", "up"))}
        for norm, (module, kinds) in readers.items():
            scale = np.ones(layer[norm]["scale"].shape, np.float32)
            channels = rng.choice(scale.size, 4, replace=False)
            scale[channels] = rng.choice([32.0, 64.0], 4)
            new[norm]["scale"] = layer[norm]["scale"] * scale
            for kind in kinds:
                kernel = layer[module][f"{kind}_proj"]["kernel"]
                new[module][f"{kind}_proj"]["kernel"] = kernel / scale[:, None]
        layers[name] = new
    return {**params, "layers": layers}


@cache
def variant():
    return with_outliers(model()[1])


@cache
def divergence(recipe, outliers: bool = False, count: int = ROWS) -> float:
    """Mean KL divergence to full precision, nats for each token."""
    f, plain = model()
    params = variant() if outliers else plain
    calibration, evaluation = text()
    batches = [(calibration[i : i + 8],) for i in range(0, count, 8)]
    quantized = qjax.quantize(f, params, recipe, batches, progress=False)

    @jax.jit
    def kl(quantized, params, tokens):
        low = jax.nn.log_softmax(qjax.apply(f)(quantized, tokens))
        full = jax.nn.log_softmax(f(params, tokens))
        return (jnp.exp(full) * (full - low)).sum(-1).mean()

    pairs = [kl(quantized, params, evaluation[i : i + 4]) for i in (0, 4)]
    return float(np.mean([float(x) for x in pairs]))


def test_the_variant_is_the_same_function():
    f, plain = model()
    tokens = text()[1][:2]
    a, b = (jax.jit(f)(p, tokens) for p in (plain, variant()))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(a).max()))


def test_gptq_is_below_rounding():
    assert divergence(qjax.GPTQ("W3A16")) < 0.8 * divergence(qjax.RTN("W3A16"))


def test_act_order_is_not_above_none_at_3_bits():
    assert divergence(qjax.GPTQ("W3A16")) <= 1.02 * divergence(
        qjax.GPTQ("W3A16", act_order="off")
    )


def test_asymmetric_is_below_symmetric_at_3_bits():
    asymmetric = divergence(qjax.GPTQ(weights=W3_ASYM))
    assert asymmetric < divergence(qjax.GPTQ("W3A16"))


def test_importance_is_below_rounding():
    assert divergence(qjax.IMatrix("W3A16")) < 0.9 * divergence(qjax.RTN("W3A16"))


def test_awq_is_below_rounding_with_outliers():
    rounding = divergence(qjax.RTN("W4A16_ASYM"), outliers=True)
    # Its search runs each module 20 times: a third of the rows is enough.
    awq = divergence(qjax.AWQ(scheme="W4A16_ASYM"), outliers=True, count=8)
    assert awq < 0.5 * rounding


@pytest.mark.parametrize("recipe", [(qjax.SmoothQuant(), qjax.RTN("W8A8"))])
def test_smoothquant_is_far_below_rounding_with_outliers(recipe):
    rounding = divergence(qjax.RTN("W8A8"), outliers=True)
    assert divergence(recipe, outliers=True) < 0.1 * rounding


def test_llm_int8_is_what_its_weights_alone_cost_with_outliers():
    """Its activations are as good as float: the rest is 8 bits of weights."""
    mixed = divergence(qjax.LLMInt8(), outliers=True)
    narrow = qjax.Int(8, qjax.channel(), scale_rule="narrow")
    assert mixed < 0.2 * divergence(qjax.RTN("W8A8"), outliers=True)
    assert mixed < 1.5 * divergence(qjax.RTN(weights=narrow), outliers=True)
