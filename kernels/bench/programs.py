"""The kernels that are compiled: which, at which shape, for which generation."""

from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from qjax.results import environment
from qjax_kernels.int_matmul.blocks import Blocks, choose
from qjax_kernels.int_matmul.pallas_tpu import int_matmul, name_of
from qjax_kernels.int_matmul.weight import WORD, IntWeight


@dataclass(frozen=True)
class Program:
    """One kernel at one shape; `up` of Llama-3-8B unless said otherwise."""

    generation: str
    bits: int
    group: int | None = 128
    zero: bool = False
    int8: bool = False
    M: int = 16
    K: int = 4096
    N: int = 14336

    @property
    def label(self) -> str:
        """`v5e w4a16_g128 16x4096x14336`."""
        name = name_of(self.weight, self.int8)
        return f"{self.generation} {name} {self.M}x{self.K}x{self.N}"

    @property
    def weight(self) -> IntWeight:
        """Shapes of the coded weight."""
        shape, K, N = jax.ShapeDtypeStruct, self.K, self.N
        per_group = (K // (self.group or K), N)
        if self.bits < 8:
            codes = shape((K * self.bits // WORD, N), jnp.uint32)
        else:
            codes = shape((K, N), jnp.int8)
        zero = shape(per_group, jnp.int8) if self.zero else None
        scale = shape(per_group, jnp.float32)
        return IntWeight(codes, scale, zero, self.bits, self.group, K)

    @property
    def blocks(self) -> Blocks:
        """The table's choice."""
        return choose(self.generation, self.M, self.weight, self.int8)

    def function(self, blocks: Blocks | None = None) -> Any:
        """The kernel as a function of `x` and the weight."""
        return partial(
            int_matmul,
            generation=self.generation,
            int8_tokens=self.int8,
            blocks=blocks,
        )

    def arguments(self) -> tuple[Any, Any]:
        """Shapes of `x` and the weight."""
        return jax.ShapeDtypeStruct((self.M, self.K), jnp.bfloat16), self.weight

    def weight_bytes(self, blocks: Blocks) -> float:
        """Bytes of weights, scales and zeros that one grid step reads."""
        groups = blocks.k / (self.group or self.K)
        per_scale = 5 if self.zero else 4
        return blocks.n * (blocks.k * self.bits / 8 + groups * per_scale)


GATE = (
    Program("v5e", 4),
    Program("v5e", 4, zero=True),
    Program("v5e", 4, int8=True),
    Program("v5e", 4, M=256),
    Program("v6e", 4),
    Program("v6e", 4, int8=True),
    Program("v6e", 4, M=256),
    Program("v7x", 4),
    Program("v7x", 4, zero=True, int8=True),
    Program("v7x", 8, group=None),
)
"""The deciding specs; compiled by `make kernels-check`."""


def context() -> dict[str, Any]:
    """Where and with what: libtpu decides the counts."""
    known = environment()
    known["versions"]["libtpu"] = version("libtpu")
    return known
