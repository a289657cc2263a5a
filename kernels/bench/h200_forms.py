"""What `h200.py` times in JAX: XLA's forms of a product, and the kernel."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from h200_problem import Problem

from qjax_kernels.int_matmul.fragments import TiledWeight, tiled
from qjax_kernels.int_matmul.pallas_gpu import int_matmul
from qjax_kernels.int_matmul.reference import quantize_tokens

FUSED = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
SPLIT = {**FUSED, "xla_gpu_experimental_force_split_k": 1}
FLOAT8 = jnp.float8_e4m3fn
LARGEST = 448.0  # of e4m3fn


@dataclass(frozen=True)
class Form:
    """One way to multiply.

    Attributes:
      name: in the results.
      f: of what `tokens` makes of `x[M, K]`, and a weight.
      weight: makes it of a problem.
      bits: of a code.
      error: the largest that rounding explains, as a share of the product's size.
      options: of XLA.
      tokens: of `x`, before time is taken.
      float8: whether codes are those of `Problem.float8`.
      card: whether only a GPU runs it.
    """

    name: str
    f: Callable[[Any, Any], jax.Array]
    weight: Callable[[Problem], Any]
    bits: int
    error: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)
    tokens: Callable[[Any], Any] = lambda x: x
    float8: bool = False
    card: bool = False


def dense(x: Any, w: Any) -> jax.Array:
    """bfloat16; cuBLAS where XLA's autotuning prefers it."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def narrow(x: Any, w: tuple[Any, Any]) -> jax.Array:
    """A native int4 array `[N, K]`, its scales on the weights."""
    (q, scale), G = w, w[1].shape[0]
    wide = q.reshape(q.shape[0], G, -1).astype(x.dtype) * scale.T[..., None]
    return dense(x, wide.reshape(q.shape).T)


def float8_tokens(x: Any) -> tuple[jax.Array, jax.Array]:
    """e4m3fn codes of `x[M, K]` and a scale for each token, `float32[M, 1]`."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), 1, keepdims=True), 1e-30) / LARGEST
    return jnp.clip(x / scale, -LARGEST, LARGEST).astype(FLOAT8), scale


def coded(tokens: tuple[Any, Any], w: tuple[Any, Any]) -> jax.Array:
    """Codes `[M, K]` by codes `[N, K]`, both scales on the sums."""
    (x, x_scale), (q, scale) = tokens, w
    total = jnp.int32 if q.dtype == jnp.int8 else jnp.float32
    axes = ((1,), (1,)), ((), ())
    y = jax.lax.dot_general(x, q, axes, preferred_element_type=total)
    return (y.astype(jnp.float32) * (x_scale * scale)).astype(jnp.bfloat16)


def wide_weight(problem: Problem) -> jax.Array:
    """`w[K, N]` in bfloat16."""
    q, scale = jnp.asarray(problem.codes()), jnp.asarray(problem.scale(), jnp.bfloat16)
    w = q.reshape(scale.shape[0], -1, problem.N).astype(jnp.bfloat16) * scale[:, None]
    return w.reshape(q.shape)


def narrow_weight(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """`int4[N, K]` and scales `[G, N]`."""
    scale = jnp.asarray(problem.scale(), jnp.bfloat16)
    return jnp.asarray(problem.codes()).astype(jnp.int4).T.copy(), scale


def int8_weight(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """`int8[N, K]` and scales `[1, N]`."""
    return jnp.asarray(problem.codes()).T.copy(), jnp.asarray(problem.scale())


def float8_weight(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """`e4m3fn[N, K]` and scales `[1, N]`."""
    return jnp.asarray(problem.float8()).T.copy(), jnp.asarray(problem.scale())


def tiled_weight(problem: Problem) -> TiledWeight:
    """The weight as the kernel takes it."""
    q, zero = problem.codes(), problem.zeros()
    if problem.bits < 8:
        q = (q + 2 ** (problem.bits - 1)).astype("uint8")
    if zero is not None:
        zero = jnp.asarray(zero.astype(problem.zero))
    scale = jnp.asarray(problem.scale(), jnp.bfloat16)
    pack = jax.jit(tiled, static_argnums=(3, 4))
    return pack(jnp.asarray(q), scale, zero, problem.bits, problem.group)


FOUR_BITS = (
    Form("bfloat16", dense, wide_weight, 16),
    Form("int4, XLA", narrow, narrow_weight, 4),
    Form("int4, XLA fused", narrow, narrow_weight, 4, options=FUSED, card=True),
    Form("int4, XLA fused, split", narrow, narrow_weight, 4, options=SPLIT, card=True),
    Form("int4, Pallas", int_matmul, tiled_weight, 4, card=True),
)
EIGHT_BITS = (
    Form("int8 x int8, XLA", coded, int8_weight, 8, 0.02, tokens=quantize_tokens),
    Form(
        "float8 x float8, XLA", coded, float8_weight, 8, 0.05,
        tokens=float8_tokens, float8=True,
    ),
    Form(
        "W8A8, XLA", lambda x, w: coded(quantize_tokens(x), w), int8_weight, 8, 0.02
    ),
    Form(
        "FP8, XLA", lambda x, w: coded(float8_tokens(x), w), float8_weight, 8, 0.05,
        float8=True,
    ),
)  # fmt: skip


def forms(problem: Problem, card: bool) -> Iterator[Form]:
    """Those that fit the problem's bits."""
    for form in EIGHT_BITS if problem.bits == 8 else FOUR_BITS:
        if card or not form.card:
            yield form
