"""`choose` recommends two or three recipes that exist, that fit, and that suit."""

import itertools

import pytest

from qjax import methods
from qjax.allocate import MixedPrecision
from qjax.catalogue import COMPARED, GROUPS, expanded, named
from qjax.choose import OPTIONS, Needs, choose, would_suit
from qjax.methods import HQQ, RTN
from qjax.recipes import steps_of

HARDWARE = ("cpu", "gpu", "tpu")
PRIORITIES = ("memory", "quality", "speed", "simplicity", "changing-inputs")


def every_need():
    for hardware, priority, calibration, training, memory in itertools.product(
        HARDWARE, PRIORITIES, (False, True), (False, True), (None, 2.8, 5, 9)
    ):
        yield Needs(memory, 7_000_000_000, 0, calibration, training, hardware, priority)


def test_every_answer_runs_and_fits():
    registry = {method.__name__ for method in methods.METHODS}
    for needs in every_need():
        advice = choose(needs)
        assert 1 <= len(advice) <= 3
        assert len({each.name for each in advice}) == len(advice)
        for each in advice:
            recipe = named(each.name).recipe
            steps = recipe if isinstance(recipe, tuple) else (recipe,)
            assert {type(step).__name__ for step in steps} <= registry
            assert each.bits <= needs.bits
            assert each.reason


def test_two_or_three_without_a_tight_limit():
    for needs in every_need():
        if needs.memory_gb is None or needs.memory_gb >= 5:
            assert len(choose(needs)) in (2, 3)


def test_bits_of_options_are_those_of_their_formats():
    """Within the rounding of small overheads, for a wide matrix."""
    for option in OPTIONS:
        if option.method in ("RTN", "HQQ"):
            nominal = named(option.name).recipe.format.bits
            assert nominal <= option.bits <= nominal + 0.51


def test_the_priority_decides():
    def first(**needs):
        return choose(Needs(**needs))[0].name

    assert first(priority="simplicity") == "rtn-int8-g128"
    assert first(priority="quality") == "rtn-int8-g128"
    assert first(priority="speed", hardware="gpu") == "FP8_DYNAMIC"
    assert first(priority="speed", hardware="tpu") == "W8A8"
    assert first(priority="speed", hardware="cpu") == "fp8a16"
    assert named(first(priority="memory")).recipe.format.bits == 4
    changing = named(first(priority="changing-inputs")).recipe
    assert changing.activation is None


def test_a_tight_limit_goes_below_four_bits():
    names = [a.name for a in choose(Needs(3.9, 8_000_000_000, priority="quality"))]
    assert names == ["hqq-int2-g64"]
    names = [a.name for a in choose(Needs(4.5, 8_000_000_000, priority="quality"))]
    assert names[0] == "hqq-int3-g64"


def test_what_stays_in_float_is_counted():
    """8e9 weights in 6 GB leave 4.8 bits each, but 0.5e9 in 16 bits leave 3.8."""
    assert Needs(6, 8_000_000_000).bits == pytest.approx(4.8)
    needs = Needs(6, 8_000_000_000, kept=500_000_000)
    assert needs.bits == pytest.approx(3.8)
    assert "weights take 4.50 of 6 GB" in choose(needs)[0].reason


def test_nothing_fits_is_one_sentence():
    with pytest.raises(ValueError, match=r"leave 0\.80 bits per weight .* takes 2\.5"):
        choose(Needs(1, 8_000_000_000))


def test_absent_methods_are_named_but_not_recommended():
    assert would_suit(Needs()) == []
    assert would_suit(Needs(calibration=True)) == []
    trained = would_suit(Needs(training=True))
    assert {advice.name for advice in trained} == {"QAT"}


def test_a_method_that_arrives_is_recommended(monkeypatch):
    qat = type("QAT", (), {})
    monkeypatch.setattr("qjax.choose.METHODS", (*methods.METHODS, qat))
    needs = Needs(5, 7_000_000_000, training=True)
    assert choose(needs)[0].name == "qat-int4-g128"
    assert "QAT" not in {advice.name for advice in would_suit(needs)}


def test_calibration_data_brings_the_calibrated_methods():
    needs = Needs(5, 7_000_000_000, calibration=True)
    assert choose(needs)[0].name == "gptq-int4-g128"


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"hardware": "abacus"}, "hardware 'abacus' is unknown: choose from cpu"),
        ({"priority": "fame"}, "priority 'fame' is unknown"),
        ({"memory_gb": 0, "weights": 1}, "memory is 0 GB"),
        ({"memory_gb": float("inf"), "weights": 1}, "memory is inf GB"),
        ({"weights": -5}, "weights is -5"),
        ({"memory_gb": 8}, "needs the model's size"),
    ],
)
def test_bad_needs_are_named(needs, message):
    with pytest.raises(ValueError, match=message):
        Needs(**needs)


def test_compared_recipes_are_the_table_of_the_demo():
    assert len(COMPARED) == 2 * 2 * 4 + 4
    found = [named(name) for name in COMPARED]
    assert len({each.label for each in found}) == len(COMPARED)
    integers = [each for each in found if each.series]
    assert {each.recipe.format.bits for each in integers} == {8, 4, 3, 2}
    assert all(each.recipe.activation is None for each in found)


def test_every_method_has_a_short_name():
    recipes = [one.recipe for one in expanded(tuple(GROUPS))]
    steps = {step for recipe in recipes for step in steps_of(recipe)}
    steps |= {step.then for step in steps if hasattr(step, "then")}
    assert {type(step) for step in steps} == {*methods.METHODS, MixedPrecision}


def test_names_give_recipes():
    assert named("hqq-int3-g64").recipe == HQQ(bits=3, group_size=64)
    assert named("w4a16").recipe == RTN(scheme="W4A16")
    rtn, hqq = (named(f"{method}-int2-g64").recipe.format for method in ("rtn", "hqq"))
    assert (rtn.bits, rtn.granularity) == (hqq.bits, hqq.granularity)
    assert (rtn.zero, hqq.zero) == ("int", "float")


@pytest.mark.parametrize("name", ["awq", "rtn-int4", "hqq-int4-g", ""])
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError, match=r"is unknown: give hqq-int4-g64.*FP8_DYNAMIC"):
        named(name)


def test_bits_out_of_range_are_refused():
    with pytest.raises(ValueError, match="bits"):
        named("hqq-int9-g64")
    with pytest.raises(ValueError, match="bits"):
        named("rtn-int9-g64")
