"""The summary of the checkpoint formats says what the matrix's lines say."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[2] / "experiments" / "formats"


@pytest.fixture(scope="module")
def run() -> Any:
    sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location("formats_run", HERE / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(HERE))


def lines(name: str) -> list[dict[str, Any]]:
    text = (HERE / "results" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_medians_and_worst_tokens_of_a_format():
    matrix = lines("matrix")
    for found in lines("formats"):
        rows = [row for row in matrix if row["label"].split()[0] == found["label"]]
        assert found["metrics"]["schemes"] == len(rows)
        for way in ("out_", "in_"):
            worst = [
                (row["metrics"][name], value)
                for row in rows
                for name, value in row["context"]["worst"].items()
                if name.startswith(way)
            ]
            medians, values = zip(*worst)
            assert found["metrics"][f"{way}largest_median"] == max(medians)
            assert found["metrics"][f"{way}worst_token"] == max(values)
            assert max(values) > max(medians)


def test_worst_tokens_of_a_line(run: Any):
    worst = {"out_a": 1.0, "out_b": 3.0, "in_c": 2.0}
    expected = {"out_worst_token": 3.0, "in_worst_token": 2.0}
    assert run.worst_tokens(worst) == expected
    assert run.worst_tokens({"in_c": 2.0}) == {"in_worst_token": 2.0}
    assert run.worst_tokens({"llama": 1.0, "opt": 2.0}) == {"worst_token": 2.0}
    assert run.worst_tokens({}) == {}
    reports = {"out_a": {"difference": 0.5, "worst": 1.0}, "in_c": {"refused": "why"}}
    row = run.record("x", reports)
    assert row.metrics == {"out_a": 0.5, "out_worst_token": 1.0}
    found = run.summary("x", [row, run.record("y", {})]).metrics
    assert found == {
        "schemes": 2,
        "out_opened": 1,
        "out_largest_median": 0.5,
        "out_worst_token": 1.0,
        "in_opened": 0,
    }
