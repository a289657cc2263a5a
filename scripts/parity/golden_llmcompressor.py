"""Write tests/golden/llmcompressor.npz: the peer's GPTQ, AWQ and SmoothQuant.

Runs in the environment of `llmcompressor_env.sh`, on the bundled model, its outlier
variant (`scripts/outlier_variant.py` with its defaults) and the evaluation tokens of
`experiments/papers/ptq/tokens.py`, of which it stores what it used:

    python scripts/parity/golden_llmcompressor.py qjax/models/tiny_llama \\
        runs/ptq/tiny_llama_outliers runs/ptq/pydoc.npz tests/golden/llmcompressor.npz

Matrices are stored as torch has them, `[out, in]`; all runs in float32, one thread.

- `gptq/*`: `quantize_weight` with scales of the default observer, on `gptq/w` and
  Hessians accumulated from `gptq/x` (cases say what they change): codes, scale, zero,
  loss.
- `awq/<model>/<duo>/*`: for each mapping, in the order solved: name, the 20 losses, the
  index of the best, and for duo scaling alone the scales. Grid points are `awq/grid/*`
  (ratio, whether duo).
- `smoothquant/<model>/<strength>/*`: for each norm, the range of its outputs and the
  scales.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import (
    accumulate_hessian,
    make_empty_hessian,
)
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.observers import Observer
from llmcompressor.pipelines.cache import IntermediatesCache
from pydantic import PrivateAttr
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT, IN, TOKENS, ROWS, LENGTH = 192, 256, 512, 16, 256
GROUP = {"strategy": "group", "group_size": 128}
# name: (quantization arguments, tokens used, dead inputs)
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "w4": ({**GROUP, "num_bits": 4, "actorder": "static"}, TOKENS, ()),
    "w4_noact": ({**GROUP, "num_bits": 4}, TOKENS, ()),
    "w4_asym": (
        {**GROUP, "num_bits": 4, "symmetric": False, "actorder": "static"},
        TOKENS,
        (),
    ),
    "w4_g32_noact": (
        {"strategy": "group", "group_size": 32, "num_bits": 4},
        TOKENS,
        (),
    ),
    "w3": ({**GROUP, "num_bits": 3, "actorder": "static"}, TOKENS, ()),
    "w3_noact": ({**GROUP, "num_bits": 3}, TOKENS, ()),
    "w8_channel": (
        {"strategy": "channel", "num_bits": 8, "actorder": "static"},
        TOKENS,
        (),
    ),
    "w4_dead": ({**GROUP, "num_bits": 4, "actorder": "static"}, TOKENS, (3, 77, 200)),
    "w4_few": ({**GROUP, "num_bits": 4, "actorder": "static"}, 96, ()),
}


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Weights of unequal rows, and correlated inputs of unequal size."""
    rng = np.random.default_rng(7)
    w = rng.standard_t(5, (OUT, IN)) * np.exp(0.3 * rng.normal(size=(OUT, 1)))
    mix = rng.normal(size=(IN // 4, IN)) * np.exp(0.7 * rng.normal(size=IN))
    x = rng.normal(size=(TOKENS, IN // 4)) @ mix / 8
    x += 0.3 * rng.normal(size=(TOKENS, IN))
    return (0.02 * w).astype(np.float32), x.astype(np.float32)


def gptq(w: np.ndarray, x: np.ndarray, case: str) -> dict[str, np.ndarray]:
    """Codes, scales and loss of one case."""
    options, tokens, dead = CASES[case]
    args = QuantizationArgs(type="int", **{"symmetric": True, **options})
    weight, inputs = torch.tensor(w), torch.tensor(x[:tokens])
    inputs[:, list(dead)] = 0
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data.copy_(weight)
    hessian, count = accumulate_hessian(
        inputs, linear, make_empty_hessian(linear), torch.zeros(())
    )
    observer = Observer.load_from_registry(
        "memoryless_minmax", base_name="weight", args=args
    )
    found = observer(weight).get_qparams()
    scale, zero = found["scale"], found["zero_point"]
    solved, loss, fell_back = quantize_weight(
        weights=weight[None].clone(),
        hessians=(hessian / count)[None],
        scale=scale[None],
        zero_point=zero[None],
        global_scale=None,
        quant_args=args,
    )
    assert not fell_back.any()
    codes = quantize(solved[0], scale, zero, args, dtype=torch.int8)
    back = dequantize(codes, scale, zero, args)
    assert torch.equal(back, solved[0]), case
    return {
        "codes": codes.numpy(),
        "scale": scale.numpy(),
        "zero": zero.to(torch.int8).numpy(),
        "loss": loss.numpy(),
    }


class Watched(AWQModifier):
    """AWQ that keeps the losses of every mapping."""

    _kept: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def _compute_best_scale(self, mapping: Any, *rest: Any) -> torch.Tensor:
        self._kept.append({"name": mapping.smooth_name, "losses": []})
        scales = super()._compute_best_scale(mapping, *rest)
        self._kept[-1]["scales"] = scales.numpy()
        return scales

    def _compute_loss(self, *outputs: Any) -> float:
        self._kept[-1]["losses"].append(super()._compute_loss(*outputs))
        return self._kept[-1]["losses"][-1]


class Ranged(SmoothQuantModifier):
    """SmoothQuant that keeps the ranges and the scales of every norm."""

    _kept: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def _calculate_smoothing_scales(self, layers: Any, ranges: torch.Tensor) -> Any:
        scales = super()._calculate_smoothing_scales(layers, ranges)
        self._kept.append({"range": ranges.numpy(), "scales": scales.numpy()})
        return scales


def calibrate(folder: str, rows: np.ndarray, modifier: Any, scheme: str) -> list[Any]:
    """What the watched modifier kept."""
    data = {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}
    then = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processor=AutoTokenizer.from_pretrained(folder),
        dataset=Dataset.from_dict(data),
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
        recipe=[modifier, then],
    )
    return modifier._kept


def awq(folder: str, rows: np.ndarray, duo: Any) -> dict[str, np.ndarray]:
    """Losses and choices of the grid search."""
    search = Watched(duo_scaling=duo, n_grid=20)
    kept = calibrate(folder, rows, search, "W4A16_ASYM")
    losses = np.array([row["losses"] for row in kept], np.float64)
    made = {
        "names": np.array([row["name"] for row in kept]),
        "losses": losses,
        "best": losses.argmin(1),
    }
    if duo is True:
        made |= {f"scales/{row['name']}": row["scales"] for row in kept}
    return made


def smoothquant(folder: str, rows: np.ndarray, strength: float) -> dict[str, Any]:
    """Ranges and scales, norm by norm in the order smoothed (layer by layer)."""
    kept = calibrate(folder, rows, Ranged(smoothing_strength=strength), "W8A8")
    return {key: np.stack([row[key] for row in kept]) for key in ("range", "scales")}


def main(tiny: str, outliers: str, tokens: str, out: str) -> None:
    """Write the file."""
    torch.set_num_threads(1)
    # CPU-only: it pins memory for an accelerator without asking for one.
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    w, x = arrays()
    with np.load(tokens) as held:
        rows = held["tokens"][:ROWS, :LENGTH].astype(np.int32)
    made: dict[str, Any] = {"gptq/w": w, "gptq/x": x, "tokens": rows.astype(np.int16)}
    for case in CASES:
        found = gptq(w, x, case)
        made |= {f"gptq/{case}/{key}": value for key, value in found.items()}
    for duo in (False, True, "both"):
        grid = AWQModifier(duo_scaling=duo, n_grid=20)._get_grid_search_params()
        made[f"awq/grid/{duo}"] = np.array(grid, np.float64)
    for name, folder in (("tiny", tiny), ("outliers", outliers)):
        for duo in (False, True, "both"):
            found = awq(folder, rows, duo)
            made |= {f"awq/{name}/{duo}/{key}": each for key, each in found.items()}
        for strength in (0.5, 0.8):
            found = smoothquant(folder, rows, strength)
            made |= {
                f"smoothquant/{name}/{strength}/{key}": each
                for key, each in found.items()
            }
    np.savez_compressed(out, **made)
    print(Path(out).stat().st_size, "bytes,", len(made), "arrays")


if __name__ == "__main__":
    main(*sys.argv[1:])
