"""The Hadamard transform: as two products, and the kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gates.hadamard import Case

from forms.form import Form
from qjax.core.hadamard import small_factor, small_hadamard
from qjax_kernels.hadamard.pallas_tpu import GROUP, hadamard, name_of
from qjax_kernels.hadamard.reference import matrix
from qjax_kernels.int_matmul.reference import quantize_tokens

BLOCK = 128
shape = jax.ShapeDtypeStruct


def two_products(x: Any) -> jax.Array:
    """A matrix of 128 within blocks of features, another across them."""
    M, K = x.shape
    factor = small_hadamard(small_factor(K))
    within = jnp.asarray(matrix(BLOCK), x.dtype)
    between = jnp.asarray(matrix(K // BLOCK, factor), x.dtype)
    y = jnp.einsum(
        "mab,bd->mad", x.reshape(M, -1, BLOCK), within,
        preferred_element_type=jnp.float32,
    ).astype(x.dtype)  # fmt: skip
    y = jnp.einsum("mad,ac->mcd", y, between, preferred_element_type=jnp.float32)
    return (y * K**-0.5).reshape(M, K)


def forms(case: Case) -> list[Form]:
    """To int8 codes, or to bfloat16."""
    M, K, int8 = case.M, case.K, case.int8
    x = shape((M, K), jnp.bfloat16)
    signs = shape((K,), jnp.float32)

    def by(transform: Any, x: Any, signs: Any) -> Any:
        y = transform((x * signs).astype(x.dtype))
        return quantize_tokens(y) if int8 else y.astype(x.dtype)

    factor = small_hadamard(small_factor(K))
    ours = partial(hadamard, generation=case.generation, factor=factor, int8=int8)
    least = M * K * case.bytes_per_value
    name = f"{case.generation} {name_of(int8)} {M}x{K}"
    steps = (M // GROUP, GROUP * K * case.bytes_per_value)
    return [
        Form(
            f"{name}, two products, XLA", partial(by, two_products), (x, signs), least
        ),
        Form(f"{name}, Pallas", ours, (x, signs), least, 0, name_of(int8), steps),
    ]


FORMS = [
    form
    for case in (
        Case("v5e", 4096),
        Case("v5e", 14336),
        Case("v6e", 14336),
        Case("v7x", 14336, int8=False),
    )
    for form in forms(case)
]
