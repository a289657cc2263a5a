"""Loading: every way a folder can be stored, and every way it can be wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from qjax.core.lazy import LazyLeaf
from qjax.io.huggingface import load_model, load_shell, load_weights
from qjax.models import llama
from qjax.models.fields import Fields

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
TOKENS = jnp.arange(10, dtype=jnp.int32).reshape(1, 10)


def tensors() -> dict[str, np.ndarray]:
    """Random tensors of the shapes that torch's Llama has."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (64, 32), "model.norm": (32,), "lm_head": (64, 32)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm": (32,),
            layer + "post_attention_layernorm": (32,),
            layer + "self_attn.q_proj": (32, 32),
            layer + "self_attn.k_proj": (16, 32),
            layer + "self_attn.v_proj": (16, 32),
            layer + "self_attn.o_proj": (32, 32),
            layer + "mlp.gate_proj": (48, 32),
            layer + "mlp.up_proj": (48, 32),
            layer + "mlp.down_proj": (32, 48),
        }

    def draw(shape):
        return rng.standard_normal(shape, np.float32) * 0.2

    return {f"{name}.weight": draw(shape) for name, shape in shapes.items()}


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def write_shards(folder: Path, count: int = 3) -> list[Path]:
    """The same tensors in several files and an index."""
    (folder / "model.safetensors").unlink()
    names, weight_map, files = sorted(tensors()), {}, []
    for i in range(count):
        file = folder / f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors()[name] for name in names[i::count]}
        save_file(part, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_leaves_are_the_tensors_transposed(folder: Path):
    f, params, tokenizer, config = load_model(folder)
    found = params["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(
        found, tensors()["model.layers.1.mlp.up_proj.weight"].T
    )
    np.testing.assert_array_equal(
        params["embed"]["embedding"], tensors()["model.embed_tokens.weight"]
    )
    assert tokenizer is None
    assert config.context == 32
    assert f.head == "lm_head/kernel"
    assert f(params, TOKENS).shape == (1, 10, 64)


def test_scanned_leaves_are_stacked(folder: Path):
    _, params, _, _ = load_model(folder, scan_layers=True)
    rows = [tensors()[f"model.layers.{i}.mlp.up_proj.weight"].T for i in range(2)]
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, np.stack(rows))


def test_shards_equal_one_file(folder: Path):
    _, whole, _, _ = load_model(folder)
    write_shards(folder)
    _, params, _, _ = load_model(folder)
    assert_trees_equal(params, whole)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_lazy_leaves_read_what_eager_loading_gives(folder: Path, scan_layers: bool):
    _, params, _, _ = load_model(folder, dtype=jnp.bfloat16, scan_layers=scan_layers)
    _, lazy, _, _ = load_model(
        folder, dtype=jnp.bfloat16, scan_layers=scan_layers, lazy=True
    )
    for leaf in jax.tree.leaves(lazy):
        assert isinstance(leaf, LazyLeaf)
        assert (leaf.shape, leaf.dtype) == (leaf.read().shape, leaf.read().dtype)
    stamps = {leaf.stamp for leaf in jax.tree.leaves(lazy)}
    assert len(stamps) == len(jax.tree.leaves(lazy))
    assert_trees_equal(jax.tree.map(lambda leaf: leaf.read(), lazy), params)


