"""Peak memory and time of GPTQ on a folder, leaf by leaf from disk.

    python scripts/random_llama.py --size 3b --out runs/ptq/random_3b
    python experiments/papers/ptq/memory.py --model runs/ptq/random_3b

Random tokens calibrate a random model; each run adds a row to `results/memory.jsonl`.
"""

import json
import resource
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import psutil
import tyro

import qjax
from qjax.io.huggingface import load_weights

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: Path
    """A Hugging Face folder."""
    rows: int = 8
    """Calibration rows."""
    length: int = 128
    """Tokens in a row."""
    batch: int = 4
    """Rows of a batch."""
    scheme: str = "W4A16"
    """Formats."""
    out: Path = HERE / "results" / "memory.jsonl"
    """Where the row goes."""


def watch(samples: list[tuple[float, int]], stop: threading.Event) -> None:
    """Sample the resident memory that is not file-backed, ten times a second."""
    process = psutil.Process()
    start = time.perf_counter()
    while not stop.wait(0.1):
        info = process.memory_info()
        samples.append((time.perf_counter() - start, info.rss - info.shared))


def main(options: Options) -> None:
    """Quantize and write one row."""
    f, params, config = load_weights(options.model, lazy=True)
    rng = np.random.default_rng(0)
    shape = (options.rows, options.length)
    tokens = rng.integers(0, config.vocabulary, shape).astype(np.int32)
    batches = [
        (tokens[i : i + options.batch],) for i in range(0, options.rows, options.batch)
    ]
    samples: list[tuple[float, int]] = []
    stop = threading.Event()
    thread = threading.Thread(target=watch, args=(samples, stop))
    thread.start()
    start = time.perf_counter()
    qparams, report = qjax.quantize_with_report(
        f, params, qjax.GPTQ(options.scheme), batches
    )
    jax.block_until_ready(qparams)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    leaves = jax.tree.leaves(qparams, is_leaf=qjax.is_quantized)
    coded = [x for x in leaves if qjax.is_quantized(x)]
    row = {
        "model": options.model.name,
        "parameters": sum(int(np.prod(x.shape)) for x in leaves),
        "scheme": options.scheme,
        "tokens": options.rows * options.length,
        "seconds": seconds,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_anonymous": max(size for _, size in samples),
        "result_bytes": sum(x.nbytes for x in leaves),
        "float_kept_bytes": sum(x.nbytes for x in leaves if not qjax.is_quantized(x)),
        "quantized_leaves": len(coded),
        "mean_error": float(np.mean([s.error for s in report.sites])),
        "mean_error_rtn": float(np.mean([s.error_before for s in report.sites])),
        "cores": psutil.cpu_count(),
        "jax": jax.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(row)}\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
