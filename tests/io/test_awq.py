"""AWQ's GEMM format: the packing, and back bit for bit."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.core.coded import pack_codes
from qjax.core.formats import Int, channel, group
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, dequantize
from qjax.core.scales import Grid
from qjax.io import awq
from qjax.io.export import export
from qjax.io.huggingface import load_weights
from qjax.io.matrices import Matrix

GOLDEN = Path(__file__).parents[1] / "golden" / "packing.npz"
DOWN = "model.layers.1.mlp.down_proj."
ASYMMETRIC = Int(4, group(32), symmetric=False)
FORMATS = [ASYMMETRIC, Int(4, channel(), symmetric=False), Int(4, group(64))]


def unpack(words: np.ndarray) -> np.ndarray:
    """AutoAWQ's nibbles: the i-th of a word is its column `order[i]`."""
    out = np.zeros((words.shape[0], words.shape[1] * 8), np.int64)
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        out[:, column::8] = (words.view(np.uint32) >> np.uint32(4 * i)) & 15
    return out


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_packing_and_back(small: Any, tmp_path: Path, format: Int):
    qparams = small.quantized(format)
    out = export(tmp_path / "out", qparams, model=small.folder, format="awq")
    found = load_file(out / "model.safetensors")
    q, z = unpack(found[DOWN + "qweight"]), unpack(found[DOWN + "qzeros"])
    groups = np.arange(128) // (format.granularity.rows or 128)
    weight = ((q - z[groups]) * found[DOWN + "scales"][groups]).T
    exact = qparams["layers"]["mlp"]["down_proj"]["kernel"].dequantize()[1].T
    np.testing.assert_allclose(weight, exact, rtol=1e-6)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert config["group_size"] == (format.granularity.rows or -1)
    _, back, _ = load_weights(out, scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, dequantize(back), dequantize(qparams))
    if not format.symmetric:
        assert jax.tree.structure(back) == jax.tree.structure(qparams)
        jax.tree.map(np.testing.assert_array_equal, back, qparams)


@pytest.mark.parametrize("format", [Int(3, group(32)), Int(4, group(48))])
def test_what_it_cannot_hold_is_refused_by_leaf(
    small: Any, tmp_path: Path, format: Int
):
    with pytest.raises(ValueError, match=r"^layers/0/attn/\w+/kernel is .*AWQ's"):
        export(
            tmp_path / "out", small.quantized(format), model=small.folder, format="awq"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "says bits=8"),
        ({"version": "gemv"}, "version='gemv'"),
        ({"zero_point": 3}, "zero_point is 3"),
        ({"zero_point": False}, "qzeros is not 8 everywhere"),
        ({"group_size": -2}, "group_size is -2"),
        ({"turbo": 1}, "'turbo' is unknown"),
    ],
)
def test_options_that_are_not_supported_are_named(
    small: Any, tmp_path: Path, changes: Any, message: str
):
    qparams = small.quantized(ASYMMETRIC)
    out = export(tmp_path / "out", qparams, model=small.folder, format="awq")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        load_weights(out)
    assert "\n" not in str(error.value)


def test_a_wrong_shape(small: Any, tmp_path: Path):
    out = export(
        tmp_path / "out",
        small.quantized(ASYMMETRIC),
        model=small.folder,
        format="awq",
    )
    found = load_file(out / "model.safetensors")
    found[DOWN + "qweight"] = found[DOWN + "qweight"].T.copy()
    save_file(found, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"qweight has shape \[8, 128\], config\.json"):
        load_weights(out)


def test_packing_is_that_of_auto_round():
    with np.load(GOLDEN) as golden:
        q, zero, scale = (golden[f"awq/4/{name}"] for name in ("q", "zero", "scale"))
        grid = Grid(jnp.asarray(scale), jnp.asarray(zero))
        part = pack_codes(jnp.asarray(q), grid, ASYMMETRIC, q.shape)
        layer = QTensor.of(part, Layout("kn", q.shape), jnp.float32)
        tensors, size = awq.write(Matrix.of("w", layer))
        assert size == 32
        for name in ("qweight", "qzeros"):
            np.testing.assert_array_equal(tensors[name], golden[f"awq/4/{name}"])
