"""Which block of rows meets which expert, and in what order.

Rows are sorted by expert and cut into blocks of `m`; an expert's rows may begin and
end inside a block. A visit is a block and one of its experts: the rows of the block
that are not the expert's keep what they have.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visits:
    """In the order of rows; entries from `count` on mean nothing.

    Attributes:
      block: int32 `[V]`, block of rows.
      expert: int32 `[V]`.
      first: int32 `[V]`, the expert's first row.
      stop: int32 `[V]`, the row after its last; `first` where the rows are no expert's.
      count: int32 `[]`, number of visits.
    """

    block: Any
    expert: Any
    first: Any
    stop: Any
    count: Any


def visits(sizes: Any, rows: int, m: int) -> Visits:
    """The visits of `rows` rows in blocks of `m`, for `sizes[E]` rows of each expert.

    Every block is visited: rows after the last expert's are a group of their own, whose
    visits write zeros. At most `blocks + min(E + 1, rows) - 1` visits are needed.
    """
    E = sizes.shape[0]
    stops = jnp.append(jnp.minimum(_running(sizes), rows), jnp.int32(rows))
    starts = jnp.append(jnp.int32(0), stops[:-1])
    touched = jnp.where(stops > starts, (stops - 1) // m - starts // m + 1, 0)
    ends = _running(touched)
    visit = jnp.arange(-(-rows // m) + min(E + 1, rows) - 1, dtype=jnp.int32)
    # By comparisons: on a TPU gathers and scatters of so few numbers take far longer.
    group = (visit[:, None] >= ends).sum(1, dtype=jnp.int32)
    own = group[:, None] == jnp.arange(E + 1)

    def of_group(values: Any) -> Any:
        return jnp.where(own, values, 0).sum(1, dtype=jnp.int32)

    first, stop = of_group(starts), of_group(stops)
    block = first // m + visit - of_group(ends - touched)
    return Visits(
        block=jnp.minimum(block, -(-rows // m) - 1),
        expert=jnp.minimum(group, E - 1),
        first=first,
        stop=jnp.where(group < E, stop, first),
        count=touched.sum(dtype=jnp.int32),
    )


def _running(counts: Any) -> Any:
    """Sums up to and including each element."""
    upto = jnp.tri(counts.shape[0], dtype=bool)
    return jnp.where(upto, counts, 0).sum(1, dtype=jnp.int32)
