"""Floating-point weights: FP8 with a scale, OCP's MX blocks, NVFP4."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.core import minifloat
from qjax.core.granularity import Granularity, channel, group, spread
from qjax.core.minifloat import (
    Minifloat,
    floor_log2,
    from_elements,
    power_of_two,
    to_elements,
)
from qjax.core.rounding import divide, round_nearest, rounder, times_reciprocal
from qjax.core.scales import (
    MINMAX,
    TOP,
    Grid,
    Search,
    block_absmax,
    check_scale_dtype,
    finite_to,
    positive,
    scale_type,
    search_grid,
)

FLOATS = {
    "e4m3": minifloat.E4M3,
    "e5m2": minifloat.E5M2,
    "e4m3b11": minifloat.E4M3B11,
}
ELEMENTS = {
    "fp4": minifloat.E2M1,
    "fp6_e2m3": minifloat.E2M3,
    "fp6_e3m2": minifloat.E3M2,
    "fp8_e4m3": minifloat.E4M3,
    "fp8_e5m2": minifloat.E5M2,
}
SHORT_ELEMENTS = {"fp6": "fp6_e2m3", "fp8": "fp8_e4m3"}
MX_RULES = ("ocp", "ct")
_CHANNEL = channel()
_E8M0_MIN = -126


@dataclass(frozen=True)
class Float:
    """8-bit floats times a scale of `absmax / largest`; codes are the float8 dtype.

    Args:
      dtype: "e4m3" (e4m3fn, up to 448), "e5m2" (up to 57344) or "e4m3b11" (e4m3b11fnuz,
        up to 30).
      granularity: which weights share a scale.
      scale_dtype: dtype of the scales; None is that of the weights.

    Raises:
      ValueError: a field has an illegal value.
    """

    dtype: str = "e4m3"
    granularity: Granularity = _CHANNEL
    scale_dtype: str | None = None

    def __post_init__(self):
        if self.dtype not in FLOATS:
            raise ValueError(
                f"Float.dtype is {self.dtype!r}; it must be one of {tuple(FLOATS)}"
            )
        check_scale_dtype("Float", self.scale_dtype)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 8

    @property
    def name(self) -> str:
        """A short name, such as `fp8 e4m3 channel`."""
        return f"fp8 {self.dtype} {self.granularity.label}"

    @property
    def element(self) -> Minifloat:
        """The float type of the codes."""
        return FLOATS[self.dtype]

    def fit(self, w: Any, search: Search = MINMAX, importance: Any = None) -> Grid:
        """Scales `[..., Gk, Gn]` of `w[..., K, N]`."""
        absmax = block_absmax(w, self.granularity, search)
        dtype = scale_type(self.scale_dtype, w)

        def grid_of(factor):
            scale = divide(absmax * factor, self.element.largest).astype(dtype)
            return Grid(finite_to(positive(scale, absmax), self.element.largest))

        return _search(self, w, grid_of, search, importance)

    def to_codes(
        self, w: Any, grid: Grid, rounding: str = "nearest", key: Any = None
    ) -> Array:
        """float8 codes of `w[..., K, N]` on `grid`, saturating."""
        scale = grid.scale.astype(jnp.float32)
        return _scaled_elements(w, scale, self, rounding, key)

    def from_codes(self, codes: Array, grid: Grid) -> Float32[Array, "... K N"]:
        """The weights that codes stand for, float32."""
        return _scaled_values(codes, grid.scale.astype(jnp.float32), self)


@dataclass(frozen=True)
class MX:
    """OCP microscaling: blocks of 32 along K share a power of two, stored as e8m0.

    4- and 6-bit codes are the elements' bit patterns. Exponents below -126 are not
    used: as float32 such scales would be subnormal, which devices flush to zero.

    Args:
      element: "fp4", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3" or "fp8_e5m2"; "fp6" is short
        for "fp6_e2m3", the one with the smaller error on weights, "fp8" for "fp8_e4m3".
      scale_rule: "ocp": `floor(log2(absmax)) - emax`, the specification's; "ct"
        (compressed-tensors): the same after an absmax whose mantissa is at least 1.75
        (1.9375 for "fp6_e2m3") was taken up to the next power of two.

    Raises:
      ValueError: a field has an illegal value.
    """

    element: str = "fp4"
    scale_rule: str = "ocp"

    def __post_init__(self):
        element = SHORT_ELEMENTS.get(self.element, self.element)
        if element not in ELEMENTS:
            known = (*ELEMENTS, *SHORT_ELEMENTS)
            raise ValueError(
                f"MX.element is {self.element!r}; it must be one of {known}"
            )
        if self.scale_rule not in MX_RULES:
            raise ValueError(
                f"MX.scale_rule is {self.scale_rule!r}; it must be one of {MX_RULES}"
            )
        object.__setattr__(self, "element", element)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.minifloat.bits

    @property
    def granularity(self) -> Granularity:
        """Blocks of 32 along K."""
        return group(32)

    @property
    def name(self) -> str:
        """A short name, such as `mxfp4`."""
        rule = "" if self.scale_rule == "ocp" else f" {self.scale_rule}"
        return f"mx{self.element.replace('_', ' ')}{rule}"

    @property
    def minifloat(self) -> Minifloat:
        """The float type of the elements."""
        return ELEMENTS[self.element]

    def fit(self, w: Any, search: Search = MINMAX, importance: Any = None) -> Grid:
        """e8m0 scales `[..., ceil(K/32), N]` of `w[..., K, N]`."""
        absmax = block_absmax(w, self.granularity, search)

        def grid_of(factor):
            return Grid(self._scale(absmax * factor))

        return _search(self, w, grid_of, search, importance)

    def _scale(self, absmax: Array) -> Array:
        exponent = floor_log2(absmax)
        if self.scale_rule == "ct":
            # compressed-tensors takes 6-bit elements' own mantissa, fp4's for others.
            mantissa = self.minifloat.mantissa if self.bits == 6 else 1
            raised = _mantissa_reaches(absmax, 2 - 2.0 ** (-mantissa - 1))
            exponent = exponent + raised.astype(jnp.int32)
        # The largest element stays below 2^128.
        exponent = jnp.minimum(exponent, 127) - self.minifloat.top_exponent
        exponent = jnp.maximum(exponent, _E8M0_MIN)
        stored = jnp.where(jnp.isnan(absmax), 255, exponent + 127).astype(jnp.uint8)
        return jax.lax.bitcast_convert_type(stored, jnp.float8_e8m0fnu)

    def to_codes(
        self, w: Any, grid: Grid, rounding: str = "nearest", key: Any = None
    ) -> Array:
        """Elements of `w[..., K, N]` on `grid`: bit patterns, or float8."""
        return _scaled_elements(w, e8m0_value(grid.scale), self, rounding, key)

    def from_codes(self, codes: Array, grid: Grid) -> Float32[Array, "... K N"]:
        """The weights that codes stand for, float32."""
        return _scaled_values(codes, e8m0_value(grid.scale), self)


@dataclass(frozen=True)
class NVFP4:
    """e2m1 elements in blocks of 16 along K with e4m3 scales and a float32 scale.

    `w = e2m1 * scale / global_scale` with one `global_scale = 448 * 6 / max|w|` for
    each matrix, so that the block scales fill e4m3's range whatever the magnitude of
    the weights. 4-bit codes are the elements' bit patterns.

    `qjax.quantize` and `qjax.fake_quantize` give matrices that read one activation
    (queries, keys and values; gate and up) one `global_scale`, of the largest weight of
    all of them: servers run them as one linear, which has one.
    """

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 4

    @property
    def granularity(self) -> Granularity:
        """Blocks of 16 along K."""
        return group(16)

    @property
    def name(self) -> str:
        """A short name, `nvfp4`."""
        return "nvfp4"

    @property
    def minifloat(self) -> Minifloat:
        """The float type of the elements, e2m1."""
        return minifloat.E2M1

    def fit(
        self,
        w: Any,
        search: Search = MINMAX,
        importance: Any = None,
        global_scale: Any = None,
    ) -> Grid:
        """e4m3 scales `[..., ceil(K/16), N]` and `global_scale[..., 1, 1]`.

        A `global_scale` that was calibrated takes the place of the matrix's own; larger
        blocks than it was made for saturate.
        """
        absmax = block_absmax(w, self.granularity, search)
        if global_scale is None:
            global_scale = self.global_scale(absmax.max((-2, -1), keepdims=True))

        def grid_of(factor):
            wanted = divide(absmax * factor, self.minifloat.largest) * global_scale
            scale = to_elements(wanted, minifloat.E4M3, round_nearest)
            smallest = np.asarray(2.0**-9, jnp.float8_e4m3fn)
            scale = jnp.where(scale.astype(jnp.float32) == 0, smallest, scale)
            return Grid(
                jnp.where(jnp.isnan(wanted), np.asarray(np.nan, smallest.dtype), scale),
                global_scale=global_scale,
            )

        return _search(self, w, grid_of, search, importance)

    def largest(self, w: Any, search: Search = MINMAX) -> Float32[Array, "... 1 1"]:
        """The largest magnitude of the blocks of `w[..., K, N]`, as `fit` sees them."""
        absmax = block_absmax(w, self.granularity, search)
        return absmax.max((-2, -1), keepdims=True)

    def global_scale(self, largest: Array) -> Array:
        """The second scale of matrices whose largest magnitude is `[..., 1, 1]`."""
        top = minifloat.E4M3.largest * self.minifloat.largest
        # By the reciprocal, as compressed-tensors rounds it. A matrix of zeros takes 1;
        # numbers too small for the quotient take the largest power of two that is safe.
        ratio = times_reciprocal(np.float32(top), jnp.where(largest > 0, largest, 1))
        ratio = jnp.clip(ratio, top / TOP, np.float32(2.0**126))
        ratio = jnp.where(largest > 0, ratio, 1)
        return jnp.where(jnp.isnan(largest), jnp.nan, ratio)

    def to_codes(
        self, w: Any, grid: Grid, rounding: str = "nearest", key: Any = None
    ) -> Array:
        """Bit patterns of the e2m1 elements of `w[..., K, N]` on `grid`."""
        return _scaled_elements(w, _nvfp4_scale(grid), self, rounding, key)

    def from_codes(self, codes: Array, grid: Grid) -> Float32[Array, "... K N"]:
        """The weights that codes stand for, float32."""
        return _scaled_values(codes, _nvfp4_scale(grid), self)


def e8m0_value(scale: Array) -> Float32[Array, "..."]:
    """The powers of two that e8m0 scales stand for, float32; NaN for pattern 255."""
    stored = jax.lax.bitcast_convert_type(scale, jnp.uint8)
    value = power_of_two(stored.astype(jnp.int32) - 127)
    return jnp.where(stored == 255, jnp.nan, value)


def _nvfp4_scale(grid: Grid) -> Array:
    return divide(grid.scale.astype(jnp.float32), grid.global_scale)


def _mantissa_reaches(x: Array, mantissa: float) -> Array:
    """Whether the mantissa of `x`, in [1, 2), is at least `mantissa`."""
    low = np.uint32(2**23 - 1)
    bound = np.float32(mantissa).view(np.uint32) & low
    return (jax.lax.bitcast_convert_type(x, jnp.uint32) & low) >= bound


def _element(number: Any) -> Minifloat:
    return number.element if isinstance(number, Float) else number.minifloat


def _scaled_elements(
    w: Any, scale: Array, number: Any, rounding: str, key: Any
) -> Array:
    K, N = w.shape[-2:]
    each = jnp.broadcast_to(spread(scale, number.granularity, K, N), w.shape)
    x = divide(w.astype(jnp.float32), each)
    return to_elements(x, _element(number), rounder(rounding, key))


def _scaled_values(codes: Array, scale: Array, number: Any) -> Array:
    K, N = codes.shape[-2:]
    values = from_elements(codes, _element(number))
    return values * spread(scale, number.granularity, K, N)


def _search(number: Any, w: Any, grid_of: Any, search: Search, importance: Any) -> Grid:
    return search_grid(
        w,
        number.granularity,
        grid_of,
        lambda grid: number.from_codes(number.to_codes(w, grid), grid),
        search,
        importance,
    )
