"""A frozen leaf with a trained low-rank term beside it."""

from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.carrier import Carrier
from qjax.core.layout import Layout
from qjax.core.pytrees import register
from qjax.core.qtensor import QTensor, factor
from qjax.ops.frozen import frozen_matmul, frozen_ragged, takes
from qjax.ops.pieces import Cut, by_columns, columns, cut_of, cut_parts, decoder
from qjax.trace import compat
from qjax.trace.apply import low_bit, other_axes, refusal, runs_as
from qjax.trace.contractions import Call
from qjax.trace.views import Tracked, as_array


@dataclass(frozen=True)
class Adapted(Carrier):
    """`W + s A B`, or with a magnitude `(W + s A B) m / ||W + s A B||` (DoRA).

    Attributes:
      base: the frozen leaf: a float array in its own axes, or a QTensor.
      a, b: `[*layers, *experts, K, r]` and `[*layers, *experts, r, N]`.
      magnitude: `[*layers, N]`; None without DoRA.
      key: for dropout, one key per layer; None: no dropout.
      layout, dtype: of the leaf.
      scaling: `s`.
      dropout: probability that a feature of the adapter's input is dropped.
    """

    base: Any
    a: Any
    b: Any
    magnitude: Any
    key: Any
    layout: Layout
    dtype: Any
    scaling: float
    dropout: float

    @property
    def acts(self) -> tuple[Any, ...]:
        """The base's records of its sites."""
        return self.base.acts if isinstance(self.base, QTensor) else ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's own shape."""
        return tuple(self.base.shape)

    def frozen(self, dtype: Any) -> jax.Array:
        """`W` as `[..., K, N]`."""
        if isinstance(self.base, QTensor):
            return self.base.matrix(dtype)
        return self.layout.to_matrix(self.base).astype(dtype)

    def delta(self, dtype: Any) -> jax.Array:
        """`s A B` as `[..., K, N]`."""
        product = self.a.astype(dtype) @ self.b.astype(dtype)
        return product * jnp.asarray(self.scaling, dtype)

    def gain(self) -> Any:
        """DoRA's `m / ||W + s A B||`, `[..., N]`; the norm is a constant.

        Section 4.3 of the paper leaves the norm out of the gradient.
        """
        norm = jax.lax.stop_gradient(replace(self, key=None)).norm()
        return self.magnitude / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)

    def norm(self) -> jax.Array:
        """`||W + s A B||` of each output feature, `[..., N]` in float32.

        A few columns are decoded at a time; a frozen weight with a transform or with
        outliers is decoded whole.
        """
        frozen, cut = _by_columns(self.base, self.layout)

        def squares(start: Any, width: int) -> Any:
            delta = replace(self, b=columns(self.b, start, width)).delta(jnp.float32)
            return jnp.sum(jnp.square(frozen(start, width) + delta), axis=-2)

        return jnp.sqrt(by_columns(squares, cut))

    def merged(self) -> jax.Array:
        """The float weight that it stands for, `[..., K, N]` in float32."""
        w = self.frozen(jnp.float32) + self.delta(jnp.float32)
        return w if self.magnitude is None else w * self.gain()[..., None, :]

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The float leaf that it stands for."""
        return self.layout.from_matrix(self.merged().astype(dtype or self.dtype))

    def without(self, x: jax.Array, site: int) -> jax.Array:
        """`x` with dropped features, the rest scaled up."""
        if self.key is None or not self.dropout:
            return x
        kept = 1 - self.dropout
        key = jax.random.fold_in(self.key, site)
        mask = jax.random.bernoulli(key, kept, x.shape)
        return jnp.where(mask, x / jnp.asarray(kept, x.dtype), jnp.zeros_like(x))


register(
    Adapted,
    ("base", "a", "b", "magnitude", "key"),
    ("layout", "dtype", "scaling", "dropout"),
)


def _by_columns(base: Any, layout: Layout) -> tuple[Any, Cut]:
    """`w(start, width)`, columns of the frozen weight in float32, and their cut."""
    if isinstance(base, QTensor) and base.parts and takes(base) and not base.moved:
        terms = [decoder(part, jnp.float32) for part in base.parts]
        if base.left is not None:
            left, right = (factor(f, jnp.float32) for f in (base.left, base.right))
            terms.append(lambda start, width: left @ columns(right, start, width))

        def coded(start: Any, width: int) -> Any:
            return reduce(add, (term(start, width) for term in terms))

        return coded, cut_parts(*base.parts)
    quantized = isinstance(base, QTensor)
    whole = base.matrix(jnp.float32) if quantized else layout.to_matrix(base)

    def given(start: Any, width: int) -> Any:
        return columns(whole, start, width).astype(jnp.float32)

    return given, cut_of(layout.N)


def adapted_rule(
    eqn: Any, call: Call, weight: Tracked, operands: list[Any], site: int
) -> tuple[Any, ...]:
    """The rule of `lora`: the frozen operation, and the low-rank term beside it."""
    leaf = weight.value
    if not isinstance(leaf, Adapted):
        return low_bit(eqn, call, weight, operands, site)
    if call.kind not in ("dot", "ragged_dot") or other_axes(leaf, weight, call):
        return None, "dequantized: an adapted weight is merged here"
    base, bias = leaf.base, None
    if leaf.magnitude is not None and isinstance(base, QTensor):
        base, bias = replace(base, bias=None), base.bias  # which has no magnitude
    y, runs = _frozen(eqn, call, weight, operands, site, base)
    x = operands[call.operand]
    if call.kind == "ragged_dot":
        delta = _ragged(leaf, leaf.without(x, site), operands[2])
        return y + delta.astype(y.dtype), f"{runs}, adapted"
    x = leaf.without(call.matrix(x), site)
    inner = x @ leaf.a.astype(x.dtype)
    scaled = inner * jnp.asarray(leaf.scaling, x.dtype)
    y = y + call.finish(scaled @ leaf.b.astype(x.dtype)).astype(y.dtype)
    if leaf.magnitude is not None:
        y = y * _of_rows(leaf.gain(), call).astype(y.dtype)
    if bias is not None:
        y = y + _of_rows(bias, call).astype(y.dtype)
    return y, f"{runs}, adapted"


def _of_rows(values: Any, call: Call) -> Any:
    """`values[..., N]` for each row, as the operation arranges its result."""
    shape = (*values.shape[:-1], call.M, values.shape[-1])
    return call.finish(jnp.broadcast_to(values[..., None, :], shape))


def _frozen(
    eqn: Any, call: Call, weight: Tracked, operands: list[Any], site: int, base: Any
) -> tuple[Any, str]:
    """The operation on the frozen leaf alone."""
    if isinstance(base, QTensor):
        alone = replace(weight, value=base)
        y, runs = _low_bit(eqn, call, alone, operands, site)
        array = None if y is not None else alone.array()
    else:
        y, runs = None, "float"
        array = weight.view.of_array(base).astype(weight.dtype)
    if y is None:
        given = [array if x is weight else as_array(x) for x in operands]
        y = compat.bind(eqn, given)[0]
    return y, runs


def _low_bit(
    eqn: Any, call: Call, weight: Tracked, operands: list[Any], site: int
) -> tuple[Any, str]:
    """`low_bit`, piece by piece where the leaf can be decoded so."""
    q = weight.value
    if refusal(q, weight, call) or not takes(q):
        return low_bit(eqn, call, weight, operands, site)
    how = {
        "site": site,
        "dtype": eqn.outvars[0].aval.dtype,
        "weight_dtype": weight.dtype,
        "precision": eqn.params["precision"],
    }
    x, runs = operands[call.operand], f"low-bit: {runs_as(call, q, site)}, by piece"
    if call.kind == "ragged_dot":
        return frozen_ragged(x, q, operands[2], **how), runs
    return call.finish(frozen_matmul(call.matrix(x), q, **how)), runs


def _ragged(leaf: Adapted, x: jax.Array, group_sizes: Any) -> jax.Array:
    """`s (x A) B`, each row with its expert's factors."""
    inner = jax.lax.ragged_dot(x, leaf.a.astype(x.dtype), group_sizes)
    scaled = inner * jnp.asarray(leaf.scaling, x.dtype)
    return jax.lax.ragged_dot(scaled, leaf.b.astype(x.dtype), group_sizes)
