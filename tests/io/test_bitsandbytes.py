"""bitsandbytes: exports run in torch, its own checkpoints run here."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.core.formats import Codebook, Int, group, token
from qjax.core.qtensor import Activation, SiteActs
from qjax.io.export import export
from qjax.io.huggingface import load_weights
from qjax.ops import matmul

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
DOWN = "model.layers.1.mlp.down_proj."
INPUTS = Int(8, token(), scale_rule="float16")
WEIGHTS = Int(8, scale_rule="float16")
FORMATS = {
    "nf4": Codebook("nf4", group(64)),
    "fp4": Codebook("fp4", group(64)),
    "nf4_double": Codebook("nf4", group(64), double_quant=256),
    "fp4_wide": Codebook("fp4", group(32), double_quant=256),
}


def int8(small: Any, threshold: float | None = 6.0) -> Any:
    activation = Activation(INPUTS, outliers=threshold)
    return small.quantized(WEIGHTS, lambda w: SiteActs(activation=activation))


def torch_logits(folder: Path, tokens: np.ndarray, **options: Any) -> Any:
    """The logits, and the model."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    for module in model.modules():
        # Where the processor has it, 4-bit weights are multiplied in bfloat16.
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        logits = model(torch.tensor(tokens).long()).logits.float().numpy()
    return logits, model


@pytest.mark.parametrize("name", FORMATS)
def test_4_bits_and_back(small: Any, tmp_path: Path, name: str):
    qparams = small.quantized(FORMATS[name])
    out = export(tmp_path / "out", qparams, model=small.folder, format="bitsandbytes")
    _, back, _ = load_weights(out, scan_layers=True)
    assert jax.tree.structure(back) == jax.tree.structure(qparams)
    jax.tree.map(np.testing.assert_array_equal, back, qparams)
    found, _ = torch_logits(out, small.tokens)
    expected = small.logits(qparams)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_their_4_bits_give_their_logits(
    small: Any, tmp_path: Path, kind: str, double: bool
):
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    expected, model = torch_logits(
        small.folder, small.tokens, quantization_config=config
    )
    model.save_pretrained(tmp_path)
    _, qparams, _ = load_weights(tmp_path, scan_layers=True)
    found = small.logits(qparams)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_8_bits_and_back(small: Any, tmp_path: Path):
    qparams = int8(small)
    out = export(tmp_path / "out", qparams, model=small.folder, format="bitsandbytes")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_threshold"] == 6.0
    _, back, _ = load_weights(out, scan_layers=True)
    assert jax.tree.structure(back) == jax.tree.structure(qparams)
    # The file holds the largest magnitude, 127 times the scale.
    close = partial(np.testing.assert_allclose, rtol=2e-7)
    jax.tree.map(close, back, qparams)


