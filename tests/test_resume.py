"""A run that is killed (SIGKILL) goes on after the last finished block, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import qjax
from qjax.core.lazy import LazyLeaf
from qjax.io.journal import Journal, fingerprint, open_journal
from qjax.io.shards import read_header
from qjax.trace.program import trace

WORKER = """
import os, signal, sys
import qjax
from qjax.io import journal
from tests_resume_model import f, params, batches, recipe

where, nth = sys.argv[2], int(sys.argv[3])
seen = {"count": 0}

def dying(wrapped, when):
    def call(*args, **named):
        if when == "before":
            count()
        out = wrapped(*args, **named)
        if when == "after":
            count()
        return out
    return call

def count():
    seen["count"] += 1
    if seen["count"] == nth:
        os.kill(os.getpid(), signal.SIGKILL)

if where == "inside":
    import qjax.io.folder as folder
    folder.publish = dying(folder.publish, "before")
elif where == "between":
    journal.Journal.write = dying(journal.Journal.write, "before")
elif where == "after":
    journal.Journal.write = dying(journal.Journal.write, "after")

quantized = qjax.quantize(
    f, params(), recipe, batches(), progress=False, resume=sys.argv[1] + "/journal"
)
qjax.save(sys.argv[1] + "/out", quantized)
"""

MODEL = """
import jax, jax.numpy as jnp, numpy as np
import qjax

recipe = (
    qjax.SmoothQuant(),
    qjax.GPTQ(weights=qjax.Int(4, qjax.group(16))),
)

def params():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32)
    return {"layers": [
        {"norm": 1 + 0.1 * draw(32), "up": draw(32, 64), "down": draw(64, 32)}
        for _ in range(4)
    ]}

def f(p, x):
    for layer in p["layers"]:
        x = x + jnp.tanh((x * layer["norm"]) @ layer["up"]) @ layer["down"]
    return x

def batches():
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(40, 32)).astype(np.float32),) for _ in range(3)]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tests_resume_model.py").write_text(MODEL)
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def run(folder: Path, where: str, nth: int) -> int:
    command = [sys.executable, "worker.py", str(folder), where, str(nth)]
    known = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=folder, env=known, check=False).returncode


def model(folder: Path) -> dict:
    names: dict = {}
    exec((folder / "tests_resume_model.py").read_text(), names)
    return names


def equal(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_killed_again_and_again(folder):
    """Inside a write, before one, behind one: each time another process goes on."""
    known = model(folder)
    whole = qjax.quantize(
        known["f"], known["params"](), known["recipe"], known["batches"](),
        progress=False,
    )  # fmt: skip
    for where, nth in (("inside", 3), ("between", 9), ("after", 1), ("inside", 2)):
        assert run(folder, where, nth) == -signal.SIGKILL
        assert not (folder / "out").exists()
    assert run(folder, "never", 0) == 0
    assert equal(qjax.restore(folder / "out"), whole)


def quantized(known, path):
    return qjax.quantize(
        known["f"], known["params"](), known["recipe"], known["batches"](),
        progress=False, resume=path,
    )  # fmt: skip


def test_replay_gives_the_same_bits_as_kept_activations(folder, monkeypatch):
    known, path = model(folder), folder / "journal"
    monkeypatch.setattr(Journal, "keep_live", lambda *_: False)
    first = quantized(known, path)
    blocks = sorted(path.glob("block-*"))
    assert len(blocks) == 4 and not list(path.glob("live-*"))
    for block in blocks[2:]:
        block.rename(folder / block.name)
    assert equal(quantized(known, path), first)


def test_large_activations_are_not_kept(tmp_path):
    journal = Journal(tmp_path, keep_bytes=100)
    assert not journal.keep_live(0, {"at": 1, "x": jnp.zeros(26)})
    assert journal.keep_live(1, {"at": 1, "x": jnp.zeros(25)})
    assert journal.keep_live(2, {"at": 1, "x": jnp.ones(25)})
    assert journal.numbers("live") == [2]


def small(p, x):
    return jnp.tanh((x * p["norm"]) @ p["up"]) @ p["down"]


def draw(seed):
    rng = np.random.default_rng(seed)
    up, down = (rng.normal(size=s).astype(np.float32) for s in ((16, 32), (32, 16)))
    return {"norm": np.ones(16, np.float32), "up": up, "down": down}


def first_tokens(x):
    return (jnp.arange(x.shape[0]) < 10).astype(jnp.float32)


X = np.random.default_rng(2).normal(size=(24, 16)).astype(np.float32)


OTHERS = {
    "parameters": {"params": draw(1)},
    "f": {"f": lambda p, x: small(p, jnp.sin(x))},
    "mask_fn": {"mask_fn": first_tokens},
    "calibration": {"calibration": [(X[::-1],)]},
}


def test_a_run_with_another_argument_is_refused(tmp_path):
    """Two models that share their gains, another function, another mask."""
    recipe = qjax.GPTQ(weights=qjax.Int(4, qjax.channel()))
    known = {"f": small, "params": draw(0), "recipe": recipe, "calibration": [(X,)]}

    def start(**other):
        given = {**known, **other}
        quantize = qjax.quantize
        return quantize(**given, progress=False, resume=tmp_path / "journal")

    first = start()
    assert equal(start(), first)
    for name, other in OTHERS.items():
        refused = f"is the journal of another run: {name} differ"
        with pytest.raises(ValueError, match=refused):
            start(**other)


def printed(program):
    return fingerprint((), program, [(X,)], [None])


def test_captured_arrays_and_lazy_leaves_count(tmp_path):
    params, other = draw(0), draw(1)
    one = printed(trace(lambda p, x: small(p, x * X[:, :1]), params, (X,)))
    two = printed(trace(lambda p, x: small(p, x * X[:, 1:2]), params, (X,)))
    assert [name for name in one if one[name] != two[name]] == ["f"]

    def lazy(array, stamp=""):
        return LazyLeaf(
            array.shape, array.dtype, lambda: jnp.asarray(array), None, stamp
        )

    def known(params, stamp=""):
        leaves = {name: lazy(x, stamp) for name, x in params.items()}
        return printed(trace(small, leaves, (X,)))["parameters"]

    assert known(params) == known(draw(0))
    assert (
        len({known(params), known(other), known(params, "a"), known(params, "b")}) == 4
    )


def test_the_stamp_of_a_tensor_is_another_after_its_file_has_changed(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": X}, file)
    before = read_header(file)["x"].stamp
    assert read_header(file)["x"].stamp == before
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert read_header(file)["x"].stamp != before


def test_another_run_is_refused(tmp_path):
    open_journal(tmp_path / "a", {"recipe": "x", "calibration": "y"})
    with pytest.raises(ValueError, match="journal of another run: calibration differ"):
        open_journal(tmp_path / "a", {"recipe": "x", "calibration": "z"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("")
    with pytest.raises(FileExistsError, match="holds no journal"):
        open_journal(tmp_path / "b", {})
