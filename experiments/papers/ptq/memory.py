"""Peak memory and time of GPTQ on a folder, leaf by leaf from disk.

    python scripts/random_llama.py --size 3b --out runs/ptq/random_3b
    python experiments/papers/ptq/memory.py --model runs/ptq/random_3b

Random tokens calibrate a random model; each run adds a row to
`results/memory.jsonl`, in order of size, and draws `results/memory.png` again.
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
from matplotlib.figure import Figure

import qjax
from qjax.io.huggingface import load_weights
from qjax.results import Record, append, environment, read

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
    kept = [leaf for leaf in leaves if not qjax.is_quantized(leaf)]
    total = sum(int(np.prod(x.shape)) for x in leaves)
    metrics = {
        "parameters_billion": total / 1e9,
        "seconds": seconds,
        "peak_gb": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9,
        "peak_anonymous_gb": max(size for _, size in samples) / 1e9,
        "bfloat16_gb": 2 * total / 1e9,
        "result_gb": sum(x.nbytes for x in leaves) / 1e9,
        "float_kept_gb": sum(x.nbytes for x in kept) / 1e9,
        "error": float(np.mean([s.error for s in report.sites])),
        "error_rtn": float(np.mean([s.error_before for s in report.sites])),
    }
    config = {"scheme": options.scheme, "rows": options.rows, "length": options.length}
    append(options.out, Record(options.model.name, config, metrics, environment()))
    order(options.out)
    draw(options.out)
    print(json.dumps(metrics, indent=1))


def order(path: Path) -> None:
    """Put the rows in order of size."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    sizes = [row.metrics["parameters_billion"] for row in read(path)]
    ordered = [line for _, line in sorted(zip(sizes, lines, strict=True))]
    partial = path.with_name(f".{path.name}.part")
    partial.write_text("".join(ordered), encoding="utf-8")
    partial.replace(path)


def draw(path: Path) -> None:
    """Peak memory against the size of the model, in a picture beside the rows."""
    records = read(path)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    sizes = [row.metrics["parameters_billion"] for row in records]
    for name, label, style in (
        ("peak_gb", "peak resident memory", "o-"),
        ("bfloat16_gb", "the model in bfloat16", "--"),
        ("result_gb", "the result", ":"),
    ):
        axes.plot(sizes, [row.metrics[name] for row in records], style, label=label)
    axes.set(xlabel="parameters, 1e9", ylabel="GB", title="GPTQ W4A16 from a folder")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options))
