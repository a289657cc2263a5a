"""A calibration run on disk, so that a killed one continues where it was.

The folder holds `run.json`, which says what is being run, and behind every finished
block one folder with what was solved in it. The live activations are kept beside the
last block if they are smaller than `keep_bytes`; else they are made again by running
the finished blocks forward, which gives the same bits. Every folder appears under its
name only when it is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.lazy import LazyLeaf
from qjax.io.checkpoint import read_manifest, restore, save
from qjax.io.describe import describe
from qjax.trace.free import is_key
from qjax.trace.program import Program
from qjax.trace.segments import text_of

KEEP_BYTES = 2**31
RUN = "run.json"


@dataclass(frozen=True)
class Journal:
    """The folder of one run.

    Attributes:
      path: the folder; made by `open_journal`.
      keep_bytes: the largest live activations that are kept, both streams together.
    """

    path: Path
    keep_bytes: int = KEEP_BYTES

    def write(self, kind: str, number: int, tree: Any, rows: Sequence[Any]) -> None:
        """Keep what was found up to a point: arrays, and rows of the report."""
        metadata = {"rows": [asdict(row) for row in rows]}
        save(self._folder(kind, number), tree, metadata=metadata, overwrite=True)

    def numbers(self, kind: str) -> list[int]:
        """The points behind which something is kept, in order."""
        found = self.path.glob(f"{kind}-*")
        return sorted(int(folder.name.rsplit("-", 1)[1]) for folder in found)

    def read(self, kind: str, number: int) -> tuple[Any, list[dict[str, Any]]]:
        """What `write` kept."""
        folder = self._folder(kind, number)
        return restore(folder), read_manifest(folder)["metadata"].get("rows", [])

    def keep_live(self, number: int, live: Any) -> bool:
        """Keep the live activations, in place of older ones, if they are small."""
        leaves = [x for x in jax.tree.leaves(live) if hasattr(x, "dtype")]
        plain = all(not jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in leaves)
        if not plain or sum(x.nbytes for x in leaves) > self.keep_bytes:
            return False
        save(self._folder("live", number), live, overwrite=True)
        for old in self.numbers("live"):
            if old != number:
                shutil.rmtree(self._folder("live", old))
        return True

    def _folder(self, kind: str, number: int) -> Path:
        return self.path / f"{kind}-{number:06d}"


def open_journal(
    path: str | os.PathLike[str], run: Mapping[str, Any], keep_bytes: int = KEEP_BYTES
) -> Journal:
    """The journal of a run, new or to be continued.

    Args:
      path: its folder.
      run: what is being run, as `fingerprint` gives it.
      keep_bytes: as in `Journal`.

    Raises:
      ValueError: the folder holds the journal of another run; the difference is named.
      FileExistsError: the folder holds something else.
    """
    path = Path(path).resolve()
    file = path / RUN
    if file.is_file():
        known = json.loads(file.read_text())
        other = [name for name in run if known.get(name) != run[name]]
        if other:
            raise ValueError(
                f"{path} is the journal of another run: {', '.join(other)} differ; "
                "give another folder, or delete this one to start again"
            )
        return Journal(path, keep_bytes)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} exists and holds no journal of a run")
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f".{RUN}.part"
    partial.write_text(json.dumps(dict(run)))
    partial.replace(file)
    return Journal(path, keep_bytes)


def fingerprint(
    recipe: Any,
    program: Program,
    batches: Sequence[Any],
    masks: Sequence[Any],
    key: Any = None,
    mesh: Any = None,
) -> dict[str, Any]:
    """What makes two runs the same, each thing under the name that an error gives it.

    Parameters count by path, shape, dtype and content. Those in memory are hashed
    whole, about a second for a gigabyte. Those on disk are not read again: they count
    by their place in their files, and the files by size and time of change
    (`LazyLeaf.stamp`), so that a copy with another time is another run; only a lazy
    leaf without a stamp is read. The function counts by its jaxpr with every array that
    it captured, on the first batch.

    Args:
      recipe: the steps.
      program: the function, traced on the first batch with its parameters.
      batches: the calibration data.
      masks: the token weights of every batch, or None.
      key: for methods that draw random numbers.
      mesh: the devices; the order of sums depends on their number.
    """
    leaves = zip(program.paths, program.leaves)
    axes = None if mesh is None else {str(a): n for a, n in mesh.shape.items()}
    return {
        "recipe": json.dumps(describe(recipe)),
        "parameters": _hashed(part for path, x in leaves for part in _leaf(path, x)),
        "f": hashlib.sha256(
            text_of(program.jaxpr, program.consts).encode()
        ).hexdigest(),
        "calibration": _hashed(jax.tree.leaves(batches)),
        "mask_fn": _hashed(masks),
        "mesh": axes,
        "key": None if key is None else np.asarray(jax.random.key_data(key)).tolist(),
        "jax": jax.__version__,
    }


def _leaf(path: str, leaf: Any) -> Iterator[Any]:
    yield path
    if isinstance(leaf, LazyLeaf):
        yield f"{leaf.shape} {leaf.dtype} {leaf.stamp}"
        yield from () if leaf.stamp else (leaf.read(),)
    else:
        yield from jax.tree.leaves(leaf)


def _hashed(parts: Iterable[Any]) -> str:
    """One hash of arrays and of text, in order."""
    found = hashlib.blake2b(digest_size=32)
    for part in parts:
        for x in _pieces(part):
            found.update(f"{x.shape} {x.dtype} ".encode())
            found.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _pieces(value: Any) -> list[np.ndarray]:
    """An array as this process holds it."""
    if isinstance(value, str) or value is None:
        return [np.frombuffer(str(value).encode(), np.uint8)]
    if not isinstance(value, jax.Array):
        return [np.asarray(value)]
    value = jax.random.key_data(value) if is_key(value) else value
    if value.is_fully_addressable:
        return [np.asarray(value)]
    return [np.asarray(shard.data) for shard in value.addressable_shards]
