"""compressed-tensors: exports run in torch, its own checkpoints run here."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from qjax.core.formats import (
    MX,
    NVFP4,
    Float,
    Format,
    Int,
    block,
    channel,
    group,
    tensor,
    token,
)
from qjax.core.qtensor import Activation, SiteActs, dequantize, is_quantized
from qjax.core.transforms import Permutation
from qjax.io.export import export
from qjax.io.huggingface import load_weights

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*are stored in .*vLLM"),
]

ASYM8 = Int(8, tensor(), symmetric=False)


@dataclass(frozen=True)
class Case:
    """A pair of formats; `static` is the range of a static input."""

    name: str
    format: Format
    activation: Activation | None = None
    static: tuple[float, int] | None = None
    file: str = "pack-quantized"

    def acts(self, w: Any) -> SiteActs:
        if self.static is None:
            return SiteActs(activation=self.activation)
        lead = (w.shape[0], 1, 1)
        scale = jnp.full(lead, self.static[0], jnp.float32)
        if isinstance(self.format, NVFP4):
            return SiteActs(activation=self.activation, global_scale=scale)
        asymmetric = isinstance(self.activation.format, Int)
        zero = jnp.full(lead, self.static[1], jnp.uint8) if asymmetric else None
        return SiteActs(scale, zero, activation=self.activation)


FP8 = Float("e4m3", token())
CT_FP4, CT_FP8 = MX("fp4", scale_rule="ct"), MX("fp8_e4m3", scale_rule="ct")
CASES = [
    Case("w4", Int(4, group(32))),
    Case("w4_channel_asym", Int(4, channel(), symmetric=False)),
    Case("w3_asym", Int(3, group(32), symmetric=False)),
    Case("w2_signed", Int(2, group(32), scale_rule="signed")),
    Case("w8", Int(8, group(64))),
    Case("w8_asym", Int(8, group(32), symmetric=False)),
    Case("w8a8", Int(8), Activation(Int(8, token())), file="int-quantized"),
    Case("w4a8", Int(4, group(32)), Activation(Int(8, token())), file="int-quantized"),
    Case("w8a8_asym", Int(8), Activation(ASYM8, False), (0.03, 120), "int-quantized"),
    Case("fp8", Float("e4m3", tensor()), file="float-quantized"),
    Case("fp8_dynamic", Float("e4m3"), Activation(FP8), file="float-quantized"),
    Case(
        "fp8_static",
        Float("e4m3", tensor()),
        Activation(Float("e4m3", tensor()), False),
        (0.01, 0),
        "float-quantized",
    ),
    Case("fp8_block", Float("e4m3", block(48, 32)), file="float-quantized"),
    Case("fp8_wide_block", Float("e4m3", block(128, 128)), file="float-quantized"),
    Case("nvfp4", NVFP4(), file="nvfp4-pack-quantized"),
    Case(
        "nvfp4_inputs",
        NVFP4(),
        Activation(NVFP4(), False),
        (600.0, 0),
        "nvfp4-pack-quantized",
    ),
    Case("mxfp4", CT_FP4, file="mxfp4-pack-quantized"),
    Case("mxfp4_inputs", CT_FP4, Activation(CT_FP4), file="mxfp4-pack-quantized"),
    Case("mxfp8", CT_FP8, Activation(CT_FP8), file="mxfp8-quantized"),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make(small: Any, case: Case) -> Any:
    return small.quantized(case.format, case.acts if case.activation else None)


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, formats included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def same(x: Any, y: Any) -> None:
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(same, a, b)


def as_stored(qparams: Any) -> Any:
    """The same codes and scales, said to be made by the file's own rule."""

    def leaf(x: Any) -> Any:
        if not is_quantized(x) or not isinstance(x.parts[0].format, Int):
            return x
        part = x.parts[0]
        format = replace(part.format, scale_rule="ct")
        return replace(x, parts=(replace(part, format=format),))

    return jax.tree.map(leaf, qparams, is_leaf=is_quantized)


@cases
def test_comes_back_bit_for_bit(small: Any, tmp_path: Path, case: Case):
    qparams = make(small, case)
    out = export(tmp_path / "out", qparams, model=small.folder)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == case.file
    assert config["ignore"] == ["lm_head"]
    _, found, _ = load_weights(out, scan_layers=True)
    # How the scales of weights were made is not in the file.
    assert_same(found, as_stored(qparams))


