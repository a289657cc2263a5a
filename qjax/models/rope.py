"""Rotary positions (Su et al., 2021) and the published ways to stretch them."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.models.fields import Fields


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """NTK-aware stretching by the length of the sequence at hand (emozilla, 2023)."""

    theta: float
    factor: float
    context: int

    def frequencies(self, head_dim: int, length: Any) -> Any:
        """`d / 2` angles per position for a sequence of this many tokens."""
        length = jnp.maximum(length, self.context).astype(jnp.float32)
        stretch = self.factor * length / self.context - (self.factor - 1.0)
        theta = self.theta * stretch ** (head_dim / (head_dim - 2))
        return theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotations by `position * frequency`, in the half-split layout of transformers.

    Attributes:
      frequencies: `d / 2` angles per position, in radians.
      scale: multiplies cosine and sine (YaRN's temperature).
      dynamic: replaces the frequencies when the sequence is longer than the context.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    dynamic: Dynamic | None = None

    def rotate(
        self, x: Float[Array, "B T H d"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T H d"]:
        """Rotate the pairs `(x[i], x[i + d/2])` of every head, in float32."""
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        if self.dynamic is not None:
            length = jnp.max(positions) + 1
            frequencies = self.dynamic.frequencies(x.shape[-1], length)
        angle = positions[:, :, None, None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angle) * self.scale, jnp.sin(angle) * self.scale
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def from_fields(fields: Fields, head_dim: int, context: int) -> Rope:
    """The frequencies that a configuration asks for.

    Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.
    """
    if head_dim % 2:
        raise ValueError(
            f"config.json: head_dim is {head_dim}, expected an even number"
        )
    table = fields.table("rope_parameters")
    if table is None:
        table = fields.table("rope_scaling") or Fields({})
        table = Fields({"rope_theta": fields.raw.get("rope_theta"), **table.raw})
    if "rope_type" not in table.raw:
        table = Fields({**table.raw, "rope_type": table.raw.get("type")})
    table.require("partial_rotary_factor", 1.0)
    kind = table.choice("rope_type", tuple(_KINDS), "default")
    theta = float(table.number("rope_theta", 10_000.0))
    return _KINDS[kind](table, head_dim, theta, context)


def plain(head_dim: int, theta: float) -> Rope:
    """The frequencies `theta ** (-2 i / d)`."""
    return _rope(_powers(head_dim, theta))


def _powers(head_dim: int, theta: float) -> np.ndarray:
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / np.float32(theta) ** exponent


def _rope(frequencies: np.ndarray, scale: float = 1.0) -> Rope:
    return Rope(tuple(float(x) for x in frequencies.astype(np.float32)), scale)


def _default(table: Fields, head_dim: int, theta: float, context: int) -> Rope:
    return plain(head_dim, theta)


def _linear(table: Fields, head_dim: int, theta: float, context: int) -> Rope:
    factor = np.float32(table.number("factor"))
    return _rope(_powers(head_dim, theta) / factor)


def _dynamic(table: Fields, head_dim: int, theta: float, context: int) -> Rope:
    factor = float(table.number("factor"))
    base = plain(head_dim, theta)
    return dataclasses.replace(base, dynamic=Dynamic(theta, factor, context))


def _llama3(table: Fields, head_dim: int, theta: float, context: int) -> Rope:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between."""
    powers = _powers(head_dim, theta)
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    turns = table.integer("original_max_position_embeddings") * powers / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return _rope((1 - kept) * powers / table.number("factor") + kept * powers)


def _yarn(table: Fields, head_dim: int, theta: float, context: int) -> Rope:
    """YaRN (Peng et al., 2023): a ramp over dimensions, and a temperature."""
    original = table.integer("original_max_position_embeddings", context)
    factor = table.number("factor", context / original)
    last = head_dim - 1

    def dimension(turns: float) -> float:
        wavelength = original / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low = dimension(float(table.number("beta_fast", 32)))
    high = dimension(float(table.number("beta_slow", 1)))
    if table.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, last)
    span = max(high - low, 0.001)
    stretched = np.clip((np.arange(head_dim // 2) - low) / span, 0.0, 1.0)
    powers = _powers(head_dim, theta)
    frequencies = powers * (1 - stretched) + powers / factor * stretched
    return _rope(frequencies, _yarn_scale(table, factor))


def _yarn_scale(table: Fields, factor: float) -> float:
    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    part, whole = table.number("mscale", None), table.number("mscale_all_dim", None)
    default = (
        temperature(part) / temperature(whole) if part and whole else temperature(1.0)
    )
    return float(table.number("attention_factor", default))


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
