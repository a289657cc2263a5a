"""Decode attention: XLA with qjax's caches and with floats, and the kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gates.kv_attention import Case

from forms.form import Form
from qjax.ops import Target, attend
from qjax.ops.attention import between, by_xla
from qjax.ops.kv_cache import CodedCache
from qjax_kernels.kv_attention.pallas_tpu import (
    choose,
    kv_attention,
    left_to_xla,
    name_of,
)

shape = jax.ShapeDtypeStruct


def forms(case: Case) -> list[Form]:
    """XLA and the kernel on one cache."""
    B, S, G, H, d = case.B, case.S, case.G, case.H, case.d
    codes = shape((B, S, G, d), jnp.dtype(case.codes))
    cache = CodedCache(codes, shape((B, G, S), jnp.float32))
    q, one = shape((B, H, d), jnp.bfloat16), shape((B,), jnp.int32)
    keys = case.cached(False)
    slots = choose(keys)
    least = B * S * case.bytes_per_slot
    name = f"{case.generation} {name_of(keys, keys)} {B}x{S}x{G}x{d}"

    def ours(implementation: str, *arguments: Any) -> Any:
        target = Target("tpu", case.generation)
        return attend(
            *arguments, scale=0.1, implementation=implementation, target=target
        )

    given = (q, cache, cache, one, one)
    products = 2 * B * S * H * d
    kernel, own = partial(ours, "pallas"), given
    if left_to_xla(case.generation, keys):
        kernel = partial(kv_attention, scale=0.1, generation=case.generation)
        own = (q, keys, keys, one, one)
    return [
        Form(f"{name}, XLA", partial(ours, "xla"), given, least, products),
        Form(f"{name}, Pallas", kernel, own, least, products,
             name_of(keys, keys), (B * S // slots, slots * case.bytes_per_slot)),
    ]  # fmt: skip


def bfloat16(generation: str) -> Form:
    """XLA with a cache in bfloat16."""
    case = Case(generation, "int8")
    B, S, G, H, d = case.B, case.S, case.G, case.H, case.d
    codes = shape((B, S, G, d), jnp.bfloat16)
    q, one = shape((B, H, d), jnp.bfloat16), shape((B,), jnp.int32)

    def run(q: Any, k: Any, v: Any, start: Any, stop: Any) -> Any:
        ones = jnp.ones((B, G, S), jnp.float32)
        keys, values = CodedCache(k, ones), CodedCache(v, ones)
        return by_xla(q, keys, values, between(start, stop, keys), 0.1)

    name = f"{generation} attention_bfloat16 {B}x{S}x{G}x{d}, XLA"
    least = 4.0 * B * S * G * d
    return Form(name, run, (q, codes, codes, one, one), least, 2 * B * S * H * d)


FORMS = [
    bfloat16("v5e"),
    *(
        form
        for generation, codes in (
            ("v5e", "int8"),
            ("v5e", "float8_e4m3fn"),
            ("v6e", "int8"),
            ("v6e", "float8_e4m3fn"),
            ("v5e", "int4"),
            ("v6e", "int4"),
            ("v7x", "int8"),
            ("v7x", "float8_e4m3fn"),
        )
        for form in forms(Case(generation, codes))
    ),
]
