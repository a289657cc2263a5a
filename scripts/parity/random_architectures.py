"""Write a small random model of every architecture, by transformers itself.

Runs in the test environment (`pip install -e ".[parity]"`):

    python scripts/parity/random_architectures.py OUT
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import tokenizer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BERT = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
OPT = {k: v for k, v in BERT.items() if k != "intermediate_size"} | {"ffn_dim": 128}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "head_dim": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"attention_bias": True, "mlp_bias": True},
    "mistral": SIZES | {"sliding_window": 5},
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": SIZES | EXPERTS,
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": SIZES | {"head_dim": 16, "sliding_window": 5},
    "gemma3_text": SIZES | {"head_dim": 16, "sliding_window": 5},
    "phi3": SIZES | {"sliding_window": 5, "pad_token_id": 0},
    "gpt2": GPT2,
    "opt": OPT,
    "bert": BERT,
}


def random_model(kind: str) -> Any:
    """Every parameter away from its neutral start."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    automatic = transformers.AutoModelForCausalLM
    if kind == "bert":
        automatic = transformers.AutoModelForMaskedLM
    model = automatic.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def main(out: str) -> None:
    """Write the folders, with a tokenizer, which GPTQModel asks for."""
    for kind in KINDS:
        random_model(kind).save_pretrained(Path(out) / kind)
        tokenizer(str(Path(out) / kind)).save_pretrained(Path(out) / kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
