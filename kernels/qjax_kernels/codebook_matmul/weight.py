"""What the operation is given: indices into levels, as qjax stores them."""

from dataclasses import dataclass
from typing import Any

import jax

from qjax_kernels.coded import WORD, CodedWeight

BITS = (2, 3, 4)
FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CodebookWeight(CodedWeight):
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
        self.expect("codes", (stored, self.N), ("uint32",))
        self.expect("scale", (self.groups, self.N), FLOATS)
        most = 2**self.bits
        if self.levels.ndim != 1 or not 2 <= self.levels.shape[0] <= most:
            raise ValueError(
                f"CodebookWeight.levels has shape {self.levels.shape}; "
                f"it must be one axis of 2 to {most}"
            )
        self.expect_tokens(x)


jax.tree_util.register_dataclass(
    CodebookWeight, ["codes", "levels", "scale"], ["bits", "group", "K"]
)
