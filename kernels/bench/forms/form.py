"""One form of an operation, compiled for one generation of TPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """One form of an operation.

    Attributes:
      label: unique; starts with the generation.
      function: of `arguments`.
      arguments: shapes.
      least: bytes that the call reads and writes at least.
      products: multiplications on the matrix unit.
      kernel: the name of its kernel; None where XLA does everything.
      steps: grid steps of the kernel, or turns of its loop, and the bytes that one
        reads from HBM; or what says so of the compiled program's text.
      firsts: how many of those steps are the first of a block of tokens.
      contract: the type that decides the limit of the matrix unit.
      compilers: packages whose versions decide.
    """

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    least: float
    products: float = 0
    kernel: str | None = None
    steps: tuple[int, float] | Callable[[str], tuple[int, float]] = (0, 0)
    firsts: int = 0
    contract: str = "bfloat16"
    compilers: tuple[str, ...] = ("libtpu",)

    @property
    def generation(self) -> str:
        """Of the TPU."""
        return self.label.split()[0]
