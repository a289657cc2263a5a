"""Time W4A16 on an NVIDIA H200 beside what else runs there, in one command.

    python kernels/bench/h200.py --out results.json    on the card, meant for 4 minutes
    python kernels/bench/h200.py --tiny                anywhere: XLA's forms, no kernel

The kernel's values are compared with float64 first; nothing is timed if one is wrong.
Then, for each shape and number of tokens, each form multiplies the same tokens with as
many copies of the same weights as exceed the L2 cache three times over, one after the
other in one program. A time is the median, over rounds, of the device's time for one
product: the sum of its kernels by CUPTI (JAX), or of a CUDA graph by events (torch).
Needs JAX for CUDA and numpy; torch and the peers are optional, and named if missing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

sys.path.insert(0, str(Path(__file__).parents[1]))

from qjax_kernels.int_matmul.fragments import BITS, TiledWeight, tiled
from qjax_kernels.int_matmul.pallas_gpu import int_matmul

FUSED = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
SPLIT = {**FUSED, "xla_gpu_experimental_force_split_k": 1}
GROUP, L2_BYTES, ROUNDS = 128, 60 * 2**20, 15
SHAPES = ((4096, 14336), (8192, 28672), (4096, 4096))
TOKENS = (1, 16, 64, 2048)
CHECKS = tuple(
    (bits, group, zero, M)
    for bits in BITS
    for group, zero in ((128, None), (32, "int8"), (None, "float32"))
    for M in (3, 64, 300)
)


@dataclass(frozen=True)
class Problem:
    """One product and its arrays, drawn from one seed."""

    K: int
    N: int
    M: int
    bits: int = 4
    group: int | None = GROUP
    zero: str | None = None

    def codes(self) -> np.ndarray:
        """`q[K, N]`."""
        half = 2 ** (self.bits - 1)
        draw = np.random.default_rng(0)
        return draw.integers(-half, half, (self.K, self.N), np.int8)

    def scale(self) -> np.ndarray:
        """`[G, N]`, float32 that bfloat16 holds."""
        shape = self.K // (self.group or self.K), self.N
        scale = np.random.default_rng(1).uniform(0.005, 0.02, shape)
        return np.asarray(scale.astype(jnp.bfloat16), np.float32)

    def zeros(self) -> np.ndarray | None:
        """`[G, N]`, of `q`."""
        if self.zero is None:
            return None
        half = 2 ** (self.bits - 1)
        draw = np.random.default_rng(2).normal(0, half / 2, self.scale().shape)
        return draw.round(2 * (self.zero == "float32")).clip(-half, half - 1)

    def tokens(self) -> np.ndarray:
        """`x[M, K]`, float32 that bfloat16 holds."""
        x = np.random.default_rng(3).normal(size=(self.M, self.K))
        return np.asarray(x.astype(jnp.bfloat16), np.float32)

    def copies(self, bits: int) -> int:
        """Weights in turn, so that none is still in the cache."""
        return max(2, -(-3 * L2_BYTES * 8 // (self.K * self.N * bits)))

    def tiled(self) -> TiledWeight:
        """The weight as the kernel takes it."""
        q, zero = self.codes(), self.zeros()
        if self.bits < 8:
            q = (q + 2 ** (self.bits - 1)).astype(np.uint8)
        if zero is not None:
            zero = jnp.asarray(zero.astype(self.zero))
        scale = jnp.asarray(self.scale(), jnp.bfloat16)
        pack = jax.jit(tiled, static_argnums=(3, 4))
        return pack(jnp.asarray(q), scale, zero, self.bits, self.group)


def dense(x: Any, w: Any) -> jax.Array:
    """bfloat16; cuBLAS where XLA's autotuning prefers it."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def narrow(x: Any, w: tuple[Any, Any]) -> jax.Array:
    """A native int4 array, its scales on the weights."""
    (q, scale), G = w, w[1].shape[0]
    wide = q.reshape(G, -1, q.shape[1]).astype(x.dtype) * scale[:, None]
    return dense(x, wide.reshape(q.shape))


def forms(problem: Problem, tiny: bool) -> dict[str, tuple[Callable, Any, dict, int]]:
    """Name, function of `x` and a weight, the weight, XLA's options and bits."""
    q, scale = jnp.asarray(problem.codes()), jnp.asarray(problem.scale(), jnp.bfloat16)
    wide = (
        q.reshape(scale.shape[0], -1, problem.N).astype(jnp.bfloat16) * scale[:, None]
    )
    int4 = (q.astype(jnp.int4), scale)
    found = {
        "bfloat16": (dense, wide.reshape(q.shape), {}, 16),
        "int4, XLA": (narrow, int4, {}, 4),
    }
    if not tiny:
        found["int4, XLA fused"] = (narrow, int4, FUSED, 4)
        found["int4, XLA fused, split"] = (narrow, int4, SPLIT, 4)
        found["int4, Pallas"] = (int_matmul, problem.tiled(), {}, 4)
    return found


