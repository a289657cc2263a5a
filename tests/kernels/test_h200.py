"""The pure parts of `kernels/bench/h200.py`, and what of it runs without a card."""

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.coded import encode
from qjax.core.layout import Layout
from qjax.core.packing import unpack
from qjax.core.qtensor import QTensor, SiteActs
from qjax.ops import Target, matmul

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
NAMES = ("h200_problem", "h200_forms", "h200_peers", "h200")


@pytest.fixture(scope="module")
def bench():
    """The scripts, importable while these tests run."""
    sys.path.insert(0, str(BENCH))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(BENCH))
    for name in NAMES:
        sys.modules.pop(name)


def test_a_problem_is_the_same_for_all(bench):
    problem = bench["h200_problem"].Problem(256, 64, 3)
    q, scale = problem.codes().astype(float), problem.scale().astype(float)
    assert (q.min(), q.max(), scale.shape) == (-8, 7, (2, 64))
    exact = q * scale.repeat(128, 0)
    np.testing.assert_array_equal(problem.weight(), exact)
    words = unpack(jnp.asarray(problem.words()), 4, 256)
    np.testing.assert_array_equal(words, q + 8)
    error = bench["h200_problem"].error
    y = problem.tokens().astype(float) @ exact
    assert error(y, problem) == 0
    assert error(1.25 * y, problem) == pytest.approx(0.25)


def test_weights_in_turn_exceed_the_cache(bench):
    for K, N in bench["h200"].SHAPES:
        for bits in (4, 8, 16):
            problem = bench["h200_problem"].Problem(K, N, 1)
            turn = problem.copies(bits) * K * N * bits / 8
            assert 3 * bench["h200_problem"].L2_BYTES <= turn < 2.1e9


def test_rates_are_bytes_and_products_over_time(bench):
    problem = bench["h200_problem"].Problem(4096, 14336, 16)
    row = problem.row("form", 1e-5, 4, "cupti")
    assert row["microseconds"] == 10
    assert row["weight_gigabytes_per_second"] == 4096 * 14336 / 2 / 1e-5 / 1e9
    assert row["teraflops"] == 2 * 16 * 4096 * 14336 / 1e-5 / 1e12
    assert (row["K"], row["bits"], row["clock"]) == (4096, 4, "cupti")


@pytest.mark.parametrize("eight", [False, True])
def test_forms_give_the_product(bench, eight):
    small = bench["h200_problem"].Problem(256, 64, 5)
    small = small.eight() if eight else small
    found = list(bench["h200_forms"].forms(small, card=False))
    assert len(found) == (4 if eight else 2)
    for form in found:
        y = bench["h200"].product(form, small)
        assert bench["h200_problem"].error(y, small, form.float8) <= form.error


@pytest.mark.parametrize("scheme", ["W8A8", "FP8"])
def test_eight_bits_are_timed_as_qjax_multiplies_them(bench, scheme):
    """The XLA form that is timed, and that of `qjax.ops.matmul` on the same codes."""
    small = bench["h200_problem"].Problem(256, 64, 5).eight()
    (form,) = (
        f
        for f in bench["h200_forms"].forms(small, card=False)
        if f.name == f"{scheme}, XLA"
    )
    found = qjax.schemes.SCHEMES[{"FP8": "FP8_DYNAMIC"}.get(scheme, scheme)]
    w = jnp.asarray(small.weight(form.float8), jnp.float32)
    acts = (SiteActs(activation=found.activations),)
    leaf = QTensor.of(
        encode(w, found.weights), Layout("kn", w.shape), jnp.bfloat16, acts
    )
    x = jnp.asarray(small.tokens(), jnp.bfloat16)
    mine = np.asarray(matmul(x, leaf, target=Target("gpu")), float)
    y = np.asarray(bench["h200"].product(form, small), float)
    assert np.linalg.norm(y - mine) <= 0.05 * np.linalg.norm(mine)


PEERS = ["bfloat16, torch", "nf4, bitsandbytes"]
PEERS += ["int8 x int8, torch _int_mm", "float8 x float8, torch _scaled_mm"]


@pytest.mark.parametrize("name", PEERS)
def test_peers_that_run_on_a_cpu_give_the_product(bench, name, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    peers = bench["h200_peers"]
    if name in peers.absent():
        pytest.skip(peers.absent()[name])
    small = bench["h200_problem"].Problem(256, 64, 5)
    small = small.eight() if peers.PEERS[name].eight else small
    assert peers.wrong(torch, name, small, "cpu") == ""


def test_wrong_values_are_a_complaint(bench, monkeypatch):
    torch = pytest.importorskip("torch")
    peers, small = bench["h200_peers"], bench["h200_problem"].Problem(256, 64, 5)
    half = peers.Peer("torch", lambda *given: lambda x: peers.bfloat16(*given)(x) / 2)
    monkeypatch.setitem(peers.PEERS, "half", half)
    assert "wrong by 0.5" in peers.wrong(torch, "half", small, "cpu")


def test_words_for_humming_are_in_its_order(bench):
    """`[N, K / 8]`, least significant field first; scales `[N, G]`."""
    torch = pytest.importorskip("torch")
    problem = bench["h200_problem"].Problem(256, 64, 5)
    found = bench["h200_peers"].humming_tensors(torch, problem)
    assert found["weight"].dtype == torch.int32
    words = found["weight"].numpy().view(np.uint32)
    fields = words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
    np.testing.assert_array_equal(fields.reshape(64, 256).T, problem.codes() + 8)
    np.testing.assert_array_equal(
        found["weight_scale"].float().numpy().T, problem.scale()
    )


def test_what_is_missing_is_named_and_rows_survive(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench["h200_peers"], "find_spec", lambda name: None)
    assert set(bench["h200_peers"].absent().values()) == {"torch is not installed"}
    path = tmp_path / "h200.json"
    result = bench["h200"].Results(path, float("inf"), {"rows": []})

    def rows():
        yield {"microseconds": 1}
        raise RuntimeError("no such instruction\nat line 3")

    result.rows("form", rows())
    found = json.loads(path.read_text())
    assert found["rows"] == [{"microseconds": 1}]
    assert found["missing"]["form"] == "failed: RuntimeError: no such instruction"
    bench["h200"].Results(path, 0, {"rows": []}).rows("late", rows())
    assert found["rows"] == json.loads(path.read_text())["rows"]


def test_it_runs_without_a_card(bench, monkeypatch, tmp_path, capsys):
    out = tmp_path / "tiny.json"
    words = ["h200.py", "--tiny", "--only", "bfloat16|W8A8", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(bench["h200"], "problems_of", lambda card: [
        bench["h200_problem"].Problem(256, 128, 4)
    ])  # fmt: skip
    assert bench["h200"].main() is None
    found = json.loads(out.read_text())
    assert {row["form"] for row in found["rows"]} == {"bfloat16", "W8A8, XLA"}
    assert set(found["missing"]) == set(bench["h200_peers"].PEERS)
    assert found["copy_gigabytes_per_second"] > 0 and found["wrong"] == []
