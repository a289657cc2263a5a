"""Exports hold what vLLM's loaders register: names, dtypes, shapes, configuration keys.

vLLM does not run here. The lists were written down from the sources of vLLM 0.32.0,
`vllm/model_executor/layers/quantization/`: `create_weights` of
`compressed_tensors/schemes/compressed_tensors_*.py`, of `auto_gptq.py` and of
`auto_awq.py`, and `_get_scheme_from_parts` of the first folder's
`compressed_tensors.py`, which chooses the class. `experiments/formats/README.md` says
what it refuses.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
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
from qjax.core.qtensor import Activation, SiteActs
from qjax.io.export import export

pytestmark = pytest.mark.filterwarnings("ignore:.*are stored in .*vLLM")

# A layer of `[N, K]` weights; `MODEL` is the dtype of the model, float32 here.
MODULE = "model.layers.1.mlp.down_proj"
N, K, MODEL = 64, 128, "F32"
Parameters = dict[str, tuple[str, list[int]]]

SHAPE: Parameters = {"weight_shape": ("I64", [2])}


def packed(bits: int, groups: int) -> Parameters:
    """`CompressedTensorsWNA16`."""
    words = -(-K * bits // 32)
    return SHAPE | {
        "weight_packed": ("I32", [N, words]),
        "weight_scale": (MODEL, [N, groups]),
    }


@dataclass(frozen=True)
class Loader:
    """A format, the class of vLLM that takes it, and what that registers."""

    name: str
    taken_by: str
    format: Format
    parameters: Parameters
    weights: dict[str, Any]
    activation: Activation | None = None
    inputs: dict[str, Any] | None = None
    stored: str = "pack-quantized"

    def acts(self, w: Any) -> SiteActs:
        """With some range where the input's is static."""
        if self.activation is None or self.activation.dynamic:
            return SiteActs(activation=self.activation)
        scale = jnp.full((w.shape[0], 1, 1), 0.5, jnp.float32)
        if isinstance(self.format, NVFP4):
            return SiteActs(activation=self.activation, global_scale=scale)
        zero = None
        if isinstance(self.activation.format, Int):
            zero = jnp.full((w.shape[0], 1, 1), 7, jnp.uint8)
        return SiteActs(scale, zero, activation=self.activation)


def integer(bits: int, **more: Any) -> dict[str, Any]:
    found = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    return found | {"symmetric": True, "dynamic": False, "actorder": None} | more


