"""Rotary positions (Su et al., 2021) and the published ways to stretch them."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.models.fields import Fields

FIRST_CONTEXT = "original_max_position_embeddings"


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
class Long:
    """LongRoPE (Ding et al., 2024): other frequencies beyond the first context.

    As in transformers, the length of the sequence at hand decides for all its tokens;
    keys in a cache keep the frequencies of the call that made them.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    context: int

    def frequencies(self, head_dim: int, length: Any) -> Any:
        """`d / 2` angles per position for a sequence of this many tokens."""
        long, short = (jnp.asarray(x, jnp.float32) for x in (self.long, self.short))
        return jnp.where(length > self.context, long, short)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotations by `position * frequency`, in the half-split layout of transformers.

    Attributes:
      frequencies: `d / 2` angles per position, in radians; fewer of them leave the last
        features of a head as they are.
      scale: multiplies cosine and sine (YaRN's temperature).
      dynamic: replaces the frequencies when the sequence is longer than the context.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    dynamic: Dynamic | Long | None = None

    def of_layer(self, layer: Any) -> "Rope":
        """The same for every layer."""
        return self

    def at(self, positions: Int[Array, "B T"]) -> Float[Array, "n"]:
        """The frequencies for a sequence of these positions."""
        if self.dynamic is None:
            return jnp.asarray(self.frequencies, jnp.float32)
        length = jnp.max(positions) + 1
        return self.dynamic.frequencies(2 * len(self.frequencies), length)

    def rotate(
        self, x: Float[Array, "B T H d"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T H d"]:
        """Rotate the pairs `(x[i], x[i + d/2])` of every head, in float32."""
        rotated = _rotated(x, positions, self.at(positions), self.scale)
        return rotated.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A rope for each kind of layer (Gemma 3).

    Attributes:
      ropes: the different ones.
      kinds: for every layer, which of them.
    """

    ropes: tuple[Rope, ...]
    kinds: tuple[int, ...]

    def of_layer(self, layer: Any) -> "Rope | Chosen":
        """The rope of a layer, whose number is traced where layers are scanned."""
        if len(self.ropes) == 1:
            return self.ropes[0]
        if isinstance(layer, int):
            return self.ropes[self.kinds[layer]]
        return Chosen(self.ropes, jnp.asarray(self.kinds, jnp.int32)[layer])


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """One of several ropes, by a traced number."""

    ropes: tuple[Rope, ...]
    kind: Any

    def rotate(
        self, x: Float[Array, "B T H d"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T H d"]:
        """As the chosen rope does."""
        frequencies = jnp.stack([rope.at(positions) for rope in self.ropes])
        scales = jnp.asarray([rope.scale for rope in self.ropes], jnp.float32)
        chosen = frequencies[self.kind], scales[self.kind]
        return _rotated(x, positions, *chosen).astype(x.dtype)


def _rotated(x: Any, positions: Any, frequencies: Any, scale: Any) -> Any:
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    wide, kept = x.astype(jnp.float32), []
    if x.shape[-1] > 2 * frequencies.size:
        wide, rest = jnp.split(wide, [2 * frequencies.size], axis=-1)
        kept = [rest]
    first, second = jnp.split(wide, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, *kept], axis=-1)


def from_fields(
    fields: Fields, head_dim: int, context: int, partial: bool = False
) -> Rope:
    """The frequencies that a configuration asks for.

    Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.
    `partial`: whether the model may rotate only the first features of a head.
    """
    table = fields.table("rope_parameters") or fields.table("rope_scaling")
    raw = {} if table is None else table.raw
    # As in transformers, these beside the table stand for those that it leaves out.
    outer = ("rope_theta", "partial_rotary_factor")
    raw = {name: fields.raw.get(name) for name in outer} | dict(raw)
    # Unlike this one, which goes before the table's own.
    first = fields.integer(FIRST_CONTEXT, None)
    raw |= {} if first is None else {FIRST_CONTEXT: first}
    return from_table(Fields(raw), head_dim, context, partial)


def from_table(
    table: Fields, head_dim: int, context: int, partial: bool = False
) -> Rope:
    """The frequencies that an entry like `rope_parameters` asks for."""
    if "rope_type" not in table.raw:
        table = Fields({**table.raw, "rope_type": table.raw.get("type")})
    if partial:
        head_dim = int(head_dim * table.number("partial_rotary_factor", 1.0))
    else:
        table.require("partial_rotary_factor", 1.0)
    if head_dim % 2:
        raise ValueError(
            f"config.json: head_dim is {head_dim}, expected an even number"
        )
    kind = table.choice("rope_type", tuple(_KINDS), "default")
    theta = float(table.number("rope_theta", 10_000.0))
    return _KINDS[kind](table, head_dim, theta, context)


def plain(head_dim: int, theta: float) -> Rope:
    """The frequencies `theta ** (-2 i / d)`."""
    return _rope(_powers(head_dim, theta))


def _powers(head_dim: int, theta: float, stretch: Any = 1.0) -> np.ndarray:
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    stretched = np.asarray(stretch, np.float32) * np.float32(theta) ** exponent
    return np.float32(1.0) / stretched


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
    turns = table.integer(FIRST_CONTEXT) * powers / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return _rope((1 - kept) * powers / table.number("factor") + kept * powers)


def _yarn(table: Fields, head_dim: int, theta: float, context: int) -> Rope:
    """YaRN (Peng et al., 2023): a ramp over dimensions, and a temperature."""
    original = table.integer(FIRST_CONTEXT, context)
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


def _longrope(table: Fields, head_dim: int, theta: float, context: int) -> Rope:
    """LongRoPE: every dimension stretched by a factor of its own, and a temperature."""
    original = table.integer(FIRST_CONTEXT, context)
    factor = float(table.number("factor", context / original))
    default = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    short, long = (
        _powers(head_dim, theta, table.numbers(f"{length}_factor", head_dim // 2))
        for length in ("short", "long")
    )
    rope = _rope(short, float(table.number("attention_factor", default)))
    long = Long(rope.frequencies, _rope(long).frequencies, original)
    return dataclasses.replace(rope, dynamic=long)


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
    "longrope": _longrope,
    "su": _longrope,  # as Phi-3 first called it
}
