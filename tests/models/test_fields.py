"""Configurations: what is left out, what is spelled in older ways, what is refused."""

import numpy as np
import pytest

from qjax.models import architecture
from qjax.models.fields import Fields

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def read(kind, **changes):
    return architecture(kind).from_fields(Fields({**SMALL, **changes}))


def test_gemma_of_the_hub():
    """Fields of gemma-2-2b and gemma-3-1b-it, which say little or say it twice."""
    two = read(
        "gemma2", hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh"
    )
    assert two.windows == (4096, None) * 3
    assert (two.score_cap, two.logit_cap, two.score_scale) == (50.0, 30.0, 1 / 16)
    assert (two.head_dim, two.tied, two.qk_norm) == (256, True, False)
    three = read("gemma3_text", head_dim=16, sliding_window=512)
    assert three.windows == (512,) * 5 + (None,)
    assert (three.score_cap, three.logit_cap, three.qk_norm) == (None, None, True)


def test_gemma2_without_bounds():
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = read("gemma2", **caps)
    assert (config.score_cap, config.logit_cap) == (None, None)


def test_gemma3_says_its_ropes_in_two_ways():
    older = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    a = read("gemma3_text", head_dim=16, **older)
    b = read("gemma3_text", head_dim=16, rope_parameters=kinds)
    assert a == b
    full, windowed = a.rope.of_layer(5), a.rope.of_layer(0)
    assert windowed.frequencies[0] == 1.0 and full.frequencies[0] == 1 / 8
    np.testing.assert_allclose(windowed.frequencies[1], 1e4 ** (-2 / 16), rtol=1e-6)


FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def test_phi3_says_its_rope_in_two_ways():
    first = {"original_max_position_embeddings": 16}
    older = {"rope_theta": 1e4, "rope_scaling": {"type": "su", **FACTORS}, **first}
    table = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS, **first}
    a, b = read("phi3", **older), read("phi3", rope_parameters=table)
    assert a.rope == b.rope
    # Section 3.2 of the Phi-3 report: sqrt(1 + ln(s) / ln(L)).
    np.testing.assert_allclose(a.rope.scale, np.sqrt(1 + np.log(4) / np.log(16)))


def test_mixtral_defaults_are_its_own():
    config = read("mixtral")
    assert (config.experts, config.chosen, config.epsilon) == (8, 2, 1e-5)
    np.testing.assert_allclose(config.rope.frequencies[1], 1e6 ** (-2 / 8), rtol=1e-6)


LONG = {"original_max_position_embeddings": 16, "rope_type": "longrope", **FACTORS}
BAD = [
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected a"),
    ("gemma2", {"hidden_activation": "tanh"}, "hidden_activation is 'tanh', expected"),
    ("gemma2", {"layer_types": ["local"] * 6}, "layer_types is .* expected 6 entries"),
    ("gemma2", {"layer_types": 3}, "layer_types is 3, expected 6 entries"),
    ("gemma2", {"use_bidirectional_attention": True}, "only False is supported"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "only None is supported"),
    ("gemma3_text", {"sliding_window_pattern": "x"}, "sliding_window_pattern is 'x'"),
    ("mixtral", {"num_experts_per_tok": 9}, "is 9, expected at most 8"),
    ("phi3", {"rope_scaling": {**LONG, "long_factor": [1.0]}}, "a list of 4 positive"),
    (
        "phi3",
        {"rope_scaling": {**LONG, "short_factor": [0.0] * 4}},
        "short_factor is 0.0, expected a positive number",
    ),
    ("phi3", {"partial_rotary_factor": "all"}, "partial_rotary_factor is 'all'"),
    ("llama", {"partial_rotary_factor": 0.5}, "only 1.0 is supported"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), BAD)
def test_bad_fields_are_named(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        read(kind, **changes)
