"""The house rules that no linter knows: where files lie and what they may hold."""

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

from qjax.core.packing import pack

ROOT = Path(__file__).parents[1]
LONGEST = 400
TEXT = {"", ".cff", ".json", ".jsonl", ".lock", ".md", ".py", ".toml", ".yaml", ".yml"}
# Written in pieces, so that this file does not hold what it forbids.
MACHINE = re.compile(
    r"(?<![\w.])/(?:" + "|".join(["root", "work", "home", "opt", "mnt"]) + r")/"
    r"|(?:" + "|".join(["pypi", "pythonhosted", "download.pytorch"]) + r")\.org"
    r"|--(?:extra-)?index-url[ =]"
)
PRIVATE = re.compile(r"\bjax\.(?:_src|interpreters)\b|from jax import _src\b")
COMPAT = {"qjax/trace/compat.py", "kernels/qjax_kernels/compat.py"}


def files() -> list[Path]:
    command = "git -c safe.directory=* ls-files -z --cached --others --exclude-standard"
    listed = subprocess.run(
        command.split(), cwd=ROOT, check=True, capture_output=True, text=True
    )
    found = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in found if path.is_file()]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
LIBRARY = [path for path in PYTHON if name(path).startswith(("qjax/", "kernels/"))]


def test_tests_are_no_package():
    inside = [name(path) for path in PYTHON if name(path).startswith("tests/")]
    assert [each for each in inside if each.endswith("__init__.py")] == []


def test_the_import_kernels_finds_no_file_of_ours():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    ours = spec is not None and spec.origin and Path(spec.origin).is_relative_to(ROOT)
    assert not ours


def test_no_file_is_longer_than_400_lines():
    lengths = {name(path): len(path.read_text().splitlines()) for path in PYTHON}
    assert {each: n for each, n in lengths.items() if n > LONGEST} == {}


def test_no_file_is_named_utils():
    assert [name(path) for path in PYTHON if path.stem in {"utils", "util"}] == []


def test_no_path_of_a_machine_and_no_registry():
    found = [
        f"{name(path)}:{number}: {line.strip()[:80]}"
        for path in FILES
        if path.suffix in TEXT
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert found == []


def test_only_compat_touches_private_names_of_jax():
    found = [
        name(path)
        for path in LIBRARY
        if name(path) not in COMPAT and PRIVATE.search(path.read_text())
    ]
    assert found == []


def test_modules_import_from_rooms_never_from_the_front_door():
    """`import qjax` inside qjax would import everything from anywhere."""

    def imports_root(path: Path) -> bool:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                if any(alias.name == "qjax" for alias in node.names):
                    return True
            elif isinstance(node, ast.ImportFrom) and node.module == "qjax":
                rooms = {each.stem for each in (ROOT / "qjax").iterdir()}
                if any(alias.name not in rooms for alias in node.names):
                    return True
        return False

    inside = [path for path in LIBRARY if name(path).startswith("qjax/")]
    assert [name(path) for path in inside if imports_root(path)] == []


def test_shapes_and_types_are_checked_while_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError):
        pack(jnp.ones((4, 4)), 4)
