"""A leaf that is quantized in every pass and trained in float."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.carrier import Carrier
from qjax.core.layout import Layout
from qjax.core.pytrees import register
from qjax.trace import compat
from qjax.trace.apply import low_bit, other_axes
from qjax.trace.contractions import Call
from qjax.trace.views import Tracked, as_array
from qjax.train.quantizers import (
    InputQuantizer,
    WeightQuantizer,
    fake_input,
    fake_weights,
    see,
)


@dataclass(frozen=True)
class FakeQuantized(Carrier):
    """A float leaf on its way to its sites.

    Attributes:
      leaf: the float parameter, own axes.
      trained: what the weights' method learned, `[*layers, *experts, ...]` each.
      records: for each site, what the input's method learned or observed, and `live`,
        whether the input is quantized by now (absent: it is).
      key: for what is drawn at random, one key per layer; None rounds to nearest.
      weights, inputs, gradients: the methods; None where activations or gradients stay
        in float.
      watching: nothing is quantized, inputs are only looked at.
    """

    leaf: Any
    trained: dict[str, Any]
    records: tuple[Any, ...]
    key: Any
    layout: Layout
    dtype: Any
    weights: WeightQuantizer
    inputs: InputQuantizer | None
    watching: bool = False
    gradients: Any = None

    @property
    def acts(self) -> tuple[Any, ...]:
        """A record for each site."""
        return self.records

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's own shape."""
        return tuple(self.leaf.shape)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The leaf as it will be stored, with the method's gradient."""
        dtype = jnp.dtype(dtype or self.dtype)
        if self.watching:
            return self.leaf.astype(dtype)

        # Recomputed in the backward pass: only the float weight is kept for it.
        @jax.checkpoint
        def fake(leaf: Any, trained: Any, key: Any) -> Any:
            def one(w: Any, trained: Any, key: Any) -> Any:
                return fake_weights(self.weights, w, trained, dtype, key)

            for _ in range(0 if key is None else key.ndim):
                one = jax.vmap(one)
            w = self.layout.to_matrix(leaf)
            return self.layout.from_matrix(one(w, trained, key))

        return fake(self.leaf, self.trained, self.key)

    def site(self, index: int) -> Any:
        """The record of the leaf's site number `index`."""
        return self.records[0 if len(self.records) == 1 else index]


register(
    FakeQuantized,
    ("leaf", "trained", "records", "key"),
    ("layout", "dtype", "weights", "inputs", "watching", "gradients"),
)


def fake_rule(
    eqn: Any, call: Call, weight: Tracked, operands: list[Any], site: int
) -> tuple[Any, ...]:
    """The rule of `fake_quantize`: the operation itself, on operands as coded."""
    leaf = weight.value
    if not isinstance(leaf, FakeQuantized):
        return low_bit(eqn, call, weight, operands, site)
    given, seen = list(operands), None
    coded = call.kind != "embedding" and not other_axes(leaf, weight, call)
    if leaf.inputs is not None and coded:
        given[call.operand], seen = _input(eqn, call, leaf, operands, site)
    output = compat.bind(eqn, [as_array(x) for x in given])[0]
    if leaf.gradients is not None and leaf.key is not None:
        # The layers of a stack that is read by index share their noise.
        key = leaf.key if leaf.key.ndim == 0 else leaf.key.reshape(-1)[0]
        output = leaf.gradients(output, jax.random.fold_in(key, site))
    return output, "fake-quantized", seen


def _input(
    eqn: Any, call: Call, leaf: FakeQuantized, operands: list[Any], site: int
) -> tuple[Any, Any]:
    """The activation as it will be coded, and what was seen of it."""
    method, state = leaf.inputs, leaf.site(site)
    assert method is not None
    x = operands[call.operand]
    matrix, back = jax.vjp(_arranged(eqn, call), x)
    granularity = method.activation.format.granularity
    watch = leaf.watching or method.observes
    seen = see(jnp.swapaxes(matrix, -1, -2), granularity) if watch else None
    if leaf.watching:
        return x, seen
    live = state.get("live")
    coded = fake_input(method, matrix, {k: v for k, v in state.items() if k != "live"})
    if live is not None:
        coded = jnp.where(live, coded, matrix)
    # The arrangement only moves values, so that its transpose is its inverse.
    return back(coded)[0], seen


def _arranged(eqn: Any, call: Call) -> Any:
    """The activation as the matrix `[..., M, K]` in which it is coded."""
    if call.kind != "conv":
        return call.matrix
    axis = eqn.params["dimension_numbers"].lhs_spec[0]

    def by_image(x: Any) -> Any:
        return jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)

    return by_image
