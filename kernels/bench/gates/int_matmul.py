"""`int_matmul` on TPUs: what decides is `up` of Llama-3-8B with 16 or 256 tokens."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from programs import TpuProgram, grid_steps

from qjax.core.formats import Int, channel, group, token
from qjax.core.qtensor import Activation
from qjax_kernels.coded import WORD
from qjax_kernels.int_matmul.blocks import Blocks, choose
from qjax_kernels.int_matmul.pallas_tpu import int_matmul, name_of
from qjax_kernels.int_matmul.specs import SPECS, TOKENS
from qjax_kernels.int_matmul.weight import IntWeight


@dataclass(frozen=True)
class Case:
    """One product on one generation."""

    generation: str
    bits: int
    group: int | None = 128
    zero: bool = False
    int8: bool = False
    M: int = 16
    K: int = 4096
    N: int = 14336

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
    def stored(self) -> tuple[Any, Any]:
        """The same in qjax: formats of the weight and of tokens."""
        shared = group(self.group) if self.group else channel()
        format = Int(self.bits, shared, symmetric=not self.zero)
        return format, Activation(Int(8, token())) if self.int8 else None

    def step_bytes(self, blocks: Blocks) -> float:
        """Bytes of weights, scales and zeros that one grid step reads."""
        groups = blocks.k / (self.group or self.K)
        per_scale = 5 if self.zero else 4
        return blocks.n * (blocks.k * self.bits / 8 + groups * per_scale)

    def program(self, blocks: Blocks | None = None) -> TpuProgram:
        """What is compiled, with the table's blocks unless others are given."""
        blocks = blocks or choose(self.generation, self.M, self.weight, self.int8)
        blocks = blocks.fitted(self.M, self.weight, self.int8)
        run: Any = partial(
            int_matmul,
            generation=self.generation,
            int8_tokens=self.int8,
            blocks=blocks,
        )
        return TpuProgram(
            generation=self.generation,
            kernel=name_of(self.weight, self.int8),
            shape=f"{self.M}x{self.K}x{self.N}",
            function=run,
            arguments=(
                jax.ShapeDtypeStruct((self.M, self.K), jnp.bfloat16),
                self.weight,
            ),
            step_bytes=self.step_bytes(blocks),
            step_products=blocks.m * blocks.k * blocks.n,
            contract="int8" if self.int8 else "bfloat16",
            config={"program": asdict(self), "blocks": asdict(blocks)},
            steps=grid_steps(blocks, self.M, self.K, self.N),
        )


GATE = tuple(
    case.program()
    for case in (
        Case("v5e", 4),
        Case("v5e", 4, int8=True),
        Case("v5e", 4, M=256),
        Case("v6e", 4),
        Case("v6e", 4, M=256),
        Case("v6e", 4, 32, K=14336, N=4096),
        Case("v7x", 4),
        Case("v7x", 4, zero=True, int8=True),
        Case("v5e", 3),
    )
)


FORMATS = (
    *((4, 128), (4, 128, True), (4, 32), (4, 32, True), (4, None), (4, None, True)),
    *((8, None), (8, 128), (8, 32), (8, 128, True)),
    *((3, 128), (3, 128, True), (3, 32), (3, None)),
    *((2, 64), (2, 64, True), (2, 128), (2, 32), (2, None)),
    *((4, 128, False, True), (4, 128, True, True), (4, None, False, True)),
    *((8, None, False, True), (8, 128, False, True), (2, 64, False, True)),
)
"""Bits, inputs that share a scale (None: all), zero points, int8 tokens."""


def shapes() -> list[tuple[str, int, int, int]]:
    """Name, M, K, N of every real shape, once."""
    different = {(spec.K, spec.N): spec.name for spec in reversed(SPECS)}
    return [(name, M, K, N) for M in TOKENS for (K, N), name in different.items()]


def grid(generation: str) -> list[tuple[str, Case]]:
    """Every format at every shape, and the name of its shape."""
    return [
        (name, Case(generation, *one, *(False,) * (4 - len(one)), M, K, N))
        for name, M, K, N in shapes()
        for one in FORMATS
    ]
