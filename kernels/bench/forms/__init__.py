"""The forms that `beside.py` compares, a file for each operation."""

import importlib
from pathlib import Path

from forms.form import Form

__all__ = ["Form", "forms"]


def forms(words: list[str]) -> list[Form]:
    """Those of the operations named, or all."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    chosen = [
        name
        for name in names
        if name not in ("__init__", "form") and (not words or name in words)
    ]
    return [
        form
        for name in chosen
        for form in importlib.import_module(f"forms.{name}").FORMS
    ]
