"""Checkpoints that other libraries wrote give the logits of their own models.

`golden/checkpoints.npz` holds them as they were written, with those logits
(`scripts/parity/golden_checkpoints.py`).
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.qtensor import is_quantized
from qjax.io.huggingface import load_weights
from qjax.trace.apply import apply
from qjax.trace.paths import flatten_with_paths

pytestmark = pytest.mark.optimized
GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints.npz"
with np.load(GOLDEN) as held:
    CASES = sorted({name.partition("/")[0] for name in held})
# Codes of inputs that lie on an edge may differ by one where sums do in the last bit.
CODED_INPUTS = ("w8a8", "fp8", "nvfp4", "mxfp")


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path: Path, case: str):
    with np.load(GOLDEN) as golden:
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes(golden[f"{case}/{name}"].tobytes())
        tokens, expected = golden[f"{case}/tokens"], golden[f"{case}/logits"]
    f, params, _ = load_weights(tmp_path, dtype=jnp.float32)
    leaves = [leaf for _, leaf in flatten_with_paths(params) if is_quantized(leaf)]
    assert len(leaves) == 14
    found = np.asarray(apply(f)(params, tokens))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 5e-6
