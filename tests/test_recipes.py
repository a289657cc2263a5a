"""Schemes, patterns, and which step takes which site."""

import warnings
from types import SimpleNamespace

import pytest

from qjax.core.formats import (
    MX,
    NVFP4,
    Codebook,
    Float,
    Int,
    block,
    channel,
    group,
    tensor,
)
from qjax.recipes import Candidate, assign, matches, steps_of
from qjax.schemes import SCHEMES, scheme
from qjax.trace.control import QuantizationWarning

# compressed-tensors 0.20 presets, transcribed by hand: weights (bits, group or
# strategy), activations (bits, strategy, dynamic).
PRESETS = {
    "W4A16": (Int(4, group(128)), None),
    "W8A16": (Int(8, group(128)), None),
    "W2A16": (Int(2, group(128)), None),
    "W3A8": (Int(3, group(128)), (Int(8, channel()), True)),
    "W4A4": (Int(4, group(128)), (Int(4, channel()), True)),
    "W4A8": (Int(4, group(128)), (Int(8, channel()), True)),
    "W4A16_ASYM": (Int(4, group(128), symmetric=False), None),
    "W8A8": (Int(8, channel()), (Int(8, channel()), True)),
    "INT8": (Int(8, channel()), (Int(8, channel()), True)),
    "W4AFP8": (Int(4, group(128)), (Float("e4m3", channel()), True)),
    "FP8": (Float("e4m3", tensor()), (Float("e4m3", tensor()), False)),
    "FP8_DYNAMIC": (Float("e4m3", channel()), (Float("e4m3", channel()), True)),
    "FP8_BLOCK": (Float("e4m3", block(128, 128)), (Float("e4m3", group(128)), True)),
    "NVFP4A16": (NVFP4(), None),
    "NVFP4": (NVFP4(), (NVFP4(), False)),
    "MXFP4A16": (MX("fp4", scale_rule="ct"), None),
    "NF4": (Codebook("nf4", granularity=group(64)), None),
}


@pytest.mark.parametrize("name", PRESETS)
def test_scheme_is_the_preset_of_that_name(name):
    weights, acts = PRESETS[name]
    found = scheme(name)
    assert found.weights == weights
    if acts is None:
        assert found.activations is None
    else:
        assert (found.activations.format, found.activations.dynamic) == acts


def test_every_name_of_the_contract_is_there():
    wanted = {f"W{b}A16" for b in range(2, 9)} | {"MXFP8A16", "NF4_DQ", "FP4"}
    assert wanted | {"BINARY", "TERNARY"} | set(PRESETS) <= set(SCHEMES)


def test_scheme_names_in_any_case():
    assert scheme("w4a16") == scheme("W4A16")


def test_unknown_scheme_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown scheme 'W4A61'.*'W4A16'.*FP8_BLOCK"):
        scheme("W4A61")


def step(targets=None, ignore=()):
    return SimpleNamespace(targets=targets, ignore=ignore, solve=None)


def leaf(path, *kinds, names=None, head=False):
    return Candidate(path, names or (path,), frozenset(kinds), head)


MODEL = (
    leaf("embed", "embedding"),
    leaf(
        "layers/q/kernel",
        "dot",
        names=tuple(f"layers/{i}/q/kernel" for i in range(12)),
    ),
    leaf("conv/kernel", "conv"),
    leaf("experts/up", "ragged_dot"),
    leaf("lm_head/kernel", "dot", head=True),
)
TIED = (leaf("embed", "embedding", "dot"), leaf("layers/0/q/kernel", "dot"))


def taken(recipe, model=MODEL):
    return {p: s for p, s in assign(recipe, model).items() if set(s) != {None}}


def test_default_is_every_linear_and_conv_but_the_head():
    assert set(taken([step()])) == {"layers/q/kernel", "conv/kernel", "experts/up"}


def test_tied_leaf_is_left_unless_asked_for():
    assert set(taken([step()], TIED)) == {"layers/0/q/kernel"}
    assert set(taken([step("Linear")], TIED)) == {"layers/0/q/kernel"}
    assert set(taken([step("embed")], TIED)) == {"embed"}
    assert set(taken([step("Embedding")], TIED)) == {"embed"}


def test_kinds():
    assert set(taken([step("Linear")])) == {
        "layers/q/kernel",
        "experts/up",
        "lm_head/kernel",
    }
    assert set(taken([step("Conv")])) == {"conv/kernel"}


@pytest.mark.parametrize(
    ("pattern", "name", "yes"),
    [
        ("layers/1", "layers/1/q/kernel", True),
        ("layers/1", "layers/11/q/kernel", False),
        ("lm_head", "lm_head/kernel", True),
        ("*q*", "layers/3/q/kernel", True),
        ("layers/?/q", "layers/11/q/kernel", False),
        ("q", "layers/3/q/kernel", False),
        (r"re:layers/\d+/q", "layers/11/q/kernel", True),
        (r"re:q", "layers/11/q/kernel", False),
        (r"re:.*q/kernel$", "layers/11/q/kernel", True),
        ("layers/[02]/*", "layers/2/q/kernel", True),
    ],
)
def test_patterns(pattern, name, yes):
    assert matches(pattern, name, leaf(name, "dot")) is yes


def test_first_step_that_matches_takes_a_layer():
    steps = assign([step("layers/1"), step(("layers/*", "conv"))], MODEL)
    assert steps["layers/q/kernel"] == (1, 0, *[1] * 10)
    assert steps["conv/kernel"] == (1,)
    assert steps["embed"] == (None,)


def test_ignore_wins_over_targets():
    steps = assign([step("*", ignore=("embed", "lm_head"))], MODEL)
    assert steps["embed"] == steps["lm_head/kernel"] == (None,)
    assert steps["conv/kernel"] == (0,)


def test_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(ValueError, match=r"'layer/\*/q_proj' matches no site.*layers/"):
        assign([step("layer/*/q_proj")], MODEL)
    with pytest.raises(ValueError, match=r"'Conv' matches no site; kinds found: dot"):
        assign([step("Conv")], TIED)


def test_step_left_with_nothing_is_an_error():
    with pytest.raises(ValueError, match="taken by an earlier step"):
        assign([step(), step("conv")], MODEL)
    with pytest.raises(ValueError, match=r"no site is taken by default.*embed"):
        assign([step()], TIED[:1])
    with pytest.raises(ValueError, match="no site whose weight is a parameter"):
        assign([step()], ())
    with pytest.raises(ValueError, match=r"ignore \('\*',\) leaves it no site"):
        assign([step(ignore=("*",))], MODEL)


def test_ignore_that_matches_nothing_is_a_warning():
    with pytest.warns(QuantizationWarning, match="'lm_heed' matches nothing"):
        assign([step(ignore="lm_heed")], MODEL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign([step(ignore="lm_head")], MODEL)


def test_bad_regular_expression():
    with pytest.raises(ValueError, match="not a regular expression"):
        assign([step("re:(")], MODEL)


def test_recipe_must_hold_methods():
    with pytest.raises(TypeError, match="recipe is empty"):
        steps_of(())
    with pytest.raises(TypeError, match="methods such as RTN"):
        steps_of("RTN")
    one = step()
    assert steps_of(one) == (one,) == steps_of([one])
