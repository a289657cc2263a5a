"""A pass in which nothing is solved gives the numbers of the program, bit for bit."""

import jax
import jax.numpy as jnp
import pytest

from qjax.models import ARCHITECTURES

pytestmark = pytest.mark.optimized

# XLA folds what it knows before the program runs, and fuses inside a program only. The
# pass makes known values anew in every program, and cuts at the sites, so that the
# numbers are those of the whole program. There are two exceptions:
# - where a norm ends a block (BERT, OPT-350m, Gemma) the whole program makes its last
#   product anew inside the residual sum, with one rounding less;
# - a product with joined leaves is made leaf by leaf.
POST_NORM = ("bert", "opt_350m", "gemma2", "gemma3_text")
ROUNDING = 1e-6


def test_every_case_keeps_its_numbers(kit):
    for name, case in kit.CASES.items():
        params = kit.tree(case.shapes)
        (got,) = kit.through(case.f, params, [case.inputs])
        want = jax.jit(case.f)(params, *case.inputs)
        bound = ROUNDING if name == "concatenated" else 0
        assert kit.error(got, want) <= bound, name


# Under the names of `kit.model`: two of them have a second form.
NAMES = sorted({*ARCHITECTURES, "llama_tied", "opt_350m"})


def test_architectures_are_all_here(kit):
    assert sorted(kit.KINDS) == NAMES
    assert set(kit.KINDS.values()) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", NAMES)
def test_models_keep_their_numbers(kit, name):
    f, params = kit.model(name)
    batch = (kit.tokens(2, 12),)
    (got,) = kit.through(f, params, [batch])
    bound = ROUNDING if name in POST_NORM else 0
    assert kit.error(got, jax.jit(f)(params, *batch)) <= bound


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_scanned_models_with_remat_and_two_shapes(kit, name):
    f, params = kit.model(name, layers=3, scan_layers=True, remat=True)
    batches = [(kit.tokens(2, 12),), (kit.tokens(3, 7, 1),), (kit.tokens(2, 12, 2),)]
    for got, batch in zip(kit.through(f, params, batches), batches, strict=True):
        assert kit.error(got, jax.jit(f)(params, *batch)) == 0


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16(kit, scan):
    f, params = kit.model("qwen3", dtype=jnp.bfloat16, scan_layers=scan)
    batch = (kit.tokens(2, 12),)
    (got,) = kit.through(f, params, [batch])
    assert kit.error(got, jax.jit(f)(params, *batch)) <= 2**-7


def test_third_party_models_keep_their_numbers(kit):
    for name, (build, inputs, _) in kit.load("test_third_party").MODELS.items():
        f, params = build()
        (got,) = kit.through(f, params, [inputs])
        assert kit.error(got, jax.jit(f)(params, *inputs)) <= ROUNDING, name
