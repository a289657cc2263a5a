"""Folders that appear under their name whole or not at all, and are checked on read."""

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A new folder to fill, which is named `path` once the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f".{path.name}."
    ) as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        yield folder
        publish(folder, path)


def publish(folder: Path, path: Path) -> None:
    """Give a complete folder its name; an old one of that name goes last."""
    for entry in [*folder.rglob("*"), folder]:
        _flush(entry)
    if not path.exists():
        folder.rename(path)
        _flush(path.parent)
        return
    # Beside the temporary folder, which is deleted whatever happens, not in it.
    aside = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
    path.rename(aside)
    try:
        folder.rename(path)
    except OSError:
        aside.rename(path)
        raise
    _flush(path.parent)
    shutil.rmtree(aside)


def _flush(path: Path) -> None:
    """Put a file or a folder's entries on the disk, so that a power cut spares them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of every file, by its name in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): _fingerprint(file) for file in files}


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def check_file(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Compare a file with the fingerprint taken when it was written.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it is truncated or changed, or the name leads out of the folder.
    """
    file = inside(folder, name)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is incomplete: {name} is missing")
    if (size := file.stat().st_size) != record["bytes"]:
        raise ValueError(
            f"{file} has {size} bytes instead of {record['bytes']}: it is truncated or "
            "was changed"
        )
    if _fingerprint(file)["sha256"] != record["sha256"]:
        raise ValueError(f"{file} was changed after saving: its sha256 differs")


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder.

    Raises:
      ValueError: the name is absolute or leads out of the folder.
    """
    parts = PurePosixPath(name)
    target = folder / parts
    outside = not target.resolve().is_relative_to(folder.resolve())
    if not name or parts.is_absolute() or ".." in parts.parts or outside:
        raise ValueError(f"{name!r} is not the name of a file inside {folder}")
    return target


def check_link(folder: Path, file: Path) -> None:
    """Refuse a link of a model's folder to a file outside of it.

    The hub's cache links to files in the same repository's `blobs`, named by hash.

    Raises:
      ValueError: the file lies elsewhere.
    """
    real, home = file.resolve(), folder.resolve()
    cached = home.parent.name == "snapshots" and real.is_relative_to(
        home.parent.parent / "blobs"
    )
    if not (real.is_relative_to(home) or cached):
        raise ValueError(f"{file} is a link to a file outside its folder")
