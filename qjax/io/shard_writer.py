"""Tensors in as many safetensors files as their size asks for, and an index."""

import json
from pathlib import Path
from types import TracebackType

import numpy as np

from qjax.io.arrays import write_arrays
from qjax.io.shards import INDEX, SINGLE


class ShardWriter:
    """Writes tensors into a folder; those of one file are in memory at a time.

    A context manager: the files get their names at its end, when their number is known.
    """

    def __init__(self, folder: Path, shard_bytes: int):
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1")
        self.folder, self.shard_bytes = folder, shard_bytes
        self._open: dict[str, np.ndarray] = {}
        self._files: list[list[str]] = []
        self._names: set[str] = set()
        self._bytes = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, name: str, array: np.ndarray) -> None:
        """One more tensor.

        Raises:
          ValueError: there is one of that name.
        """
        if name in self._names:
            raise ValueError(f"two leaves are called {name} in the checkpoint")
        held = sum(each.nbytes for each in self._open.values())
        if self._open and held + array.nbytes > self.shard_bytes:
            self._flush()
        self._names.add(name)
        self._open[name] = array
        self._bytes += array.nbytes

    def _flush(self) -> None:
        with self._temporary(len(self._files)).open("xb") as file:
            write_arrays(file, self._open, "pt")
        self._files.append(list(self._open))
        self._open = {}

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            return
        self._flush()
        count, weight_map = len(self._files), {}
        for i, names in enumerate(self._files):
            file = SINGLE
            if count > 1:
                file = f"model-{i + 1:05}-of-{count:05}.safetensors"
            self._temporary(i).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX).write_text(text, encoding="utf-8")
