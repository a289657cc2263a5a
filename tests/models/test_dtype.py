"""A model computes in the dtype of its parameters."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from qjax.models import architecture, functional
from qjax.models.fields import Fields

COMMON = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
OWN = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bert": {"type_vocab_size": 2},
}


@pytest.mark.parametrize("kind", OWN)
def test_bfloat16_parameters_give_bfloat16(kind):
    module = architecture(kind)
    config = module.from_fields(Fields({"model_type": kind, **COMMON, **OWN[kind]}))
    f, params = functional(
        nnx.eval_shape(lambda: module.build(config, rngs=nnx.Rngs(0)))
    )
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    out = jax.tree.leaves(jax.eval_shape(f, narrow, tokens))[0]
    assert out.dtype == jnp.bfloat16
