"""Whatever a quantized folder's options and tensors say, a reader reads or refuses.

Every option is replaced by values of every kind, every tensor of a module is dropped,
cut, widened and retyped; what is refused is refused in a sentence.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.core.formats import Codebook, Int, group
from qjax.io.export import export
from qjax.io.modules import Take, by_module
from qjax.io.quantized import Reader, reader_of
from qjax.io.shards import open_shards
from qjax.io.suitable import check_config

MODULE, K, N = "model.layers.1.mlp.down_proj", 128, 64
FORMATS = {
    "compressed-tensors": Int(4, group(32), symmetric=False),
    "gptq-v2": Int(4, group(32), symmetric=False),
    "awq": Int(4, group(32), symmetric=False),
    "bitsandbytes": Codebook("nf4", group(64)),
    "bitsandbytes, doubly": Codebook("nf4", group(64), double_quant=256),
}
VALUES = (None, [], ["x"], {}, {"x": 1}, "x", "", -1, 0, 1, 3.5, 10**30, True, False)
DELETED = object()


@pytest.fixture(scope="module", params=FORMATS)
def written(request: Any, small: Any, tmp_path_factory: Any) -> Path:
    qparams = small.quantized(FORMATS[request.param])
    out = tmp_path_factory.mktemp("written") / "out"
    name = request.param.partition(",")[0]
    return export(out, qparams, model=small.folder, format=name)


def places(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value in nested dicts."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def changed(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    copy = dict(tree)
    if len(path) > 1:
        copy[path[0]] = changed(tree[path[0]], path[1:], value)
    elif value is DELETED:
        del copy[path[0]]
    else:
        copy[path[0]] = value
    return copy


def read(raw: Any, take: Take, folder: Path) -> None:
    """What `load_weights` does with one module."""
    reader = reader_of(raw)
    check_config(raw, folder, quantized=reader is not None)
    assert reader is None or isinstance(reader, Reader)
    if reader is not None and reader.takes(take):
        reader.read(take, K, N, np.float32)
        take.finish()


@dataclass
class Tally:
    """How often a reader refused, and what it did otherwise than in a sentence."""

    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    def try_(self, what: Any, *arguments: Any) -> bool:
        """Whether it was refused."""
        try:
            read(*arguments)
        except ValueError as error:
            text = str(error)
            if not text or "\n" in text:
                self.wrong.append(f"{what!r}: {text}")
            self.refused += 1
            return True
        except Exception as error:
            self.wrong.append(f"{what!r} raised {type(error).__name__}: {error}"[:300])
        return False


def module_of(folder: Path) -> Take:
    return Take(MODULE, by_module(open_shards(folder))[MODULE])


def test_options_of_every_kind(written: Path):
    raw = json.loads((written / "config.json").read_text())
    section, tally = raw["quantization_config"], Tally()
    assert not tally.try_("as it is", raw, module_of(written), written)
    for path in places(section):
        for value in (*VALUES, DELETED):
            config = changed(section, path, value)
            given = raw | {"quantization_config": config}
            tally.try_((path, value), given, module_of(written), written)
    for value in VALUES:
        given = raw | {"quantization_config": value}
        tally.try_(value, given, module_of(written), written)
    assert tally.wrong == []
    assert tally.refused > 20


DAMAGE = {
    "gone": lambda x: None,
    "shorter": lambda x: x[:-1] if x.ndim else np.zeros((0,), x.dtype),
    "empty": lambda x: np.zeros((0, *x.shape[1:]), x.dtype),
    "one more axis": lambda x: x[None],
    "flat": lambda x: x.reshape(-1, 1, 1),
    "int16": lambda x: x.astype(np.int16),
    "float64": lambda x: x.astype(np.float64),
    "bool": lambda x: x.astype(np.bool_),
}


def test_tensors_of_every_kind(written: Path, tmp_path: Path):
    raw = json.loads((written / "config.json").read_text())
    whole = load_file(written / "model.safetensors")
    mine = {name: x for name, x in whole.items() if name.startswith(MODULE)}
    tally, read = Tally(), []
    for name in mine:
        for how, damage in DAMAGE.items():
            array = damage(mine[name])
            rest = {other: x for other, x in mine.items() if other != name}
            if array is not None:
                rest[name] = np.ascontiguousarray(array)
            save_file(rest, tmp_path / "model.safetensors")
            what, take = (name, how), module_of(tmp_path)
            if not tally.try_(what, raw, take, tmp_path) and not harmless(what):
                read.append(what)
    assert (tally.wrong, read) == ([], [])


def harmless(what: tuple[str, str]) -> bool:
    """A module without codes is one in float; a few numbers need no exact axes."""
    name, how = what
    last = name.removeprefix(MODULE + ".")
    optional = ("weight_g_idx", "g_idx", "weight_shape")
    return (how == "gone" and last in ("qweight", *optional)) or "quant_state" in last


def test_a_quantization_state_of_every_kind(small: Any, tmp_path: Path):
    """bitsandbytes keeps JSON in a tensor."""
    made = export(
        tmp_path / "out",
        small.quantized(FORMATS["bitsandbytes, doubly"]),
        model=small.folder,
        format="bitsandbytes",
    )
    raw = json.loads((made / "config.json").read_text())
    whole = load_file(made / "model.safetensors")
    mine = {name: x for name, x in whole.items() if name.startswith(MODULE)}
    [name] = [name for name in mine if "quant_state" in name]
    state = json.loads(mine[name].tobytes())
    texts = [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b"9" * 10_000]
    for key in state:
        for value in (*VALUES, DELETED):
            texts.append(json.dumps(changed(state, (key,), value)).encode())
    tally = Tally()
    for text in texts:
        given = mine | {name: np.frombuffer(text, np.uint8)}
        save_file(given, tmp_path / "model.safetensors")
        tally.try_(text[:80], raw, module_of(tmp_path), tmp_path)
    assert tally.wrong == []
    assert tally.refused > 40
