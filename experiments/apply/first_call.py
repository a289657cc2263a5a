"""Time of the first call (trace, compile, run) of `jax.jit(f)` and `jax.jit(apply(f))`.

Goal: with float leaves, at most 1.3 times that of `jax.jit(f)`; the compiled program is
the same. The row with int4 leaves shows what tracing through QTensors adds. Each first
call is made in a process of its own, in turn; the median of the ratios is reported.

Cost: 2 minutes on 2 cores.
Command: python experiments/apply/first_call.py
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import qjax
from qjax.models import llama
from qjax.models.fields import Fields
from qjax.models.functional import functional
from qjax.results import Record, append, environment

RESULTS = Path(__file__).parent / "results" / "first_call.jsonl"
KINDS = ("float", "applied float", "applied int4")
SIZES = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}


def first_call(kind: str) -> float:
    """Seconds of the first call."""
    config = llama.common(Fields(SIZES))
    f, params = functional(llama.build(config, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((2, 128), jnp.int32)
    run: Any = f if kind == "float" else qjax.apply(f)
    if kind == "applied int4":
        recipe = qjax.RTN("W4A16")
        params = qjax.quantize(f, params, recipe, [(tokens,)], progress=False)
    jax.block_until_ready(params)
    start = time.perf_counter()
    jax.block_until_ready(jax.jit(run)(params, tokens))
    return time.perf_counter() - start


def measure(kind: str) -> float:
    """`first_call` in a new process."""
    command = [sys.executable, __file__, kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(repeats: int = 5) -> None:
    """Measure in turn, write one record per kind."""
    seconds = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            seconds[kind].append(measure(kind))
    RESULTS.unlink(missing_ok=True)
    for kind in KINDS:
        ratios = [a / b for a, b in zip(seconds[kind], seconds["float"])]
        metrics = {"seconds": median(seconds[kind]), "ratio": median(ratios)}
        record = Record(kind, {"repeats": repeats, **SIZES}, metrics, environment())
        append(RESULTS, record)
        print(f"{kind}: {metrics['seconds']:.2f} s, {metrics['ratio']:.2f} times float")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(first_call(sys.argv[1]))
    else:
        main()
