"""GPTQ's format, both versions: the packing, and back bit for bit."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.core.coded import pack_codes
from qjax.core.formats import Codebook, Float, Int, channel, group, token
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs, dequantize
from qjax.core.scales import Grid
from qjax.core.transforms import Permutation
from qjax.io.export import export
from qjax.io.gptq import Writer
from qjax.io.huggingface import load_weights
from qjax.io.matrices import Matrix

pytestmark = pytest.mark.filterwarnings("ignore:.*are stored in .*vLLM")

FORMATS = [
    *(Int(bits, group(32)) for bits in (2, 3, 4, 8)),
    *(Int(bits, group(64), symmetric=False) for bits in (2, 3, 4, 8)),
    Int(4, channel(), symmetric=False),
]
GOLDEN = Path(__file__).parents[1] / "golden" / "packing.npz"
DOWN = "model.layers.1.mlp.down_proj."


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Little-endian streams of bits along rows, read one number at a time."""
    wide = words.view(np.uint32).astype(np.uint64)
    out = np.zeros((len(words), count), np.int64)
    for i in range(count):
        word, offset = divmod(i * bits, 32)
        value = wide[:, word] >> np.uint64(offset)
        if offset + bits > 32:
            value |= wide[:, word + 1] << np.uint64(32 - offset)
        out[:, i] = value & np.uint64(2**bits - 1)
    return out


def decoded(found: Any, bits: int, version: int, K: int, N: int) -> np.ndarray:
    """The weight `[out, in]` as readers of the format compute it."""
    q = unpack(np.ascontiguousarray(found[DOWN + "qweight"].T), bits, K).T
    z = unpack(found[DOWN + "qzeros"], bits, N) + (version == 1)
    groups = found[DOWN + "g_idx"]
    return ((q - z[groups]) * found[DOWN + "scales"][groups]).T


