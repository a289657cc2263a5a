"""Tables in READMEs are written from results, and drift is found."""

import importlib.util
from pathlib import Path

import pytest

from qjax.results import Record, append

SCRIPT = Path(__file__).parents[1] / "scripts" / "render_tables.py"
PAGE = """# Page
<!-- table: results/a.jsonl bits_per_weight perplexity speed_up -->
old
<!-- end -->
after
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch):
    spec = importlib.util.spec_from_file_location("render_tables", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def fill(folder: Path) -> None:
    rows = [("float", 16.0, 10.0), ("RTN", 4.1, 12.0), ("worse", 5.0, 13.0)]
    for label, bits, perplexity in rows:
        metrics = {"bits_per_weight": bits, "perplexity": perplexity}
        metrics |= {"speed_up": "none"} if label == "worse" else {}
        append(
            folder / "results/a.jsonl", Record(label, {}, metrics, {"device": "cpu"})
        )


def test_tables_come_from_results_and_drift_fails(script, tmp_path: Path):
    fill(tmp_path)
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    assert "README.md" in script.main(["--check"])
    assert page.read_text() == PAGE
    assert script.main([]) is None
    text = page.read_text()
    assert "| **RTN** | 4.100 | 12.000 | – |" in text
    assert "| worse | 5.000 | 13.000 | none |" in text
    assert "speed up" in text and "old" not in text and text.endswith("after\n")
    assert script.main(["--check"]) is None
    page.write_text(text.replace("12.000", "11.000"))
    assert "differ" in script.main(["--check"])


def test_a_missing_result_is_named(script, tmp_path: Path):
    (tmp_path / "README.md").write_text(PAGE)
    assert "a.jsonl" in script.main(["--check"])
    assert "usage" in script.main(["--help"])


def test_a_commit_with_other_files_is_called_dirty(script):
    whole, short = "a" * 40, "a" * 10
    for state in ("", "-dirty"):
        row = Record("x", {}, {}, {"commit": whole + state})
        assert script.source(row) == [f"commit {short}{state}."]
