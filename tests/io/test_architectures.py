"""Every architecture in 4 bits, as compressed-tensors: torch gives the same logits."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import encode
from qjax.core.formats import Codebook, Int, group
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, dequantize
from qjax.io.export import export
from qjax.io.huggingface import load_weights, read_config
from qjax.io.named import named_leaves

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
BERT = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
OPT = {k: v for k, v in BERT.items() if k != "intermediate_size"} | {"ffn_dim": 96}
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32}


@dataclass(frozen=True)
class Kind:
    """An architecture, its sizes, and how many of its leaves are linears."""

    name: str
    fields: dict[str, Any]
    linears: int
    model: str = "AutoModelForCausalLM"


KINDS = [
    Kind("llama", SIZES | {"attention_bias": True, "mlp_bias": True}, 7),
    Kind("mistral", SIZES | {"sliding_window": 5}, 7),
    Kind("qwen2", SIZES, 7),
    Kind("qwen3", SIZES | {"head_dim": 16, "tie_word_embeddings": True}, 7),
    Kind("opt", OPT, 6),
    Kind("bert", BERT, 6, "AutoModelForMaskedLM"),
]
FOUR = Int(4, group(32))
_encode = jax.jit(lambda w: encode(w, FOUR))
_run = jax.jit(lambda f, params, tokens: f(params, tokens), static_argnums=0)


def build(kind: Kind) -> Any:
    """A random torch model, with every parameter away from its neutral start."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind.name, **kind.fields)
    model = getattr(transformers, kind.model).from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def quantized(folder: Path, params: Any) -> Any:
    """Every linear but the head in 4 bits."""
    named = named_leaves(*read_config(folder), params)
    chosen = {x.path for x in named if x.linear and "layers" in x.path}

    def leaf(path: Any, w: Any) -> Any:
        if "/".join(key.key for key in path) not in chosen:
            return w
        return QTensor.of(_encode(w), Layout("kn", w.shape), w.dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_logits(tmp_path: Path, kind: Kind):
    import torch

    pytest.importorskip("compressed_tensors")
    import transformers

    build(kind).save_pretrained(tmp_path / "float")
    f, params, _ = load_weights(tmp_path / "float")
    qparams = quantized(tmp_path / "float", params)
    out = export(tmp_path / "out", qparams, model=tmp_path / "float")
    tokens = np.random.default_rng(1).integers(2, 64, (2, 8))
    expected = np.asarray(_run(f, dequantize(qparams), jnp.asarray(tokens)))
    served = getattr(transformers, kind.model).from_pretrained(out)
    packed = [n for n, _ in served.named_parameters() if n.endswith("weight_packed")]
    assert len(packed) in (kind.linears, 0)  # 0: decoded while it was read
    with torch.no_grad():
        found = served(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
    held = jax.tree.leaves(qparams, is_leaf=is_coded)
    assert sum(map(is_coded, held)) == kind.linears


def is_coded(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """GPT-2 keeps its linears in `Conv1D`, `[in, out]` in torch too."""
    folder = tmp_path_factory.mktemp("gpt2")
    build(Kind("gpt2", GPT2, 0)).save_pretrained(folder)
    f, params, _ = load_weights(folder)
    return folder, f, params


def coded_gpt2(params: Any, format: Any) -> Any:
    def leaf(path: Any, w: Any) -> Any:
        if path[-1].key != "kernel":
            return w
        return QTensor.of(encode(w, format), Layout("kn", w.shape), w.dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


@pytest.mark.parametrize("format", ["compressed-tensors", "awq", "hqq"])
def test_conv1d_is_no_linear_in_most_formats(gpt2: Any, tmp_path: Path, format: str):
    folder, _, params = gpt2
    coded = coded_gpt2(params, FOUR)
    with pytest.raises(ValueError, match=r"^layers/0/attn/\w+/kernel .* is none in"):
        export(tmp_path / "out", coded, model=folder, format=format)


@pytest.mark.parametrize("format", ["gptq", "gptq-v2"])
def test_conv1d_in_gptq_and_back(gpt2: Any, tmp_path: Path, format: str):
    folder, _, params = gpt2
    coded = coded_gpt2(params, FOUR)
    out = export(tmp_path / "out", coded, model=folder, format=format)
    _, back, _ = load_weights(out)
    assert jax.tree.structure(back) == jax.tree.structure(coded)
    jax.tree.map(np.testing.assert_array_equal, back, coded)


def test_gptq_holds_linears_of_blocks_alone(tmp_path: Path):
    folder = tmp_path / "float"
    build(KINDS[-1]).save_pretrained(folder)
    _, params, _ = load_weights(folder)
    coded = quantized(folder, params)
    out = export(tmp_path / "out", coded, model=folder, format="gptq")
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["block_name_to_quantize"] == "bert.encoder.layer"
    proj = params["head"]["proj"]["kernel"]
    coded["head"]["proj"]["kernel"] = QTensor.of(
        _encode(proj), Layout("kn", proj.shape), proj.dtype
    )
    with pytest.raises(ValueError, match=r"^cls.*transform.dense is quantized, and "):
        export(tmp_path / "refused", coded, model=folder, format="gptq")
    assert not (tmp_path / "refused").exists()


def test_conv1d_in_bitsandbytes(gpt2: Any, tmp_path: Path):
    import torch
    import transformers

    pytest.importorskip("bitsandbytes")
    folder, f, params = gpt2
    coded = coded_gpt2(params, Codebook("nf4", group(64)))
    out = export(tmp_path / "out", coded, model=folder, format="bitsandbytes")
    _, back, _ = load_weights(out)
    jax.tree.map(np.testing.assert_array_equal, back, coded)
    served: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    for module in served.modules():
        module.support_avx512bf16_for_cpu = False
    tokens = np.random.default_rng(1).integers(2, 64, (2, 8))
    expected = np.asarray(_run(f, dequantize(coded), jnp.asarray(tokens)))
    with torch.no_grad():
        found = served(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
