"""llm-compressor names every expert; here they are one leaf."""

import json

import pytest

from qjax.methods import RTN
from qjax.recipe_files import read_recipe


def test_experts_are_one_leaf(tmp_path):
    config = {
        "model_type": "qwen3_moe", "vocab_size": 32, "hidden_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "intermediate_size": 32, "moe_intermediate_size": 16,
        "num_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False, "rope_scaling": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    def read(**fields):
        modifiers = {"QuantizationModifier": {"scheme": "W8A16", **fields}}
        stages = {"quant_stage": {"quant_modifiers": modifiers}}
        return read_recipe(json.dumps(stages), tmp_path)[0]

    assert read(targets="Linear", ignore=["lm_head"]) == RTN(scheme="W8A16")
    assert "lm_head/kernel" in read(targets="Linear").targets
    up = read(targets=["re:.*experts.*up_proj"])
    assert up.targets == tuple(f"layers/{n}/mlp/experts/up_proj/kernel" for n in (0, 1))
    assert read(targets=["re:.*mlp.gate$"]).targets == tuple(
        f"layers/{n}/mlp/router/kernel" for n in (0, 1)
    )
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj is left where other"):
        read(targets=["re:.*experts.1.up_proj"])
