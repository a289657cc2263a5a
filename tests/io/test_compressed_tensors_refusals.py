"""compressed-tensors: what cannot be written, and damaged folders, are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.core.formats import (
    MX,
    Binary,
    Codebook,
    Float,
    Int,
    channel,
    group,
    token,
)
from qjax.core.qtensor import Activation, SiteActs
from qjax.core.transforms import Diagonal
from qjax.io.export import export
from qjax.io.huggingface import load_weights

CANNOT = {
    "float zero points": (Int(4, group(32), zero="float"), None),
    "one bit": (Int(1, group(32), symmetric=False), None),
    "levels": (Codebook("nf4", group(32)), None),
    "signs": (Binary(group(32)), None),
    "e5m2": (Float("e5m2", channel()), None),
    "six bits": (MX("fp6"), None),
    "partial groups": (Int(4, group(48)), None),
    "a transform": (
        Int(4, group(32)),
        lambda w: SiteActs(t_in=Diagonal(jnp.ones(w.shape[:2]))),
    ),
    "narrow inputs": (
        Int(8),
        lambda w: SiteActs(activation=Activation(Int(8, token(), scale_rule="narrow"))),
    ),
    "ocp inputs": (MX("fp4"), lambda w: SiteActs(activation=Activation(MX("fp4")))),
    "outliers": (
        Int(8),
        lambda w: SiteActs(activation=Activation(Int(8, token()), outliers=6.0)),
    ),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_it_cannot_hold_is_refused_by_leaf(small: Any, tmp_path: Path, what: str):
    qparams = small.quantized(*CANNOT[what])
    with pytest.raises(ValueError, match=r"^layers/0/attn/\w+/kernel .*") as error:
        export(tmp_path / "out", qparams, model=small.folder)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def written(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    format = Int(4, group(32), symmetric=False)
    out = tmp_path_factory.mktemp("written") / "out"
    return export(out, small.quantized(format), model=small.folder)


@pytest.fixture
def damaged(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "damaged")


UP = "model.layers.1.mlp.up_proj."


def drop(found: dict[str, np.ndarray], name: str) -> None:
    del found[UP + name]


DAMAGE: dict[str, tuple[Any, str]] = {
    "no scale": (lambda x: drop(x, "weight_scale"), r"no tensor .*up_proj\.weight_sc"),
    "no codes": (lambda x: drop(x, "weight_packed"), r"no tensor .*weight_packed"),
    "no zeros": (lambda x: drop(x, "weight_zero_point"), r"no tensor .*weight_zero"),
    "short": (
        lambda x: x.update({UP + "weight_packed": x[UP + "weight_packed"][:, 1:]}),
        r"weight_packed has shape \[128, 7\], config\.json asks for \[128, 8\]",
    ),
    "wide": (
        lambda x: x.update({UP + "weight_packed": np.zeros((128, 8), np.int64)}),
        "weight_packed is int64, expected int32",
    ),
    "another shape": (
        lambda x: x.update({UP + "weight_shape": np.array([64, 128])}),
        r"weight_shape is \[64, 128\], config\.json asks for \[128, 64\]",
    ),
    "uneven groups": (
        lambda x: x.update({UP + "weight_g_idx": np.zeros(64, np.int32)}),
        "g_idx does not put 32 of 64 features into each of 2 groups",
    ),
    "a tensor too many": (
        lambda x: x.update({UP + "weight_global_scale": np.zeros(1, np.float32)}),
        "weight_global_scale, which the scheme in config.json has no use for",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_tensors(damaged: Path, how: str):
    change, message = DAMAGE[how]
    found = load_file(damaged / "model.safetensors")
    change(found)
    save_file(found, damaged / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_weights(damaged)
    assert "\n" not in str(error.value)


def test_truncated(damaged: Path):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is truncated"):
        load_weights(damaged)


def test_pickles_are_never_opened(damaged: Path):
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which runs code when read"):
        load_weights(damaged)


def test_an_index_cannot_lead_elsewhere(damaged: Path):
    index = {"weight_map": {UP + "weight_packed": "../../etc/passwd"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="a file outside its folder"):
        load_weights(damaged)


CONFIGS: dict[str, tuple[Any, str]] = {
    "an option": (lambda c: c.update(turbo=1), "'turbo' is unknown"),
    "an argument": (
        lambda c: weights(c).update(spin=1),
        r"group_0\.weights: 'spin' is unknown",
    ),
    "a cache": (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "sparsity": (
        lambda c: c.update(sparsity_config={"format": "sparse-bitmask"}),
        "sparsity_config is",
    ),
    "rotations": (
        lambda c: c.update(transform_config=ROTATION),
        "transform_config: R3 transforms activations",
    ),
    "status": (
        lambda c: c.update(quantization_status="frozen"),
        "quantization_status is 'frozen'",
    ),
    "a format": (
        lambda c: c["config_groups"]["group_0"].update(format="marlin-24"),
        "format is 'marlin-24', supported are pack-quantized",
    ),
    "outputs": (
        lambda c: c["config_groups"]["group_0"].update(output_activations={"a": 1}),
        "output_activations must be null",
    ),
    "bits": (
        lambda c: weights(c).update(num_bits=40),
        "num_bits is 40, expected a whole number from 1 to 8",
    ),
    "a group size": (
        lambda c: weights(c).update(group_size="big"),
        "group_size is 'big', expected a positive whole number",
    ),
    "other groups": (
        lambda c: weights(c).update(group_size=48),
        "has 64 inputs, no multiple of 48",
    ),
    "an expression": (lambda c: c.update(ignore=["re:("]), "is no regular expression"),
    "no groups": (lambda c: c.update(config_groups=[]), "config_groups is"),
}
ROTATION = {"config_groups": {"R3": {"apply": [{"location": "q_attn"}]}}}


def weights(config: Any) -> Any:
    return config["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize("what", CONFIGS)
def test_options_that_are_not_supported_are_named(damaged: Path, what: str):
    change, message = CONFIGS[what]
    config = json.loads((damaged / "config.json").read_text())
    change(config["quantization_config"])
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        load_weights(damaged)
    assert "\n" not in str(error.value)
