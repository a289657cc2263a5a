"""What the scripts share that let a peer write a checkpoint: model, tokens, logits.

The float model is a folder of `scripts/random_llama.py`. A case is a folder that the
peer wrote, with `logits.npz`: the tokens and what the peer's own model says of them,
all in float32 and one thread.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

LENGTH, ROWS = 16, 8


def float_model(folder: str) -> Any:
    """The float model in float32, attention without kernels of its own."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def vocabulary(folder: str) -> int:
    config = json.loads((Path(folder) / "config.json").read_text())
    return config["vocab_size"]


def tokenizer(folder: str) -> Any:
    """One word for each token; peers ask for a tokenizer and save it."""
    words = {f"w{i}": i for i in range(vocabulary(folder))}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w0", pad_token="w0", eos_token="w1"
    )


def calibration(folder: str) -> np.ndarray:
    """Random rows of tokens."""
    draw = np.random.default_rng(1)
    return draw.integers(2, vocabulary(folder), (ROWS, LENGTH))


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def keep_logits(out: Path, model: Any, base: str) -> None:
    """Write what the peer's model says of one row beside what the peer wrote."""
    tokens = np.random.default_rng(2).integers(2, vocabulary(base), (1, LENGTH))
    out.mkdir(parents=True, exist_ok=True)
    found = logits(model, tokens)
    assert np.isfinite(found).all()
    np.savez(out / "logits.npz", tokens=tokens.astype(np.int32), logits=found)


Cases = Mapping[str, Callable[[str, Path], Any]]


def write_cases(
    base: str,
    out: str,
    cases: Mapping[str, Callable[[str, Path], Any]],
    only: list[str],
) -> None:
    """Let every case, or those named, write its folder."""
    torch.set_num_threads(1)
    for name, write in cases.items():
        if only and name not in only:
            continue
        write(base, Path(out) / name)
        print("wrote", Path(out) / name, flush=True)
