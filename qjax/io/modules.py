"""The linear modules of a torch checkpoint: what is written of them, and read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qjax.io.matrices import Matrix
from qjax.io.shards import Tensor

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Linear:
    """A linear module of the torch model.

    Attributes:
      name: the module's, `model.layers.0.mlp.up_proj`.
      path: the leaf's.
      scheme: what the format's configuration must say of it; None: it is in float.
    """

    name: str
    path: str
    scheme: Any


@runtime_checkable
class Writer(Protocol):
    """What a format's writer does; a module may be one."""

    def write(self, matrix: Matrix) -> tuple[dict[str, np.ndarray], Any]:
        """The tensors of a linear by their last names, and its scheme."""
        ...

    def config(self, modules: Sequence[Linear]) -> dict[str, Any]:
        """`quantization_config` of the linears, quantized or not."""
        ...


def common_scheme(
    format: str, modules: Sequence[Linear], part: Callable[[Any], Any] = lambda x: x
) -> Any:
    """What all quantized linears have in common.

    Raises:
      ValueError: two of them differ.
    """
    quantized = [m for m in modules if m.scheme is not None]
    first = quantized[0]
    for module in quantized:
        if part(module.scheme) != part(first.scheme):
            raise ValueError(
                f"{first.path} and {module.path} are stored differently, as "
                f"{part(first.scheme)} and {part(module.scheme)}; {format} holds one "
                "format for all: compressed-tensors can mix them"
            )
    return part(first.scheme)


def checked(owner: str, given: Any, known: Iterable[str]) -> None:
    """Refuse keys that are not known.

    Raises:
      ValueError: naming the first of them and the known ones.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{owner}: expected {{key: value}}, got {given!r}")
    for key in given:
        if key not in known:
            raise ValueError(
                f"{owner}: {key!r} is unknown; known are {', '.join(sorted(known))}"
            )


def group_size(owner: str, raw: Mapping[str, Any]) -> int:
    """How many inputs share a scale; -1: all.

    Raises:
      ValueError: it is neither a positive whole number nor -1.
    """
    size = raw.get("group_size", 128)
    whole = isinstance(size, int) and not isinstance(size, bool)
    if not whole or not (size > 0 or size == -1):
        raise ValueError(
            f"{owner}.group_size is {size!r}, expected a positive whole number or -1"
        )
    return size


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of every module, by the rest of their names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        # bitsandbytes keeps what belongs to a weight behind the weight's own name.
        module, dot, _ = name.partition(".weight")
        module = module if dot else name.rpartition(".")[0]
        found.setdefault(module, {})[name[len(module) + 1 :]] = tensor
    return found


@dataclass
class Take:
    """The tensors of one module of a checkpoint, read by the last parts of their names.

    `used` collects the names of those that were read.
    """

    module: str
    tensors: Mapping[str, Tensor]
    used: set[str] = field(default_factory=set)

    def __contains__(self, last: str) -> bool:
        return last in self.tensors

    def __call__(
        self, last: str, dtypes: str | tuple[str, ...], *shapes: tuple[int, ...]
    ) -> np.ndarray:
        """The tensor, brought to the first of `shapes`.

        Raises:
          ValueError: it is missing, or has another dtype or shape.
        """
        found = self.tensors.get(last)
        if found is None:
            raise ValueError(f"the checkpoint has no tensor {self.module}.{last}")
        dtypes = (dtypes,) if isinstance(dtypes, str) else dtypes
        kind = np.dtype(found.dtype).name
        if kind not in dtypes:
            raise ValueError(
                f"{found.path}: {found.name} is {kind}, expected {' or '.join(dtypes)}"
            )
        if found.shape not in shapes:
            raise ValueError(
                f"{found.path}: {found.name} has shape {list(found.shape)}, "
                f"config.json asks for {list(shapes[0])}"
            )
        self.used.add(found.name)
        return np.array(found.view()).reshape(shapes[0])

    def number(self, last: str, dtypes: str | tuple[str, ...]) -> np.ndarray:
        """One number, `[1, 1]`, stored with any number of axes."""
        return self(last, dtypes, (1, 1), (1,), ())

    def finish(self) -> None:
        """Refuse tensors that the scheme does not say how to use.

        Raises:
          ValueError: naming one.
        """
        for last, tensor in self.tensors.items():
            if last != "bias" and tensor.name not in self.used:
                raise ValueError(
                    f"{tensor.path} holds {tensor.name}, which the scheme in "
                    "config.json has no use for"
                )
