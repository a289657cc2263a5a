"""Gradients by activations on TPUs: `up` of Llama-3-8B, 1024 tokens."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gates import codebook_matmul, int_matmul
from programs import TpuProgram, grid_steps

from qjax_kernels.codebook_matmul import backward_tpu as codebook_tpu
from qjax_kernels.codebook_matmul.pallas_tpu import name_of
from qjax_kernels.int_matmul import backward_tpu as int_tpu
from qjax_kernels.scaled import Blocks
from qjax_kernels.scaled.transposed import BLOCKS, fitted

FEWEST = 256  # tokens of a training step


@dataclass(frozen=True)
class Case:
    """The transpose of a forward case."""

    of: Any

    def program(self, blocks: Blocks | None = None) -> TpuProgram:
        """What is compiled, with the kernel's blocks unless others are given."""
        case, weight = self.of, self.of.weight
        whole = isinstance(case, int_matmul.Case)
        kernel = int_tpu if whole else codebook_tpu
        run: Any = kernel.int_matmul_backward if whole else None
        run = run or codebook_tpu.codebook_matmul_backward
        name = int_tpu.name_of(weight) if whole else f"{name_of(weight)}_backward"
        given = jax.eval_shape(kernel.operands, weight)
        decoder = kernel.decoder(weight.bits)
        blocks = fitted(blocks or BLOCKS, case.M, given, decoder)
        return TpuProgram(
            generation=case.generation,
            kernel=name,
            shape=f"{case.M}x{case.N}x{case.K}",
            function=partial(run, generation=case.generation, blocks=blocks),
            arguments=(jax.ShapeDtypeStruct((case.M, case.N), jnp.bfloat16), weight),
            step_bytes=case.step_bytes(blocks),
            step_products=blocks.m * blocks.k * blocks.n,
            contract="bfloat16",
            config={"program": asdict(case), "blocks": asdict(blocks)},
            steps=grid_steps(blocks, case.M, case.K, case.N),
        )


GATE = tuple(
    Case(of).program()
    for of in (
        int_matmul.Case("v6e", 4, zero=True, M=1024),
        codebook_matmul.Case("v6e", M=1024),
    )
)


def grid(generation: str) -> list[tuple[str, Case]]:
    """The transposes that exist: of 2, 4 and 8 bits, and of levels."""
    integers = [
        (name, case)
        for name, case in int_matmul.grid(generation)
        if case.bits != 3 and not case.int8
    ]
    levels = [each for each in codebook_matmul.grid(generation) if each[1].bits != 3]
    found = integers + levels
    return [(name, Case(case)) for name, case in found if case.M >= FEWEST]
