"""Recipes as text, ours and llm-compressor's."""

import json
from pathlib import Path

import pytest

from qjax.allocate import MixedPrecision
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
    token,
)
from qjax.core.qtensor import Activation
from qjax.core.ranges import MinMaxRange, MovingAverageRange, PercentileRange
from qjax.core.scales import MSE, Percentile
from qjax.io.huggingface import read_config
from qjax.methods import (
    AWQ,
    EETQ,
    GPTQ,
    HQQ,
    METHODS,
    QEP,
    RTN,
    IMatrix,
    SimplePTQ,
    SmoothQuant,
)
from qjax.models.coded_cache import KVCache
from qjax.recipe_files import read_recipe, write_recipe
from qjax.recipes import cache_apart, check_quantizes, steps_of
from qjax.trace.control import QuantizationWarning

ROOT = Path(__file__).parents[1]
TINY = ROOT / "qjax/models/tiny_llama"

RECIPES = [
    (RTN(),),
    (RTN("W8A16", ignore=("layers/0", "re:.*down"), targets="Linear"), EETQ()),
    (AWQ(n_grid=7, duo_scaling="both"), GPTQ(scheme="W4A16_ASYM", damping=0.1)),
    (SmoothQuant(0.8, span=True), SimplePTQ()),
    (
        GPTQ(
            weights=Int(3, group(64), symmetric=False),
            activations=Activation(Int(8, tensor()), dynamic=False),
            calibrator=PercentileRange(99.0),
            search=MSE(grid=10),
            act_order=None,
        ),
    ),
    (RTN(weights=Int(4, block(32, 16), zero="float"), search=Percentile(98)),),
    (RTN(weights=NVFP4()), HQQ(weights=Int(2, channel(), zero="float"), p=0.5)),
    (RTN(weights=Codebook((-1.0, 0.0, 0.5, 1.0), group(8)), rounding="stochastic"),),
    (RTN(weights=MX("fp6"), activations=Activation(Float("e4m3", token()))),),
    (QEP(then=RTN("W4A16")),),
    (KVCache(), RTN("FP8_DYNAMIC")),
    (
        MixedPrecision((None, RTN("W4A16"), RTN("FP8_DYNAMIC")), target_bits=5),
        RTN("W8A16", targets=("lm_head",)),
    ),
]


@pytest.mark.parametrize("steps", RECIPES)
def test_our_form_round_trips(steps):
    assert read_recipe(write_recipe(steps)) == steps


def test_every_method_can_be_written():
    for method in METHODS:
        step = method(RTN()) if "then" in method.__dataclass_fields__ else method()
        assert read_recipe(write_recipe(step)) == (step,)


def test_only_what_differs_from_the_defaults_is_written():
    assert write_recipe(RTN(weights=Int(4, group(128)))) == (
        "- RTN:\n    weights:\n      Int:\n        bits: 4\n"
        "        granularity:\n          group: 128\n"
    )
    assert write_recipe(EETQ()) == "- EETQ: {}\n"


def test_short_forms():
    text = """
    - AWQ: {n_grid: 7}
    - GPTQ:
        weights: {Int: {bits: 4, granularity: {group: 128}}}
        activations: {Activation: {format: {Int: {bits: 8, granularity: token}}}}
        search: MSE
        targets: [layers/1, "re:.*q_proj"]
    - RTN: {weights: NVFP4}
    - EETQ
    """
    acts = Activation(Int(8, token()))
    named = ("layers/1", "re:.*q_proj")
    assert read_recipe(text) == (
        AWQ(n_grid=7),
        GPTQ(weights=Int(4, group(128)), activations=acts, search=MSE(), targets=named),
        RTN(weights=NVFP4()),
        EETQ(),
    )
    assert read_recipe("{RTN: {scheme: W4A16}}") == (RTN("W4A16"),)


