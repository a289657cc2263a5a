"""Named arrays in one safetensors file, written and read one array at a time.

The `safetensors` package reads neither bfloat16 nor float8 into numpy and writes only
what is in memory as a whole, so that the format, a JSON header in front of the raw
bytes, is written out here.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from qjax.io.jsontext import parse_json
from qjax.io.treespec import dtype_of

TAGS = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
}
Spec = tuple[str, tuple[int, ...]]


def spec_of(array: Any) -> Spec:
    """Name of the dtype, and the shape."""
    return np.dtype(array.dtype).name, tuple(array.shape)


def write_arrays(
    file: BinaryIO, arrays: Mapping[str, Any], origin: str = "qjax"
) -> None:
    """Write arrays as safetensors; each comes to the host only when its turn comes.

    One-byte dtypes that safetensors has no name for are stored as `U8`. `origin` is
    the `format` in the file's metadata; transformers reads no file without "pt".

    Raises:
      TypeError: a dtype that cannot be stored.
      ValueError: a lazy leaf is not what it announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": origin}}
    for name, (start, stop) in _places(arrays).items():
        dtype, shape = spec_of(arrays[name])
        entry = {
            "dtype": _tag(name, dtype),
            "shape": shape,
            "data_offsets": [start, stop],
        }
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in _places(arrays):
        host = to_host(arrays[name])
        if spec_of(host) != spec_of(arrays[name]):
            raise ValueError(
                f"leaf {name} was read as {spec_of(host)}, not as announced"
            )
        flat = np.ascontiguousarray(host).reshape(-1)
        file.write(flat.view(np.uint8).data)


def _places(arrays: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Where arrays lie behind the header: wide dtypes first, so all are aligned."""
    places, start = {}, 0
    for name in sorted(arrays, key=lambda n: (-np.dtype(arrays[n].dtype).itemsize, n)):
        dtype, shape = spec_of(arrays[name])
        stop = start + prod(shape) * np.dtype(dtype_of(dtype)).itemsize
        places[name], start = (start, stop), stop
    return places


def _tag(name: str, dtype: str) -> str:
    if dtype not in TAGS and dtype_of(dtype).itemsize != 1:
        raise TypeError(f"leaf {name} is {dtype}, which safetensors cannot hold")
    return TAGS.get(dtype, "U8")


def to_host(array: Any) -> np.ndarray:
    """The array's values as numpy; a lazy leaf is read."""
    return np.asarray(array.read() if hasattr(array, "read") else array)


def read_arrays(path: Path, specs: Mapping[str, Spec]) -> dict[str, np.ndarray]:
    """Views of the file's arrays, mapped and not yet read.

    Raises:
      ValueError: the header is damaged, or does not hold the arrays of `specs`.
    """
    header, begin = _read_header(path)
    header.pop("__metadata__", None)
    if set(header) != set(specs):
        raise ValueError(f"{path} does not hold the arrays that its manifest lists")
    data = (
        np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    )
    return dict(_views(path, header, data[begin:], specs))


def _views(
    path: Path, header: Mapping[str, Any], data: np.ndarray, specs: Mapping[str, Spec]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, (dtype, shape) in specs.items():
        start, stop = _offsets(path, name, header[name])
        size = prod(shape) * dtype_of(dtype).itemsize
        if not 0 <= start <= stop <= len(data) or stop - start != size:
            raise ValueError(f"{path} holds {name} with a size unlike its manifest's")
        yield name, data[start:stop].view(dtype_of(dtype)).reshape(shape)


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    found = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(found, list) or [type(x) for x in found] != [int, int]:
        raise ValueError(f"the header of {path} is damaged: {name} is {entry!r}")
    return found[0], found[1]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError(f"{path} is not a safetensors file: its header is damaged")
        header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict):
        raise ValueError(f"the header of {path} is damaged: it is no JSON object")
    return header, 8 + length


def place(view: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array on the devices, each shard read from the file once."""
    # A copy, because a CPU array may share memory with what it is made of, and the
    # file must not stay mapped under an array's feet.
    if sharding is None:
        return jax.device_put(np.array(view))
    read: Callable[[Any], np.ndarray] = lambda index: np.array(view[index])
    return jax.make_array_from_callback(view.shape, sharding, read)
