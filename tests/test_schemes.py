"""Our schemes beside compressed-tensors' presets of the same names."""

import json
from pathlib import Path

import pytest

from qjax.io.compressed_arguments import activation_of, scheme_of
from qjax.schemes import SCHEMES, Scheme, scheme

GOLDEN = Path(__file__).with_name("golden") / "presets.json"
PRESETS = json.loads(GOLDEN.read_text())["presets"]


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"UNQUANTIZED"}))
def test_scheme_is_compressed_tensors_preset(name):
    preset = PRESETS[name]
    weights = scheme_of(name, preset["weights"])
    activations = activation_of(name, preset.get("input_activations"))
    assert scheme(name) == Scheme(weights, activations)


def test_every_preset_is_there_and_ours_are_known():
    ours = {"NF4", "NF4_DQ", "FP4", "BINARY", "TERNARY"}
    assert set(SCHEMES) - ours == set(PRESETS) - {"UNQUANTIZED"}
    assert ours <= set(SCHEMES)
