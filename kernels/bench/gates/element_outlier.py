"""Outlier weights on TPUs: one in a hundred of `up` of Llama-3-8B, 16 tokens."""

from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from gates.int_matmul import shapes
from programs import TpuProgram

from qjax_kernels.element_outlier.elements import TILE, Elements
from qjax_kernels.element_outlier.pallas_tpu import DOWN, element_outlier, name_of


@dataclass(frozen=True)
class Case:
    """256 slots: the largest of 3584 tiles of 164 entries on average has some 220."""

    generation: str
    slots: int = 256
    M: int = 16
    K: int = 4096
    N: int = 14336

    @property
    def elements(self) -> Elements:
        """Shapes of the tiles."""
        tiles = (self.N // TILE, self.K // TILE, self.slots)
        words = jax.ShapeDtypeStruct(tiles, jnp.uint32)
        return Elements(words, (self.K, self.N))

    def program(self) -> TpuProgram:
        """What is compiled; a step is 8 tiles."""
        run: Any = partial(element_outlier, generation=self.generation)
        return TpuProgram(
            generation=self.generation,
            kernel=name_of(self.elements),
            shape=f"{self.M}x{self.K}x{self.N}",
            function=run,
            arguments=(
                jax.ShapeDtypeStruct((self.M, self.K), jnp.bfloat16),
                self.elements,
            ),
            step_bytes=DOWN * self.slots * 4,
            step_products=2 * DOWN * self.slots * TILE * self.M,
            contract="bfloat16",
            config={"program": asdict(self), "tiles": DOWN},
            steps=self.N // TILE * ceil(self.K / TILE / DOWN),
        )


GATE = tuple(Case(generation).program() for generation in ("v5e", "v6e"))


def grid(generation: str) -> list[tuple[str, Case]]:
    """One in a hundred weights at every shape."""
    return [(name, Case(generation, 256, M, K, N)) for name, M, K, N in shapes()]
