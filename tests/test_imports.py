"""The import contracts hold, and each of them fails when it is broken on purpose."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINTER = Path(sys.executable).with_name("lint-imports")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    return subprocess.run(
        [LINTER, "--no-logo", "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def house(tmp_path: Path) -> Path:
    python_only = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json")
    for part in ("qjax", "kernels"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=python_only)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_hold(house: Path):
    done = lint(house)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("qjax/core/coded.py", "import qjax.models", "Imports point down"),
        ("qjax/ops/__init__.py", "import qjax.quantize", "Imports point down"),
        ("qjax/unplaced.py", "", "Imports point down"),
        ("qjax/methods/rtn.py", "import qjax.methods.hqq", "Methods never import"),
        ("qjax/models/llama.py", "import qjax_kernels", "Only qjax.ops imports"),
        ("kernels/qjax_kernels/__init__.py", "import qjax.core", "The kernels import"),
        ("qjax/core/coded.py", "import flax", "Core imports jax only"),
        ("qjax/models/llama.py", "import torch", "never imports a peer"),
    ],
)
def test_a_broken_contract_is_found(house: Path, file: str, line: str, contract: str):
    with (house / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint(house)
    report = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    broken = [part for part in report.split("BROKEN")[:-1] if contract in part[-80:]]
    assert broken or "qjax.unplaced" in report
