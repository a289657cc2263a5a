"""Experts: XLA's grouped product of decoded or int8 experts, and the kernel."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gates.ragged_matmul import QWEN3, Case

from forms.form import Form
from qjax.core.coded import Coded
from qjax.core.formats import Int, group, token
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.ops import Target, ragged_matmul
from qjax_kernels.ragged_matmul.pallas_tpu import choose, name_of

XLA_KERNEL = "ragged-dot-none"
TILING = re.compile(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"')
shape = jax.ShapeDtypeStruct


def forms(case: Case) -> list[Form]:
    """bfloat16, XLA with qjax's codes, and the kernel; every expert has rows."""
    K, N, E, M = case.K, case.N, case.E, case.M
    x, sizes = shape((M, K), jnp.bfloat16), shape((E,), jnp.int32)
    format = Int(4, group(128)) if case.bits == 4 else Int(8)
    coded = Coded(
        case.experts.codes, case.experts.scale, None, None, None, format, (K, N)
    )
    acts = (SiteActs(activation=Activation(Int(8, token()))),) if case.int8 else ()
    leaf = QTensor.of(coded, Layout("bkn", (0, K, N)), jnp.bfloat16, acts)
    here = Target("tpu", case.generation)
    ends = M * (K + N) * 2
    blocks = choose(case.generation, M, case.experts, case.int8)
    least = E * case.one.step_bytes(replace(blocks, k=K, n=N)) + ends
    steps = -(-N // blocks.n) * (K // blocks.k) * visits(case, blocks.m)
    name = f"{case.generation} {name_of(case.experts, case.int8)} {M}x{E}x{K}x{N}"

    def ours(implementation: str, x: Any, leaf: Any, sizes: Any) -> Any:
        return ragged_matmul(x, leaf, sizes, implementation=implementation, target=here)

    def by_xla(itemsize: int, text: str) -> tuple[int, float]:
        m, k, n = map(int, TILING.findall(text)[0])
        return -(-N // n) * -(-K // k) * visits(case, m), k * n * itemsize

    itemsize = 1 if case.int8 else 2
    given = (x, leaf, sizes)
    return [
        Form(f"{name}, XLA", partial(ours, "xla"), given, least, M * K * N, XLA_KERNEL,
             partial(by_xla, itemsize)),
        Form(f"{name}, Pallas", partial(ours, "pallas"), given, least, M * K * N,
             name_of(case.experts, case.int8), (steps, case.one.step_bytes(blocks))),
    ]  # fmt: skip


def visits(case: Case, m: int) -> int:
    """Visits of blocks of `m` rows where rows are spread evenly."""
    each = case.M // case.E
    return sum(((e + 1) * each - 1) // m - e * each // m + 1 for e in range(case.E))


FORMS = [
    form
    for case in (
        Case("v5e", 8, None, True),
        Case("v6e", 8, None, True),
        Case("v7x", 8, None, True),
        Case("v5e", 4),
        Case("v6e", 4, **QWEN3),
    )
    for form in forms(case)
]
