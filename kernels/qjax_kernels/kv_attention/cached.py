"""What the operation is given: codes of keys or values, and their scales."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

CODES = ("int8", "int4", "float8_e4m3fn")


@dataclass(frozen=True)
class Cached:
    """Keys or values, `(codes - zero) * scale`. A pytree.

    Attributes:
      codes: `[B, S, G, d]`: sequences, slots, heads, features; int8, int4 or
        float8_e4m3fn.
      scale: float32; one for each slot and head, `[B, 1, S * G]` (the heads of a
        slot side by side), or, with `tokens`, for each feature of a run of slots,
        `[B, S / tokens, G, d]` (KIVI's keys).
      zero: of the codes, float32, shaped as `scale`; None for none.
      tokens: slots of a run that share the scale of a feature; None: scales for each
        slot and head.
    """

    codes: Any
    scale: Any
    zero: Any = None
    tokens: int | None = None

    def check(self, field: str) -> None:
        """That shapes and dtypes agree.

        Raises:
          ValueError: they do not; the message names the field.
        """
        if self.codes.ndim != 4 or self.codes.dtype.name not in CODES:
            raise ValueError(
                f"{field}.codes is {self.codes.dtype.name}{list(self.codes.shape)}; "
                f"it must be one of {', '.join(CODES)} with four axes"
            )
        B, S, G, d = self.codes.shape
        if self.tokens is None:
            shape = (B, 1, S * G)
        else:
            if self.tokens < 1 or S % self.tokens:
                raise ValueError(
                    f"{field}.tokens is {self.tokens}; it must divide the {S} slots"
                )
            shape = (B, S // self.tokens, G, d)
        given = {"scale": self.scale}
        if self.zero is not None:
            given["zero"] = self.zero
        for name, value in given.items():
            if tuple(value.shape) != shape or value.dtype != jnp.float32:
                raise ValueError(
                    f"{field}.{name} is {value.dtype.name}{list(value.shape)}; "
                    f"it must be float32{list(shape)}"
                )


jax.tree_util.register_dataclass(Cached, ["codes", "scale", "zero"], ["tokens"])


def check(q: Any, keys: Cached, values: Cached, start: Any, stop: Any) -> None:
    """That everything agrees with `q[B, H, d]`.

    Raises:
      ValueError: something does not; the message names it.
    """
    keys.check("keys")
    values.check("values")
    if values.tokens is not None:
        raise ValueError(
            f"values.tokens is {values.tokens}; values have scales for slots and heads"
        )
    B, S, G, d = keys.codes.shape
    if values.codes.shape != (B, S, G, d):
        raise ValueError(
            f"values.codes has shape {values.codes.shape}; keys have {(B, S, G, d)}"
        )
    if q.ndim != 3 or q.shape[0] != B or q.shape[2] != d or q.shape[1] % G:
        raise ValueError(
            f"q has shape {q.shape}; it must be ({B}, a multiple of {G}, {d})"
        )
    for name, value in (("start", start), ("stop", stop)):
        if tuple(value.shape) != (B,) or value.dtype != jnp.int32:
            raise ValueError(
                f"{name} is {value.dtype.name}{list(value.shape)}; it must be "
                f"int32[{B}]"
            )
