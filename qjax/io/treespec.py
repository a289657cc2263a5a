"""A quantized tree as JSON: its containers, its formats, the names of its arrays.

A node is a JSON scalar, or an object with one key that says what it is: `array`,
`dict`, `list`, `tuple`, `record` (one of qjax's own classes), `dtype`, `float` (one
that JSON has no number for).
"""

from collections.abc import Callable
from dataclasses import MISSING, fields
from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.core.coded import Coded
from qjax.core.double_quant import DoubleQuantized
from qjax.core.formats import (
    MX,
    NVFP4,
    Additive,
    Binary,
    Codebook,
    Float,
    Int,
    Ternary,
)
from qjax.core.granularity import Granularity
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs, Sparse, Stacked
from qjax.core.transforms import TRANSFORMS
from qjax.io.records import check_shapes, check_types
from qjax.methods.base import Solution
from qjax.solving import Solved
from qjax.trace.paths import path_of

RESERVED = "__metadata__"
RECORDS: dict[str, type] = {
    record.__name__: record
    for record in (
        *(QTensor, Stacked, Coded, SiteActs, Sparse, DoubleQuantized),
        *(Layout, Activation, Granularity),
        *(Int, Float, MX, NVFP4, Codebook, Additive, Binary, Ternary),
        *TRANSFORMS,
        *(Solution, Solved),
    )
}


def encode(tree: Any) -> tuple[Any, dict[str, Any]]:
    """The tree's JSON node, and its arrays by name.

    Containers other than dict, list and tuple (Flax states, Equinox modules) are
    written as dicts of their paths.

    Raises:
      TypeError: a leaf is neither array nor number, named by its path.
      ValueError: an array at the root is called `__metadata__`.
    """
    arrays: dict[str, Any] = {}
    return _encode(tree, "", arrays), arrays


