"""`kernels/bench/grid.py`: it continues, and one program does not end the others."""

from types import SimpleNamespace

import jax
import pytest

from qjax import results
from qjax.results import Record


@pytest.fixture
def grid(script, monkeypatch, tmp_path):
    """The script, writing to a file of its own."""
    module = script("grid")
    monkeypatch.setattr(module, "OUT", tmp_path / "grid.jsonl")
    return module


def test_words_choose_programs_and_small_ones_come_first(grid, monkeypatch):
    monkeypatch.setattr(grid, "TOPOLOGIES", {"v6e": "v6e:2x2"})
    found = list(grid.cases(["v6e", "sparse_outlier", "up"]))
    assert {label.split()[0] for label, _ in found} == {"v6e"}
    tokens = [grid.tokens(case) for _, case in found]
    assert tokens == sorted(tokens) and len(set(tokens)) > 1
    sixteen = [label for label, _ in grid.cases(["sparse_outlier", "up", "16"])]
    assert sixteen == [label for label, case in found if grid.tokens(case) == 16]
    assert not list(grid.cases(["v9"]))


def test_it_continues_and_one_failure_ends_one_program(grid, monkeypatch, capsys):
    """A compiler's error is the exit's message, a kernel's refusal is not."""
    asked = []

    def measure(label, case):
        asked.append(label)
        if label == "refused":
            raise ValueError("no such words")
        if label == "broken" or (label == "killed" and len(asked) < 4):
            error = KeyboardInterrupt if label == "killed" else None
            raise error or jax.errors.JaxRuntimeError("INTERNAL: index\nand more")
        return Record(label, {}, {"kernel_microseconds": 1.0}, {})

    labels = ["first", "broken", "killed", "refused", "last"]
    cases = [(label, SimpleNamespace()) for label in labels]
    monkeypatch.setattr(grid, "cases", lambda words: cases)
    monkeypatch.setattr(grid, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        grid.main([])
    assert asked == ["first", "broken", "killed"]
    said = grid.main([])
    assert asked[3:] == ["broken", "killed", "refused", "last"]
    assert said == "broken does not compile: INTERNAL: index"
    assert "refused is refused: no such words" in capsys.readouterr().out
    there = [record.label for record in results.read(grid.OUT)]
    assert there == ["first", "killed", "last"]