def torch_model(folder: Path, dtype: Any = None, decoded: bool = False) -> Any:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    options = {} if dtype is None else {"dtype": dtype}
    if decoded:
        config = transformers.CompressedTensorsConfig(dequantize=True)
        options["quantization_config"] = config
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def run(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


def in_float(leaf: Any) -> Any:
    return leaf.dequantize(jnp.float32) if is_quantized(leaf) else leaf


def float32_weights(model: Any, qparams: Any) -> None:
    """Give a model that only decodes to bfloat16 the weights in float32.

    Its own must be those, rounded twice.
    """
    import torch

    for values in (*model.parameters(), *model.buffers()):
        if values.is_floating_point():
            values.data = values.data.float()
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in (("attn", "self_attn"), ("mlp", "mlp")):
            for name, leaf in qparams["layers"][ours].items():
                exact = np.array(in_float(leaf["kernel"])[i].T)
                module = getattr(getattr(layer, theirs), name)
                found = module.weight.data.numpy()
                np.testing.assert_allclose(found, exact, rtol=2**-7)
                module.weight.data = torch.from_numpy(exact)


# transformers 5.23 has no room for packed zero points unless it decodes while loading.
@cases
def test_torch_gives_the_same_logits(small: Any, tmp_path: Path, case: Case):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    qparams = make(small, case)
    out = export(tmp_path / "out", qparams, model=small.folder)
    low = case.file.startswith(("nvfp4", "mx"))
    packed_zeros = "asym" in case.format.name
    model = torch_model(out, torch.bfloat16 if low else None, decoded=packed_zeros)
    if low:
        run(model, small.tokens)  # decodes
        float32_weights(model, qparams)
    expected = small.logits(qparams)
    found = run(model, small.tokens)
    # A dynamic scale may differ in its last bit, and then one code of 255.
    integers = case.activation is not None and isinstance(case.activation.format, Int)
    atol = 1e-3 if integers else 2e-6
    np.testing.assert_allclose(found, expected, atol=atol * np.abs(expected).max())


def mixed(path: str) -> Format | None:
    """Three formats, and queries in float."""
    if path.endswith("q_proj/kernel"):
        return None
    if "attn" in path:
        return Int(8, channel())
    return NVFP4() if "down_proj" in path else Int(4, group(32))


def test_a_format_for_each_module(small: Any, tmp_path: Path):
    qparams = small.quantized(mixed)
    out = export(tmp_path / "out", qparams, model=small.folder)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    named = {g["format"]: g["targets"] for g in config["config_groups"].values()}
    assert named["nvfp4-pack-quantized"] == [
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    ]
    queries = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert sorted(config["ignore"]) == sorted([*queries, "lm_head"])
    _, unrolled, _ = load_weights(out)
    assert_same(load_weights(out, scan_layers=True)[1], qparams)
    kernel = unrolled["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    assert_same(kernel, qparams["layers"]["mlp"]["up_proj"]["kernel"][1])
    torch = pytest.importorskip("torch")
    model = torch_model(out, torch.bfloat16)
    run(model, small.tokens)
    float32_weights(model, qparams)
    expected, found = small.logits(qparams), run(model, small.tokens)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_layers_that_differ_are_no_stack(small: Any, tmp_path: Path):
    out = export(
        tmp_path / "out", small.quantized(Int(4, group(32))), model=small.folder
    )
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.1.mlp.up_proj")
    (out / "config.json").write_text(json.dumps(config))
    message = r"layers\.0\.mlp\.up_proj is quantized and .*1\.mlp\.up_proj is not"
    with pytest.raises(ValueError, match=message):
        load_weights(out, scan_layers=True)
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.up_proj"):
        load_weights(out)


def reordered(w: Any) -> SiteActs:
    rng = np.random.default_rng(1)
    order = np.stack([rng.permutation(w.shape[-2]) for _ in range(w.shape[0])])
    return SiteActs(t_in=Permutation(jnp.asarray(order, jnp.int32)))


def test_groups_in_another_order(small: Any, tmp_path: Path):
    """`g_idx`, which compressed-tensors read up to 0.18; vLLM 0.32 refuses it."""
    format = Int(4, group(32), symmetric=False)
    qparams = small.quantized(format, reordered)
    out = export(tmp_path / "out", qparams, model=small.folder)
    with safe_open(out / "model.safetensors", "numpy") as file:
        name = "model.layers.1.mlp.down_proj."
        get = lambda last: file.get_tensor(name + last)
        q = unpack(get("weight_packed"), 4, 128)
        z = unpack(get("weight_zero_point").T, 4, 64).T
        groups = get("weight_g_idx")
        decoded = (q - z[:, groups]) * get("weight_scale")[:, groups]
    exact = qparams["layers"]["mlp"]["down_proj"]["kernel"].dequantize()[1].T
    np.testing.assert_allclose(decoded, exact, rtol=1e-6)
    _, found, _ = load_weights(out, scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, dequantize(found), dequantize(qparams))


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Little-endian streams of bits, read one number at a time."""
    wide = words.view(np.uint32).astype(np.uint64)
    out = np.zeros((len(words), count), np.int64)
    for i in range(count):
        word, offset = divmod(i * bits, 32)
        value = wide[:, word] >> np.uint64(offset)
        if offset + bits > 32:
            value |= wide[:, word + 1] << np.uint64(32 - offset)
        out[:, i] = value & np.uint64(2**bits - 1)
    return out


def by_compressed_tensors(
    folder: Path, source: Path, tokens: np.ndarray, weights: Any, inputs: Any
) -> np.ndarray:
    """A checkpoint that compressed-tensors writes; logits of its fake quantization."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=args,
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    config = QuantizationConfig(config_groups={"g": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if not hasattr(module, "weight_scale"):
            continue
        blocks = module.weight.data.unflatten(-1, (-1, args.group_size or 1))
        axes = (-1,) if args.group_size else (-2, -1)
        scale, zero = calculate_qparams(blocks.amin(axes), blocks.amax(axes), args)
        module.weight_scale.data = scale.reshape(module.weight_scale.shape)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.reshape(module.weight_scale.shape)
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.03)
            module.input_zero_point.data.fill_(-9)
    logits = run(model, tokens)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    assert torch.isfinite(torch.tensor(logits)).all()
    return logits


THEIRS = {
    "w4_asym": ({"num_bits": 4, "symmetric": False, "group_size": 32}, None),
    "w3": ({"num_bits": 3, "group_size": 64}, None),
    "w8a8": (
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "w8a8_static": (
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "tensor", "symmetric": False},
    ),
    "fp8_dynamic": (
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_their_checkpoints_give_their_logits(small: Any, tmp_path: Path, name: str):
    expected = by_compressed_tensors(
        tmp_path, small.folder, small.tokens, *THEIRS[name]
    )
    _, qparams, _ = load_weights(tmp_path, scan_layers=True)
    found = small.logits(qparams)
    atol = 1e-3 if name == "w8a8" else 2e-6
    np.testing.assert_allclose(found, expected, atol=atol * np.abs(expected).max())
