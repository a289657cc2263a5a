"""Grouped products on TPUs: Mixtral's and Qwen3's experts with 16 tokens."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from gates.int_matmul import Case as IntCase
from programs import TpuProgram, grid_steps

from qjax_kernels.int_matmul.weight import IntWeight
from qjax_kernels.ragged_matmul.pallas_tpu import choose, name_of, ragged_matmul
from qjax_kernels.ragged_matmul.specs import SPECS, TOKENS


@dataclass(frozen=True)
class Case:
    """`M` rows of `E` experts on one generation; the rest is as in `int_matmul`."""

    generation: str
    bits: int
    group: int | None = 128
    int8: bool = False
    M: int = 32
    E: int = 8
    K: int = 4096
    N: int = 14336

    @property
    def one(self) -> IntCase:
        """One expert."""
        sizes = {"M": self.M, "K": self.K, "N": self.N}
        return IntCase(self.generation, self.bits, self.group, int8=self.int8, **sizes)

    @property
    def experts(self) -> IntWeight:
        """Shapes of all experts."""
        one = self.one.weight
        codes, scale = (
            jax.ShapeDtypeStruct((self.E, *value.shape), value.dtype)
            for value in (one.codes, one.scale)
        )
        return replace(one, codes=codes, scale=scale)

    def visits(self, m: int) -> int:
        """Of blocks of `m` rows by experts, at most."""
        return ceil(self.M / m) + min(self.E, self.M) - 1

    def program(self) -> TpuProgram:
        """What is compiled; a step is one visit's share of one block of outputs."""
        blocks = choose(self.generation, self.M, self.experts, self.int8)
        run: Any = partial(
            ragged_matmul,
            generation=self.generation,
            int8_tokens=self.int8,
            blocks=blocks,
        )
        return TpuProgram(
            generation=self.generation,
            kernel=name_of(self.experts, self.int8),
            shape=f"{self.M}x{self.E}x{self.K}x{self.N}",
            function=run,
            arguments=(
                jax.ShapeDtypeStruct((self.M, self.K), jnp.bfloat16),
                self.experts,
                jax.ShapeDtypeStruct((self.E,), jnp.int32),
            ),
            step_bytes=self.one.step_bytes(blocks),
            step_products=blocks.m * blocks.k * blocks.n,
            contract="int8" if self.int8 else "bfloat16",
            config={"program": asdict(self), "blocks": asdict(blocks)},
            steps=self.visits(blocks.m) * grid_steps(blocks, 1, self.K, self.N),
        )


QWEN3 = {"M": 128, "E": 128, "K": 2048, "N": 768}
GATE = tuple(
    case.program()
    for case in (
        Case("v5e", 4),
        Case("v6e", 4, **QWEN3),
        Case("v6e", 8, None, True),
        Case("v7x", 4),
    )
)


FORMATS = (
    *((4, 128), (4, 32), (4, None), (8, None), (8, 128), (2, 64)),
    *((4, 128, True), (8, None, True)),
)
"""Bits, inputs that share a scale (None: all), int8 tokens."""


def grid(generation: str) -> list[tuple[str, Case]]:
    """Every format at every shape; a token is a row for each expert it chooses."""
    return [
        (
            spec.name,
            Case(generation, *one, *(False,) * (3 - len(one)), M * spec.chosen,
                 spec.E, spec.K, spec.N),
        )
        for M in TOKENS
        for spec in SPECS
        for one in FORMATS
        if not one[1] or spec.K % one[1] == 0
    ]  # fmt: skip
