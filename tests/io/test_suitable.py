"""Quantized checkpoints are refused, tensors that nobody reads are reported."""

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qjax.io.arrays import write_arrays
from qjax.io.huggingface import load_model
from qjax.io.suitable import warn_of_unread
from qjax.trace.control import QuantizationWarning

CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}


def tensors() -> dict[str, np.ndarray]:
    names = {"model.embed_tokens": (16, 8), "model.norm": (8,), "lm_head": (16, 8)}
    for layer in ("model.layers.0.", "model.layers.1."):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[layer + norm] = (8,)
        names |= {f"{layer}self_attn.{x}_proj": (8, 8) for x in "qkvo"}
        names |= {f"{layer}mlp.{x}_proj": (8, 8) for x in ("gate", "up", "down")}
    return {f"{name}.weight": np.ones(s, np.float32) for name, s in names.items()}


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_quantized_checkpoints_are_refused(folder: Path, field: str, lazy: bool):
    write_config(folder, **{field: {"quant_method": "fp8"}})
    message = rf"config\.json: {field} says .* \(fp8\), but only float .* F64, F32"
    with pytest.raises(ValueError, match=message):
        load_model(folder, lazy=lazy)
    write_config(folder, **{field: None})
    load_model(folder, lazy=lazy)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_weights_that_are_no_floats_are_refused(folder: Path, dtype, scan_layers: bool):
    name = "model.layers.1.mlp.up_proj.weight"
    with (folder / "model.safetensors").open("wb") as file:
        write_arrays(file, tensors() | {name: tensors()[name].astype(dtype)})
    message = rf"{name} is {np.dtype(dtype).name}, but only float weights"
    with pytest.raises(ValueError, match=message):
        load_model(folder, scan_layers=scan_layers)


def test_tensors_without_a_place_are_reported(folder: Path):
    extra = {f"model.layers.{i}.mlp.up_proj.weight_scale": 1.0 for i in range(4)}
    whole = tensors() | {name: np.float32([x]) for name, x in extra.items()}
    save_file(whole, folder / "model.safetensors")
    message = (
        r"no place for 4 of .*: model\.layers\.0\.mlp\.up_proj\.weight_scale, .*\."
    )
    with pytest.warns(QuantizationWarning, match=message) as caught:
        load_model(folder)
    assert len(caught) == 1 and "layers.3" not in str(caught[0].message)


def test_buffers_and_tied_heads_are_not_reported(folder: Path):
    write_config(folder, tie_word_embeddings=True)
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.position_ids")
    save_file(
        tensors() | {name: np.ones(4, np.float32) for name in names},
        folder / "model.safetensors",
    )
    load_model(folder)  # warnings are errors here


@pytest.mark.parametrize(
    ("name", "kind", "harmless"),
    [
        ("h.0.attn.bias", "gpt2", True),
        ("transformer.h.0.attn.masked_bias", "gpt2", True),
        ("model.layers.0.self_attn.q_proj.bias", "llama", False),
        ("lm_head.weight", "llama", False),
        ("bert.pooler.dense.weight", "bert", True),
        ("cls.seq_relationship.weight", "bert", True),
        ("cls.seq_relationship.weight", "llama", False),
        ("classifier.weight", "bert", False),
    ],
)
def test_which_tensors_are_harmless(name: str, kind: str, harmless: bool):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unread([name], [], None, {"model_type": kind})
    assert bool(caught) != harmless
