"""Experts, which are one leaf here, in torch: every one of them is a linear there.

transformers fuses them while it reads a checkpoint, and loses what quantized ones have
beside weights and one scale; `scripts/parity/unfused.py` keeps them apart.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.formats import Int, group

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[2] / "scripts/parity"))
unfused = pytest.importorskip("unfused")

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*are stored in"),
]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "num_local_experts": 3,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}
# A second scale and coded inputs are what fused experts have no place for.
RECIPE = (
    qjax.RTN("NVFP4A16", targets="*gate_proj*"),
    qjax.RTN("FP8_DYNAMIC", targets="*down_proj*"),
    qjax.RTN(weights=Int(4, group(32))),
)


@pytest.mark.parametrize("kind", unfused.BLOCKS)
def test_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    from compressed_tensors.compressors.nvfp4 import base, helpers

    # Theirs are unpacked to bfloat16, whatever the model computes in.
    unpack = partial(helpers.unpack_fp4_from_uint8, dtype=torch.float32)
    monkeypatch.setattr(base, "unpack_fp4_from_uint8", unpack)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "float")
    f, params, _, _ = qjax.load_model(tmp_path / "float")
    tokens = np.random.default_rng(1).integers(2, 64, (2, 8))
    example = (jnp.asarray(tokens),)
    qparams = qjax.quantize(f, params, RECIPE, example=example, progress=False)
    out = qjax.export(tmp_path / "out", qparams, model=tmp_path / "float")
    expected = np.asarray(jax.jit(qjax.apply(f))(qparams, *example))
    with unfused.experts_as_linears(), torch.no_grad():
        served = transformers.AutoModelForCausalLM.from_pretrained(
            unfused.with_module_names(out, tmp_path / "renamed"), dtype="float32"
        )
        found = served(torch.from_numpy(tokens)).logits.numpy()
    schemes = [
        module.quantization_scheme.weights.type
        for name, module in served.named_modules()
        if ".experts.2." in name and hasattr(module, "quantization_scheme")
    ]
    assert sorted(schemes) == ["float", "float", "int"]
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
