"""Records survive the file, the front is the definition's, pictures are drawn."""

import io
import json
import math
import re
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from qjax import results
from qjax.io.describe import describe
from qjax.methods import HQQ, RTN
from qjax.plots import compare_plot
from qjax.results import Record

METRICS = {
    "bits_per_weight": 4.25,
    "disk_bytes": 4_250_000,
    "perplexity": 41.25,
    "kl": 0.0125,
    "top1_agreement": 0.875,
    "quantize_seconds": 1.5,
    "quantize_peak_bytes": 2_000_000,
    "run_peak_bytes": 64_000_000,
    "tokens_per_second": 12345.6,
}


def record(label="HQQ int4 g64", series="HQQ g64", **metrics):
    return Record(label, {"class": "HQQ"}, METRICS | metrics, {"seed": 0}, series)


def test_records_round_trip(tmp_path):
    path = tmp_path / "deep" / "runs.jsonl"
    rows = [record(), record("RTN", None, kl=1e-9)]
    for row in rows:
        results.append(path, row)
    assert results.read(path) == rows
    assert len(path.read_text().splitlines()) == 2


def test_what_json_cannot_hold_becomes_null(tmp_path):
    results.append(tmp_path / "a.jsonl", record(perplexity=math.inf, kl=math.nan))
    text = (tmp_path / "a.jsonl").read_text()
    assert json.loads(text)["metrics"]["perplexity"] is None
    assert results.read(tmp_path / "a.jsonl")[0].metrics["kl"] is None


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b"\xff",
        b"[" * 100_000,
        b'{"label": "x", "config": {}}',
        b'{"label": 1, "config": {}, "metrics": {}}',
        b'{"label": "x", "config": {}, "metrics": []}',
        b'{"label": "x", "config": {}, "metrics": {}, "context": null}',
        b'{"label": "x", "config": {}, "metrics": {}, "evil": 1}',
    ],
)
def test_what_is_no_record_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match=r"line 1 of .*(no JSON|is not a record)") as e:
        results.read(tmp_path / "a.jsonl")
    assert "\n" not in str(e.value)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    results.append(path, record())
    path.write_text(path.read_text() + '{"label": "x"')
    with pytest.raises(ValueError, match="line 2 of"):
        results.read(path)
    path.write_text('{"label": "x"}\n')
    with pytest.raises(ValueError, match="line 1 of"):
        results.read(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        results.read(tmp_path / "b.jsonl")


def test_describe_keeps_class_names_all_the_way_down():
    described = describe((RTN(scheme="W4A16"), HQQ(bits=3, group_size=64)))
    assert [step["class"] for step in described] == ["RTN", "HQQ"]
    assert described[0]["search"]["class"] == "MinMax"
    assert described[1]["bits"] == 3
    json.dumps(described)
    assert describe({"dtype": jnp.bfloat16}) == {"dtype": "bfloat16"}


def test_environment_says_versions_device_and_date():
    found = results.environment()
    assert found["versions"]["jax"] and found["versions"]["python"]
    assert found["device"].startswith("cpu")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", found["date"])
    json.dumps(found)


def test_commit_is_none_outside_a_checkout_of_ours(tmp_path, monkeypatch):
    """An installed copy inside another project's repository has no commit of ours."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "results.py").write_text("")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert results.git_commit() is None


def test_commit_is_read_and_marked_when_files_differ(tmp_path, monkeypatch):
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True)

    source = tmp_path / "results.py"
    source.write_text("1")
    outputs = [tmp_path / "a/results/b/c.jsonl", tmp_path / "a/README.md"]
    outputs += [tmp_path / "results/d.jsonl", tmp_path / "README.md"]
    for each in outputs:
        each.parent.mkdir(parents=True, exist_ok=True)
        each.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    monkeypatch.setattr(results, "__file__", str(source))
    commit = results.git_commit()
    assert commit is not None and re.fullmatch("[0-9a-f]{40}", commit)
    for each in outputs:  # what a run writes itself
        each.write_text("2")
    assert results.git_commit() == commit
    source.write_text("2")
    assert results.git_commit() == commit + "-dirty"


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(points)
def test_pareto_is_the_definition(points):
    chosen = set(results.pareto(points))
    for i, (x, y) in enumerate(points):
        beaten = any(
            a <= x and b <= y and (a < x or b < y)
            for j, (a, b) in enumerate(points)
            if j != i
        )
        assert (i in chosen) == (not beaten)


@given(points)
def test_pareto_descends(points):
    front = [points[i] for i in results.pareto(points)]
    assert front == sorted(front)
    assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)


def test_pareto_leaves_out_what_is_not_a_number():
    assert results.pareto([(1, math.nan), (2, 5), (math.inf, 1)]) == [1]
    assert (
        results.front([record(perplexity=None)], "bits_per_weight", "perplexity") == []
    )


def printed(table, width=140):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_table_writes_every_metric_with_its_unit():
    text = printed(results.table([record(), record("worse", perplexity=99.0)], "t"))
    row = next(line for line in text.splitlines() if "HQQ int4" in line)
    shown = ["*", "4.250", "4,250,000", "41.250", "0.01250", "87.5%", "1.50", "2.0"]
    assert all(cell in row for cell in [*shown, "64.0", "12,346"])
    assert "worse *" not in text
    assert "nats" in text and "peak MB" in text


def test_table_shows_a_dash_for_what_was_not_measured():
    bare = Record("full precision", None, {"bits_per_weight": 16.0})
    assert printed(results.table([bare], "t")).count(" - ") == 8


def rows():
    yield record("full precision", None, bits_per_weight=16.0, kl=0.0, perplexity=40.0)
    for method, loss in (("RTN", 1.0), ("HQQ", 0.5)):
        for group in (64, 128):
            for bits in (8, 4, 3, 2):
                error = loss * 4.0 ** (2 - bits) * (1 + group / 512)
                yield record(
                    f"{method} int{bits} g{group}",
                    f"{method} g{group}",
                    bits_per_weight=bits + 20 / group,
                    perplexity=40 * math.exp(error),
                    kl=error,
                )
    yield record("NF4 g64", None)


def test_plot_is_drawn_with_all_labels_apart(tmp_path, monkeypatch):
    """The labels overlap neither each other nor a point, and stay in the frame."""
    from qjax import plots

    boxes = []
    place = plots._label

    def spy(axes, label, point, taken, lines):
        box = place(axes, label, point, taken, lines)
        boxes.append((box, list(taken), axes.get_window_extent()))
        return box

    monkeypatch.setattr(plots, "_label", spy)
    compare_plot(tmp_path / "new" / "a.png", list(rows()), "title", "subtitle")
    image = imread(tmp_path / "new" / "a.png")
    assert image.shape[1] > 1500
    assert np.unique(image.reshape(-1, 4), axis=0).shape[0] > 100
    assert len(boxes) > 8
    for box, taken, frame in boxes:
        assert not any(box.overlaps(other) for other in taken)
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1


def test_plot_bears_missing_and_single_values(tmp_path):
    """A diverged row (no perplexity) is left out, one row alone is drawn."""
    lone = [record("full precision", None, bits_per_weight=16.0, kl=0.0)]
    compare_plot(tmp_path / "a.png", lone, "t")
    compare_plot(tmp_path / "b.png", [*lone, record(perplexity=None, kl=None)], "t")
    assert (tmp_path / "b.png").stat().st_size > 10_000
