"""What the operation is given: indices into levels, as qjax stores them."""

from dataclasses import dataclass
from typing import Any

import jax

WORD = 32
BITS = (2, 3, 4)
FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CodebookWeight:
    """`w[K, N] = levels[code] * scale`. A pytree.

    Attributes:
      codes: `uint32[ceil(K*bits/32), N]`, indices along K, least significant bit first.
      levels: float32 `[L]`, `L <= 2^bits`.
      scale: float `[G, N]`; double-quantized scales are decoded before, being one for
        64 weights.
      bits: 2, 3 or 4.
      group: inputs that share a scale; None for all of them (G = 1).
      K: number of inputs.
    """

    codes: Any
    levels: Any
    scale: Any
    bits: int
    group: int | None
    K: int

    @property
    def N(self) -> int:
        """Number of outputs."""
        return self.codes.shape[-1]

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
            raise ValueError(
                f"CodebookWeight.bits is {self.bits}; it must be one of {BITS}"
            )
        stored = -(-self.K * self.bits // WORD)
        _expect("codes", self.codes, (stored, self.N), ("uint32",))
        _expect("scale", self.scale, (self.groups, self.N), FLOATS)
        most = 2**self.bits
        if self.levels.ndim != 1 or not 2 <= self.levels.shape[0] <= most:
            raise ValueError(
                f"CodebookWeight.levels has shape {self.levels.shape}; "
                f"it must be one axis of 2 to {most}"
            )
        if x.ndim != 2 or x.shape[1] != self.K:
            raise ValueError(f"x has shape {x.shape}; it must be (M, {self.K})")


def _expect(field: str, value: Any, shape: tuple, dtypes: tuple[str, ...]) -> None:
    if tuple(value.shape) != shape or value.dtype.name not in dtypes:
        raise ValueError(
            f"CodebookWeight.{field} is {value.dtype.name}{list(value.shape)}; "
            f"it must be {' or '.join(dtypes)}{list(shape)}"
        )


jax.tree_util.register_dataclass(
    CodebookWeight, ["codes", "levels", "scale"], ["bits", "group", "K"]
)