def _encode(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    if type(value) in _RECORD_TYPES:
        names = [field.name for field in fields(value)]
        parts = {n: _encode(getattr(value, n), _join(path, n), arrays) for n in names}
        return {"record": type(value).__name__, "fields": parts}
    if isinstance(value, (Coded, Sparse)):  # a backend's form of one
        raise TypeError(
            f"leaf {path or 'at the root'} is packed for hardware; save qjax.unpack of "
            "the tree"
        )
    if _is_array(value):
        return {"array": _name(path, value, arrays)}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if value is None or isinstance(value, (bool, int, float, str)):
        infinite = isinstance(value, float) and not isfinite(value)
        return {"float": str(value)} if infinite else value
    if type(value) in (list, tuple):
        items = [_encode(v, _join(path, i), arrays) for i, v in enumerate(value)]
        return {type(value).__name__: items}
    return {
        "dict": [
            [k, _encode(v, _join(path, k), arrays)] for k, v in _items(value, path)
        ]
    }


def _items(value: Any, path: str) -> list[tuple[str | int, Any]]:
    if type(value) is dict:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(
                    f"{path or 'the tree'} has the key {key!r}; only text and whole "
                    "numbers can be saved as keys"
                )
        return list(value.items())
    flat, _ = jax.tree_util.tree_flatten_with_path(
        value, is_leaf=lambda x: x is not value
    )
    if [keys for keys, _ in flat] == [()]:
        raise TypeError(
            f"leaf {path or 'at the root'} is a {type(value).__name__}; "
            "only arrays and numbers can be saved"
        )
    return [(path_of(keys), child) for keys, child in flat]


def _is_array(value: Any) -> bool:
    # Flax variables look like arrays but are containers.
    looks = hasattr(value, "shape") and hasattr(value, "dtype")
    return looks and jax.tree_util.all_leaves([value])


def _name(path: str, value: Any, arrays: dict[str, Any]) -> str:
    if isinstance(value, jax.ShapeDtypeStruct | Tracer):
        raise TypeError(f"leaf {path} has a shape but no values; save concrete arrays")
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        raise TypeError(f"leaf {path} is a random key; save jax.random.key_data of it")
    name = path or "root"
    if name == RESERVED:
        raise ValueError(
            f"the tree's root has the key {RESERVED!r}, which safetensors keeps for "
            "itself; give the leaf another name"
        )
    while name in arrays:
        name += "'"
    arrays[name] = value
    return name


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def decode(node: Any, leaf: Callable[[str], Any]) -> Any:
    """The tree that a node stands for, with `leaf(name)` in place of each array.

    Raises:
      ValueError: the node holds something that this version cannot read, or records
        whose fields do not fit their class or each other.
    """
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    kind = next(iter(node), "") if isinstance(node, dict) else type(node).__name__
    if not isinstance(node, dict) or kind not in _DECODERS:
        raise ValueError(f"the tree holds a {kind!r}, which this version cannot read")
    stored = {"record", "fields"} if kind == "record" else {kind}
    if set(node) != stored or not isinstance(node[kind], _PAYLOADS[kind]):
        raise ValueError(f"the tree holds a {kind!r} that is {node[kind]!r}")
    return _DECODERS[kind](node, leaf)


def _decode_dict(node: Any, leaf: Callable[[str], Any]) -> Any:
    found = {}
    for pair in node["dict"]:
        whole = isinstance(pair, list) and len(pair) == 2
        if not whole or type(pair[0]) not in (str, int):
            raise ValueError(f"the tree holds a 'dict' with {pair!r}, no key and node")
        found[pair[0]] = decode(pair[1], leaf)
    return found


def _decode_record(node: Any, leaf: Callable[[str], Any]) -> Any:
    name, stored = node["record"], node["fields"]
    if name not in RECORDS:
        raise ValueError(
            f"the tree holds a record {name!r}, which this version cannot read; "
            f"it knows {', '.join(sorted(RECORDS))}"
        )
    known = [field.name for field in fields(RECORDS[name])]
    # A field with a default may be younger than the file.
    needed = {f.name for f in fields(RECORDS[name]) if f.default is MISSING}
    if not isinstance(stored, dict) or not needed <= set(stored) <= set(known):
        found = sorted(stored) if isinstance(stored, dict) else stored
        raise ValueError(f"{name} is stored with fields {found}, not {known}")
    values = {field: decode(stored[field], leaf) for field in stored}
    check_types(RECORDS[name], values)
    record = RECORDS[name](**values)
    check_shapes(record)
    return record


def _decode_dtype(node: Any, leaf: Callable[[str], Any]) -> Any:
    del leaf
    return dtype_of(node["dtype"])


def _decode_float(node: Any, leaf: Callable[[str], Any]) -> Any:
    del leaf
    if node["float"] not in ("inf", "-inf", "nan"):
        raise ValueError(f"the tree holds a 'float' that is {node['float']!r}")
    return float(node["float"])


def dtype_of(name: str) -> np.dtype:
    """A dtype by name, those of ml_dtypes included.

    Raises:
      ValueError: there is no such dtype.
    """
    try:
        return jnp.dtype(name)
    except TypeError:
        raise ValueError(f"{name!r} is not the name of a dtype") from None


_RECORD_TYPES = frozenset(RECORDS.values())
_DECODERS: dict[str, Callable[[Any, Callable[[str], Any]], Any]] = {
    "array": lambda node, leaf: leaf(node["array"]),
    "dict": _decode_dict,
    "list": lambda node, leaf: [decode(v, leaf) for v in node["list"]],
    "tuple": lambda node, leaf: tuple(decode(v, leaf) for v in node["tuple"]),
    "record": _decode_record,
    "dtype": _decode_dtype,
    "float": _decode_float,
}
_PAYLOADS: dict[str, type] = {
    **dict.fromkeys(("array", "record", "dtype", "float"), str),
    **dict.fromkeys(("dict", "list", "tuple"), list),
}
