"""The qjax side of the comparison with llm-compressor: same tokens, same windows.

    python experiments/papers/ptq/run.py --all
    python experiments/papers/ptq/run.py --model runs/ptq/tiny_llama_outliers \
        --method gptq-w4a16

Every method runs in a process of its own: cold (compilation included), then warm, then
with other batches of the same rows. How rows are batched changes sums by their last
bit, which is enough to change codes, and perplexity by as much as 1 %: hence the mean
over several. Rows go to `results/qjax.jsonl` in the layout of `peer.py`'s.
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
from averages import averaged

import qjax
from qjax.io.huggingface import load_weights
from qjax.recipes import needs_data, steps_of

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
    models: tuple[Path, ...] = ()
    """With --all: only these."""
    methods: tuple[str, ...] = ()
    """With --all: only these."""
    tokens: Path = ROOT / "runs" / "ptq"
    """Where `tokens.py` put the tokens."""
    evaluate: tuple[str, ...] = ("pydoc", "wikitext2")
    """Texts to evaluate on; those that are missing are left out."""
    batches: tuple[int, ...] = (8, 4, 16)
    """Rows of a calibration batch; the first is timed."""
    once: bool = False
    """Leave out the warm run."""
    out: Path = HERE / "results" / "qjax.jsonl"
    """Where the rows go."""


def quality(
    f: Any, q: Any, exact: Any, rows: np.ndarray, batch: int = 8
) -> list[float]:
    """Perplexity, and KL divergence from the exact parameters, nats for each token."""

    @jax.jit
    def sums(q: Any, exact: Any, rows: Any) -> Any:
        low = jax.nn.log_softmax(qjax.apply(f)(q, rows)[:, :-1].astype(jnp.float32))
        full = jax.nn.log_softmax(f(exact, rows)[:, :-1].astype(jnp.float32))
        nll = -jnp.take_along_axis(low, rows[:, 1:, None], -1)
        return jnp.stack([nll.sum(), (jnp.exp(full) * (full - low)).sum()])

    parts = [sums(q, exact, rows[i : i + batch]) for i in range(0, len(rows), batch)]
    total = np.asarray(parts, np.float64).sum(0) / (len(rows) * (rows.shape[1] - 1))
    return [math.exp(total[0]), float(total[1])]


def cut(rows: np.ndarray, batch: int) -> list[tuple[np.ndarray]]:
    """Rows in batches."""
    return [(rows[i : i + batch],) for i in range(0, len(rows), batch)]


def measure(options: Options) -> dict[str, Any]:
    """Quantize cold and warm, evaluate, and again with other batches."""
    f, params, _ = load_weights(options.model, dtype=jnp.float32)
    held = np.load(options.tokens / "calibration.npz")
    rows, recipe = held["tokens"], METHODS[options.method]
    paths = {name: options.tokens / f"{name}.npz" for name in options.evaluate}
    texts = {name: np.load(p)["tokens"] for name, p in paths.items() if p.is_file()}

    def qualities(q: Any) -> dict[str, list[float]]:
        return {name: quality(f, q, params, text) for name, text in texts.items()}

    metrics: dict[str, Any] = {"rss_model": psutil.Process().memory_info().rss}
    runs, layers, transforms = [], [], []
    first, *others = options.batches
    data = recipe is not None and any(needs_data(step) for step in steps_of(recipe))
    for run in () if recipe is None else ("cold", "warm")[: 2 - options.once]:
        start = time.perf_counter()
        q, report = qjax.quantize_with_report(
            f, params, recipe, cut(rows, first), progress=False
        )
        jax.block_until_ready(q)
        metrics[f"{run}_seconds"] = time.perf_counter() - start
        if run == "cold":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            metrics["peak_rss"] = 1024 * peak
            runs.append(qualities(q))
            layers = [[s.name, s.error_before, s.error] for s in report.sites]
            transforms = [[t.names[0], t.remark, t.notes] for t in report.transforms]
    for batch in others if data else ():
        runs.append(
            qualities(
                qjax.quantize(f, params, recipe, cut(rows, batch), progress=False)
            )
        )
    metrics |= averaged(runs or [qualities(params)])
    return {
        "label": f"qjax {options.method} {options.model.name}",
        "config": {"method": options.method, "batches": options.batches},
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
        for model in options.models or (options.model, outliers):
            for method in options.methods or METHODS:
                command = [sys.executable, __file__, "--method", method]
                command += ["--model", str(model), "--out", str(options.out)]
                command += ["--batches", *map(str, options.batches)]
                command += ["--tokens", str(options.tokens)]
                command += ["--evaluate", *options.evaluate]
                subprocess.run(command + ["--once"] * options.once, check=True)
        return
    row = measure(options)
    shown = {k: v for k, v in row["metrics"].items() if not k.endswith("_runs")}
    print(row["label"], {k: round(v, 4) for k, v in shown.items()}, flush=True)
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
