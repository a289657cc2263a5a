"""Leaves of quantized checkpoints, without a pass through float."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor
from qjax.core.sharding import shard
from qjax.io import (
    autoround,
    awq,
    bitsandbytes,
    compressed_tensors_reader,
    gptq,
    hqq,
)
from qjax.io.modules import FLOATS, Take, by_module
from qjax.io.shards import Tensor


@runtime_checkable
class Reader(Protocol):
    """What a format's reader does."""

    def takes(self, take: Take) -> bool:
        """Whether a module is quantized."""
        ...

    def read(self, take: Take, K: int, N: int, dtype: Any) -> QTensor:
        """The weight of a module that is `[N, K]` in torch."""
        ...


def _auto_round(raw: Mapping[str, Any]) -> Reader:
    """auto-round's own format, which is GPTQ's or AWQ's under another name."""
    found = autoround.as_its_packing(raw)
    return READERS[found["quant_method"]](found)


READERS: dict[str, Callable[[Mapping[str, Any]], Reader]] = {
    "compressed-tensors": compressed_tensors_reader.Reader.of,
    "gptq": gptq.Reader.of,
    "awq": awq.Reader.of,
    "bitsandbytes": bitsandbytes.Reader.of,
    "hqq": hqq.Reader.of,
    "auto-round": _auto_round,
}


def reader_of(raw: Mapping[str, Any]) -> Reader | None:
    """The reader of a configuration, None where it names no format that is read.

    Raises:
      ValueError: an option of its quantization is not known.
    """
    found = raw.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    method = found.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        return None
    return READERS[method](found)


def reader_of_names(names: Iterable[str]) -> Reader | None:
    """The reader of a format that is known by its tensors, whatever config.json says.

    `hqq` alone writes no `quantization_config`.
    """
    return hqq.Reader() if any(name.endswith(".W_q") for name in names) else None


@dataclass(frozen=True)
class QuantizedModules:
    """The modules of a quantized checkpoint and their reader."""

    reader: Reader
    modules: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def of(
        cls, reader: Reader | None, tensors: Mapping[str, Tensor]
    ) -> "QuantizedModules | None":
        """None where nothing is quantized."""
        return None if reader is None else cls(reader, by_module(tensors))

    def takes(self, path: str, candidates: Iterable[Iterable[str]]) -> tuple[Take, ...]:
        """The modules of a leaf that is quantized, none of one that is in float.

        Args:
          path: the leaf's.
          candidates: for each module, the names under which it may be stored.

        Raises:
          ValueError: some of the modules are quantized and some are not.
        """
        found, left = [], []
        for names in map(list, candidates):
            name = next((n for n in names if n in self.modules), names[0])
            take = Take(name, self.modules.get(name, {}))
            (found if self.reader.takes(take) else left).append(take)
        if found and left:
            raise ValueError(
                f"{found[0].module} is quantized and {left[0].module} is not, so that "
                f"{path} cannot be one stacked leaf; load with scan_layers=False"
            )
        return tuple(found)


@dataclass(frozen=True)
class QuantizedSource:
    """A quantized leaf in the checkpoint: modules of one scheme, in order.

    Attributes:
      path: the leaf's.
      takes: the modules' tensors, one or `prod(lead)` of them.
      lead: the stacked axes, layers before experts.
      batched: how many of them are experts'.
      shape: of the leaf.
    """

    path: str
    takes: tuple[Take, ...]
    lead: tuple[int, ...]
    batched: int
    shape: tuple[int, ...]
    reader: Reader

    def read(self, dtype: Any) -> QTensor:
        """The leaf on the host.

        Raises:
          ValueError: its modules differ in format, or one of them cannot be read.
        """
        K, N = self.shape[-2:]
        read = []
        for take in self.takes:
            read.append(self.reader.read(take, K, N, dtype))
            take.finish()
        return self._stack(read)

    def _stack(self, read: list[QTensor]) -> QTensor:
        if not self.lead:
            return read[0]
        trees = [jax.tree.structure(q) for q in read]
        for take, tree in zip(self.takes, trees):
            if tree != trees[0]:
                raise ValueError(
                    f"{self.takes[0].module} and {take.module} are quantized "
                    f"differently, so that {self.path} cannot be one stacked leaf; "
                    "load with scan_layers=False"
                )
        stacked = jax.tree.map(lambda *x: np.stack(x), *read)
        whole = jax.tree.map(lambda x: x.reshape(*self.lead, *x.shape[1:]), stacked)
        layout = whole.layout
        roles, sizes = "b" * self.batched + layout.roles, (0,) * self.batched
        return replace(whole, layout=Layout(roles, sizes + layout.sizes))

    def place(self, dtype: Any, sharding: Any) -> QTensor:
        """The leaf on the devices."""
        host = self.read(dtype)
        if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
            sharding = sharding(self.path, self.shape)
        if sharding is None:
            return jax.tree.map(jnp.asarray, host)
        if isinstance(sharding, jax.sharding.NamedSharding):
            return shard(host, sharding.spec, sharding.mesh)
        return jax.device_put(host, sharding)


def float_dtype(raw: Mapping[str, Any], tensors: Iterable[Tensor]) -> np.dtype:
    """The dtype of the float model: as stated, else that of a float tensor."""
    said = raw.get("dtype", raw.get("torch_dtype"))
    if said in FLOATS:
        return jnp.dtype(said)
    kinds = (np.dtype(tensor.dtype) for tensor in tensors)
    return next((kind for kind in kinds if kind.name in FLOATS), jnp.dtype("float32"))
