"""Factors of the Hessian `H = E[x x^T]` that error compensation needs.

GPTQ is written with the upper Cholesky factor `U` of the inverse, `H^-1 = U^T U`. What
is computed here is its inverse `R = U^-1`: `H = R R^T` with `R` upper triangular, the
Cholesky factor of the features in reverse order. It takes one Cholesky and no inverse,
and is therefore both cheaper and more exact in float32 than `U` itself.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int

from qjax.core.pytrees import register

RUNGS = 4


@dataclass(frozen=True)
class Factor:
    """`(H + damping) / mean(diag H) = R R^T`, in the order of features asked for.

    Attributes:
      upper: `R[K, K]`, upper triangular; the identity if no rung of the ladder held.
      fraction: of the mean diagonal that was added to it: the last rung tried.
      diagonal: whether no rung held, so that features count as uncorrelated.
      unit: one over the mean diagonal.
    """

    upper: Any
    fraction: Any
    diagonal: Any
    unit: Any


register(Factor, ("upper", "fraction", "diagonal", "unit"))


def ladder(damping: float) -> np.ndarray:
    """The fractions of the mean diagonal to try: `damping`, then tens of it."""
    return (damping * 10.0 ** np.arange(RUNGS)).astype(np.float32)


def dead_features(h: Float32[Array, "K K"]) -> Bool[Array, " K"]:
    """Features that no sample ever used. None in a Hessian that is not finite."""
    return (jnp.diagonal(h) == 0) & jnp.isfinite(h).all()


def reverse_cholesky(h: Float32[Array, "K K"]) -> Float32[Array, "K K"]:
    """`R`, upper triangular, with `h = R R^T`; NaN if `h` is not positive definite."""
    return lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]


def factorize(
    h: Float32[Array, "K K"],
    damping: float,
    order: Int[Array, " K"] | None = None,
) -> Factor:
    """The factor of `h`, damped as little as its Cholesky needs.

    Tries `ladder(damping)` until the factor is finite. A dead feature has the mean
    diagonal for its own. The order of features changes the factor, not its damping.

    Args:
      h: `E[x x^T]`, of any scale; may be singular, zero or not finite.
      damping: the first rung, a fraction of the mean diagonal of live features.
      order: of the features, first to be quantized first; None keeps theirs.
    """
    backwards = None if order is None else order[::-1]
    unit = mean_unit(h)
    h = h[::-1, ::-1] if backwards is None else h[backwards][:, backwards]
    h, fractions, K = h * unit, jnp.asarray(ladder(damping)), h.shape[0]
    ones = (jnp.diagonal(h) == 0).astype(jnp.float32)

    def climb(state):
        rung, _ = state
        damped = h + jnp.diag(ones + fractions[rung])
        return rung + 1, lax.linalg.cholesky(damped, symmetrize_input=False)

    def failed(state):
        rung, lower = state
        return (rung < RUNGS) & ~jnp.isfinite(lower).all()

    start = jnp.int32(0), jnp.full((K, K), jnp.nan, jnp.float32)
    rung, lower = lax.while_loop(failed, climb, start)
    diagonal = ~jnp.isfinite(lower).all()
    upper = jnp.where(diagonal, jnp.eye(K, dtype=jnp.float32), lower[::-1, ::-1])
    return Factor(upper, fractions[rung - 1], diagonal, unit)


def mean_unit(h: Float32[Array, "K K"]) -> Float32[Array, ""]:
    """One over the mean diagonal of live features, 1 if there are none.

    NaN if this is no Hessian: an entry is not finite, or that mean is negative.
    """
    diagonal = jnp.diagonal(h)
    count = jnp.sum(diagonal != 0).astype(jnp.float32)
    # In units of the largest, so that the sum does not overflow.
    top = jnp.max(jnp.abs(diagonal))
    mean = top * (jnp.sum(diagonal / jnp.where(top == 0, 1, top)) / count)
    usable = jnp.isfinite(h).all() & ((count == 0) | (mean > 0))
    unit = jnp.where(count == 0, np.float32(1), 1 / mean)
    return jnp.where(usable, unit, np.float32(np.nan))


def drift_target(
    upper: Float32[Array, "K K"],
    cross: Float32[Array, "K K"],
    w: Float32[Array, "K N"],
) -> Float32[Array, "K N"]:
    """What the features still to come must make up for drift of the input (GPTAQ).

    Feature `q` of the full-precision input differs by `d_q` from the quantized one; the
    least-squares compensation of `d_q w_q` by the features after `q` alone is
    `P[q, :] w_q` with `P = triu(C U^T, 1) U`. Returns `P^T w`.

    Args:
      upper: `R` of `factorize`.
      cross: `C = E[d x^T]`, times the factor's `unit` and in its order.
      w: the weights.
    """
    seen = lax.linalg.triangular_solve(upper, cross.T, left_side=True, lower=False).T
    later = jnp.triu(seen, 1)
    return lax.linalg.triangular_solve(
        upper,
        jnp.matmul(later.T, w, precision="highest"),
        left_side=True,
        lower=False,
        transpose_a=True,
    )


def solve(
    upper: Float32[Array, "K K"], b: Float32[Array, "K N"]
) -> Float32[Array, "K N"]:
    """`x` with `R R^T x = b`, for the `R` of `factorize`."""
    half = lax.linalg.triangular_solve(upper, b, left_side=True, lower=False)
    return lax.linalg.triangular_solve(
        upper, half, left_side=True, lower=False, transpose_a=True
    )
