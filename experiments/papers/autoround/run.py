"""The qjax side of the comparison with auto-round: same tokens, same windows.

    python experiments/papers/autoround/run.py --all

AutoRound, GPTQ or RTN on the bundled model, with the tokens of
`experiments/papers/ptq/tokens.py`, every method and format in a process of its own;
the first seed's seconds are with compilation. A seed changes the minibatches of
AutoRound and the batches of GPTQ, whose sums then differ by their last bit. Rows go to
`results/qjax.jsonl` in the layout of `peer.py`'s.
"""

import json
import math
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
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
# bits, group size, symmetric
FORMATS = {
    "w4g128": (4, 128, True),
    "w3g128": (3, 128, True),
    "w2g64": (2, 64, True),
    "w2g64-asym": (2, 64, False),
}
METHODS = ("autoround", "gptq", "rtn")
SHOWN = ("perplexity_pydoc", "perplexity_wikitext2", "kl_pydoc", "kl_wikitext2")
SHOWN += ("seconds", "warm_seconds")


@dataclass(frozen=True)
class Options:
    """What to run."""

    method: str = "autoround"
    """autoround, gptq or rtn."""
    format: str = "w4g128"
    """One of the formats above."""
    iters: int = 200
    """Steps for each block."""
    rows: int = 128
    """Calibration rows."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the minibatches; one row each."""
    seed: int = 0
    """Of one row."""
    all: bool = False
    """Every method and format, one after the other."""
    formats: tuple[str, ...] = tuple(FORMATS)
    """With --all: these."""
    model: Path = ROOT / "qjax" / "models" / "tiny_llama"
    """A Hugging Face folder."""
    tokens: Path = ROOT / "runs" / "ptq"
    """Where `tokens.py` put the tokens."""
    cold: bool = True
    """Whether the seconds are those of a fresh process, compilation included."""
    out: Path = HERE / "results" / "qjax.jsonl"
    """Where the rows go."""


def recipe_of(options: Options) -> Any:
    """The method, with scales in float16 as auto-round keeps them."""
    bits, size, symmetric = FORMATS[options.format]
    rule = {"scale_rule": "signed"} if symmetric else {}
    weights = qjax.Int(
        bits, qjax.group(size), symmetric=symmetric, scale_dtype="float16", **rule
    )
    if options.method == "autoround":
        return qjax.AutoRound(weights=weights, iters=options.iters)
    if options.method == "gptq":
        return qjax.GPTQ(weights=weights)
    return qjax.RTN(weights=weights)


def quality(f: Any, q: Any, exact: Any, rows: np.ndarray) -> list[float]:
    """Perplexity, and KL divergence from the exact parameters, nats for each token."""

    @jax.jit
    def sums(q: Any, exact: Any, rows: Any) -> Any:
        low = jax.nn.log_softmax(qjax.apply(f)(q, rows)[:, :-1].astype(jnp.float32))
        full = jax.nn.log_softmax(f(exact, rows)[:, :-1].astype(jnp.float32))
        nll = -jnp.take_along_axis(low, rows[:, 1:, None], -1)
        return jnp.stack([nll.sum(), (jnp.exp(full) * (full - low)).sum()])

    parts = [sums(q, exact, rows[i : i + 8]) for i in range(0, len(rows), 8)]
    total = np.asarray(parts, np.float64).sum(0) / (len(rows) * (rows.shape[1] - 1))
    return [math.exp(total[0]), float(total[1])]


def measure(options: Options) -> dict[str, Any]:
    """Quantize once, compilation included, and evaluate."""
    f, params, _ = load_weights(options.model, dtype=jnp.float32)
    held = np.load(options.tokens / "calibration.npz")
    rows = held["tokens"][: options.rows]
    # AutoRound draws sequences one by one; GPTQ only sums over them.
    size = 1 if options.method == "autoround" else (8, 4, 16)[options.seed % 3]
    batches = [(rows[i : i + size],) for i in range(0, len(rows), size)]
    start = time.perf_counter()
    q, report = qjax.quantize_with_report(
        f,
        params,
        recipe_of(options),
        batches,
        key=jax.random.key(options.seed),
        progress=False,
    )
    jax.block_until_ready(q)
    seconds = time.perf_counter() - start
    metrics = {"seconds" if options.cold else "warm_seconds": seconds}
    metrics["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for text in ("pydoc", "wikitext2"):
        path = options.tokens / f"{text}.npz"
        if path.is_file():
            found = quality(f, q, params, np.load(path)["tokens"])
            metrics[f"perplexity_{text}"], metrics[f"kl_{text}"] = found
    blocks = {row.name.rsplit("/", 3)[0]: row for row in report.sites}
    return {
        "label": f"qjax {options.method} {options.format} seed {options.seed}",
        "config": {
            "method": options.method,
            "format": options.format,
            "iters": options.iters,
            "rows": len(rows),
            "seed": options.seed,
        },
        "metrics": metrics,
        "blocks": [[name, row.error_before, row.error] for name, row in blocks.items()],
        "context": {
            "model": options.model.name,
            "calibration": json.loads(str(held["about"])),
            "versions": {"qjax": qjax.__version__, "jax": jax.__version__},
            "machine": platform.machine(),
            "cores": psutil.cpu_count(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def run_all(options: Options) -> None:
    """Every method and format in a process of its own; RTN has no seeds."""
    for format in options.formats:
        for method in METHODS:
            seeds = options.seeds[: 1 if method == "rtn" else None]
            command = [sys.executable, __file__, "--method", method]
            command += ["--format", format, "--seeds", *map(str, seeds)]
            command += ["--iters", str(options.iters), "--rows", str(options.rows)]
            command += ["--model", str(options.model), "--out", str(options.out)]
            command += ["--tokens", str(options.tokens)]
            subprocess.run(command, check=True)


def main(options: Options) -> None:
    """One row, or all of them."""
    if options.all:
        run_all(options)
        return
    for number, seed in enumerate(options.seeds):
        add(options, measure(replace(options, seed=seed, cold=number == 0)))


def add(options: Options, row: dict[str, Any]) -> None:
    """Write a row in place of an earlier one of the same label."""
    shown = {k: round(v, 4) for k, v in row["metrics"].items() if k in SHOWN}
    print(row["label"], shown, flush=True)
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
