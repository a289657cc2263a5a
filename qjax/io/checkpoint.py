"""Saving a quantized tree in a folder, and getting back exactly what was saved.

A folder holds `qjax.json` (the tree's structure and formats, the recipe, the versions,
and a checksum of every file and of itself) beside the arrays: one safetensors file, or
an Orbax folder for sharded trees. It appears under its name only once it is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

from qjax.core.qtensor import is_quantized
from qjax.io.arrays import Spec, place, read_arrays, spec_of, write_arrays
from qjax.io.describe import describe
from qjax.io.folder import check_file, fingerprints, inside, published
from qjax.io.jsontext import parse_json
from qjax.io.manifest import check_depth, check_fields
from qjax.io.orbax import read_folder, write_folder
from qjax.io.treespec import decode, dtype_of, encode
from qjax.trace.paths import flatten_with_paths

FORMAT_VERSION = 1
MANIFEST = "qjax.json"
ARRAYS = {"safetensors": "arrays.safetensors", "orbax": "arrays"}
PACKAGES = ("qjax", "jax", "jaxlib", "numpy", "ml_dtypes", "orbax-checkpoint")
Shardings = Mapping[str, jax.sharding.Sharding | None]


def save(
    path: str | os.PathLike[str],
    qparams: Any,
    *,
    recipe: Any = None,
    metadata: Mapping[str, Any] | None = None,
    format: str = "safetensors",
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a tree of parameters, quantized or not, into a new folder.

    Args:
      path: the folder. Its parents are made.
      qparams: nested containers of arrays, QTensors and lazy leaves, which are read one
        at a time. Containers other than dict, list and tuple become dicts of paths.
      recipe: what made the tree; kept in the manifest with class names and every field.
      metadata: anything else worth keeping, as JSON values.
      format: "safetensors" (one file), or "orbax" (each device writes its shards).
      files: further files to keep in the folder, by their name there.
      overwrite: replace a folder that an earlier `save` made. The old one is removed
        after the new one is complete.

    Returns:
      The folder's path.

    Raises:
      FileExistsError: the path exists and may not be replaced.
      TypeError: a leaf or the metadata cannot be stored.
      ValueError: `format`, a name in `files` or a key of the tree is not valid.
    """
    path = Path(path).resolve()
    if format not in ARRAYS:
        raise ValueError(f"format is {format!r}; it must be one of {tuple(ARRAYS)}")
    check_target(path, overwrite)
    tree, arrays = encode(qparams)
    _check_here(arrays)
    body = {
        "format_version": FORMAT_VERSION,
        "storage": format,
        "versions": {package: version(package) for package in PACKAGES},
        "recipe": describe(recipe),
        "metadata": dict(metadata or {}),
        "arrays": {name: spec_of(array) for name, array in arrays.items()},
        "tree": tree,
    }
    _check_json(body)
    with published(path) as folder:
        _write_storage(folder / ARRAYS[format], format, arrays)
        for name, source in (files or {}).items():
            _copy(Path(source), folder, name)
        _write_manifest(folder, body)
    return path


def restore(
    path: str | os.PathLike[str], *, sharding: Any = None, like: Any = None
) -> Any:
    """Read what `save` wrote, after checking every file against its checksum.

    Args:
      path: the folder.
      sharding: where the arrays go: None (the default device), one
        `jax.sharding.Sharding` for all, or a tree of them that is a prefix of the saved
        tree (`jax.tree.map(lambda x: x.sharding, qparams)` is one). Each device reads
        only its shards.
      like: a tree with the same paths, whose containers (an Equinox module, say) are
        used instead of nested dicts.

    Returns:
      The tree, bit for bit as it was saved, as JAX arrays.

    Raises:
      FileNotFoundError: the folder, its manifest or one of its files is missing.
      ValueError: a file is truncated or changed, the format is unknown, a name leads
        out of the folder, or `sharding` or `like` do not fit the saved tree.
    """
    path = Path(path).resolve()
    body = read_manifest(path)
    _check_storage(path, body)
    for name, record in body["files"].items():
        check_file(path, name, record)
    specs = _specs(body)
    _check_width(specs)
    shardings = _shardings(body["tree"], specs, sharding)
    arrays = _read_storage(path / ARRAYS[body["storage"]], specs, shardings)
    tree = decode(body["tree"], arrays.__getitem__)
    return tree if like is None else _pour(tree, like)


def holds_quantized(path: str | os.PathLike[str]) -> bool:
    """Whether a folder that `save` wrote holds a quantized leaf; reads the manifest."""
    body = read_manifest(path)
    tree = decode(body["tree"], _structs(_specs(body)))
    return any(is_quantized(x) for x in jax.tree.leaves(tree, is_leaf=is_quantized))


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked manifest: `recipe`, `metadata`, `versions`, `files` and more.

    Raises:
      FileNotFoundError: there is no such folder, or it was not saved by qjax.
      ValueError: the manifest is damaged, or its version is unknown.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"{path} was not saved by qjax: it has no {MANIFEST}")
    file = path / MANIFEST
    body = parse_json(file.read_bytes(), f"{file} is truncated or damaged: it")
    check_depth(file, body)
    found = body.get("format_version") if isinstance(body, dict) else None
    if found != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {found}; this qjax reads {FORMAT_VERSION}"
        )
    if body.pop("checksum", None) != _digest_of(body):
        raise ValueError(f"{file} was changed: its checksum differs")
    check_fields(file, body)
    return body


