"""AWQ's choices beside llm-compressor's, mapping by mapping: `results/choices.jsonl`.

    python experiments/papers/ptq/choices.py
    python scripts/render_tables.py

The peer's are in `tests/golden/llmcompressor.npz` (how they were made:
`scripts/parity/golden_llmcompressor.py`), for the bundled model and its outlier variant
and three settings of `duo_scaling`. Both search on full-precision inputs: as the peer's
search runs before anything is quantized, no weight is coded here. A mapping agrees if
the chosen ratio is at most one grid step from the peer's with the same kind of scale;
where the two best losses lie closer than 0.1 % the choice is a tie.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

import qjax
from qjax.core.coded import encode
from qjax.core.formats import Int, group
from qjax.io.huggingface import load_weights
from qjax.methods.base import Solution
from qjax.results import Record, append, environment

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "llmcompressor.npz"
OUT = Path(__file__).parent / "results" / "choices.jsonl"
TIE = 1e-3
NORMS = {
    "q_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "down_proj": "mlp.up_proj",
}


class Searched:
    """Has the format that AWQ searches for, and leaves the weights as they are."""

    random, activation, full_precision, shared = False, None, False, False
    format, statistics = Int(4, group(128), symmetric=False, zero="int"), {}
    targets, ignore = None, ()

    def solve_site(self, w: Any, stats: Any, key: Any = None) -> Solution:
        """The weights as a low-rank part of full rank."""
        zero = encode(jnp.zeros_like(w), self.format)
        return Solution((zero,), left=w, right=jnp.eye(w.shape[1], dtype=w.dtype))


@dataclass(frozen=True)
class Options:
    """The two models."""

    tiny: Path = ROOT / "qjax" / "models" / "tiny_llama"
    """The bundled model."""
    outliers: Path = ROOT / "runs" / "ptq" / "tiny_llama_outliers"
    """What `scripts/outlier_variant.py` made of it."""


def compare(model: str, folder: Path, duo: Any) -> Record:
    """Our choices on one model beside the peer's."""
    f, params, _ = load_weights(folder, dtype=jnp.float32)
    with np.load(GOLDEN) as golden:
        rows = jnp.asarray(golden["tokens"], jnp.int32)
        names = golden[f"awq/{model}/{duo}/names"].tolist()
        losses, grid = golden[f"awq/{model}/{duo}/losses"], golden[f"awq/grid/{duo}"]
    recipe = (qjax.AWQ(duo_scaling=duo), Searched())
    batches = [(rows[:8],), (rows[8:],)]
    report = qjax.quantize_with_report(f, params, recipe, batches, progress=False)[1]
    step = np.diff(np.unique(grid[:, 0])).max()
    equal, near, worse = [], [], []
    for row in report.transforms:
        _, layer, _, linear, _ = row.names[0].split("/")
        if linear not in NORMS:
            continue  # the peer leaves grouped-query attention's output alone
        theirs = losses[names.index(f"model.layers.{layer}.{NORMS[linear]}")]
        ratio, kind = grid[theirs.argmin()]
        found = (0, 0) if row.remark else (row.notes["ratio"], row.notes["duo"])
        ours = float(row.error) / (rows.size * f_width(params))
        worse.append(ours / theirs.min() - 1)
        equal.append(abs(found[0] - ratio) < 1e-6 and found[1] == kind)
        close = abs(found[0] - ratio) <= step + 1e-6 and found[1] == kind
        near.append(close or abs(worse[-1]) < TIE)
    metrics = {
        "mappings": len(near),
        "equal_percent": 100 * float(np.mean(equal)),
        "within_one_step_percent": 100 * float(np.mean(near)),
        "worst_loss_excess_percent": 100 * float(np.max(worse)),
    }
    config = {"duo_scaling": duo, "n_grid": 20}
    return Record(f"{model} duo_scaling={duo}", config, metrics, environment())


def f_width(params: Any) -> int:
    """Features of the residual stream."""
    return params["embed"]["embedding"].shape[1]


def main(options: Options) -> None:
    """Every setting on both models."""
    partial = OUT.with_name(f".{OUT.name}.part")
    partial.unlink(missing_ok=True)
    for model in ("tiny", "outliers"):
        for duo in (False, True, "both"):
            record = compare(model, getattr(options, model), duo)
            print(record.label, record.metrics, flush=True)
            append(partial, record)
    partial.replace(OUT)


if __name__ == "__main__":
    main(tyro.cli(Options))
