"""`codebook_matmul` on TPUs: `up` of Llama-3-8B."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gates.int_matmul import shapes
from programs import TpuProgram, grid_steps

from qjax.core.formats import Codebook, channel, group
from qjax_kernels.codebook_matmul.blocks import choose
from qjax_kernels.codebook_matmul.decode import decoder
from qjax_kernels.codebook_matmul.pallas_tpu import codebook_matmul, name_of
from qjax_kernels.codebook_matmul.specs import FORMATS
from qjax_kernels.codebook_matmul.weight import CodebookWeight
from qjax_kernels.coded import WORD
from qjax_kernels.scaled import Blocks, Operands


@dataclass(frozen=True)
class Case:
    """One product on one generation."""

    generation: str
    bits: int = 4
    group: int | None = 64
    M: int = 16
    K: int = 4096
    N: int = 14336

    @property
    def weight(self) -> CodebookWeight:
        """Shapes of the coded weight."""
        shape, K, N = jax.ShapeDtypeStruct, self.K, self.N
        return CodebookWeight(
            shape((K * self.bits // WORD, N), jnp.uint32),
            shape((2**self.bits,), jnp.float32),
            shape((K // (self.group or K), N), jnp.float32),
            self.bits,
            self.group,
            K,
        )

    @property
    def stored(self) -> tuple[Any, None]:
        """The same in qjax: the format of the weight, and none of tokens."""
        shared = group(self.group) if self.group else channel()
        if self.group == 64:
            return Codebook("nf4", shared, double_quant=256), None
        return Codebook(None, shared, bits=self.bits), None

    def step_bytes(self, blocks: Blocks) -> float:
        """Bytes of weights and scales that one grid step reads."""
        scales = 4 * blocks.k / (self.group or self.K)
        return blocks.n * (blocks.k * self.bits / 8 + scales)

    def program(self, blocks: Blocks | None = None) -> TpuProgram:
        """What is compiled, with the table's blocks unless others are given."""
        weight = self.weight
        blocks = blocks or choose(self.generation, self.M, weight)
        group = None if weight.groups == 1 else weight.group
        given = Operands(weight.codes, weight.scale, group, weight.K)
        blocks = blocks.fitted(self.M, given, decoder(self.bits))
        run: Any = partial(codebook_matmul, generation=self.generation, blocks=blocks)
        x = jax.ShapeDtypeStruct((self.M, self.K), jnp.bfloat16)
        return TpuProgram(
            generation=self.generation,
            kernel=name_of(weight),
            shape=f"{self.M}x{self.K}x{self.N}",
            function=run,
            arguments=(x, weight),
            step_bytes=self.step_bytes(blocks),
            step_products=blocks.m * blocks.k * blocks.n,
            contract="bfloat16",
            config={"program": asdict(self), "blocks": asdict(blocks)},
            steps=grid_steps(blocks, self.M, self.K, self.N),
        )


GATE = (Case("v6e").program(),)


def grid(generation: str) -> list[tuple[str, Case]]:
    """Every format at every shape, and the name of its shape."""
    return [
        (name, Case(generation, *one, M, K, N))
        for name, M, K, N in shapes()
        for one in FORMATS.values()
    ]
