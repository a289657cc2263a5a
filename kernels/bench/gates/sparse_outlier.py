"""Outlier features beside int8 on TPUs: `up` of Llama-3-8B with 16 tokens."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gates.int_matmul import Case as IntCase
from gates.int_matmul import shapes
from programs import TpuProgram, grid_steps

from qjax_kernels.sparse_outlier.pallas_tpu import choose, name_of, sparse_outlier


@dataclass(frozen=True)
class Case:
    """int8 weights of whole channels, as LLM.int8() has them, unless said otherwise."""

    generation: str
    bits: int = 8
    group: int | None = None
    M: int = 16
    K: int = 4096
    N: int = 14336

    @property
    def one(self) -> IntCase:
        """The product without outliers."""
        sizes = {"M": self.M, "K": self.K, "N": self.N}
        return IntCase(self.generation, self.bits, self.group, int8=True, **sizes)

    def program(self) -> TpuProgram:
        """What is compiled; a step counts as if every chunk held an outlier."""
        one, shape = self.one, jax.ShapeDtypeStruct
        M, K, N = one.M, one.K, one.N
        blocks = choose(self.generation, M, one.weight)
        run: Any = partial(sparse_outlier, generation=self.generation, blocks=blocks)
        return TpuProgram(
            generation=self.generation,
            kernel=name_of(one.weight),
            shape=f"{M}x{K}x{N}",
            function=run,
            arguments=(
                shape((M, K), jnp.int8),
                shape((M, 1), jnp.float32),
                shape((M, K), jnp.bfloat16),
                one.weight,
            ),
            step_bytes=one.step_bytes(blocks),
            step_products=blocks.m * blocks.k * blocks.n,
            contract="int8",
            config={"program": asdict(self), "blocks": asdict(blocks)},
            steps=grid_steps(blocks, M, K, N),
        )


GATE = tuple(case.program() for case in (Case("v5e"), Case("v6e"), Case("v6e", 4, 128)))


def grid(generation: str) -> list[tuple[str, Case]]:
    """Weights of whole channels and of groups at every shape."""
    return [
        (name, Case(generation, *one, M, K, N))
        for name, M, K, N in shapes()
        for one in ((8, None), (4, 128))
    ]
