"""Bytes that forms of one 4-bit product move through a TPU's HBM, as it compiles them.

    python kernels/bench/compare.py      writes compare.jsonl

Every array that a program keeps beside its arguments and results is written once and
read once; what a form moves at least is `arguments + results + 2 * temporaries`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aot
import jax
import jax.numpy as jnp
from gates.int_matmul import Case
from programs import context

from qjax.core.coded import Coded
from qjax.core.formats import Int, group
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor
from qjax.ops import Target, matmul
from qjax.results import Record, append
from qjax_kernels.compat import chip

OUT = Path(__file__).parent / "compare.jsonl"
shape = jax.ShapeDtypeStruct


def dense(x: Any, w: Any) -> jax.Array:
    """bfloat16."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def scaled_weights(x: Any, q: Any, scale: Any) -> jax.Array:
    """A native int4 array, its scales on the weights."""
    G, N = scale.shape
    w = q.reshape(G, -1, N).astype(x.dtype) * scale.astype(x.dtype)[:, None]
    return dense(x, w.reshape(-1, N))


def scaled_sums(x: Any, q: Any, scale: Any) -> jax.Array:
    """A native int4 array, its scales on the sums of groups."""
    G, N = scale.shape
    w = q.reshape(G, -1, N).astype(x.dtype)
    x_groups = x.reshape(x.shape[0], G, -1)
    sums = jnp.einsum("mgk,gkn->gmn", x_groups, w, preferred_element_type=jnp.float32)
    return (sums * scale[:, None]).sum(0).astype(x.dtype)


def forms(case: Case) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Label, function and argument shapes of each form."""
    M, K, N = case.M, case.K, case.N
    x, scale = shape((M, K), jnp.bfloat16), case.weight.scale
    q = shape((K, N), jnp.int4)
    coded = Coded(
        case.weight.codes, scale, None, None, None, Int(4, group(128)), (K, N)
    )
    leaf = QTensor.of(coded, Layout("kn", (K, N)), jnp.bfloat16)
    here = Target("tpu", case.generation)

    def ours(implementation: str, target: Target = here) -> Callable[..., Any]:
        return lambda x, leaf: matmul(
            x, leaf, implementation=implementation, target=target
        )

    return {
        "bfloat16, XLA": (dense, (x, shape((K, N), jnp.bfloat16))),
        "int4 array, scale on weights, XLA": (scaled_weights, (x, q, scale)),
        "int4 array, scale on sums, XLA": (scaled_sums, (x, q, scale)),
        "qjax's words, decoded, XLA": (ours("xla", Target("cpu")), (x, leaf)),
        "qjax's words, scale on sums, XLA": (ours("xla"), (x, leaf)),
        "qjax's words, Pallas": (ours("pallas"), (x, leaf)),
    }


def measure(case: Case) -> list[Record]:
    """One record for each form."""
    records = []
    for label, (f, shapes) in forms(case).items():
        found = aot.compiled(case.generation, f, *shapes).memory_analysis()
        once = found.argument_size_in_bytes + found.output_size_in_bytes
        moved = once + 2 * found.temp_size_in_bytes
        rate = chip(case.generation).mem_bw_bytes_per_second
        metrics = {
            "temporary_megabytes": found.temp_size_in_bytes / 1e6,
            "least_megabytes_moved": moved / 1e6,
            "least_microseconds": moved / rate * 1e6,
        }
        name = f"{case.generation} {label}"
        print(name, metrics, flush=True)
        config = {"form": label, "M": case.M, "K": case.K, "N": case.N}
        records.append(Record(name, config, metrics, context(case.program())))
    return records


def main() -> None:
    """Write everything anew."""
    records = [
        record
        for generation in aot.TOPOLOGIES
        for record in measure(Case(generation, 4))
    ]
    OUT.unlink(missing_ok=True)
    for record in records:
        append(OUT, record)


if __name__ == "__main__":
    sys.exit(main())
