"""The qjax side of the comparison with llm-compressor: same tokens, same windows.

    python experiments/papers/ptq/run.py --all
    python experiments/papers/ptq/run.py --model runs/ptq/tiny_llama_outliers \
        --method gptq-w4a16

Every method runs in a process of its own: cold (compilation included), then warm. Rows
go to `results/qjax.jsonl` in the layout of `peer.py`'s.
"""

import json
import math
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import tyro

import qjax
from qjax.io.huggingface import load_weights

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ASYM = "W4A16_ASYM"
METHODS: dict[str, Any] = {
    "float": None,
    "rtn-w4a16": qjax.RTN("W4A16"),
    "rtn-w4a16-asym": qjax.RTN(ASYM),
    "rtn-w3a16": qjax.RTN("W3A16"),
    "rtn-w8a8": qjax.RTN("W8A8"),
    "fp8-dynamic": qjax.RTN("FP8_DYNAMIC"),
    "imatrix-w4a16": qjax.IMatrix("W4A16"),
    "gptq-w4a16": qjax.GPTQ("W4A16"),
    "gptq-w3a16": qjax.GPTQ("W3A16"),
    "gptq-w3a16-noact": qjax.GPTQ("W3A16", act_order="off"),
    "gptaq-w3a16": qjax.GPTAQ(scheme="W3A16"),
    "gptq-w3a16-asym": qjax.GPTQ(
        weights=qjax.Int(3, qjax.group(128), symmetric=False, zero="int")
    ),
    "awq-w4a16-asym": qjax.AWQ(scheme=ASYM),
    "smoothquant-rtn-w8a8": (qjax.SmoothQuant(0.8, span=True), qjax.RTN("W8A8")),
    "smoothquant-gptq-w8a8": (qjax.SmoothQuant(0.8, span=True), qjax.GPTQ("W8A8")),
    "llm-int8": qjax.LLMInt8(),
    "w8a16": qjax.RTN("W8A16"),
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    model: Path = ROOT / "qjax" / "models" / "tiny_llama"
    """A Hugging Face folder."""
    method: str = "gptq-w4a16"
    """One of the methods above."""
    all: bool = False
    """Every method on the tiny Llama and its outlier variant, one after the other."""
    methods: tuple[str, ...] = ()
    """With --all: only these."""
    tokens: Path = ROOT / "runs" / "ptq"
    """Where `tokens.py` put the tokens."""
    evaluate: tuple[str, ...] = ("pydoc", "wikitext2")
    """Texts to evaluate on; those that are missing are left out."""
    batch: int = 8
    """Rows of a calibration batch."""
    once: bool = False
    """Leave out the warm run."""
    out: Path = HERE / "results" / "qjax.jsonl"
    """Where the rows go."""


def perplexity(f: Any, params: Any, rows: np.ndarray, batch: int = 8) -> float:
    """Every token of a window but its first is scored."""

    @jax.jit
    def loss(params: Any, rows: Any) -> Any:
        logits = qjax.apply(f)(params, rows)[:, :-1].astype(jnp.float32)
        scores = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(scores, rows[:, 1:, None], -1).sum()

    total = sum(
        float(loss(params, rows[i : i + batch])) for i in range(0, len(rows), batch)
    )
    return math.exp(total / (len(rows) * (rows.shape[1] - 1)))


def measure(options: Options) -> dict[str, Any]:
    """Quantize cold and warm, then evaluate."""
    f, params, _ = load_weights(options.model, dtype=jnp.float32)
    held = np.load(options.tokens / "calibration.npz")
    rows = held["tokens"]
    batches = [
        (rows[i : i + options.batch],) for i in range(0, len(rows), options.batch)
    ]
    recipe, metrics, layers = METHODS[options.method], {}, []
    transforms: list[Any] = []
    if recipe is not None:
        metrics["rss_model"] = psutil.Process().memory_info().rss
        for run in ("cold",) if options.once else ("cold", "warm"):
            start = time.perf_counter()
            quantized, report = qjax.quantize_with_report(
                f, params, recipe, batches, progress=False
            )
            jax.block_until_ready(quantized)
            metrics[f"{run}_seconds"] = time.perf_counter() - start
            if run == "cold":
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                metrics["peak_rss"] = 1024 * peak
        params = quantized
        layers = [[s.name, s.error_before, s.error] for s in report.sites]
        transforms = [[t.names[0], t.remark, t.notes] for t in report.transforms]
    for name in options.evaluate:
        if (options.tokens / f"{name}.npz").is_file():
            text = np.load(options.tokens / f"{name}.npz")["tokens"]
            metrics[f"perplexity_{name}"] = perplexity(f, params, text)
    return {
        "label": f"qjax {options.method} {options.model.name}",
        "config": {"method": options.method, "batch": options.batch},
        "metrics": metrics,
        "layers": layers,
        "transforms": transforms,
        "context": {
            "model": options.model.name,
            "calibration": json.loads(str(held["about"])),
            "versions": {"qjax": qjax.__version__, "jax": jax.__version__},
            "machine": platform.machine(),
            "cores": psutil.cpu_count(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def main(options: Options) -> None:
    """One method, or every one in a process of its own."""
    if options.all:
        outliers = ROOT / "runs" / "ptq" / "tiny_llama_outliers"
        for model in (options.model, outliers):
            for method in options.methods or METHODS:
                command = [sys.executable, __file__, "--method", method]
                command += ["--model", str(model), "--out", str(options.out)]
                command += ["--batch", str(options.batch)]
                subprocess.run(command + ["--once"] * options.once, check=True)
        return
    row = measure(options)
    print(row["label"], {k: round(v, 3) for k, v in row["metrics"].items()})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if options.out.is_file():
        lines = options.out.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["label"] != row["label"]]
    partial = options.out.with_name(f".{options.out.name}.part")
    partial.write_text("\n".join([*kept, json.dumps(row)]) + "\n", encoding="utf-8")
    partial.replace(options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