def eight(kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    found = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    return found | {"dynamic": False, "group_size": None} | more


FP8 = Float("e4m3", tensor())
FP4, MX8 = MX("fp4", scale_rule="ct"), MX("fp8_e4m3", scale_rule="ct")
ONE, TOKEN = ("F32", [1]), {"dynamic": True}
BYTES: Parameters = {"weight": ("I8", [N, K]), "weight_scale": (MODEL, [N, 1])}
FLOAT8: Parameters = {"weight": ("F8_E4M3", [N, K])}
HALVES: Parameters = {"weight_packed": ("U8", [N, K // 2])}
POWERS: Parameters = {"weight_scale": ("U8", [N, K // 32])}
NV: Parameters = HALVES | {
    "weight_scale": ("F8_E4M3", [N, K // 16]),
    "weight_global_scale": ONE,
}
NVFP4_ARGUMENTS = {
    **{"num_bits": 4, "type": "float", "strategy": "tensor_group"},
    **{"group_size": 16, "symmetric": True, "scale_dtype": "torch.float8_e4m3fn"},
}
POWER_ARGUMENTS = {
    **{"type": "float", "strategy": "group", "group_size": 32, "symmetric": True},
    "scale_dtype": "torch.uint8",
}
LOADERS = [
    *(
        Loader(f"w{b}", "WNA16", Int(b, group(32)), packed(b, 4), integer(b))
        for b in range(2, 9)
    ),
    Loader(
        "w4 asym",
        "WNA16",
        Int(4, group(32), symmetric=False),
        packed(4, 4) | {"weight_zero_point": ("I32", [N * 4 // 32, 4])},
        integer(4, symmetric=False, zp_dtype="torch.int8"),
    ),
    Loader(
        "w4 channel",
        "WNA16",
        Int(4, channel()),
        packed(4, 1),
        integer(4, strategy="channel", group_size=None),
    ),
    Loader(
        "w8a8",
        "W8A8Int8",
        Int(8),
        BYTES,
        eight("int", "channel"),
        Activation(Int(8, token())),
        eight("int", "token", **TOKEN),
        "int-quantized",
    ),
    Loader(
        "w8a8 static",
        "W8A8Int8",
        Int(8),
        BYTES | {"input_scale": ONE, "input_zero_point": ("I8", [1])},
        eight("int", "channel"),
        Activation(Int(8, tensor(), symmetric=False), dynamic=False),
        eight("int", "tensor", symmetric=False),
        "int-quantized",
    ),
    Loader(
        "w4a8",
        "W4A8Int",
        Int(4, group(32)),
        {"weight": ("I8", [N, K]), "weight_scale": (MODEL, [N, 4])},
        integer(4),
        Activation(Int(8, token())),
        eight("int", "token", **TOKEN),
        "int-quantized",
    ),
    Loader(
        "fp8",
        "W8A8Fp8",
        FP8,
        FLOAT8 | {"weight_scale": ONE, "input_scale": ONE},
        eight("float", "tensor"),
        Activation(FP8, dynamic=False),
        eight("float", "tensor"),
        "float-quantized",
    ),
    Loader(
        "fp8 dynamic",
        "W8A8Fp8",
        Float("e4m3"),
        FLOAT8 | {"weight_scale": (MODEL, [N, 1])},
        eight("float", "channel"),
        Activation(Float("e4m3", token())),
        eight("float", "token", **TOKEN),
        "float-quantized",
    ),
    Loader(
        "fp8 block",
        "W8A8Fp8",
        Float("e4m3", block(128, 32)),
        FLOAT8 | {"weight_scale": (MODEL, [2, 1])},
        eight("float", "block", block_structure=[32, 128]),
        Activation(Float("e4m3", group(128))),
        eight("float", "group", **TOKEN, group_size=128),
        "float-quantized",
    ),
    Loader(
        "fp8 weights",
        "W8A16Fp8",
        Float("e4m3"),
        FLOAT8 | {"weight_scale": (MODEL, [N, 1])},
        eight("float", "channel"),
        stored="float-quantized",
    ),
    Loader(
        "nvfp4 weights",
        "W4A4Fp4(use_a16)",
        NVFP4(),
        NV,
        NVFP4_ARGUMENTS | {"dynamic": False},
        stored="nvfp4-pack-quantized",
    ),
    Loader(
        "nvfp4",
        "W4A4Fp4",
        NVFP4(),
        NV | {"input_global_scale": ONE},
        NVFP4_ARGUMENTS | {"dynamic": False},
        Activation(NVFP4(), dynamic=False),
        NVFP4_ARGUMENTS | {"dynamic": "local"},
        "nvfp4-pack-quantized",
    ),
    Loader(
        "mxfp4",
        "W4A4Mxfp4",
        FP4,
        HALVES | POWERS,
        POWER_ARGUMENTS | {"num_bits": 4, "dynamic": False},
        Activation(FP4),
        POWER_ARGUMENTS | {"num_bits": 4, "dynamic": True},
        "mxfp4-pack-quantized",
    ),
    Loader(
        "mxfp8",
        "W8A8Mxfp8",
        MX8,
        FLOAT8 | POWERS,
        POWER_ARGUMENTS | {"num_bits": 8, "dynamic": False},
        Activation(MX8),
        POWER_ARGUMENTS | {"num_bits": 8, "dynamic": True},
        "mxfp8-quantized",
    ),
]


def held(folder: Path) -> Parameters:
    """The module's parameters in the file."""
    found = {}
    with safe_open(folder / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118
            if name.startswith(f"{MODULE}."):
                piece = file.get_slice(name)
                last = name.removeprefix(f"{MODULE}.")
                found[last] = (piece.get_dtype(), piece.get_shape())
    return found


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_compressed_tensors(small: Any, tmp_path: Path, loader: Loader):
    acts = loader.acts if loader.activation else None
    qparams = small.quantized(loader.format, acts)
    out = export(tmp_path / "out", qparams, model=small.folder)
    assert held(out) == loader.parameters
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == loader.stored
    assert config["ignore"] == ["lm_head"]
    assert config["kv_cache_scheme"] is None
    (scheme,) = config["config_groups"].values()
    assert scheme["targets"] == ["Linear"]
    assert scheme["format"] == loader.stored
    assert scheme["output_activations"] is None
    assert scheme["weights"].items() >= loader.weights.items()
    if loader.inputs is None:
        assert scheme["input_activations"] is None
    else:
        assert scheme["input_activations"].items() >= loader.inputs.items()


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(small: Any, tmp_path: Path, bits: int):
    """`AutoGPTQLinearMethod`; symmetric, which is all that `TYPE_MAP` has."""
    qparams = small.quantized(Int(bits, group(32)))
    out = export(tmp_path / "out", qparams, model=small.folder, format="gptq")
    assert held(out) == {
        "qweight": ("I32", [K * bits // 32, N]),
        "qzeros": ("I32", [4, N * bits // 32]),
        "scales": (MODEL, [4, N]),
        "g_idx": ("I32", [K]),
    }
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    read = {"bits": bits, "group_size": 32, "desc_act": False, "sym": True}
    assert config.items() >= (read | {"lm_head": False}).items()


def test_awq(small: Any, tmp_path: Path):
    """`AutoAWQLinearMethod`."""
    qparams = small.quantized(Int(4, group(32), symmetric=False))
    out = export(tmp_path / "out", qparams, model=small.folder, format="awq")
    assert held(out) == {
        "qweight": ("I32", [K, N // 8]),
        "qzeros": ("I32", [4, N // 8]),
        "scales": (MODEL, [4, N]),
    }
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    read = {"bits": 4, "group_size": 32, "zero_point": True}
    assert config.items() >= (read | {"modules_to_not_convert": ["lm_head"]}).items()
