"""The Hadamard transform on TPUs: inputs of Llama-3-8B, a group of 32 tokens."""

from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from programs import TpuProgram

from qjax.core.hadamard import small_factor, small_hadamard
from qjax_kernels.hadamard.pallas_tpu import GROUP, hadamard, name_of, unfit
from qjax_kernels.hadamard.specs import SPECS, TOKENS

BLOCK = 128  # features that meet a matrix on the matrix unit


@dataclass(frozen=True)
class Case:
    """`K` features on one generation, to int8 codes or to bfloat16."""

    generation: str
    K: int
    int8: bool = True
    M: int = 256

    def program(self) -> TpuProgram:
        """What is compiled; a step is a group of tokens, one turn of the loop."""
        factor = small_hadamard(small_factor(self.K))
        run: Any = partial(
            hadamard, generation=self.generation, factor=factor, int8=self.int8
        )
        x = jax.ShapeDtypeStruct((self.M, self.K), jnp.bfloat16)
        signs = jax.ShapeDtypeStruct((self.K,), jnp.float32)
        return TpuProgram(
            generation=self.generation,
            kernel=name_of(self.int8),
            shape=f"{self.M}x{self.K}",
            function=run,
            arguments=(x, signs),
            step_bytes=GROUP * self.K * self.bytes_per_value,
            step_products=GROUP * self.K * BLOCK,
            contract="bfloat16",
            config={"program": asdict(self), "group": GROUP},
            steps=ceil(self.M / GROUP),
        )

    @property
    def bytes_per_value(self) -> int:
        """Read in bfloat16, written as codes or in bfloat16."""
        return 3 if self.int8 else 4


GATE = tuple(
    case.program()
    for case in (
        Case("v5e", 4096),
        Case("v6e", 14336),
        Case("v7x", 14336, int8=False),
    )
)


def grid(generation: str) -> list[tuple[str, Case]]:
    """Every input of a layer, to int8 codes and to bfloat16."""
    return [
        (spec.name, Case(generation, spec.K, int8, M))
        for M in TOKENS
        for spec in SPECS
        for int8 in (True, False)
        if not unfit(generation, jax.ShapeDtypeStruct((M, spec.K), jnp.bfloat16),
                     small_hadamard(small_factor(spec.K)))
    ]  # fmt: skip
