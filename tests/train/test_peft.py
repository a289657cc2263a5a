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


PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
QUIET = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def pefts(folder, adapter, **options):
    """Logits of PEFT, without and with the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        plain = base(torch.tensor(TOKENS)).logits.numpy()
        wrapped = PeftModel.from_pretrained(base, adapter)
        return plain, wrapped(torch.tensor(TOKENS)).logits.numpy()


def restarted(folder, start, **options):
    """Adapters as a start leaves them, and after some training."""
    f, params, config = load_weights(folder)
    f_lora, adapters = qjax.lora(
        f, params, 4, 8, example=(TOKENS,), key=jax.random.key(0), **options
    )
    first, base = qjax.initialise_lora(f, params, adapters, start)
    wave = lambda x: 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    moved = jax.tree.map(lambda x: x + wave(x), first)
    logits = [np.asarray(jax.jit(f_lora)(a, base, TOKENS)) for a in (first, moved)]
    return first, moved, base, config, logits


@PEFT
@QUIET
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
def test_peft_computes_the_same(model, tmp_path, options):
    f_lora, adapters, params, config = trained(model, **options)
    folder = qjax.save_peft(tmp_path / "adapter", adapters, "llama", config, str(model))
    plain, want = pefts(model, folder)
    got = np.asarray(jax.jit(f_lora)(adapters, params, TOKENS))
    assert np.abs(want - plain).max() > 0.01
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@PEFT
@QUIET
@pytest.mark.parametrize("options", [{}, {"rslora": True}])
def test_adapters_beside_a_rest_become_ones_of_the_original(model, tmp_path, options):
    """PiSSA: at the start PEFT's model is the original, later the trained one."""
    first, moved, _, config, logits = restarted(model, qjax.PiSSA(), **options)
    for name, adapters, got in zip("ab", (first, moved), logits):
        folder = qjax.save_peft(
            tmp_path / name, adapters, "llama", config, str(model), start=first
        )
        body = json.loads((folder / "adapter_config.json").read_text())
        assert body["r"] == 8
        plain, want = pefts(model, folder)
        assert (np.abs(want - plain).max() < 1e-4) == (adapters is first)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@PEFT
@QUIET
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*are stored in .*vLLM")
def test_adapters_beside_codes_go_with_the_exported_model(model, tmp_path):
    from transformers import CompressedTensorsConfig

    start = qjax.LoftQ(weights=qjax.Int(4, qjax.group(16)))
    _, moved, base, config, (_, got) = restarted(model, start)
    codes = qjax.export(tmp_path / "codes", base, model=model)
    folder = qjax.save_peft(
        tmp_path / "a", moved, "llama", config, str(codes), exported=True
    )
    decoded = CompressedTensorsConfig(dequantize=True)
    plain, want = pefts(codes, folder, quantization_config=decoded)
    assert np.abs(want - plain).max() > 0.01
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_it_must_be_said_beside_which_weights_adapters_stand(model, tmp_path):
    f, params, config = load_weights(model)
    _, given = qjax.lora(f, params, 2, example=(TOKENS,), key=jax.random.key(0))
    rest = qjax.initialise_lora(f, params, given, qjax.PiSSA())[0]
    nf4 = qjax.RTN("NF4").format
    codes = qjax.initialise_lora(f, params, given, qjax.PiSSA(nf4))[0]
    other = qjax.lora(f, params, 3, example=(TOKENS,), key=jax.random.key(0))[1]
    cases = (
        (rest, {}, "beside what initialise_lora left of the weights"),
        (rest, {"start": rest, "exported": True}, "give either start"),
        (rest, {"exported": True}, "exported=True needs base_model"),
        (rest, {"start": other}, "start holds other adapters"),
        (codes, {}, "beside the codes that initialise_lora made"),
        (codes, {"start": codes}, "beside the codes that initialise_lora made"),
        (given, {"start": given}, "start is for adapters beside a rest"),
    )
    for adapters, options, text in cases:
        with pytest.raises(ValueError, match=text):
            qjax.save_peft(tmp_path / "a", adapters, "llama", config, **options)
    assert not (tmp_path / "a").exists()


def test_a_leaf_that_is_no_linear_of_the_checkpoint_is_refused(model, tmp_path):
    _, _, config = load_weights(model)
    f, params, x = (lambda p, x: x @ p["own"]), {"own": jnp.ones((8, 8))}, jnp.ones(8)
    _, adapters = qjax.lora(f, params, 2, example=(x,), key=jax.random.key(0))
    with pytest.raises(ValueError, match="own is no single linear of a llama"):
        qjax.save_peft(tmp_path / "a", adapters, "llama", config)