@contextmanager
def exact_scale() -> Iterator[None]:
    """bitsandbytes 0.50 with `1/127^2` on a CPU, not 6.200124e-5: 1.8e-5 too large."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")

    def decoded(a, rows, cols, dtype=None, bias=None):
        y = a * (rows.reshape(-1, 1) * cols.reshape(1, -1)) * (1 / 127**2)
        return (y if bias is None else y + bias).to(dtype or torch.float16)

    with torch.library._scoped_library("bitsandbytes", "IMPL") as library:
        library.impl("int8_mm_dequant", decoded, "CPU")
        yield


def same_layers(model: Any, tokens: np.ndarray, qparams: Any) -> tuple[int, Any]:
    """Every 8-bit layer gives its own output for the inputs that it had.

    How many of them had outliers, and the model's logits.
    """
    torch = pytest.importorskip("torch")
    compared = []

    def compare(names: list[str], layer: Any, inputs: Any, output: Any) -> None:
        kernel = qparams["layers"][names[-2].removeprefix("self_")][names[-1]]["kernel"]
        q = jax.tree.map(lambda a: a[int(names[2])], kernel)
        x = inputs[0].numpy().reshape(-1, inputs[0].shape[-1])
        y = np.asarray(matmul(jnp.asarray(x), q))
        y = y if layer.bias is None else y + layer.bias.detach().float().numpy()
        found = output.detach().float().numpy().reshape(y.shape)
        np.testing.assert_allclose(found, y, atol=1e-6 * np.abs(y).max())
        compared.append((np.abs(x) >= 6).any())

    for name, module in model.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_hook(partial(compare, name.split(".")))
    with torch.no_grad():
        logits = model(torch.tensor(tokens).long()).logits.numpy()
    assert len(compared) == 14
    return sum(compared), logits


def check_8_bits(small: Any, model: Any, qparams: Any) -> None:
    """Layers and logits; a value on the edge of two codes may cost a row of four."""
    rows = np.arange(24, dtype=np.int32).reshape(4, 6)
    small = replace(small, tokens=rows)
    with exact_scale():
        outliers, found = same_layers(model, rows, qparams)
    expected = small.logits(qparams)
    off = np.abs(found - expected).max((1, 2))
    assert np.median(off) < 2e-6 * np.abs(expected).max()
    assert outliers >= 6


def spiky(folder: Path, out: Path) -> Path:
    """The same function with inputs of the attention 40 times as large in places."""
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}."
        tensors[name + "input_layernorm.weight"][[3, 17]] *= 40
        tensors[name + "post_attention_layernorm.weight"][5] *= 40
        for linear in ("q_proj", "k_proj", "v_proj"):
            tensors[name + f"self_attn.{linear}.weight"][:, [3, 17]] /= 40
        for linear in ("gate_proj", "up_proj"):
            tensors[name + f"mlp.{linear}.weight"][:, 5] /= 40
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_their_8_bits_run_here(small: Any, tmp_path: Path, threshold: float):
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=threshold
    )
    folder = spiky(small.folder, tmp_path / "spiky")
    _, model = torch_logits(folder, small.tokens, quantization_config=config)
    model.save_pretrained(tmp_path / "theirs")
    _, qparams, _ = load_weights(tmp_path / "theirs", scan_layers=True)
    check_8_bits(small, model, qparams)


@pytest.mark.parametrize("threshold", [None, 6.0])
def test_8_bits_run_in_torch(small: Any, tmp_path: Path, threshold: float | None):
    folder = spiky(small.folder, tmp_path / "spiky")
    activation = Activation(INPUTS, outliers=threshold)
    _, params, _ = load_weights(folder, scan_layers=True)
    own = replace(small, folder=folder, params=params)
    qparams = own.quantized(WEIGHTS, lambda w: SiteActs(activation=activation))
    out = export(tmp_path / "out", qparams, model=folder, format="bitsandbytes")
    _, model = torch_logits(out, small.tokens)
    check_8_bits(small, model, qparams)


CANNOT = {
    "groups": Codebook("nf4", group(16)),
    "levels": Codebook((-1.0, 0.0, 1.0), group(64)),
    "integers": Int(4, group(32)),
    "rows that end inside a block": Codebook("nf4", group(128)),
    "8 bits with float inputs": Int(8),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_it_cannot_hold_is_refused_by_leaf(small: Any, tmp_path: Path, what: str):
    with pytest.raises(ValueError, match=r"^layers/0/attn/\w+/kernel .*bitsandbytes"):
        export(
            tmp_path / "out",
            small.quantized(CANNOT[what]),
            model=small.folder,
            format="bitsandbytes",
        )
    assert list(tmp_path.iterdir()) == []


def damage(found: Any, state: Any) -> dict[str, Any]:
    """Tensors with a change to one quantization state."""
    name = DOWN + "weight.quant_state.bitsandbytes__nf4"
    held = json.loads(found[name].tobytes()) | state
    text = json.dumps(held).encode()
    return {**found, name: np.frombuffer(text, np.uint8)}


@pytest.mark.parametrize(
    ("config", "state", "message"),
    [
        ({"turbo": 1}, {}, "'turbo' is unknown"),
        ({"load_in_8bit": True}, {}, "one of them must be true"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, {}, "quant_storage is 'bfloat16'"),
        ({"llm_int8_threshold": "high"}, {}, "threshold is 'high'"),
        ({}, {"blocksize": 63}, "the quantization state says blocks of 63"),
        ({}, {"shape": [128, 64]}, r"shape \[128, 64\]; config\.json asks for"),
    ],
)
def test_options_that_are_not_supported_are_named(
    small: Any, tmp_path: Path, config: Any, state: Any, message: str
):
    qparams = small.quantized(FORMATS["nf4"])
    out = export(tmp_path / "out", qparams, model=small.folder, format="bitsandbytes")
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"] |= config
    (out / "config.json").write_text(json.dumps(raw))
    found = load_file(out / "model.safetensors")
    save_file(damage(found, state), out / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_weights(out)
    assert "\n" not in str(error.value)
