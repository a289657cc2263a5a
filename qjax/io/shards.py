"""The tensors of a folder of safetensors files, mapped and read slice by slice.

The format is a JSON header in front of raw bytes, read here because the `safetensors`
package gives numpy neither bfloat16 nor float8.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What torch, keras and others write by pickling, which reading would execute.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not yet read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: Any
    offset: int

    def view(self) -> np.ndarray:
        """The tensor mapped into memory; slices of it read only their own bytes."""
        if not self.size:
            return np.zeros(self.shape, self.dtype)
        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        return data.view(self.dtype).reshape(self.shape)

    @property
    def stamp(self) -> str:
        """What tells the tensor from another without reading it."""
        file = self.path.stat()
        where = f"{self.name} {self.offset} {self.nbytes}"
        return f"{where} of {file.st_size} {file.st_mtime_ns}"

    @functools.cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * np.dtype(self.dtype).itemsize


def open_shards(folder: Path) -> dict[str, Tensor]:
    """Every tensor of `model.safetensors`, or of the shards that the index lists.

    Raises:
      FileNotFoundError: there are no weights, or a listed shard is missing.
      ValueError: a file is damaged or truncated, the index leaves the folder, or the
        weights are pickled.
    """
    if (folder / INDEX).exists():
        return _open_index(folder)
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    for path in sorted(folder.glob("*")):
        _refuse_pickle(path)
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _refuse_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which runs code when read: convert it to safetensors "
            "first"
        )


def _open_index(folder: Path) -> dict[str, Tensor]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(x, str) for x in index.values()
    ):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files")
    tensors = {}
    for file in sorted(set(index.values())):
        if Path(file).name != file or file in ("", ".."):
            raise ValueError(
                f"{folder / INDEX} lists {file!r}, a file outside its folder"
            )
        _refuse_pickle(folder / file)
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is listed in {INDEX} but missing")
        # A tensor is the one of the file that the index names, whatever others hold.
        for name, tensor in read_header(folder / file).items():
            if index.get(name, file) == file:
                tensors[name] = tensor
    missing = sorted(name for name in index if name not in tensors)
    if missing:
        raise ValueError(f"{folder / index[missing[0]]} lacks {missing[0]} of {INDEX}")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError, ValueError: it is missing, or no JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        found = json.loads(path.read_text("utf-8"))
    # No JSON, no UTF-8, a number of thousands of digits, or brackets without end.
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, checked to lie inside it.

    Raises:
      ValueError: the header is damaged or the file is truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} has a corrupted header: its length is {length}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError(f"{path} has a corrupted header: it is no JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a corrupted header: it is no JSON object")
    header.pop("__metadata__", None)
    begin = 8 + length
    return {name: _tensor(path, name, row, begin, size) for name, row in header.items()}


def _tensor(path: Path, name: str, row: Any, begin: int, size: int) -> Tensor:
    try:
        kind, shape, (start, stop) = row["dtype"], row["shape"], row["data_offsets"]
        sane = isinstance(kind, str) and all(
            isinstance(n, int) and n >= 0 for n in (*shape, start, stop)
        )
    except (KeyError, TypeError, ValueError):
        sane, kind, shape, start, stop = False, None, (), 0, 0
    if not sane:
        raise ValueError(f"{path} has a corrupted header: {name} is {row!r}")
    if kind not in DTYPES:
        raise ValueError(
            f"{path}: {name} has dtype {kind}, supported are " + ", ".join(DTYPES)
        )
    tensor = Tensor(path, name, tuple(shape), DTYPES[kind], begin + start)
    if stop - start != tensor.nbytes:
        raise ValueError(
            f"{path} has a corrupted header: {name} has {stop - start} bytes, its "
            f"shape takes {tensor.nbytes}"
        )
    if begin + stop > size:
        raise ValueError(
            f"{path} is truncated: {name} ends at byte {begin + stop} of {size}"
        )
    return tensor
