"""The Hugging Face folder, its card and the loss curve of `train_tiny.py`."""

import hashlib
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from safetensors.flax import save_file
from transformers import GenerationConfig, LlamaConfig

from qjax.models import llama

matplotlib.use("Agg")
from matplotlib import pyplot

WINDOW, WINDOWS = 512, 100

CARD = """---
license: apache-2.0
library_name: transformers
---
# tiny-llama
Llama architecture, {parameters:,} parameters: vocabulary 4096 (byte-level BPE), hidden
256, MLP 768, 8 layers, 8 heads of 32 with 4 key-value heads, context 512, tied
embeddings, bf16 safetensors.

Made by `scripts/train_tiny.py` on {text}: {steps:,} steps of {batch} tokens
({tokens:.1f} M tokens{start}), {minutes:.0f} minutes on {device}. Muon on the hidden
matrices, AdamW elsewhere, peak rate {rate:g}, linear decay to zero.

Validation loss {loss:.4f} nats per token on the last {part:.0%} of the documents,
{seen}.

Perplexity per token (the bf16 weights, computed in float32), non-overlapping windows
of 512, the first 51,200 tokens:

| text | sha256 | perplexity |
|---|---|---|
{rows}
"""


def draw(losses: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss against tokens, as a picture."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    tokens = np.array([row["tokens"] for row in losses]) / 1e6
    width = max(1, min(50, len(losses) // 20))
    smooth = np.convolve(
        [row["loss"] for row in losses], np.ones(width) / width, "valid"
    )
    axes.plot(tokens[width - 1 :], smooth, label=f"training, mean of {width} steps")
    marks = [row for row in losses if "validation_loss" in row]
    places = [row["tokens"] / 1e6 for row in marks]
    axes.plot(
        places, [row["validation_loss"] for row in marks], "o-", label="validation"
    )
    axes.set(xlabel="tokens (millions)", ylabel="loss per token (nats)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def perplexity(logits: Any, ids: np.ndarray, batch: int = 4) -> float:
    """Per token, over non-overlapping windows of 512, the first 51,200 tokens."""
    count = min(WINDOWS, len(ids) // WINDOW)
    windows = ids[: count * WINDOW].reshape(count, WINDOW)
    total = 0.0
    for start in range(0, count, batch):
        tokens = jnp.asarray(windows[start : start + batch], jnp.int32)
        log_p = jax.nn.log_softmax(logits(tokens)[:, :-1].astype(jnp.float32))
        total -= float(jnp.sum(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)))
    return math.exp(total / (count * (WINDOW - 1)))


def describe(config, parameters, losses, tokenizer, logits, valid) -> str:
    """The model card."""
    texts = {"pydoc_data.topics": "\n".join(topics[key] for key in sorted(topics))}
    texts |= {path.name: path.read_text() for path in config.evaluate}
    rows = [f"| validation split | - | {perplexity(logits, valid.reshape(-1)):.2f} |"]
    for name, text in texts.items():
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        ids = np.array(tokenizer.encode(text), np.int32)
        rows.append(f"| {name} | {digest} | {perplexity(logits, ids):.2f} |")
    warm = config.init is not None
    last = losses[-1]
    return CARD.format(
        parameters=parameters,
        text=config.text.name,
        steps=last["step"],
        batch=config.batch_tokens,
        tokens=last["tokens"] / 1e6,
        start=f", after {config.init_tokens:g} M of its warm start" if warm else "",
        minutes=last["seconds"] / 60,
        device=jax.devices()[0].device_kind,
        rate=config.peak_rate,
        loss=last["validation_loss"],
        part=config.validation,
        seen="which the warm start may have seen" if warm else "never trained on",
        rows="\n".join(rows),
    )


def export(
    config: llama.Config, params: Any, tokenizer: Any, card: str, out: Path
) -> None:
    """Write config, bf16 weights, tokenizer, generation config and card."""
    tensors = {}
    for name in llama.names(config):
        for layer in range(config.layers):
            leaf = params
            for part in name.path.format(layer=layer).split("/"):
                leaf = leaf[part]
            value = (leaf.T if name.transpose else leaf).astype(jnp.bfloat16)
            tensors[name.hf.format(layer=layer)] = value
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.eos_token_id
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=config.vocabulary,
        hidden_size=config.features,
        intermediate_size=config.mlp_features,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rms_norm_eps=config.epsilon,
        tie_word_embeddings=config.tied,
        bos_token_id=end,
        eos_token_id=end,
        dtype="bfloat16",
    ).save_pretrained(out)
    GenerationConfig(bos_token_id=end, eos_token_id=end).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card)
