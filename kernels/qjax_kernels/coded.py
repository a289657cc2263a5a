"""What the coded weights of all products share: words, sizes, and checks."""

from typing import Any

import jax
import jax.numpy as jnp

WORD = 32


class CodedWeight:
    """Codes `[rows, N]` of `w[K, N]`, a scale for every `group` inputs (None: all)."""

    codes: Any
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

    def expect(self, field: str, shape: tuple[int, ...], dtypes: tuple[str, ...]):
        """That a field has the shape and one of the dtypes.

        Raises:
          ValueError: it does not.
        """
        value = getattr(self, field)
        if tuple(value.shape) != shape or value.dtype.name not in dtypes:
            raise ValueError(
                f"{type(self).__name__}.{field} is {value.dtype.name}"
                f"{list(value.shape)}; it must be {' or '.join(dtypes)}{list(shape)}"
            )

    def expect_tokens(self, x: Any):
        """That `x` is `[M, K]`.

        Raises:
          ValueError: it is not.
        """
        if x.ndim != 2 or x.shape[1] != self.K:
            raise ValueError(f"x has shape {x.shape}; it must be (M, {self.K})")


def unpacked(words: Any, bits: int, K: int) -> jax.Array:
    """Unsigned codes along the first axis of `words[rows, N]`, `uint32[K, N]`.

    Least significant bits first; codes may cross words.
    """
    first = jnp.arange(K) * bits
    word, shift = first // WORD, (first % WORD).astype(jnp.uint32)[:, None]
    low = words[word] >> shift
    following = words[jnp.minimum(word + 1, words.shape[0] - 1)]
    # Shifted in two steps, because a shift by a whole word is not defined.
    high = (following << (WORD - 1 - shift)) << jnp.uint32(1)
    return (low | high) & jnp.uint32(2**bits - 1)
