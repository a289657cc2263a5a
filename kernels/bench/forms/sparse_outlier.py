"""Outlier features and outlier weights: XLA's forms and the kernels."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gates.element_outlier import Case as ElementCase
from gates.sparse_outlier import Case

from forms.form import Form
from qjax.core.coded import Coded
from qjax.core.formats import Int, token
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs, Sparse
from qjax.ops import Target, matmul
from qjax_kernels.element_outlier.pallas_tpu import DOWN, element_outlier
from qjax_kernels.element_outlier.pallas_tpu import name_of as element_name
from qjax_kernels.int_matmul.blocks import choose
from qjax_kernels.sparse_outlier.pallas_tpu import name_of

shape = jax.ShapeDtypeStruct
KEEPS = Activation(Int(8, token(), scale_rule="narrow"), outliers=6.0)


def features(case: Case) -> list[Form]:
    """LLM.int8() on 16 tokens."""
    one = case.one
    M, K, N, weight = one.M, one.K, one.N, one.weight
    coded = Coded(weight.codes, weight.scale, None, None, None, Int(8), (K, N))
    acts = (SiteActs(activation=KEEPS),)
    leaf = QTensor.of(coded, Layout("kn", (K, N)), jnp.bfloat16, acts)
    target = Target("tpu", case.generation)

    def ours(implementation: str, x: Any, leaf: Any) -> Any:
        return matmul(x, leaf, implementation=implementation, target=target)

    given = (shape((M, K), jnp.bfloat16), leaf)
    blocks = choose(case.generation, M, weight, True)
    step_bytes = one.step_bytes(blocks)
    steps = -(-N // blocks.n) * (K // blocks.k)
    least = K * N + M * (K + N) * 2.0
    name = f"{case.generation} {name_of(weight)} {M}x{K}x{N}"
    return [
        Form(f"{name}, XLA", partial(ours, "xla"), given, least),
        Form(f"{name}, Pallas", partial(ours, "pallas"), given, least, 0,
             name_of(weight), (steps, step_bytes)),
    ]  # fmt: skip


def weights(case: ElementCase) -> list[Form]:
    """The sparse part of SpQR: scattered into a dense matrix, or in tiles."""
    M, K, N = case.M, case.K, case.N
    count = K * N // 100
    one = shape((count,), jnp.int32)
    sparse = Sparse(shape((count,), jnp.float32), one, one)
    x = shape((M, K), jnp.bfloat16)

    def scattered(x: Any, sparse: Sparse) -> Any:
        return x @ sparse.dense((K, N), x.dtype)

    ours = partial(element_outlier, generation=case.generation)
    words = case.elements.words
    steps = words.shape[0] * words.shape[1] // DOWN
    least = count * 4.0 + M * (K + N) * 2.0
    name = f"{case.generation} {element_name(case.elements)} {M}x{K}x{N}"
    return [
        Form(f"{name}, scattered, XLA", scattered, (x, sparse), least),
        Form(f"{name}, Pallas", ours, (x, case.elements), least, 0,
             element_name(case.elements), (steps, DOWN * case.slots * 4.0)),
    ]  # fmt: skip


FORMS = [
    *features(Case("v5e")),
    *features(Case("v6e")),
    *weights(ElementCase("v5e")),
    *weights(ElementCase("v6e")),
]
