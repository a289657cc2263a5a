"""`int_matmul` on TPUs: what decides is `up` of Llama-3-8B with 16 or 256 tokens."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from programs import TpuProgram

from qjax.core.formats import Int, channel, group, token
from qjax.core.qtensor import Activation
from qjax_kernels.coded import WORD
from qjax_kernels.int_matmul.blocks import Blocks, choose
from qjax_kernels.int_matmul.pallas_tpu import int_matmul, name_of
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
        )


GATE = tuple(
    case.program()
    for case in (
        Case("v5e", 4),
        Case("v5e", 4, int8=True),
        Case("v5e", 4, M=256),
        Case("v6e", 4),
        Case("v6e", 4, M=256),
        Case("v7x", 4),
        Case("v7x", 4, zero=True, int8=True),
        Case("v5e", 3),
    )
)


FORMATS = (
    *((4, 128), (4, 128, True), (4, 32), (4, None)),
    *((8, None), (3, 128), (2, 64)),
)


def grid(generation: str, M: int, K: int, N: int) -> list[Case]:
    """Every format at one shape, with float tokens; 4 bits with int8 ones too."""
    cases = [(*one, *(False,) * (4 - len(one))) for one in FORMATS]
    cases.append((4, 128, False, True))
    return [Case(generation, *one, M, K, N) for one in cases]
