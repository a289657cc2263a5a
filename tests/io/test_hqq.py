"""HQQ: exports run in the package `hqq`, its own checkpoints run here."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.core.formats import Codebook, Int, channel, group, token
from qjax.core.qtensor import Activation, SiteActs, dequantize
from qjax.io import hqq
from qjax.io.export import export
from qjax.io.hqq import pack, unpack
from qjax.io.huggingface import load_weights

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]
DOWN = "model.layers.1.mlp.down_proj."
FORMATS = [
    *(Int(bits, group(32), zero="float") for bits in (1, 2, 3, 4, 5, 8)),
    Int(4, group(64), symmetric=False),
    Int(3, channel()),
]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_packing_is_that_of_hqq(bits: int):
    torch = pytest.importorskip("torch")
    quantize = pytest.importorskip("hqq.core.quantize")
    rows = np.random.default_rng(0).integers(0, 2**bits, (48, 8)).astype(np.uint8)
    name = quantize.Quantizer.bit_to_packing[bits]
    theirs = quantize.Quantizer.pack[name](torch.from_numpy(rows)).numpy()
    ours = pack(rows, bits)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(unpack(ours, bits, 48), rows)


def hqq_logits(folder: Path, source: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of torch's model with every linear that holds `W_q` run by `hqq`."""
    torch = pytest.importorskip("torch")
    quantize = pytest.importorskip("hqq.core.quantize")
    from safetensors.torch import load_file as load_torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    found = load_torch(folder / "model.safetensors")
    for name in [key.removesuffix(".W_q") for key in found if key.endswith(".W_q")]:
        state = {
            key.removeprefix(f"{name}."): found.pop(key)
            for key in list(found)
            if key.startswith(f"{name}.")
        }
        layer = quantize.HQQLinear(None, None, compute_dtype=None, device="cpu")
        layer.load_state_dict(state)
        model.set_submodule(name, layer)
    model.load_state_dict(found, strict=False)
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_back_code_for_code(small: Any, tmp_path: Path, format: Int):
    qparams = small.quantized(format)
    out = export(tmp_path / "out", qparams, model=small.folder, format="hqq")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["skip_modules"] == ["lm_head"]
    assert config["quant_config"]["weight_quant_params"]["nbits"] == format.bits
    _, back, _ = load_weights(out, scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, dequantize(back), dequantize(qparams))
    if format.zero == "float":
        assert jax.tree.structure(back) == jax.tree.structure(qparams)
        jax.tree.map(np.testing.assert_array_equal, back, qparams)


@pytest.mark.parametrize("format", [FORMATS[2], FORMATS[-2]], ids=lambda f: f.name)
def test_exports_give_the_same_logits(small: Any, tmp_path: Path, format: Int):
    qparams = small.quantized(format)
    out = export(tmp_path / "out", qparams, model=small.folder, format="hqq")
    assert_close(hqq_logits(out, small.folder, small.tokens), small.logits(qparams))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """To the rounding of sums, which zero points of many codes make larger."""
    np.testing.assert_allclose(found, expected, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [1, 4])
def test_their_checkpoints_give_their_logits(small: Any, tmp_path: Path, bits: int):
    torch = pytest.importorskip("torch")
    quantize = pytest.importorskip("hqq.core.quantize")
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small.folder)
    settings = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
    AutoHQQHFModel.quantize_model(
        model, settings, compute_dtype=torch.float32, device="cpu"
    )
    with torch.no_grad():
        expected = model(torch.tensor(small.tokens).long()).logits.numpy()
    AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "out"), verbose=False)
    _, qparams, _ = load_weights(tmp_path / "out", scan_layers=True)
    assert_close(small.logits(qparams), expected)


CANNOT = {
    "7 bits": (Int(7, group(32)), None, "holds whole numbers of"),
    "levels": (Codebook("nf4", group(32)), None, "holds whole numbers of"),
    "inputs": (
        Int(8),
        lambda w: SiteActs(activation=Activation(Int(8, token()))),
        "codes its input as int8 channel",
    ),
    "groups": (Int(4, group(48)), None, "whole groups"),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_it_cannot_hold_is_refused_by_leaf(small: Any, tmp_path: Path, what: str):
    format, acts, message = CANNOT[what]
    qparams = small.quantized(format, acts)
    with pytest.raises(ValueError, match=rf"^layers/0/attn/\w+/kernel .*{message}"):
        export(tmp_path / "out", qparams, model=small.folder, format="hqq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("last", "value", "message"),
    [
        ("W_q", np.zeros((64, 32), np.uint8), r"W_q has shape \[64, 32\]"),
        ("axis", np.array(0, np.int32), "axis is 0, supported is 1"),
        ("nbits", np.array(7, np.int32), "has nbits=7, group_size=32; supported"),
        ("group_size", np.array(0, np.int32), "has nbits=4, group_size=0"),
        ("shape", np.array([1, 2], np.int64), r"shape is \[1, 2\], config\.json asks"),
        ("view_as_float", np.array(1, np.uint8), "view_as_float is true"),
        ("packing", np.frombuffer(b"4bit_u9", np.uint8), "packing is '4bit_u9'"),
        ("turbo", np.array(1, np.uint8), "turbo, which the scheme"),
        ("scale", None, r"no tensor model\.layers\.1\.mlp\.down_proj\.scale"),
    ],
)
def test_damaged_tensors(
    small: Any, tmp_path: Path, last: str, value: Any, message: str
):
    qparams = small.quantized(Int(4, group(32), zero="float"))
    out = export(tmp_path / "out", qparams, model=small.folder, format="hqq")
    found = load_file(out / "model.safetensors")
    found[DOWN + last] = value
    if value is None:
        del found[DOWN + last]
    save_file(found, out / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_weights(out)
    assert "\n" not in str(error.value)


def test_options_are_known_ones():
    weights = {"nbits": 4, "group_size": 64, "axis": 1}
    options = {"weight_quant_params": weights, "offload_meta": False}
    raw = {"quant_method": "hqq", "skip_modules": ["lm_head"]}
    for given in (options, {"self_attn.q_proj": options, "mlp.up_proj": options}):
        hqq.Reader.of(raw | {"quant_config": given})
    unknown = (
        {"evil": 1},
        options | {"evil": 1},
        {"weight_quant_params": weights | {"evil": 1}},
        {"self_attn.q_proj": options | {"evil": 1}},
        [],
    )
    for given in unknown:
        with pytest.raises(ValueError, match=r"'evil' is unknown|expected \{key"):
            hqq.Reader.of(raw | {"quant_config": given})