def test_dtype(folder: Path):
    _, params, _, _ = load_model(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    kernel = params["layers"]["0"]["attn"]["q_proj"]["kernel"]
    expected = tensors()["model.layers.0.self_attn.q_proj.weight"].T
    np.testing.assert_array_equal(kernel, jnp.asarray(expected).astype(jnp.bfloat16))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_device_gets_its_slice(folder: Path, scan_layers: bool):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        axes = [None] * (len(shape) - 1) + [
            "model" if path.endswith("kernel") else None
        ]
        return NamedSharding(mesh, PartitionSpec(*axes))

    _, whole, _, _ = load_model(folder, scan_layers=scan_layers)
    f, params, _, _ = load_model(folder, scan_layers=scan_layers, sharding=sharding)
    assert_trees_equal(params, whole)
    kernel = params["lm_head"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(32, 16)}
    got, expected = jax.jit(f)(params, TOKENS), jax.jit(f)(whole, TOKENS)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_shell_needs_no_weights(folder: Path):
    f, _, _, config = load_model(folder)
    (folder / "model.safetensors").unlink()
    shell, same = load_shell(folder)
    assert (same, shell.head) == (config, f.head)


def test_a_bare_models_names(folder: Path):
    _, whole, _, _ = load_model(folder)
    bare = {name.removeprefix("model."): value for name, value in tensors().items()}
    save_file(bare, folder / "model.safetensors")
    _, params, _, _ = load_model(folder)
    assert_trees_equal(params, whole)


def test_old_and_new_rope_fields_agree():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    old = CONFIG | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    table = {"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    new = CONFIG | {"rope_parameters": table}
    del new["rope_theta"]
    assert llama.from_fields(Fields(old)) == llama.from_fields(Fields(new))
    assert llama.from_fields(Fields(old)) != llama.from_fields(Fields(CONFIG))


def test_missing_folder_and_repository(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is no folder, and no model"):
        load_model(tmp_path / "nowhere")


def test_missing_config(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_model(folder)


def test_damaged_config(folder: Path):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(folder)


def test_unknown_model_type_lists_the_known(folder: Path):
    write_config(folder, model_type="mamba")
    with pytest.raises(ValueError, match="'mamba', supported are bert, gemma2, "):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "big"}, "hidden_size is 'big', expected a positive integer"),
        ({"hidden_size": None}, "hidden_size is missing, expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor"),
        ({"hidden_size": 30}, "hidden_size is 30, expected a multiple of"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06, expected a positive number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a positive"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 10+, expected a positive number"),
        ({"hidden_act": "swish9"}, "hidden_act is 'swish9', expected one of silu"),
        ({"rope_scaling": [2]}, r"rope_scaling is \[2\], expected an object"),
        (
            {"rope_scaling": {"type": "spiral"}},
            "rope_type is 'spiral', expected one of default, linear",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "factor is missing, expected a positive number",
        ),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
    ],
)
def test_wrong_config_fields(folder: Path, changes: dict[str, Any], message: str):
    write_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_missing_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
        load_model(folder)


def test_pickles_are_refused(folder: Path):
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which runs code when read"):
        load_model(folder)


def test_missing_shard(folder: Path):
    write_shards(folder)[1].unlink()
    with pytest.raises(
        FileNotFoundError, match=r"00002-of-00003.* listed in .* missing"
    ):
        load_model(folder)


@pytest.mark.parametrize("file", ["../../secret.safetensors", "/etc/passwd", ".."])
def test_index_that_leaves_the_folder(folder: Path, file: str):
    write_shards(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(ValueError, match="a file outside its folder"):
        load_model(folder)


def test_index_without_a_map(folder: Path):
    write_shards(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(folder)


def test_index_and_shard_disagree(folder: Path):
    save_file({"other": np.zeros(2, np.float32)}, write_shards(folder)[0])
    with pytest.raises(ValueError, match=r"00001-of-00003\.safetensors lacks "):
        load_model(folder)


def test_missing_tensor(folder: Path):
    some = tensors()
    del some["model.layers.1.mlp.up_proj.weight"]
    save_file(some, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.up_proj"):
        load_model(folder)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_wrong_shape(folder: Path, scan_layers: bool):
    write_config(folder, intermediate_size=40)
    message = r"down_proj.weight has shape \[32, 48\], config\.json asks for \[32, 40\]"
    with pytest.raises(ValueError, match=message):
        load_model(folder, scan_layers=scan_layers)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_corrupted_header(folder: Path, header: bytes):
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match="corrupted header"):
        load_model(folder)


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 64])
def test_no_header(folder: Path, data: bytes):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="corrupted header: its length"):
        load_model(folder)


def test_truncated_file(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is truncated: .* ends at"
    ):
        load_model(folder)


def test_unknown_dtype(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"Z32"'))
    with pytest.raises(ValueError, match="has dtype Z32, supported are F64"):
        load_model(folder)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("text", ["{}", "[]", "garbage", '{"added_tokens": []}'])
def test_a_damaged_tokenizer_is_named(folder: Path, text: str):
    (folder / "tokenizer.json").write_text(text)
    message = r"tokenizer\.json is not a tokenizer that can be read \(.+: .+\)$"
    with pytest.raises(ValueError, match=message):
        load_model(folder)
    load_weights(folder)


def test_old_bert_names_of_norms():
    from qjax.models.names import spellings

    found = list(spellings("bert.embeddings.LayerNorm.weight", "bert."))
    assert "embeddings.LayerNorm.gamma" in found
