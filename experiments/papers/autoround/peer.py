"""What auto-round makes of the bundled model: perplexity, divergence, seconds, memory.

Runs in the environment of `scripts/parity/llmcompressor_env.sh` and needs the tokens of
`experiments/papers/ptq/tokens.py`. Every row is one process; rows go to
`results/peer.jsonl`. Float32 throughout (`amp=False`), as on the other side; everything
that is not named here is auto-round's default.

Command: <environment>/bin/python experiments/papers/autoround/peer.py --all
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[3]
RESULTS = Path(__file__).parent / "results" / "peer.jsonl"
PACKAGES = ("auto-round", "torch", "transformers", "numpy")
# bits, group size, symmetric
FORMATS = {
    "w4g128": (4, 128, True),
    "w3g128": (3, 128, True),
    "w2g64": (2, 64, True),
    "w2g64-asym": (2, 64, False),
}


def load_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def quality(model: Any, exact: Any, rows: np.ndarray) -> list[float]:
    """Perplexity, and KL divergence from the exact model, nats for each token."""
    totals = [0.0, 0.0]
    for start in range(0, len(rows), 8):
        ids = torch.from_numpy(rows[start : start + 8]).long()
        low, full = (
            torch.log_softmax(m(ids, use_cache=False).logits[:, :-1].float(), -1)
            for m in (model, exact)
        )
        nll = -low.gather(-1, ids[:, 1:, None])
        totals[0] += nll.double().sum().item()
        totals[1] += (full.exp() * (full - low)).double().sum().item()
    tokens = len(rows) * (rows.shape[1] - 1)
    return [math.exp(totals[0] / tokens), totals[1] / tokens]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Quantize once and evaluate."""
    torch.set_num_threads(given.threads)
    bits, size, symmetric = FORMATS[given.format]
    held = np.load(given.tokens / "calibration.npz")
    rows = torch.from_numpy(held["tokens"][: given.rows]).long()
    model, exact = load_model(given.model), load_model(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    began = time.perf_counter()
    tuner = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=size,
        sym=symmetric,
        iters=given.iters,
        nsamples=len(rows),
        seqlen=rows.shape[1],
        dataset=list(rows.split(8)),
        batch_size=8,
        seed=given.seed,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    tuned, _ = tuner.quantize()
    metrics: dict[str, Any] = {"seconds": time.perf_counter() - began}
    metrics["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert tuned.dtype == torch.float32
    for text in ("pydoc", "wikitext2"):
        path = given.tokens / f"{text}.npz"
        if path.is_file():
            found = quality(tuned, exact, np.load(path)["tokens"])
            metrics[f"perplexity_{text}"], metrics[f"kl_{text}"] = found
    names = ("format", "iters", "rows", "seed", "threads")
    return {
        "label": f"auto-round {given.format} seed {given.seed}",
        "config": {name: getattr(given, name) for name in names},
        "metrics": metrics,
        "context": {
            "model": given.model.name,
            "calibration": json.loads(str(held["about"])),
            "versions": {package: version(package) for package in PACKAGES},
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def replace(path: Path, row: dict[str, Any]) -> None:
    """Write a row in place of an earlier one of the same label."""
    kept = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in kept if json.loads(line)["label"] != row["label"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text("\n".join([*kept, json.dumps(row)]) + "\n")
    partial.replace(path)


def run_all(given: argparse.Namespace) -> None:
    """Every format and seed, one process each."""
    for format in FORMATS:
        for seed in given.seeds:
            command = [sys.executable, __file__, "--format", format]
            for name in ("iters", "rows", "threads", "model", "tokens", "out"):
                command += [f"--{name}", str(getattr(given, name))]
            quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(given.threads)}
            subprocess.run(
                [*command, "--seed", str(seed)], check=True, env={**os.environ, **quiet}
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    bundled = ROOT / "qjax/models/tiny_llama"
    parser.add_argument("--all", action="store_true", help="every format and seed")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--format", choices=tuple(FORMATS), default="w4g128")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", type=Path, default=bundled)
    parser.add_argument("--tokens", type=Path, default=ROOT / "runs/ptq")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.all:
        run_all(given)
        return
    row = measure(given)
    print(row["label"], json.dumps(row["metrics"]), flush=True)
    replace(given.out, row)


if __name__ == "__main__":
    main()
