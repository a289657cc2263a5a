"""What training does not do is refused by name, and so is what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QAT
from qjax.core.formats import MSE, NVFP4

L, K, N, M = 3, 32, 16, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(M, K)).astype(np.float32)
STACK = {"layers": {"w": RNG.normal(size=(L, K, K)).astype(np.float32) / 8}}
TOKENS = qjax.Int(8, qjax.token())


def scanned(p, x):
    step = lambda h, w: (h + jnp.tanh(h @ w["w"]), None)
    return jax.lax.scan(step, x, p["layers"])[0]


def fake(recipe, params=STACK, x=X):
    return qjax.fake_quantize(scanned, params, recipe, [(x,)])


OTHERWISE = {
    r"RTN\.activations has outliers=6\.0": qjax.RTN(
        weights=qjax.Int(8), activations=qjax.Activation(TOKENS, outliers=6.0)
    ),
    r"RTN\.calibrator is PercentileRange": qjax.RTN(
        "FP8", calibrator=qjax.PercentileRange()
    ),
    "activations of RTN are nvfp4 with a static": qjax.RTN("NVFP4"),
}


@pytest.mark.parametrize("text", OTHERWISE)
def test_what_rtn_says_and_training_does_not(text):
    with pytest.raises(ValueError, match=text):
        fake(OTHERWISE[text])


def test_the_remedy_for_nvfp4_is_one():
    both = qjax.StraightThrough(NVFP4()), qjax.StraightThrough(NVFP4())
    (plan,) = fake(QAT(*both))[1].plans
    assert plan.step.activations.activation == qjax.Activation(NVFP4())


def test_weights_that_are_not_finite_are_named():
    bad = STACK["layers"]["w"].copy()
    bad[1, 3, :2] = np.nan, np.inf
    for method in (qjax.LSQ(4), qjax.StraightThrough(qjax.Int(4))):
        with pytest.raises(
            ValueError, match=f"^layers/1/w holds 2 NaN or Inf of {K * K} values"
        ):
            fake(QAT(method), {"layers": {"w": bad}})


def test_activations_that_are_not_finite_are_named():
    x = X.copy()
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="the input of layers/w is NaN or Inf"):
        fake(QAT(qjax.LSQ(4), qjax.LSQ(8)), x=x)


def test_a_missing_leaf_is_named():
    _, qstate = fake(QAT(qjax.LSQ(4)))
    with pytest.raises(ValueError, match="params has no layers/w, which was trained"):
        qjax.finalize({"layers": {"other": X}}, qstate)


def unchecked(made, **fields):
    """The method with other fields: no type checker stands before its own checks."""
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    made.__post_init__()


BAD = {
    "LSQ.granularity": lambda: unchecked(qjax.LSQ(4), granularity="channel"),
    "LSQPlus.granularity": lambda: unchecked(qjax.LSQPlus(4), granularity=128),
    "ParetoQ.granularity": lambda: unchecked(qjax.ParetoQ(2), granularity="channel"),
    "BitNet.granularity": lambda: unchecked(qjax.BitNet(), granularity="tensor"),
    "XNOR.granularity": lambda: unchecked(qjax.XNOR(), granularity=8),
    "PiSSA.weights": lambda: unchecked(qjax.PiSSA(), weights="nf4"),
    "StraightThrough.rounding": lambda: QAT(
        qjax.LSQ(4), qjax.StraightThrough(TOKENS, rounding="stochastic")
    ),
    "StraightThrough.search": lambda: QAT(
        qjax.LSQ(4), qjax.StraightThrough(TOKENS, MSE())
    ),
    "Observed.freeze": lambda: qjax.Observed(
        qjax.Int(8, qjax.tensor()), start=10, freeze=5
    ),
}


@pytest.mark.parametrize("field", BAD)
def test_bad_fields_are_named(field):
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        BAD[field]()
