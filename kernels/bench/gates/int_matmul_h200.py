"""`int_matmul` on an H200: the kernel with scales on sums and on weights."""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from programs import CudaProgram

from qjax_kernels.int_matmul.fragments import INPUTS, OUTPUTS, TiledWeight
from qjax_kernels.int_matmul.launch import choose
from qjax_kernels.int_matmul.pallas_gpu import int_matmul, name_of

shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Case:
    """One product; `up` of Llama-3-8B unless said otherwise."""

    bits: int = 4
    group: int | None = 128
    zero: str | None = None
    M: int = 16
    K: int = 4096
    N: int = 14336

    @property
    def weight(self) -> TiledWeight:
        """Shapes of the packed weight."""
        per_group = (self.K // (self.group or self.K), self.N)
        tiles = (self.N // OUTPUTS, self.K // INPUTS, 2 * self.bits, 128)
        zero = None if self.zero is None else shape(per_group, jnp.dtype(self.zero))
        codes, scale = shape(tiles, jnp.uint32), shape(per_group, jnp.bfloat16)
        return TiledWeight(codes, scale, zero, self.bits, self.group, self.K)

    def program(self) -> CudaProgram:
        """What is compiled."""
        launch = choose(self.M, self.weight)
        cut = launch.stripes(self.M, self.weight)
        sizes: dict[str, Any] = {"launch": asdict(launch), "stripes": asdict(cut)}
        return CudaProgram(
            name=f"{name_of(self.weight)} {self.M}x{self.K}x{self.N}",
            function=int_matmul,
            arguments=(shape((self.M, self.K), jnp.bfloat16), self.weight),
            config={"program": asdict(self), **sizes},
        )


GATE = tuple(
    case.program()
    for case in (
        Case(),
        Case(M=2048),
        Case(zero="int8"),
        Case(group=32, zero="float32"),
        Case(bits=3),
        Case(bits=8, group=None),
    )
)
