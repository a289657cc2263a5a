"""Decode attention on TPUs: Llama-3-8B, 16 sequences with 4096 slots each."""

from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from programs import TpuProgram

from qjax_kernels.kv_attention import Cached
from qjax_kernels.kv_attention.pallas_tpu import choose, kv_attention, name_of
from qjax_kernels.kv_attention.specs import SEQUENCES, SLOTS, SPECS


@dataclass(frozen=True)
class Case:
    """One cache on one generation; KIVI's keys have scales for runs of 32 slots."""

    generation: str
    codes: str
    kivi: bool = False
    B: int = 16
    S: int = 4096
    G: int = 8
    H: int = 32
    d: int = 128

    def cached(self, runs: bool) -> Cached:
        """Shapes of keys or values."""
        shape = jax.ShapeDtypeStruct
        tokens = 32 if runs else None
        B, S, G, d = self.B, self.S, self.G, self.d
        per_run = (B, S // 32, G, d) if runs else (B, 1, S * G)
        scale = shape(per_run, jnp.float32)
        codes = shape((B, S, G, d), jnp.dtype(self.codes))
        return Cached(codes, scale, scale if self.kivi else None, tokens)

    def program(self) -> TpuProgram:
        """What is compiled; a step is one block of slots of a sequence."""
        keys, values = self.cached(self.kivi), self.cached(False)
        slots = choose(keys)
        sequences = jax.ShapeDtypeStruct((self.B,), jnp.int32)
        q = jax.ShapeDtypeStruct((self.B, self.H, self.d), jnp.bfloat16)
        run: Any = partial(
            kv_attention,
            scale=self.d**-0.5,
            generation=self.generation,
            slots=slots,
        )
        return TpuProgram(
            generation=self.generation,
            kernel=name_of(keys, values),
            shape=f"{self.B}x{self.S}x{self.G}x{self.d}",
            function=run,
            arguments=(q, keys, values, sequences, sequences),
            step_bytes=self.bytes_per_slot * slots,
            step_products=2 * self.H * slots * self.d,
            contract="bfloat16",
            config={"program": asdict(self), "slots": slots},
            steps=self.B * ceil(self.S / slots),
        )

    @property
    def bytes_per_slot(self) -> float:
        """Codes, scales and zeros of keys and values."""
        codes = self.G * self.d * (0.5 if self.codes == "int4" else 1)
        scale = 4 * self.G * (1 + self.kivi)
        key_scale = scale * self.d / 32 if self.kivi else scale
        return 2 * codes + scale + key_scale


GATE = tuple(
    case.program()
    for case in (
        Case("v5e", "int8"),
        Case("v6e", "int8"),
        Case("v6e", "int4", kivi=True),
        Case("v7x", "float8_e4m3fn"),
    )
)


FORMATS = (("int8", False), ("int4", False), ("int4", True), ("float8_e4m3fn", False))
"""Codes, and whether keys have scales for runs of slots, as KIVI's."""


def grid(generation: str) -> list[tuple[str, Case]]:
    """Every format of a cache for every number of heads, slots and sequences."""
    heads = {(spec.H, spec.G, spec.d): spec.model for spec in reversed(SPECS)}
    return [
        (model, Case(generation, *one, B, S, G, H, d))
        for B in SEQUENCES
        for S in SLOTS
        for (H, G, d), model in heads.items()
        for one in FORMATS
    ]
