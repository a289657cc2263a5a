"""HQQ int4 over all linear layers of a random Llama: qjax beside package `hqq`, CPU.

Both get the same float32 arrays, groups of 64 along the inputs, 20 iterations. Each
part runs in a process of its own: qjax with the float model in memory, qjax with lazy
leaves, and `hqq` (packing included; drawing the weights is not timed). Time is that of
the whole `qjax.quantize` call, tracing and compilation included (and, for lazy leaves,
drawing), against the sum of `hqq`'s calls.

Cost on 2 cores: 1b takes about 20 minutes (nearly all of it `hqq`) and 14 GB; 100m
takes 2 minutes.
Command: python experiments/papers/hqq/bench.py --size 1b
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx

from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import is_quantized
from qjax.methods import HQQ
from qjax.models import llama
from qjax.models.fields import Fields
from qjax.models.functional import functional
from qjax.quantize import quantize_with_report
from qjax.results import Record, append, environment, read
from qjax.trace.paths import flatten_with_paths

RESULTS = Path(__file__).parent / "results" / "bench.jsonl"
PARTS = ("hqq", "qjax", "qjax-lazy")


@dataclass(frozen=True)
class Config:
    """A Llama by its sizes; groups of 64, 4 bits."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


CONFIGS = {
    "10m": Config(256, 1024, 8, 4, 2, 4096),
    "100m": Config(768, 3072, 10, 12, 4, 8192),
    "1b": Config(2048, 8192, 16, 32, 8, 128256),
}


def abstract_model(config: Config) -> tuple[Any, dict[str, Any]]:
    """The function and the shapes of its parameters."""
    fields = {"model_type": "llama", "tie_word_embeddings": True, **asdict(config)}
    sizes = llama.common(Fields(fields))
    make = lambda: llama.build(sizes, rngs=nnx.Rngs(0))
    return functional(nnx.eval_shape(make))


def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Heavy-tailed weights, the same for both libraries."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    w = rng.standard_normal(shape, dtype=np.float32)
    w *= np.float32(0.02)
    return w


def lazy_params(shapes: Any) -> Any:
    flat = [
        LazyLeaf(
            tuple(x.shape),
            np.dtype("float32"),
            lambda p=p, x=x: jnp.asarray(draw(p, x.shape)),
        )
        for p, x in flatten_with_paths(shapes)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), flat)


class Watch:
    """Peak of the process's memory and of JAX's live arrays, above the start."""

    def __enter__(self) -> "Watch":
        gc.collect()
        self.rss = self.first = psutil.Process().memory_info().rss
        self.arrays, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        self.start = time.perf_counter()
        return self

    def _look(self) -> None:
        process = psutil.Process()
        while not self.done.wait(0.02):
            self.rss = max(self.rss, process.memory_info().rss)
            self.arrays = max(self.arrays, live_bytes())

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        self.done.set()
        self.thread.join()
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.highest = max(highest, self.rss) - self.first


def live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def run_qjax(config: Config, lazy: bool) -> dict[str, Any]:
    """Seconds and peaks in bytes; the float model, if in memory, counts as part."""
    f, shapes = abstract_model(config)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    largest = max(4 * x.size for x in jax.tree.leaves(shapes))
    jnp.zeros(1).block_until_ready()
    with Watch() as outer:
        params = lazy_params(shapes)
        if not lazy:
            params = jax.tree.map(lambda x: x.read(), params)
            jax.block_until_ready(params)
        with Watch() as inner:
            q, report = quantize_with_report(
                f, params, HQQ(bits=4, group_size=64), example=(tokens,)
            )
    result = sum(x.nbytes for x in jax.tree.leaves(q))
    kept = 0 if lazy else sum(4 * x.size for x in jax.tree.leaves(shapes))
    bits = [x for x in jax.tree.leaves(q, is_leaf=is_quantized) if is_quantized(x)]
    return {
        "seconds": inner.seconds,
        "weights": sum(x.size for x in bits),
        "leaves": len(report),
        "error": float(np.mean([row.error for row in report])),
        "peak_rss": outer.highest,
        "peak_arrays": outer.arrays,
        "model_bytes": kept,
        "result_bytes": result,
        "largest_leaf_float32_bytes": largest,
        "bound_bytes": kept + result + 6 * largest,
    }


def run_hqq(config: Config) -> dict[str, Any]:
    """Seconds of `hqq`'s own calls over the same layers."""
    import torch  # noqa: PLC0415  (only this part of the benchmark needs it)
    from hqq.core.quantize import Quantizer  # noqa: PLC0415

    torch.set_num_threads(psutil.cpu_count() or 1)
    _, shapes = abstract_model(config)
    seconds, weights, errors = 0.0, 0, []
    for path, x in flatten_with_paths(shapes):
        if x.ndim != 2 or path.startswith("embed"):
            continue
        w = torch.from_numpy(np.ascontiguousarray(draw(path, x.shape).T))
        start = time.perf_counter()
        codes, meta = Quantizer.quantize(
            w, nbits=4, group_size=64, axis=1, device="cpu", bitpack=True
        )
        seconds += time.perf_counter() - start
        weights += x.size
        meta["compute_dtype"] = torch.float32
        back = Quantizer.dequantize(codes, meta)
        errors.append(float(torch.linalg.norm(w - back) / torch.linalg.norm(w)))
    return {"seconds": seconds, "weights": weights, "error": float(np.mean(errors))}


def run(part: str, config: Config) -> dict[str, Any]:
    if part == "hqq":
        return run_hqq(config)
    return run_qjax(config, lazy=part == "qjax-lazy")


def main() -> None:
    """Run every part in its own process and write a record for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=CONFIGS, default="100m")
    parser.add_argument("--part", choices=PARTS, help="one part, printed as JSON")
    given = parser.parse_args()
    config = CONFIGS[given.size]
    if given.part:
        print(json.dumps(run(given.part, config)))
        return
    found = {}
    for part in PARTS:
        command = [sys.executable, __file__, "--size", given.size, "--part", part]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[part] = json.loads(out.stdout.splitlines()[-1])
        print(part, found[part], flush=True)
    for part in PARTS:
        metrics = {**found[part], **compare(found[part], found["hqq"])}
        label = f"{part} {given.size}"
        replace(Record(label, asdict(config), metrics, environment()))
        print(label, metrics)


def replace(record: Record) -> None:
    """Write a record in place of an earlier one of the same label."""
    kept = read(RESULTS) if RESULTS.exists() else []
    RESULTS.unlink(missing_ok=True)
    for each in [*(r for r in kept if r.label != record.label), record]:
        append(RESULTS, each)


def compare(one: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Ratios of this run; memory as a share of model + result + six largest leaves."""
    ratios = {
        "times_faster": reference["seconds"] / one["seconds"],
        "error_ratio": one["error"] / reference["error"],
    }
    if "bound_bytes" in one:
        ratios["rss_of_bound"] = one["peak_rss"] / one["bound_bytes"]
        ratios["arrays_of_bound"] = one["peak_arrays"] / one["bound_bytes"]
    return ratios


if __name__ == "__main__":
    main()