def test_a_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(write_recipe(RECIPES[2]))
    assert read_recipe(file) == read_recipe(str(file)) == RECIPES[2]
    with pytest.raises(FileNotFoundError, match=r"'recipe\.yml' does not exist"):
        read_recipe("recipe.yml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- RTM: {}", r"'RTM' is unknown; known are RTN, HQQ.*MixedPrecision"),
        ("- RTN: {sheme: W4A16}", r"RTN: 'sheme' is unknown; fields are scheme, wei"),
        ("- RTN: {scheme: W4A61}", "unknown scheme 'W4A61'"),
        (
            "- RTN: {weights: {Int: {bit: 4}}}",
            "Int: 'bit' is unknown; fields are bits",
        ),
        ("- RTN: {weights: {Int: {}}}", "Int: 'bits' is missing"),
        ("- RTN: {weights: Uint}", "RTN.weights: 'Uint' is unknown; known are Int"),
        (
            "- RTN: {weights: {Int: {bits: 4, granularity: {group: []}}}}",
            "group takes 1",
        ),
        ("- RTN: W4A16", "RTN: expected {field: value}, got 'W4A16'"),
        ("- {RTN: {}, HQQ: {}}", "expected one {Name"),
        ("- RTN: {scheme: W4A16, scheme: FP8}", "key 'scheme' twice .* line 1"),
        ("- RTN: {", "the recipe is not YAML"),
        ("[]", "a recipe is a list of steps"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        read_recipe(text)


def test_only_methods_of_ours_are_written():
    with pytest.raises(TypeError, match="holds qjax's own methods, got 'W4A16'"):
        write_recipe("W4A16")


def stages(modifiers):
    return json.dumps({"quant_stage": {"quant_modifiers": modifiers}})


LINEAR = {"targets": "Linear", "ignore": ["lm_head"]}
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
W8_CHANNEL = {"num_bits": 8, "strategy": "channel", "dynamic": False}


@pytest.mark.parametrize(
    ("modifiers", "steps"),
    [
        ({"GPTQModifier": {"scheme": "W4A16", **LINEAR}}, (GPTQ(scheme="W4A16"),)),
        (
            {
                "GPTQModifier": {
                    "config_groups": {
                        "group_0": {"weights": {**W4, "actorder": "weight"}}
                    },
                    "ignore": ["re:.*lm_head"],
                    "dampening_frac": 0.05,
                    "block_size": 64,
                    "sequential_update": True,
                }
            },
            (
                GPTQ(
                    weights=Int(4, group(128)),
                    damping=0.05,
                    block_size=64,
                    act_order="static",
                ),
            ),
        ),
        (
            {"GPTQModifier": {"scheme": "W4A16", "actorder": None, **LINEAR}},
            (GPTQ(scheme="W4A16", act_order="off"),),
        ),
        (
            {
                "SmoothQuantModifier": {"smoothing_strength": 0.8},
                "GPTQModifier": {"scheme": "W8A8", **LINEAR},
            },
            (SmoothQuant(0.8, span=True), GPTQ(scheme="W8A8")),
        ),
        (
            {
                "AWQModifier": {"duo_scaling": "both", "n_grid": 10},
                "QuantizationModifier": {"scheme": "W4A16_ASYM", **LINEAR},
            },
            (AWQ(duo_scaling="both", n_grid=10), RTN(scheme="W4A16_ASYM")),
        ),
        (
            {"AWQModifier": {"scheme": "W4A16", **LINEAR}},
            (AWQ(), RTN(scheme="W4A16")),
        ),
        (
            {"QuantizationModifier": {"scheme": "fp8", **LINEAR}},
            (RTN(scheme="FP8", calibrator=MinMaxRange()),),
        ),
        (
            {
                "QuantizationModifier": {
                    "config_groups": {
                        "group_0": {
                            "weights": W8_CHANNEL,
                            "input_activations": {"num_bits": 8, "strategy": "tensor"},
                            "targets": ["Linear"],
                        }
                    },
                    "weight_observer": "mse",
                    **LINEAR,
                }
            },
            (
                RTN(
                    weights=Int(8, channel()),
                    activations=Activation(Int(8, tensor()), dynamic=False),
                    search=MSE(),
                    calibrator=MovingAverageRange(),
                ),
            ),
        ),
        (
            {"QuantizationModifier": {"scheme": "W8A16", "targets": ["Linear"]}},
            (RTN(scheme="W8A16", targets="Linear"),),
        ),
        (
            {
                "QuantizationModifier": {
                    "scheme": "W4A16",
                    "observer": {"weights": "imatrix_mse"},
                    **LINEAR,
                }
            },
            (IMatrix(scheme="W4A16"),),
        ),
    ],
)
def test_stages_of_llm_compressor(modifiers, steps):
    found = read_recipe(stages(modifiers))
    assert found == steps == steps_of(found)


def test_yaml_as_their_documentation_has_it():
    text = """
    quant_stage:
      quant_modifiers:
        GPTQModifier:
          sequential_update: true
          dampening_frac: 0.02
          ignore: ["lm_head"]
          config_groups:
            group_0:
              weights: {num_bits: 4, type: "int", symmetric: false,
                        strategy: "group", group_size: 64, observer: "mse",
                        observer_kwargs: {maxshrink: 0.5, grid: 50.0}}
              targets: ["Linear"]
    """
    fields = {"search": MSE(grid=50, maxshrink=0.5), "damping": 0.02}
    weights = Int(4, group(64), symmetric=False)
    assert read_recipe(text) == (GPTQ(weights=weights, **fields),)


def test_patterns_on_module_names():
    modifiers = {
        "GPTQModifier": {
            "scheme": "W4A16",
            "targets": ["re:.*self_attn.(q|k)_proj$", "model.layers.7.mlp.up_proj"],
            "ignore": ["re:.*layers\\.[0-5]\\."],
        },
        "QuantizationModifier": {
            "scheme": "W8A16",
            "targets": ["Linear"],
            "ignore": ["lm_head", "re:.*down_proj"],
        },
    }
    gptq, rtn = read_recipe(stages(modifiers), TINY)
    assert set(gptq.targets) == {
        *(f"layers/{n}/attn/{p}_proj/kernel" for n in (6, 7) for p in "qk"),
        "layers/7/mlp/up_proj/kernel",
    }
    assert rtn.targets is None
    assert rtn.ignore == tuple(f"layers/{n}/mlp/down_proj/kernel" for n in range(8))


def test_a_model_turns_the_usual_patterns_into_the_default():
    given = {"QuantizationModifier": {"scheme": "W8A16", **LINEAR}}
    assert read_recipe(stages(given), TINY) == (RTN(scheme="W8A16"),)
    assert read_config(TINY)[1].tied


def test_patterns_that_match_nothing():
    wrong = {"scheme": "W8A16", "targets": ["re:.*c_attn"]}
    with pytest.raises(ValueError, match=r"targets 're:.*c_attn' matches no module"):
        read_recipe(stages({"GPTQModifier": wrong}), TINY)
    ignored = {"scheme": "W8A16", "ignore": ["re:.*gate$"]}
    with pytest.warns(QuantizationWarning, match=r"ignore 're:.*gate\$' matches no"):
        read_recipe(stages({"GPTQModifier": ignored}), TINY)


def test_mappings_are_the_traced_programs():
    given = {"SmoothQuantModifier": {"mappings": [[["re:.*q_proj"], "re:.*norm"]]}}
    with pytest.warns(QuantizationWarning, match="mappings is not used"):
        assert read_recipe(stages(given)) == (SmoothQuant(span=True),)


GROUP = {"group_0": {"weights": {**W4, "bits": 4}}}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def test_a_coded_cache_is_a_step_of_its_own():
    fields = {"scheme": "W8A8", "kv_cache_scheme": CACHE, **LINEAR}
    given = {"SmoothQuantModifier": {}, "QuantizationModifier": fields}
    with pytest.warns(QuantizationWarning, match="largest key and value of all"):
        steps = read_recipe(stages(given))
    assert steps == (KVCache(), SmoothQuant(span=True), RTN(scheme="W8A8"))
    fields["kv_cache_scheme"] = CACHE | {"observer": "static_minmax"}
    assert read_recipe(stages(given)) == steps
    assert cache_apart(steps) == (steps[1:], True)
    assert read_recipe("[KVCache, RTN]")[0] == KVCache()
    with pytest.raises(ValueError, match=r"KVCache.*qjax\.quantize_cache\(f, params"):
        check_quantizes(steps_of(steps))
    with pytest.raises(ValueError, match="KVCache alone, which codes no weights"):
        cache_apart(KVCache())


@pytest.mark.parametrize(
    ("modifiers", "said"),
    [
        ({"SparseGPTModifier": {}}, "'SparseGPTModifier' is unknown; known are Quant"),
        ({"GPTQModifier": {"percdamp": 1}}, "'percdamp' is unknown; known .*dampening"),
        ({"GPTQModifier": {"scheme": "W4A61"}}, "unknown scheme 'W4A61'"),
        ({"GPTQModifier": {"config_groups": GROUP}}, "weights: 'bits' is unknown; kno"),
        ({"GPTQModifier": {}}, "needs scheme or config_groups"),
        (
            {"GPTQModifier": {"scheme": "W4A16", "actorder": "x"}},
            "actorder 'x' is",
        ),
        (
            {"GPTQModifier": {"scheme": "W4A16", "targets": ["re:.*q_proj"]}},
            r"'re:.*q_proj' names modules .* model=folder_or_id",
        ),
        (
            {"GPTQModifier": {"scheme": "W4A16", "kv_cache_scheme": {"num_bits": 8}}},
            "GPTQModifier.kv_cache_scheme is static int8 tensor, supported is float8",
        ),
        (
            {
                "GPTQModifier": {
                    "scheme": "W4A16",
                    "kv_cache_scheme": CACHE | {"observer": "mse"},
                }
            },
            "kv_cache_scheme.observer 'mse' has no counterpart",
        ),
        ({"AutoRoundModifier": {"scheme": "FP8"}}, "dynamic ones"),
        (
            {"QuantizationModifier": {"scheme": "FP8", "input_observer": "median"}},
            "input observer 'median' has no counterpart; known are minmax",
        ),
        (
            {"SmoothQuantModifier": {"algorithm": "log_equalization"}},
            "algorithm 'log_equalization' has no counterpart",
        ),
    ],
)
def test_what_has_no_counterpart(modifiers, said):
    with pytest.raises(ValueError, match=said):
        read_recipe(stages(modifiers))
