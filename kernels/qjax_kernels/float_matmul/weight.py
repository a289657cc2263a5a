"""What the operation is given: floats of 4 or 8 bits as qjax stores them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.coded import WORD, CodedWeight

FLOAT8 = {
    "e4m3": jnp.dtype("float8_e4m3fn"),
    "e5m2": jnp.dtype("float8_e5m2"),
    "e4m3b11": jnp.dtype("float8_e4m3b11fnuz"),
}
ELEMENTS = ("e2m1", *FLOAT8)
SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn")


@dataclass(frozen=True)
class FloatWeight(CodedWeight):
    """`w[K, N] = element * scale / global_scale`. A pytree.

    FP8 has float scales; MXFP4 and MXFP8 have e8m0 ones for 32 inputs; NVFP4 has e4m3
    ones for 16 inputs and a global scale.

    Attributes:
      codes: e2m1: `uint32[ceil(K/8), N]`, bit patterns along K, least significant bit
        first; else the float8 dtype, `[K, N]`.
      scale: `[G, N]`, float, e8m0 or e4m3fn.
      global_scale: float32 `[1, 1]`, or None.
      element: "e2m1", "e4m3" (e4m3fn), "e5m2" or "e4m3b11" (e4m3b11fnuz).
      group: inputs that share a scale; None for all of them (G = 1).
      K: number of inputs.
    """

    codes: Any
    scale: Any
    global_scale: Any
    element: str
    group: int | None
    K: int

    def check(self, x: Any) -> None:
        """That shapes and dtypes agree with each other and with `x[M, K]`.

        Raises:
          ValueError: they do not; the message names the field.
        """
        if self.element not in ELEMENTS:
            raise ValueError(
                f"FloatWeight.element is {self.element!r}; it must be one of {ELEMENTS}"
            )
        packed = self.element == "e2m1"
        stored = -(-self.K * 4 // WORD) if packed else self.K
        dtype = "uint32" if packed else FLOAT8[self.element].name
        self.expect("codes", (stored, self.N), (dtype,))
        self.expect("scale", (self.groups, self.N), SCALES)
        if self.global_scale is not None:
            self.expect("global_scale", (1, 1), ("float32",))
        self.expect_tokens(x)


jax.tree_util.register_dataclass(
    FloatWeight, ["codes", "scale", "global_scale"], ["element", "group", "K"]
)
