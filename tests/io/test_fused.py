"""Linears that vLLM runs as one are stored alike, or the export says so."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from qjax.core.formats import NVFP4, Int, group
from qjax.io.export import export
from qjax.trace.control import QuantizationWarning

FOUR = Int(4, group(32))


def test_two_formats(small: Any, tmp_path: Path):
    keep = lambda path: None if "k_proj" in path else FOUR
    with pytest.warns(QuantizationWarning) as caught:
        export(tmp_path / "out", small.quantized(keep), model=small.folder)
    (message,) = [str(each.message) for each in caught]
    layer = "model.layers.0.self_attn."
    assert message.startswith(f"{layer}q_proj and {layer}k_proj are stored in diff")


def test_two_second_scales(small: Any, tmp_path: Path):
    with pytest.warns(QuantizationWarning, match="with different global scales: vLLM"):
        export(tmp_path / "out", small.quantized(NVFP4()), model=small.folder)


def test_modules_that_stand_alone(small: Any, tmp_path: Path):
    def format(path: str) -> Any:
        return NVFP4() if "down_proj" in path or "o_proj" in path else FOUR

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(tmp_path / "out", small.quantized(format), model=small.folder)
