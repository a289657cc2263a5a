"""Time low-bit products on an NVIDIA H200 beside what else runs there, in one command.

    python kernels/bench/h200.py --out results.json    on the card, at most 8 minutes
    python kernels/bench/h200.py --only 'W8A8|FP8'      some forms and peers
    python kernels/bench/h200.py --tiny                anywhere: XLA's forms, no kernel

The kernel's values are compared with float64 first, element by element; each form and
each peer multiplies a small problem before it is timed. What is wrong, fails or is not
installed is named in the results, with the reason. Then, for each shape and number of
tokens, each form multiplies the same tokens with as many copies of the same weights as
exceed the L2 cache three times over, one after the other in one program. A time is the
median, over rounds, of the device's time for one product: the sum of its kernels by
CUPTI (JAX; the host's clock where there is none), or of a CUDA graph by events (torch).

W4A16 in groups of 128 at all shapes; 8-bit weights with 8-bit tokens at the first, both
with codes given and with tokens coded in front of the product. Results are written
after every row. Needs JAX for CUDA and numpy; torch, gemlite, humming-kernels and
bitsandbytes are peers.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

sys.path.insert(0, str(Path(__file__).parents[1]))

import h200_peers
from h200_forms import Form, forms, tiled_weight
from h200_problem import Problem, error

from qjax_kernels.int_matmul.fragments import BITS
from qjax_kernels.int_matmul.pallas_gpu import int_matmul

ROUNDS = 15
SHAPES = ((4096, 14336), (8192, 28672), (4096, 4096))
TOKENS = (16, 1, 64, 2048)
SMALL = Problem(512, 768, 16)
CHECKS = tuple(
    Problem(512, 768, M, bits, group, zero)
    for bits in BITS
    for group, zero in ((128, None), (32, "int8"), (None, "float32"))
    for M in (3, 64, 300)
)
PACKAGES = ("jax", "numpy", "torch", "gemlite", "humming-kernels", "bitsandbytes")


@dataclass
class Results:
    """What is known so far; every addition is written.

    Attributes:
      path: of the JSON file.
      until: the clock after which nothing more is begun.
      found: the file's content.
    """

    path: Path
    until: float
    found: dict[str, Any]
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, **more: Any) -> None:
        """Keep and write."""
        self.found |= more
        text = {**self.found, "missing": self.missing}
        self.path.write_text(json.dumps(text, indent=1) + "\n")

    def rows(self, name: str, rows: Any) -> None:
        """Keep the rows of a form or a peer; why there are no more, if it fails."""
        if time.monotonic() > self.until:
            self.missing[name] = "not begun: the time was over"
            return
        try:
            for row in rows:
                print(json.dumps(row), flush=True)
                self.add(rows=[*self.found["rows"], row])
                if time.monotonic() > self.until:
                    self.missing[name] = "not finished: the time was over"
                    break
        # Whatever a form or a peer dies of, the others are still worth their time.
        except Exception as failure:
            said = str(failure).strip().splitlines() or [""]
            self.missing[name] = f"failed: {type(failure).__name__}: {said[0]}"
        self.add()


def device_seconds(
    f: Callable, arguments: tuple, options: dict, card: bool
) -> tuple[float, str]:
    """Median time of `f` and the clock that took it: "cupti" or "host"."""
    run = jax.jit(f, compiler_options=options or None)
    compiled = run.lower(*arguments).compile()
    if card:
        measured = profiler.measure(compiled, iterations=ROUNDS)(*arguments)[1]
        if measured is not None:
            return median(measured) / 1e3, "cupti"
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return median(seconds), "host"


def timed(form: Form, problems: list[Problem], card: bool) -> Any:
    """Results of one form, its values checked on a small problem first.

    Raises:
      ValueError: its values are wrong.
    """
    small = SMALL.eight() if problems[0].bits == 8 else SMALL
    found = error(product(form, small), small, form.float8)
    if found > form.error:
        raise ValueError(f"values are wrong by {found:.3g} of the product's size")
    for problem in problems:
        weight, x = form.weight(problem), tokens_of(form, problem)
        count = problem.copies(form.bits) if card else 2
        weights = [jax.tree.map(jnp.copy, weight) for _ in range(count)]

        def all_of(x: Any, weights: Any) -> Any:
            return [form.f(x, w) for w in weights]

        seconds, clock = device_seconds(all_of, (x, weights), form.options, card)
        yield problem.row(form.name, seconds / count, form.bits, clock)


def tokens_of(form: Form, problem: Problem) -> Any:
    """What the form takes."""
    return form.tokens(jnp.asarray(problem.tokens(), jnp.bfloat16))


def product(form: Form, problem: Problem) -> jax.Array:
    """What the form gives."""
    run = jax.jit(form.f, compiler_options=form.options or None)
    return run(tokens_of(form, problem), form.weight(problem))


def wrong(problem: Problem) -> str:
    """What is wrong with an element of the kernel's; empty if nothing is."""
    weight, x = tiled_weight(problem), problem.tokens()
    y = jax.jit(partial(int_matmul, dtype=jnp.float32))(jnp.asarray(x), weight)
    group, zero = problem.group or problem.K, problem.zeros()
    size = np.abs(problem.codes().astype(np.float64))
    if zero is not None:
        size += np.abs(zero.astype(problem.zero).astype(np.float64)).repeat(group, 0)
    size *= problem.scale().astype(np.float64).repeat(group, 0)
    # Up to 32 tokens products are exact; beyond, weights are rounded to 8 bits.
    bound = (2.0**-18 if problem.M <= 32 else 2.0**-7) * np.abs(x) @ size
    exact = x.astype(np.float64) @ problem.weight()
    over = np.abs(np.asarray(y, np.float64) - exact) / bound
    return "" if (over <= 1).all() else f"{problem}: {np.nanmax(over):.3g} of the bound"


