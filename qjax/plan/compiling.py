"""One program through the compiler: memory of each device, or that it does not fit."""

import re
from dataclasses import dataclass
from typing import Any

import jax

from qjax.plan.hlo import parse
from qjax.plan.steps import Step
from qjax.plan.traffic import Traffic, traffic

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"(\d+(?:\.\d+)?)([KMGT]?)i?B?"
REFUSED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device, in bytes.

    Attributes:
      arguments: weights, cache and tokens, as they lie in memory.
      temporaries: what lives in between.
      outputs: results that are in no argument's place.
      code: the program.
      moved: what it moves; None if it was not compiled to the end.
      needed, available: where the compiler ran out of memory, in its words.
      message: its sentence there.
    """

    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    code: int = 0
    moved: Traffic | None = None
    needed: int | None = None
    available: int | None = None
    message: str = ""

    @property
    def total(self) -> int:
        """Bytes of one device."""
        if self.needed is not None:
            return self.needed
        return self.arguments + self.temporaries + self.outputs + self.code

    def fits(self, memory: int) -> bool:
        """Whether a device with so much memory can run it."""
        return not self.message and self.total <= memory


def compile_step(step: Step, devices: int, options: dict[str, Any]) -> Compiled:
    """Compile for the devices that the shapes are placed on.

    Running out of memory is a result; every other error of the compiler is raised.
    """
    jitted = jax.jit(step.f, donate_argnums=step.donated)
    lowered = jitted.trace(*step.arguments).lower()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if REFUSED not in str(error):
            raise
        return out_of_memory(str(error))
    memory = compiled.memory_analysis()
    assert memory is not None
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        traffic(parse(compiled.as_text() or ""), devices),
    )


def out_of_memory(message: str) -> Compiled:
    """The figures in a compiler's complaint.

    >>> found = out_of_memory("RESOURCE_EXHAUSTED: temporaries (20.0G) exceeds (16M)")
    >>> found.needed, found.available
    (21474836480, 16777216)
    """
    line = next(line for line in message.splitlines() if REFUSED in line)
    text = line.partition(REFUSED)[2].lstrip(": ")
    sizes = [
        int(float(number) * UNITS[unit])
        for number, unit in re.findall(rf"\b{SIZE}\b", text)
        if unit
    ]
    needed, available = (*sizes[:2], None, None)[:2] if sizes else (None, None)
    return Compiled(needed=needed, available=available, message=text.strip())
