"""Integer grids of 1 to 8 bits."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from qjax.core.granularity import Granularity, channel, spread
from qjax.core.rounding import divide, rounder
from qjax.core.scales import (
    MINMAX,
    Grid,
    Search,
    block_absmax,
    block_range,
    check_scale_dtype,
    finite_to,
    positive,
    scale_type,
    search_grid,
)

SCALE_RULES = ("ct", "narrow", "signed", "float16")
_NARROW = ("narrow", "float16")
ZEROS = ("none", "int", "float")
_CHANNEL = channel()


@dataclass(frozen=True)
class Int:
    """Whole numbers times a scale: `w = (u - zero) * scale`, `u` in `[0, 2^bits - 1]`.

    Unpacked codes `u` are unsigned for every variant; without a zero point the code of
    0 is `2^(bits-1)`, as in compressed-tensors' files.

    Args:
      bits: 1 to 8.
      granularity: which weights share a scale.
      symmetric: no zero point. Default: true unless `zero` says otherwise.
      zero: "none", "int" (a code) or "float" (HQQ's, in units of codes). Default:
        "none" if symmetric, else "int".
      scale_rule: of symmetric grids. "ct" (compressed-tensors, GPTQ):
        `absmax / ((2^b-1)/2)`; "narrow" (torchao): `absmax / (2^(b-1)-1)`, codes
        `+-(2^(b-1)-1)`; "signed" (AutoRound): `+-absmax / 2^(b-1)` with the sign that
        gives the weight of largest magnitude the lowest code; "float16" (bitsandbytes):
        "narrow" of values brought to float16, with codes `w * ((2^(b-1)-1) / absmax)`.
      scale_dtype: dtype of scales and float zeros; None is that of the weights, float32
        with the rule "float16".

    Raises:
      ValueError: a field has an illegal value, or two fields contradict each other.
    """

    bits: int
    granularity: Granularity = _CHANNEL
    symmetric: bool | None = None
    zero: str | None = None
    scale_rule: str = "ct"
    scale_dtype: str | None = None

    def __post_init__(self):
        whole = isinstance(self.bits, int) and not isinstance(self.bits, bool)
        if not whole or self.bits not in range(1, 9):
            raise ValueError(
                f"Int.bits is {self.bits!r}; it must be a whole number from 1 to 8"
            )
        if self.zero not in (None, *ZEROS):
            raise ValueError(f"Int.zero is {self.zero!r}; it must be one of {ZEROS}")
        if self.scale_rule not in SCALE_RULES:
            raise ValueError(
                f"Int.scale_rule is {self.scale_rule!r}; "
                f"it must be one of {SCALE_RULES}"
            )
        check_scale_dtype("Int", self.scale_dtype)
        symmetric = self.symmetric
        if symmetric is None:
            symmetric = self.zero in (None, "none")
        zero = self.zero or ("none" if symmetric else "int")
        object.__setattr__(self, "symmetric", symmetric)
        object.__setattr__(self, "zero", zero)
        self._check_agreement()

    def _check_agreement(self):
        if self.symmetric != (self.zero == "none"):
            raise ValueError(
                f"Int.zero is {self.zero!r} with symmetric={self.symmetric}; a "
                'symmetric grid has zero="none", an asymmetric one "int" or "float"'
            )
        if self.symmetric and self.bits == 1:
            raise ValueError(
                "Int(bits=1, symmetric=True) has no level above zero; "
                "use Binary() for +-scale, or Int(1, symmetric=False)"
            )
        if not self.symmetric and self.scale_rule != "ct":
            raise ValueError(
                f"Int.scale_rule is {self.scale_rule!r} with a zero point; "
                'only symmetric grids choose a rule, leave it at "ct"'
            )

    @property
    def name(self) -> str:
        """A short name, such as `int4 g128 asym`."""
        kind = {"none": "", "int": " asym", "float": " float-zero"}[self.zero or "none"]
        rule = "" if self.scale_rule == "ct" else f" {self.scale_rule}"
        return f"int{self.bits} {self.granularity.label}{kind}{rule}"

    @property
    def half(self) -> int:
        """The code of zero in a symmetric grid, `2^(bits-1)`."""
        return 2 ** (self.bits - 1)

    def fit(
        self,
        w: Float[Array, "... K N"],
        search: Search = MINMAX,
        importance: Float[Array, "... K"] | None = None,
    ) -> Grid:
        """Scales `[..., Gk, Gn]`, and zero points where the format has them."""
        w = self._given(w)
        dtype = scale_type(self.scale_dtype, w)
        if self.symmetric and self.scale_rule != "signed":
            high = block_absmax(w, self.granularity, search)
            low = -high
        else:
            low, high = block_range(w, self.granularity, search)
        return search_grid(
            w,
            self.granularity,
            lambda factor: self.grid_of(low * factor, high * factor, dtype),
            lambda grid: self.from_codes(self.to_codes(w, grid), grid),
            search,
            importance,
        )

    def grid_of(
        self,
        low: Float32[Array, "... Gk Gn"],
        high: Float32[Array, "... Gk Gn"],
        dtype: Any,
    ) -> Grid:
        """The grid that covers `[low, high]`, which includes zero."""
        absmax = jnp.maximum(-low, high)
        if self.symmetric:
            scale = positive(self._symmetric_scale(low, high).astype(dtype), absmax)
            return Grid(finite_to(scale, self.half - (self.scale_rule in _NARROW)))
        # Halves, so that a range as wide as float32 does not overflow.
        steps = np.float32((2**self.bits - 1) / 2)
        scale = divide(high * 0.5 - low * 0.5, steps).astype(dtype)
        scale = positive(scale, absmax)
        zero = -divide(low, scale.astype(jnp.float32))
        if self.zero == "int":
            signed = jnp.clip(zero - self.half, -self.half, self.half - 1)
            zero = jnp.round(signed) + self.half
        scale = finite_to(scale, jnp.maximum(zero, 2**self.bits - 1 - zero))
        stored = zero.astype(dtype) if self.zero == "float" else _to_uint8(zero)
        return Grid(scale, stored)

    def _given(self, w: Array) -> Array:
        """The values that are coded."""
        if self.scale_rule != "float16":
            return w
        return w.astype(jnp.float16).astype(jnp.float32)

    def _symmetric_scale(self, low: Array, high: Array) -> Array:
        if self.scale_rule == "signed":
            return jnp.where(-low >= high, -low, -high) / self.half
        absmax = jnp.maximum(-low, high)
        if self.scale_rule in _NARROW:
            return divide(absmax, self.half - 1)
        return divide(absmax, (2**self.bits - 1) / 2)

    def to_codes(
        self,
        w: Float[Array, "... K N"],
        grid: Grid,
        rounding: str = "nearest",
        key: Any = None,
    ) -> UInt8[Array, "... K N"]:
        """Unsigned codes of `w` on `grid`."""
        K, N = w.shape[-2:]
        to_whole = rounder(rounding, key)
        scale = spread(grid.scale.astype(jnp.float32), self.granularity, K, N)
        x = self._in_steps(self._given(w).astype(jnp.float32), scale)
        if self.zero == "float":
            zero = spread(grid.zero.astype(jnp.float32), self.granularity, K, N)
            return _to_uint8(jnp.clip(to_whole(x + zero), 0, 2**self.bits - 1))
        if self.zero == "int":
            # Signed, as compressed-tensors rounds: after adding the zero point.
            zero = spread(grid.zero.astype(jnp.float32), self.granularity, K, N)
            x = x + (zero - self.half)
        lowest = 1 - self.half if self.scale_rule in _NARROW else -self.half
        return _to_uint8(jnp.clip(to_whole(x), lowest, self.half - 1) + self.half)

    def _in_steps(self, w: Array, scale: Array) -> Array:
        if self.scale_rule != "float16":
            return divide(w, jnp.broadcast_to(scale, w.shape))
        # A value of float16, as the scale was made from: the rounding undoes itself.
        most = np.float32(self.half - 1)
        absmax = (scale * most).astype(jnp.float16).astype(jnp.float32)
        # As torch divides a number by a tensor.
        return w * (most * (1 / jnp.where(absmax == 0, 1, absmax)))

    def from_codes(self, codes: Array, grid: Grid) -> Float32[Array, "... K N"]:
        """The weights `(u - zero) * scale` that unsigned codes stand for, float32."""
        K, N = codes.shape[-2:]
        scale = spread(grid.scale.astype(jnp.float32), self.granularity, K, N)
        if self.symmetric:
            return (codes.astype(jnp.float32) - self.half) * scale
        zero = spread(grid.zero.astype(jnp.float32), self.granularity, K, N)
        return (codes.astype(jnp.float32) - zero) * scale


def _to_uint8(x: Array) -> Array:
    # A NaN has no code; its block's NaN scale is what makes it decode to NaN.
    return jnp.where(jnp.isnan(x), 0, x).astype(jnp.uint8)
