"""What `kernels/bench/check.py` says of compilers that are not here."""

import importlib
from dataclasses import dataclass
from types import SimpleNamespace

import pytest


@dataclass(frozen=True)
class Program:
    label: str
    platform: str
    compilers: tuple[str, ...]


TPU = Program("v5e one", "tpu", ("libtpu",))
GPU = Program("h200 one", "gpu", ("nvidia-cuda-nvcc",))


@pytest.fixture
def check(script, monkeypatch):
    """The script, with two programs of which `here` says what compiles."""
    module = script("check")
    monkeypatch.setattr(module, "gates", lambda: {"both": (TPU, GPU)})
    monkeypatch.setattr(module, "checked", lambda *_: "")
    monkeypatch.setattr(module, "sys", SimpleNamespace(version_info=(3, 11)))
    return module


@pytest.mark.parametrize(
    ("here", "arguments", "said"),
    [
        ([], [], "nothing is checked: no libtpu, nvidia-cuda-nvcc here"),
        ([], ["--expect=tpu"], "nothing is checked"),
        (["libtpu"], [], None),
        (["libtpu"], ["--expect=tpu"], None),
        (["libtpu"], ["--expect=gpu"], "programs for gpu are expected"),
        (["libtpu"], ["h200"], "nothing is checked: no nvidia-cuda-nvcc here"),
        (["libtpu"], ["v9"], "no program is so called"),
    ],
)
def test_a_check_without_compilers_fails(here, arguments, said, check, monkeypatch):
    monkeypatch.setattr(
        check, "missing", lambda p: [c for c in p.compilers if c not in here]
    )
    found = check.main(arguments)
    assert found is None if said is None else said in found


def test_spills_are_counted_in_a_schedule(check, tmp_path):
    """The head and lines as libtpu 0.0.42.1 writes them."""
    schedule = importlib.import_module("schedule")
    path = tmp_path / "kernel.1-70-final_hlo-static-per-bundle-utilization.txt"
    path.write_text(
        "== CAPACTIY:\n"
        "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\n"
        "    4     3     4     2     1     3     3     1     1     2\n"
        "== UTILIZATION:\n"
        "0 0 0 0 0 1 0 1 1 0\n0 0 0 0 0 1 1 0 0 2\n4 0 0 0 0 0 0 1 1 0\n"
    )
    assert schedule.spilled(path) == 2


def test_later_pythons_skip_it(check, monkeypatch, capsys):
    monkeypatch.setattr(check, "sys", SimpleNamespace(version_info=(3, 12)))
    assert check.main([]) is None
    assert capsys.readouterr().out.startswith("skipped: ")