def without_zeros_of_0(qparams: Any) -> Any:
    """Zero points of at least 1, which version 1 can hold."""

    def leaf(x: Any) -> Any:
        part = x.parts[0]
        zero = jnp.maximum(part.grid().zero, 1)
        grid = Grid(part.scale, zero)
        coded = pack_codes(part.unpack(), grid, part.format, part.shape)
        return QTensor.of(coded, x.layout, x.dtype, x.acts)

    kernels = lambda x: hasattr(x, "parts")
    return jax.tree.map(
        lambda x: leaf(x) if kernels(x) else x, qparams, is_leaf=kernels
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_packing_and_back(small: Any, tmp_path: Path, format: Int, version: int):
    qparams = small.quantized(format)
    if version == 1 and not format.symmetric:
        qparams = without_zeros_of_0(qparams)
    name = "gptq" if version == 1 else "gptq-v2"
    out = export(tmp_path / "out", qparams, model=small.folder, format=name)
    found = load_file(out / "model.safetensors")
    exact = qparams["layers"]["mlp"]["down_proj"]["kernel"].dequantize()[1].T
    weight = decoded(found, format.bits, version, 128, 64)
    np.testing.assert_allclose(weight, exact, rtol=1e-6)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == json.loads((out / "quantize_config.json").read_text())
    rows = format.granularity.rows
    assert (config["bits"], config["group_size"]) == (format.bits, rows or -1)
    assert (config["sym"], config["desc_act"]) == (format.symmetric, False)
    _, back, _ = load_weights(out, scan_layers=True)
    assert jax.tree.structure(back) == jax.tree.structure(qparams)
    jax.tree.map(np.testing.assert_array_equal, back, qparams)


@pytest.fixture
def reordered(small: Any) -> Any:
    def acts(w: Any) -> SiteActs:
        rng = np.random.default_rng(1)
        order = np.stack([rng.permutation(w.shape[-2]) for _ in range(w.shape[0])])
        return SiteActs(t_in=Permutation(jnp.asarray(order, jnp.int32)))

    return small.quantized(Int(4, group(32), symmetric=False), acts)


def test_groups_in_another_order(small: Any, tmp_path: Path, reordered: Any):
    out = export(tmp_path / "out", reordered, model=small.folder, format="gptq-v2")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["desc_act"]
    found = load_file(out / "model.safetensors")
    exact = reordered["layers"]["mlp"]["down_proj"]["kernel"].dequantize()[1].T
    np.testing.assert_allclose(decoded(found, 4, 2, 128, 64), exact, rtol=1e-6)
    _, back, _ = load_weights(out, scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, dequantize(back), dequantize(reordered))


def test_modules_in_float_are_named(small: Any, tmp_path: Path):
    keep = lambda path: None if "q_proj" in path else Int(4, group(32))
    qparams = small.quantized(keep)
    out = export(tmp_path / "out", qparams, model=small.folder, format="gptq")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert list(config["dynamic"]) == [
        rf"-:^model\.layers\.{i}\.self_attn\.q_proj$" for i in range(2)
    ]
    _, back, _ = load_weights(out, scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, back, qparams)


CANNOT = {
    "5 bits": (Int(5, group(32)), None, "holds whole numbers of"),
    "floats": (Float("e4m3"), None, "holds whole numbers of"),
    "levels": (Codebook("nf4", group(32)), None, "holds whole numbers of"),
    "float zeros": (Int(4, group(32), zero="float"), None, "holds whole numbers of"),
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
        export(tmp_path / "out", qparams, model=small.folder, format="gptq")
    assert list(tmp_path.iterdir()) == []


def test_two_formats_are_refused(small: Any, tmp_path: Path):
    two = lambda path: Int(8 if "down" in path else 4, group(32))
    with pytest.raises(ValueError, match=r"q_proj/kernel and .*down_proj/kernel are"):
        export(
            tmp_path / "out", small.quantized(two), model=small.folder, format="gptq"
        )


def test_zero_points_that_version_1_has_no_code_for(small: Any, tmp_path: Path):
    rise = {"layers": jax.tree.map(jnp.abs, small.params["layers"])}
    qparams = small.quantized(
        Int(4, group(32), symmetric=False), params=small.params | rise
    )
    with pytest.raises(ValueError, match=r'zero points of 0.*export to "gptq-v2"'):
        export(tmp_path / "out", qparams, model=small.folder, format="gptq")


@pytest.fixture
def written(small: Any, tmp_path: Path) -> Path:
    qparams = small.quantized(Int(4, group(32)))
    return export(tmp_path / "out", qparams, model=small.folder, format="gptq")


CONFIGS = {
    "bits": ({"bits": 5}, "bits is 5, supported are"),
    "format": ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "method": ({"method": "awq"}, r"method is 'awq', supported are \('gptq',\)"),
    "two formats": ({"format": "gptq_v2"}, r"\.format is 'gptq_v2', supported are"),
    "words": ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
    "size": ({"group_size": 0}, "group_size is 0, expected a positive whole number"),
    "dynamic": ({"dynamic": {"+:up": {"bits": 8}}}, r"dynamic: '\+:up' sets"),
    "unknown": ({"turbo": True}, "'turbo' is unknown"),
    "symmetric": ({"checkpoint_format": "gptq_v2"}, "qzeros is not 8 everywhere"),
    "other groups": ({"group_size": 64}, r"scales has shape \[2, 64\], config\.json"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_options_that_are_not_supported_are_named(written: Path, what: str):
    changes, message = CONFIGS[what]
    config = json.loads((written / "config.json").read_text())
    config["quantization_config"] |= changes
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        load_weights(written)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("last", "value", "message"),
    [
        ("qweight", np.zeros((16, 63), np.int32), r"qweight has shape \[16, 63\]"),
        ("qweight", np.zeros((16, 64), np.float32), "qweight is float32, expected int"),
        ("qzeros", np.full((4, 8), -1, np.int32), "qzeros holds 15, for which readers"),
        ("g_idx", np.zeros(128, np.int32), "g_idx does not put 32 of 128 features"),
        ("scales", None, r"no tensor model\.layers\.1\.mlp\.down_proj\.scales"),
    ],
)
def test_damaged_tensors(written: Path, last: str, value: Any, message: str):
    found = load_file(written / "model.safetensors")
    found[DOWN + last] = value
    if value is None:
        del found[DOWN + last]
    save_file(found, written / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(written)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_packing_is_that_of_auto_round(bits: int, version: int):
    key = f"{'gptq' if version == 1 else 'gptq_v2'}/{bits}/"
    with np.load(GOLDEN) as golden:
        q, zero, scale = (golden[key + name] for name in ("q", "zero", "scale"))
        grid = Grid(jnp.asarray(scale), jnp.asarray(zero))
        format = Int(bits, group(32), symmetric=False)
        part = pack_codes(jnp.asarray(q), grid, format, q.shape)
        layer = QTensor.of(part, Layout("kn", q.shape), jnp.float32)
        tensors, _ = Writer(version).write(Matrix.of("w", layer))
        for name in ("qweight", "qzeros"):
            np.testing.assert_array_equal(tensors[name], golden[key + name])