def _check_here(arrays: Mapping[str, Any]) -> None:
    """Refuse arrays of which this process holds a part only."""
    for name, array in arrays.items():
        whole = not isinstance(array, jax.Array) or array.is_fully_addressable
        if not whole and not array.is_fully_replicated:
            raise ValueError(
                f"{name} is spread over several processes; save writes what one "
                "process holds: replicate it first, and save in one process alone"
            )


def check_target(path: Path, overwrite: bool, option: str = "overwrite=True") -> None:
    """Whether `save` may write a folder of that name; `option` is how to allow it.

    Raises:
      FileExistsError: the path exists and may not be replaced.
    """
    if not os.path.lexists(path):
        return
    if not (path / MANIFEST).is_file():
        raise FileExistsError(
            f"{path} exists already and was not saved by qjax, so it is never "
            "replaced: give another folder"
        )
    if not overwrite:
        raise FileExistsError(f"{path} exists already: {option} replaces it")


def _check_json(body: Mapping[str, Any]) -> None:
    try:
        json.dumps(body)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must hold JSON values only: {error}") from None


def _write_storage(target: Path, format: str, arrays: Mapping[str, Any]) -> None:
    if format == "orbax":
        write_folder(target, arrays)
        return
    with target.open("xb") as file:
        write_arrays(file, arrays)


def _copy(source: Path, folder: Path, name: str) -> None:
    target = inside(folder, name)
    if target.exists() or name == MANIFEST:
        raise ValueError(f"files names {name!r}, which is a name that save itself uses")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    body = {**body, "files": fingerprints(folder)}
    full = {**body, "checksum": _digest_of(body)}
    text = json.dumps(full, separators=(",", ":"))
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _digest_of(body: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(body)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_storage(path: Path, body: Mapping[str, Any]) -> None:
    if body["storage"] not in ARRAYS:
        raise ValueError(
            f"{path / MANIFEST} has storage {body['storage']!r}; it must be one of "
            f"{tuple(ARRAYS)}"
        )
    arrays = ARRAYS[body["storage"]]
    if not any(PurePosixPath(name).is_relative_to(arrays) for name in body["files"]):
        raise ValueError(f"{path / MANIFEST} has no checksum of {arrays}")


def _check_width(specs: Mapping[str, Spec]) -> None:
    for name, (dtype, _) in specs.items():
        if jax.dtypes.canonicalize_dtype(dtype_of(dtype)) != dtype_of(dtype):
            raise ValueError(
                f"leaf {name} is {dtype}; restoring it needs jax_enable_x64=True"
            )


def _specs(body: Mapping[str, Any]) -> dict[str, Spec]:
    return {
        name: (dtype, tuple(shape)) for name, (dtype, shape) in body["arrays"].items()
    }


def _structs(specs: Mapping[str, Spec]) -> Callable[[str], jax.ShapeDtypeStruct]:
    """The struct of an array by its name, always the same one."""
    structs = {n: jax.ShapeDtypeStruct(s, dtype_of(d)) for n, (d, s) in specs.items()}

    def struct(name: str) -> jax.ShapeDtypeStruct:
        if name not in structs:
            raise ValueError(f"the tree names an array {name!r}, which is not stored")
        return structs[name]

    return struct


def _shardings(node: Any, specs: Mapping[str, Spec], sharding: Any) -> Shardings:
    """One sharding (None: the default device) for each array's name."""
    struct = _structs(specs)
    names = {id(struct(name)): name for name in specs}
    tree = decode(node, struct)
    if sharding is None:
        return dict.fromkeys(specs)
    try:
        full = jax.tree.leaves(jax.tree.broadcast(sharding, tree))
    except ValueError:
        raise ValueError(
            "sharding must be one jax.sharding.Sharding or a prefix of the saved tree"
        ) from None
    pairs = zip(jax.tree.leaves(tree), full, strict=True)
    chosen = {names[id(leaf)]: each for leaf, each in pairs if id(leaf) in names}
    for each in chosen.values():
        if not isinstance(each, jax.sharding.Sharding):
            raise ValueError(f"sharding holds {each!r}, which is no Sharding of JAX")
    return chosen


def _read_storage(
    source: Path, specs: Mapping[str, Spec], shardings: Shardings
) -> dict[str, jax.Array]:
    if source.is_dir():
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return read_folder(source, specs, {n: shardings[n] or default for n in specs})
    views: dict[str, np.ndarray] = read_arrays(source, specs)
    return {name: place(view, shardings[name]) for name, view in views.items()}


def _pour(tree: Any, like: Any) -> Any:
    """The leaves of `tree` in the containers of `like`, matched by path."""
    saved = dict(flatten_with_paths(tree))
    wanted = flatten_with_paths(like)
    lacking = {path for path, _ in wanted} ^ set(saved)
    if lacking:
        raise ValueError(f"like and the saved tree differ in {sorted(lacking)[:3]}")
    structure = jax.tree.structure(like, is_leaf=is_quantized)
    return jax.tree.unflatten(structure, [saved[path] for path, _ in wanted])
