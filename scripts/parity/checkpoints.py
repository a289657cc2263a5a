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
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

LENGTH, ROWS = 16, 8  # of calibration
SEEN, COMPARED = 8, 4  # tokens in a row, rows, of which logits are compared


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


def in_float32(model: Any) -> Any:
    """The model with its floats in float32; `float()` is refused to quantized ones."""
    for values in (*model.parameters(), *model.buffers()):
        if values.is_floating_point():
            values.data = values.data.float()
    return model.eval()


def widen(model: Any, folder: Path) -> Any:
    """The model in float32, floats as the file has them.

    GPTQModel's kernels load in 16 bits alone, and compute in the dtype of their input.
    """
    model = in_float32(model)
    found = load_file(folder / "model.safetensors")
    # Codes in float8 are none.
    wide = {k: v for k, v in found.items() if v.is_floating_point() and v.itemsize > 1}
    floats = {k: v.float() for k, v in wide.items()}
    left = model.load_state_dict(floats, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    return model


LIBRARIES: list[Any] = []  # what is registered lasts as long as these


def exact_int8() -> None:
    """Put `1/127^2` in bitsandbytes' kernel for CPUs in place of its `6.200124e-5`."""
    import bitsandbytes  # noqa: F401, PLC0415

    if not LIBRARIES:
        LIBRARIES.append(torch.library.Library("bitsandbytes", "IMPL"))
        LIBRARIES[0].impl("int8_mm_dequant", _int8_mm_dequant, "CPU")


def _int8_mm_dequant(
    a: Any, row_stats: Any, col_stats: Any, dtype: Any = None, bias: Any = None
) -> torch.Tensor:
    y = a * (row_stats.reshape(-1, 1) * col_stats.reshape(1, -1)) * (1 / 127**2)
    return (y if bias is None else y + bias).to(dtype or torch.float16)


def distances(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """A token's largest difference over the largest logit: median and worst token.

    Where inputs are coded, one that lies on the edge of two codes may fall to the other
    side when sums differ in their last bit; then its token is off by more than
    rounding, and so may be those that attend to it.
    """
    each = np.abs(found - expected).max(-1) / np.abs(expected).max()
    return {"difference": float(np.median(each)), "worst": float(each.max())}


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def keep_logits(out: Path, model: Any, base: str) -> None:
    """Write what the peer's model says of a few rows beside what the peer wrote."""
    tokens = np.random.default_rng(2).integers(2, vocabulary(base), (COMPARED, SEEN))
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
