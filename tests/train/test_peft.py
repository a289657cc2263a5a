"""The folder that PEFT reads: names, shapes, values."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import qjax
from qjax.io.huggingface import load_weights

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
TOKENS = np.arange(12).reshape(2, 6) % 60
PREFIX = "base_model.model.model.layers.{}.self_attn.q_proj."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trained(folder, scan_layers=False, **options):
    f, params, config = load_weights(folder, scan_layers=scan_layers)
    f_lora, adapters = qjax.lora(
        f, params, 4, 8, example=(TOKENS,), key=jax.random.key(0), **options
    )
    wave = lambda x: 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    moved = jax.tree.map(lambda x: x + wave(x), adapters)
    return f_lora, moved, params, config


@pytest.mark.parametrize("scan_layers", [False, True])
def test_names_and_shapes_are_pefts(model, tmp_path, scan_layers):
    _, adapters, _, config = trained(model, scan_layers, dora=True)
    folder = qjax.save_peft(tmp_path / "adapter", adapters, "llama", config, str(model))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3
    assert tensors[PREFIX.format(1) + "lora_A.weight"].shape == (4, 32)
    assert tensors[PREFIX.format(1) + "lora_B.weight"].shape == (32, 4)
    assert tensors[PREFIX.format(1) + "lora_magnitude_vector"].shape == (32,)
    path = "layers/attn/q_proj/kernel" if scan_layers else "layers/1/attn/q_proj/kernel"
    a = adapters.leaves[path]["a"]
    want = np.asarray(a[1] if scan_layers else a).T
    np.testing.assert_array_equal(tensors[PREFIX.format(1) + "lora_A.weight"], want)
    body = json.loads((folder / "adapter_config.json").read_text())
    assert (body["r"], body["lora_alpha"], body["use_dora"]) == (4, 8, True)
    assert "model.layers.0.mlp.down_proj" in body["target_modules"]
    with pytest.raises(FileExistsError, match="exists"):
        qjax.save_peft(folder, adapters, "llama", config)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
def test_peft_computes_the_same(model, tmp_path, options):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    f_lora, adapters, params, config = trained(model, **options)
    folder = qjax.save_peft(tmp_path / "adapter", adapters, "llama", config, str(model))
    base = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        plain = base(torch.tensor(TOKENS)).logits.numpy()
        wrapped = PeftModel.from_pretrained(base, folder)
        want = wrapped(torch.tensor(TOKENS)).logits.numpy()
    got = np.asarray(jax.jit(f_lora)(adapters, params, TOKENS))
    assert np.abs(want - plain).max() > 0.01
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_a_leaf_that_is_no_linear_of_the_checkpoint_is_refused(model, tmp_path):
    _, _, config = load_weights(model)
    f, params, x = (lambda p, x: x @ p["own"]), {"own": jnp.ones((8, 8))}, jnp.ones(8)
    _, adapters = qjax.lora(f, params, 2, example=(x,), key=jax.random.key(0))
    with pytest.raises(ValueError, match="own is no single linear of a llama"):
        qjax.save_peft(tmp_path / "a", adapters, "llama", config)
