"""Keys and values in float8: exports run in torch, scales come back as they were."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from qjax.commands.inputs import open_model
from qjax.core.formats import Int, group
from qjax.io.checkpoint import save
from qjax.io.export import export
from qjax.io.huggingface import load_weights
from qjax.models import Function, generate

FORMAT = Int(4, group(32))


@pytest.fixture(scope="module")
def coded(small: Any) -> tuple[Any, Any]:
    """The model with a coded cache, and its parameters."""
    batches = [(small.tokens,), (small.tokens[:, ::-1],)]
    f, params = qjax.quantize_cache(small.f, small.quantized(FORMAT), batches)
    return replace(small, f=f), params


@pytest.fixture(scope="module")
def folder(coded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    own, params = coded
    out = tmp_path_factory.mktemp("coded") / "out"
    return export(out, params, model=own.folder)


def in_torch(folder: Path, **options: Any) -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options)


def test_scales_are_those_of_the_caches_that_torch_keeps(
    small: Any, coded: Any, tmp_path: Path
):
    import torch

    out = export(tmp_path / "out", small.quantized(FORMAT), model=small.folder)
    model, seen = in_torch(out), []
    for tokens in (small.tokens, small.tokens[:, ::-1]):
        with torch.no_grad():
            ids = torch.tensor(np.ascontiguousarray(tokens)).long()
            seen.append(model(ids, use_cache=True).past_key_values.layers)
    attn = coded[1]["layers"]["attn"]
    for i in range(2):
        for name, kind in (("k_scale", "keys"), ("v_scale", "values")):
            most = max(float(getattr(cache[i], kind).abs().max()) for cache in seen)
            np.testing.assert_allclose(attn[name][i], [most / 448], rtol=2e-6)


def test_transformers_gives_the_same_logits(small: Any, coded: Any, folder: Path):
    import torch

    own, params = coded
    with torch.no_grad():
        found = in_torch(folder)(torch.tensor(own.tokens).long()).logits.numpy()
    expected = own.logits(params)
    plain = small.logits(small.quantized(FORMAT))
    slack = 2e-6 * np.abs(expected).max()
    assert np.abs(expected - plain).max() > 1000 * slack
    np.testing.assert_allclose(found, expected, atol=slack)


def test_names_and_config_are_those_of_the_format(folder: Path, coded: Any):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = config["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"]) == (8, "float")
    assert (scheme["strategy"], scheme["dynamic"]) == ("tensor", False)
    assert scheme["symmetric"] is True
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        for name in ("k_scale", "v_scale"):
            found = tensors[f"model.layers.{i}.self_attn.{name}"]
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, coded[1]["layers"]["attn"][name][i])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_it_comes_back(coded: Any, folder: Path, scan_layers: bool):
    own, params = coded
    f, back, config = load_weights(folder, scan_layers=scan_layers)
    assert config.coded_cache
    if scan_layers:
        assert jax.tree.structure(back) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, back, params)
    expected = own.logits(params)
    np.testing.assert_allclose(
        replace(own, f=f).logits(back), expected, atol=2e-6 * np.abs(expected).max()
    )


def test_unrolled_layers_get_the_same_scales(small: Any, coded: Any):
    f, params, _ = load_weights(small.folder)
    quantized = qjax.quantize(
        f, params, qjax.RTN(weights=FORMAT), [(small.tokens,)], progress=False
    )
    batches = [(small.tokens,), (small.tokens[:, ::-1],)]
    _, found = qjax.quantize_cache(f, quantized, batches)
    for name, stacked in coded[1]["layers"]["attn"].items():
        if name.endswith("_scale"):
            each = [found["layers"][str(i)]["attn"][name] for i in range(2)]
            np.testing.assert_allclose(np.stack(each), stacked, rtol=2e-6)


def test_generation_agrees_with_the_whole_sequence(coded: Any):
    own, params = coded
    f = qjax.apply(own.f)
    made = generate(f, params, jnp.asarray(own.tokens), 3)
    whole = np.asarray(f(params, made[:, :-1]))
    np.testing.assert_array_equal(whole[:, -3:].argmax(-1), made[:, -3:])


def test_it_survives_our_own_files(coded: Any, tmp_path: Path):
    own, params = coded
    files = {"config.json": own.folder / "config.json"}
    metadata = {"scan_layers": True}
    save(tmp_path / "saved", params, metadata=metadata, files=files)
    model = open_model(str(tmp_path / "saved"))
    np.testing.assert_array_equal(
        replace(own, f=model.f).logits(model.params), own.logits(params)
    )


def test_what_cannot_hold_it_is_named(coded: Any, small: Any, tmp_path: Path):
    own, params = coded
    with pytest.raises(ValueError, match="keys and values, which gptq cannot hold"):
        export(tmp_path / "out", params, model=own.folder, format="gptq")
    with pytest.raises(ValueError, match="have scales for keys and values already"):
        qjax.quantize_cache(small.f, params, [(small.tokens,)])
    with pytest.raises(TypeError, match="quantize_cache needs the function"):
        qjax.quantize_cache(Function(lambda p, x: x), {}, [])
    with pytest.raises(ValueError, match="batches is empty"):
        qjax.quantize_cache(small.f, small.params, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "int"}, "kv_cache_scheme is static int8 tensor, supported is float8"),
        ({"dynamic": True}, "kv_cache_scheme is dynamic fp8 e4m3"),
        ({"strategy": "attn_head"}, "strategy 'attn_head' has no counterpart"),
        ({"turbo": 1}, "'turbo' is unknown"),
    ],
)
def test_other_schemes_are_refused(folder: Path, tmp_path: Path, change, message):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["kv_cache_scheme"] |= change
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path)


def test_a_missing_scale_is_named(folder: Path, tmp_path: Path):
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1.*\.v_scale"):
        load_weights(tmp_path)
