"""The outlier variant computes what the original does, and has outliers."""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import outlier_variant

import qjax
from qjax.io.huggingface import load_model
from qjax.io.shards import open_shards

torch = pytest.importorskip("torch")
# torch's own, when transformers first imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

MODEL = Path(qjax.__file__).parent / "models/tiny_llama"
TOKENS = np.random.default_rng(0).integers(0, 4096, (2, 32))


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    root = tmp_path_factory.mktemp("variants")
    for name, inside in (("norms", 0), ("everything", 3)):
        outlier_variant.main(
            outlier_variant.Options(MODEL, root / name, inside=inside, seed=5)
        )
    return root


@pytest.mark.parametrize("name", ["norms", "everything"])
def test_logits_are_the_originals_in_qjax(variants, name):
    # Powers of two change no product and no rounding: equal, not merely close.
    f, params, _, _ = load_model(MODEL, dtype=jnp.float32)
    expected = f(params, jnp.asarray(TOKENS))
    f, params, tokenizer, _ = load_model(variants / name, dtype=jnp.float32)
    assert tokenizer is not None
    np.testing.assert_array_equal(f(params, jnp.asarray(TOKENS)), expected)


@pytest.mark.parametrize("name", ["norms", "everything"])
def test_logits_are_the_originals_in_transformers(variants, name):
    with torch.no_grad():
        expected, got = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
                torch.from_numpy(TOKENS)
            ).logits.numpy()
            for folder in (MODEL, variants / name)
        )
    np.testing.assert_array_equal(got, expected)


def test_every_norm_has_its_outliers(variants):
    before, after = open_shards(MODEL), open_shards(variants / "norms")
    changed = set()
    for name, tensor in before.items():
        ratio = after[name].view().astype(float) / tensor.view().astype(float)
        if "layernorm" in name:
            found = ratio[ratio != 1]
            assert len(found) == 4 and set(found) <= {32, 64}
        if (ratio[np.isfinite(ratio)] != 1).any():
            changed.add(name.split(".")[-2])
    assert changed == {
        "input_layernorm", "q_proj", "k_proj", "v_proj",
        "post_attention_layernorm", "gate_proj", "up_proj",
    }  # fmt: skip


def test_a_value_head_is_undone_in_each_of_its_queries(variants):
    before, after = open_shards(MODEL), open_shards(variants / "everything")
    name = "model.layers.0.self_attn.o_proj.weight"
    ratio = after[name].view().astype(float) / before[name].view().astype(float)
    columns = np.nanmedian(ratio, 0).reshape(4, 2, 32)  # value head, query, dim
    assert (columns[:, 0] == columns[:, 1]).all()
    assert (columns[:, 0] != 1).sum() == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"factors": (30,)}, "power of two"),
        ({"factors": ()}, "power of two"),
        ({"channels": 257}, "channels is 257"),
    ],
)
def test_what_is_not_exact_is_refused(tmp_path, change, message):
    options = outlier_variant.Options(MODEL, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        outlier_variant.main(dataclasses.replace(options, **change))
    assert not (tmp_path / "out").exists()