def copy_rate(card: bool) -> float:
    """Bytes read and written a second by a copy of much memory."""
    x = jnp.zeros((2**30 if card else 2**20,), jnp.float32)
    return 2 * x.nbytes / device_seconds(lambda x: x + 1, (x,), {}, card)[0]


def problems_of(card: bool) -> list[Problem]:
    """W4A16, the deciding problem first."""
    if not card:
        return [Problem(256, 384, M) for M in (1, 4)]
    return [
        Problem(*shape, M)
        for shape in SHAPES
        for M in TOKENS
        if M < 64 or shape == SHAPES[0]
    ]


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> str | None:
    """Check, time, write; the return value is the complaint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, no kernel")
    parser.add_argument("--only", default="", help="forms and peers, by expression")
    parser.add_argument("--seconds", type=float, default=480, help="of everything")
    parser.add_argument("--out", type=Path, default=Path("h200.json"))
    given = parser.parse_args()
    card, until = not given.tiny, time.monotonic() + given.seconds
    result = Results(given.out, until, {"device": jax.devices()[0].device_kind})
    complaints = [text for p in CHECKS if (text := wrong(p))] if card else []
    checked = len(CHECKS) if card else 0
    result.add(versions=versions(), checked=checked, wrong=complaints, rows=[])
    result.add(copy_gigabytes_per_second=copy_rate(card) / 1e9)
    four = problems_of(card)
    eight = [p.eight() for p in four if (p.K, p.N) == (four[0].K, four[0].N)]
    for problems in (four, eight):
        for form in forms(problems[0], card):
            if form.name == "int4, Pallas" and complaints:
                result.missing[form.name] = "not timed: its values are wrong"
            elif re.search(given.only, form.name):
                result.rows(form.name, timed(form, problems, card))
    result.missing |= h200_peers.absent()
    for name, peer in h200_peers.PEERS.items():
        small = SMALL.eight() if peer.eight else SMALL
        if not card:
            result.missing.setdefault(name, "not run: no card")
        elif name not in result.missing and re.search(given.only, name):
            own = eight if peer.eight else four
            result.rows(name, h200_peers.timed(name, own, small))
    result.add()
    print(f"wrote {given.out}; missing: {result.missing or 'nothing'}")
    return "\n".join(["the kernel is wrong:", *complaints]) if complaints else None


if __name__ == "__main__":
    sys.exit(main())