def device_seconds(f: Callable, arguments: tuple, options: dict, tiny: bool) -> float:
    """Median time of `f` on the device; of the host's clock on a CPU."""
    run = jax.jit(f, compiler_options=options or None)
    compiled = run.lower(*arguments).compile()
    if not tiny:
        measured = profiler.measure(compiled, iterations=ROUNDS)(*arguments)[1]
        return median(measured) / 1e3
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def timed(problem: Problem, tiny: bool) -> list[dict[str, Any]]:
    """Every form of one product."""
    x = jnp.asarray(problem.tokens(), jnp.bfloat16)
    rows = []
    for name, (f, weight, options, bits) in forms(problem, tiny).items():
        count = problem.copies(bits) if not tiny else 2
        weights = [jax.tree.map(jnp.copy, weight) for _ in range(count)]

        def all_of(x: Any, weights: Any, f: Callable = f) -> Any:
            return [f(x, w) for w in weights]

        seconds = device_seconds(all_of, (x, weights), options, tiny) / count
        rows.append(row(problem, name, seconds, problem.K * problem.N * bits // 8))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def row(problem: Problem, name: str, seconds: float, size: int) -> dict[str, Any]:
    """One result; rates are those of codes alone, and of products."""
    products = 2 * problem.M * problem.K * problem.N
    return {
        "form": name,
        **asdict(problem),
        "microseconds": seconds * 1e6,
        "weight_gigabytes_per_second": size / seconds / 1e9,
        "teraflops": products / seconds / 1e12,
    }


def wrong(problem: Problem) -> str:
    """What is wrong with the kernel's values; empty if nothing is."""
    weight, x = problem.tiled(), problem.tokens()
    y = jax.jit(partial(int_matmul, dtype=jnp.float32))(jnp.asarray(x), weight)
    group, zero = problem.group or problem.K, problem.zeros()
    q = problem.codes().astype(np.float64)
    size = np.abs(q)
    if zero is not None:
        zero = zero.astype(problem.zero).astype(np.float64).repeat(group, 0)
        q, size = q - zero, size + np.abs(zero)
    scale = problem.scale().astype(np.float64).repeat(group, 0)
    # Up to 32 tokens products are exact; beyond, weights are rounded to 8 bits.
    bound = (2.0**-18 if problem.M <= 32 else 2.0**-7) * np.abs(x) @ (size * scale)
    over = (
        np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ (q * scale)) / bound
    )
    return "" if (over <= 1).all() else f"{problem}: {np.nanmax(over):.3g} of the bound"


def copy_rate(tiny: bool) -> float:
    """Bytes read and written a second by a copy of much memory."""
    x = jnp.zeros((2**20 if tiny else 2**30,), jnp.float32)
    return 2 * x.nbytes / device_seconds(lambda x: x + 1, (x,), {}, tiny)


def main() -> str | None:
    """Check, time, write; the return value is the complaint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, no kernel")
    parser.add_argument("--out", type=Path, default=Path("h200.json"))
    given = parser.parse_args()
    start, device = time.monotonic(), jax.devices()[0]
    if not given.tiny:
        problems = [Problem(512, 768, M, b, g, z) for b, g, z, M in CHECKS]
        if complaints := [text for p in problems if (text := wrong(p))]:
            return "\n".join(["the kernel is wrong:", *complaints])
        print(f"{len(problems)} problems agree with float64", flush=True)
    shapes = ((256, 384),) if given.tiny else SHAPES
    tokens = (1, 4) if given.tiny else TOKENS
    problems = [
        Problem(*shape, M)
        for shape in shapes
        for M in tokens
        if M < 64 or shape == SHAPES[0]
    ]
    result = {
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "copy_gigabytes_per_second": copy_rate(given.tiny) / 1e9,
        "rows": [row for p in problems for row in timed(p, given.tiny)],
    }
    # Imported late: torch starts CUDA, and its peers may not be there.
    import h200_peers  # noqa: PLC0415

    rows, missing = h200_peers.timed(problems, row, given.tiny)
    result |= {"missing": missing, "seconds": time.monotonic() - start}
    result["rows"] += rows
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {given.out}; missing: {missing or 'nothing'}")
    return None


if __name__ == "__main__":
    sys.exit(main())
