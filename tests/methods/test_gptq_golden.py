"""GPTQ beside llm-compressor's `quantize_weight`, on the same weights and inputs.

`scripts/parity/golden_llmcompressor.py` made the arrays. The error that the method
minimises is the peer's; the codes are where both do the same:

- without an order of the features, the peer takes the scales of all groups from the
  original weights, the paper and we take a group's when the sweep reaches it, so that
  the first group alone has the same scales;
- dead features count as 1 in the mean that the peer's damping is a share of.

A weight of minus the largest magnitude lies half way between two codes, so a few codes
differ by the last bit of a division.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import Int, channel, group
from qjax.methods.gptq import GPTQ

GOLDEN = Path(__file__).parents[1] / "golden/llmcompressor.npz"
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
G128 = group(128)
# name: format, order of the features, tokens used, dead features
CASES = {
    "w4": (Int(4, G128), "static", 512, ()),
    "w4_noact": (Int(4, G128), "off", 512, ()),
    "w4_asym": (Int(4, G128, symmetric=False, zero="int"), "static", 512, ()),
    "w4_g32_noact": (Int(4, group(32)), "off", 512, ()),
    "w3": (Int(3, G128), "static", 512, ()),
    "w3_noact": (Int(3, G128), "off", 512, ()),
    "w8_channel": (Int(8, channel()), "static", 512, ()),
    "w4_dead": (Int(4, G128), "static", 512, (3, 77, 200)),
    "w4_few": (Int(4, G128), "static", 96, ()),
}


def output_error(w, q, x):
    return np.linalg.norm(x.astype(np.float64) @ (w.astype(np.float64) - q))


@pytest.mark.parametrize("case", CASES)
def test_codes_and_error_are_those_of_llm_compressor(case):
    format, order, tokens, dead = CASES[case]
    with np.load(GOLDEN) as golden:
        w, x = golden["gptq/w"].T, golden["gptq/x"][:tokens].copy()
        codes, scale, zero = (
            golden[f"gptq/{case}/{name}"] for name in ("codes", "scale", "zero")
        )
    x[:, list(dead)] = 0
    method = GPTQ(weights=format, act_order=order)
    solve = jax.jit(method.solve_site, compiler_options=QUICK)
    found = solve(jnp.asarray(w), {"hessian": x.T @ x / tokens})
    ours = np.asarray(found.parts[0].decode(jnp.float32))
    width = w.shape[0] // scale.shape[1]
    spread = [np.repeat(a.T.astype(np.float64), width, 0) for a in (scale, zero)]
    theirs = (codes.T - spread[1]) * spread[0]
    if not dead:
        alike = slice(width if order == "off" else None)
        same = np.isclose(ours, theirs, atol=0.01 * spread[0].min())[alike]
        assert same.mean() >= 0.99
    np.testing.assert_array_equal(ours[list(dead)], 0)
    assert output_error(w, ours, x) <= 1.01 * output_error(w, theirs, x)
