"""What the operation is given: integer codes as qjax stores them, and their scales."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

WORD = 32
BITS = (2, 4, 8)


@dataclass(frozen=True)
class IntWeight:
    """`w[K, N] = (q - zero) * scale`, `q` in `[-2^(bits-1), 2^(bits-1))`. A pytree.

    Attributes:
      codes: 2 and 4 bits: `uint32[ceil(K*bits/32), N]`, unsigned codes
        `q + 2^(bits-1)` along K, least significant bit first; 8 bits: `int8[K, N]`.
      scale: float `[G, N]`.
      zero: of `q`, `[G, N]` int8 or float; None for symmetric codes.
      bits: 2, 4 or 8.
      group: inputs that share a scale; None for all of them (G = 1).
      K: number of inputs.
    """

    codes: Any
    scale: Any
    zero: Any
    bits: int
    group: int | None
    K: int

    @property
    def N(self) -> int:
        """Number of outputs."""
        return self.codes.shape[-1]

    @property
    def rows(self) -> int:
        """Codes along K, those that fill the last word included."""
        return self.codes.shape[-2] * (WORD // self.bits if self.bits < 8 else 1)

    @property
    def groups(self) -> int:
        """Number of scales along K."""
        return -(-self.K // (self.group or self.K))

    def check(self, x: Any) -> None:
        """That shapes and dtypes agree with each other and with `x[M, K]`.

        Raises:
          ValueError: they do not; the message names the field.
        """
        if self.bits not in BITS:
            raise ValueError(f"IntWeight.bits is {self.bits}; it must be one of {BITS}")
        packed = self.bits < 8
        stored = -(-self.K * self.bits // WORD) if packed else self.K
        _expect(
            "codes", self.codes, (stored, self.N), ("uint32" if packed else "int8",)
        )
        floats = ("float32", "bfloat16", "float16")
        _expect("scale", self.scale, (self.groups, self.N), floats)
        if self.zero is not None:
            _expect("zero", self.zero, (self.groups, self.N), (*floats, "int8"))
        if x.ndim != 2 or x.shape[1] != self.K:
            raise ValueError(f"x has shape {x.shape}; it must be (M, {self.K})")


def _expect(field: str, value: Any, shape: tuple, dtypes: tuple[str, ...]) -> None:
    if tuple(value.shape) != shape or value.dtype.name not in dtypes:
        raise ValueError(
            f"IntWeight.{field} is {value.dtype.name}{list(value.shape)}; "
            f"it must be {' or '.join(dtypes)}{list(shape)}"
        )


jax.tree_util.register_dataclass(
    IntWeight, ["codes", "scale", "zero"], ["bits", "group", "K"]
)


def signed_codes(weight: IntWeight) -> jax.Array:
    """The codes `q` as `int8[K, N]`, in plain JAX."""
    if weight.bits == 8:
        return weight.codes
    shifts = jnp.arange(0, WORD, weight.bits, dtype=jnp.uint32)
    mask = jnp.uint32(2**weight.bits - 1)
    codes = (weight.codes[:, None, :] >> shifts[:, None]) & mask
    codes = codes.reshape(-1, weight.N)[: weight.K].astype(jnp.int8)
    return codes - jnp.int8(2 ** (weight.bits - 1))
