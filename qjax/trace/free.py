"""Values that the compiler knows before a program runs: which may be made anew."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.trace import compat

LARGEST_FREE = 2**22  # elements of a value that is made anew wherever it is read
# Worth keeping rather than making anew; a barrier says where the compiler's knowledge
# of a value ends.
KEPT = frozenset(
    {"conv_general_dilated", "dot_general", "optimization_barrier", "sort"}
)


def is_cheap(eqn: Any) -> bool:
    """Whether its results may be made anew wherever they are read."""
    kind = compat.kind(eqn)
    if kind in ("jit", "custom"):
        return all(is_cheap(e) for e in compat.call_body(eqn)[0].eqns)
    large = any(v.aval.size > LARGEST_FREE for v in eqn.outvars)
    return not (large or kind in KEPT or compat.has_bodies(eqn))


def is_whole(dtype: Any) -> bool:
    """Whether a dtype is of whole numbers or truth values."""
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)


def on_host(x: Any) -> Any:
    """An array in host memory; keys of random streams stay where they are."""
    return x if is_key(x) else np.asarray(x)


def is_key(x: Any) -> bool:
    """Whether an array holds keys of random streams."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
