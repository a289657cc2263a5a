"""`float_matmul` on TPUs: `up` of Llama-3-8B."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gates.int_matmul import shapes
from programs import TpuProgram, grid_steps

from qjax.core.formats import MX, NVFP4, Float, channel, group, token
from qjax.core.qtensor import Activation
from qjax_kernels.float_matmul.blocks import choose
from qjax_kernels.float_matmul.pallas_tpu import (
    float_matmul,
    how_decoded,
    name_of,
    operands,
)
from qjax_kernels.float_matmul.specs import FORMATS
from qjax_kernels.float_matmul.weight import FLOAT8, FloatWeight
from qjax_kernels.scaled import Blocks

SCALES = {32: jnp.float8_e8m0fnu, 16: jnp.float8_e4m3fn}


@dataclass(frozen=True)
class Case:
    """One product on one generation; `coded`: tokens are float8 too."""

    generation: str
    element: str = "e4m3"
    group: int | None = None
    coded: bool = False
    M: int = 16
    K: int = 4096
    N: int = 14336

    @property
    def weight(self) -> FloatWeight:
        """Shapes of the coded weight."""
        shape, K, N = jax.ShapeDtypeStruct, self.K, self.N
        if self.element == "e2m1":
            codes = shape((K // 8, N), jnp.uint32)
        else:
            codes = shape((K, N), FLOAT8[self.element])
        kind = SCALES.get(self.group or K, jnp.float32)
        scale = shape((K // (self.group or K), N), kind)
        two_levels = shape((1, 1), jnp.float32) if self.group == 16 else None
        return FloatWeight(codes, scale, two_levels, self.element, self.group, K)

    @property
    def stored(self) -> tuple[Any, Any]:
        """The same in qjax: formats of the weight and of tokens."""
        tokens = Activation(Float("e4m3", token())) if self.coded else None
        if self.group == 16:
            return NVFP4(), tokens
        if self.group == 32:
            return MX("fp4" if self.element == "e2m1" else "fp8"), tokens
        shared = group(self.group) if self.group else channel()
        return Float(self.element, shared), tokens

    def step_bytes(self, blocks: Blocks) -> float:
        """Bytes of weights and scales that one grid step reads."""
        width = 0.5 if self.element == "e2m1" else 1
        scales = blocks.k / (self.group or self.K) * self.weight.scale.dtype.itemsize
        return blocks.n * (blocks.k * width + scales)

    def program(self, blocks: Blocks | None = None) -> TpuProgram:
        """What is compiled, with the table's blocks unless others are given."""
        weight = self.weight
        blocks = blocks or choose(self.generation, self.M, weight, self.coded)
        decoder = how_decoded(weight, self.generation, self.coded)
        blocks = blocks.fitted(self.M, jax.eval_shape(operands, weight), decoder)
        kind = FLOAT8[self.element] if self.coded else jnp.bfloat16
        run: Any = partial(
            float_matmul,
            generation=self.generation,
            blocks=blocks,
            dtype=jnp.bfloat16,
        )
        return TpuProgram(
            generation=self.generation,
            kernel=name_of(weight, self.coded),
            shape=f"{self.M}x{self.K}x{self.N}",
            function=run,
            arguments=(jax.ShapeDtypeStruct((self.M, self.K), kind), weight),
            step_bytes=self.step_bytes(blocks),
            step_products=blocks.m * blocks.k * blocks.n,
            contract="float8_e5m2" if self.coded else "bfloat16",
            config={"program": asdict(self), "blocks": asdict(blocks)},
            steps=grid_steps(blocks, self.M, self.K, self.N),
        )


GATE = (
    Case("v5e", "e2m1", 32).program(),
    Case("v6e", coded=True).program(),
)


def grid(generation: str) -> list[tuple[str, Case]]:
    """Every format at every shape, and the name of its shape."""
    return [
        (name, Case(generation, *one, M, K, N))
        for name, M, K, N in shapes()
        for one in FORMATS.values()
    ]
