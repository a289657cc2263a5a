"""Architectures beside Llama, quantized, exported, and run by transformers."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.core.qtensor import dequantize, is_quantized
from qjax.io.export import export
from qjax.io.huggingface import load_weights
from qjax.methods import GPTQ, RTN
from qjax.models import architecture, functional
from qjax.models.fields import Fields
from qjax.trace.paths import flatten_with_paths

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "dtype": "float32",
}
MODELS = {
    "gemma2": {"sliding_window": 4, "architectures": ["Gemma2ForCausalLM"]},
    "gemma3_text": {
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "architectures": ["Gemma3ForCausalLM"],
    },
    "mixtral": {"num_local_experts": 3, "architectures": ["MixtralForCausalLM"]},
    "phi3": {"architectures": ["Phi3ForCausalLM"]},
}
TOKENS = np.random.default_rng(1).integers(1, 61, (4, 12)).astype(np.int32)
W3 = qjax.Int(3, qjax.group(16), symmetric=False)
W4 = qjax.Int(4, qjax.group(16))


def fields(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **SMALL, **MODELS[kind], **changes}


@functools.cache
def model(kind: str) -> Any:
    """A random model with stacked layers."""
    made = architecture(kind)
    config = made.from_fields(Fields(fields(kind)))
    f, params = functional(made.build(config, rngs=nnx.Rngs(0), scan_layers=True))
    rng = np.random.default_rng(2)

    def moved(leaf: Any) -> Any:
        return leaf + jnp.asarray(0.15 * rng.normal(size=leaf.shape), jnp.float32)

    return f, jax.tree.map(moved, params)


@functools.cache
def quantized(kind: str, recipe: Any) -> Any:
    f, params = model(kind)
    return qjax.quantize(f, params, recipe, [(TOKENS,)], progress=False)


def logits(f: Any, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(f)(params, TOKENS))


@pytest.mark.parametrize("kind", MODELS)
def test_every_linear_but_head_and_routers(kind: str):
    f, params = model(kind)
    q = quantized(kind, RTN(weights=W4))
    found = {p for p, leaf in flatten_with_paths(q) if is_quantized(leaf)}
    kernels = {p for p, _ in flatten_with_paths(params) if p.endswith("kernel")}
    assert found == {p for p in kernels if "router" not in p and "lm_head" not in p}
    assert len(found) == (4 if kind == "phi3" else 7)
    exact = logits(f, dequantize(q))
    scale = np.abs(exact).max()
    np.testing.assert_allclose(logits(qjax.apply(f), q), exact, atol=1e-5 * scale)


def test_gptq_loses_less_than_rounding():
    kind = "phi3"  # of those that join leaves; tests/trace streams every architecture
    f, params = model(kind)
    exact = logits(f, params)
    errors = [
        np.mean((logits(f, dequantize(quantized(kind, recipe))) - exact) ** 2)
        for recipe in (GPTQ(weights=W3), RTN(weights=W3))
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder for each kind, made at its first use."""

    @functools.cache
    def get(kind: str) -> Path:
        source = tmp_path_factory.mktemp(kind)
        (source / "config.json").write_text(json.dumps(fields(kind)))
        return export(source / "out", quantized(kind, RTN(weights=W4)), model=source)

    return get


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_comes_back_as_it_was(kind: str, exported: Any, tmp_path: Path):
    folder = exported(kind)
    _, q, _ = load_weights(folder, scan_layers=True)
    assert sum(map(is_quantized, jax.tree.leaves(q, is_leaf=is_quantized))) >= 4
    again = export(tmp_path / "again", q, model=folder)
    assert (again / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def torch_logits(folder: Path) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return loaded(torch.from_numpy(TOKENS).long()).logits.float().numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_gives_the_same_logits(kind: str, exported: Any):
    folder = exported(kind)
    f, q, _ = load_weights(folder, scan_layers=True)
    ours = logits(qjax.apply(f), q)
    theirs = torch_logits(folder)
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())
