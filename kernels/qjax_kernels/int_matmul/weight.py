"""What the operation is given: integer codes as qjax stores them, and their scales."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.coded import WORD, CodedWeight, unpacked

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class IntWeight(CodedWeight):
    """`w[K, N] = (q - zero) * scale`, `q` in `[-2^(bits-1), 2^(bits-1))`. A pytree.

    Attributes:
      codes: 2 to 4 bits: `uint32[ceil(K*bits/32), N]`, unsigned codes
        `q + 2^(bits-1)` along K, least significant bit first; 8 bits: `int8[K, N]`.
      scale: float `[G, N]`.
      zero: of `q`, `[G, N]` int8 or float; None for symmetric codes.
      bits: 2, 3, 4 or 8.
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
    def rows(self) -> int:
        """Codes along K, those that fill the last word included."""
        per_row = 1 if self.bits == 8 else Fraction(WORD, self.bits)
        return int(self.codes.shape[-2] * per_row)

    def check(self, x: Any) -> None:
        """That shapes and dtypes agree with each other and with `x[M, K]`.

        Raises:
          ValueError: they do not; the message names the field.
        """
        if self.bits not in BITS:
            raise ValueError(f"IntWeight.bits is {self.bits}; it must be one of {BITS}")
        packed = self.bits < 8
        stored = -(-self.K * self.bits // WORD) if packed else self.K
        self.expect("codes", (stored, self.N), ("uint32" if packed else "int8",))
        floats = ("float32", "bfloat16", "float16")
        self.expect("scale", (self.groups, self.N), floats)
        if self.zero is not None:
            self.expect("zero", (self.groups, self.N), (*floats, "int8"))
        self.expect_tokens(x)


jax.tree_util.register_dataclass(
    IntWeight, ["codes", "scale", "zero"], ["bits", "group", "K"]
)


def signed_codes(weight: IntWeight) -> jax.Array:
    """The codes `q` as `int8[K, N]`, in plain JAX."""
    if weight.bits == 8:
        return weight.codes
    codes = unpacked(weight.codes, weight.bits, weight.K).astype(jnp.int8)
    return codes - jnp.int8(2 ** (weight.bits - 1))
