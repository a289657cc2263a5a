"""Which bundles of a schedule `kernels/bench/branches.py` counts."""

import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


@pytest.fixture
def branches():
    """The script."""
    spec = importlib.util.spec_from_file_location("branches", BENCH / "branches.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def schedule(*bodies):
    """A word, bodies behind jumps over them, a word; a jump counts with its body."""
    words = ["{ nop }"]
    for region, body in enumerate(bodies):
        words.append(f"{{ sbr.rel (%p) target = $region{region} /* {region - 1} */ }}")
        if region:
            words[-1] += f" /* Start region {region - 1} */"
        words += [f"{{ {op} }}" for op in body]
    words.append(f"{{ nop }} /* Start region {len(bodies) - 1} */")
    lines = [f" {hex(at) if at else '0'}   :  {word}" for at, word in enumerate(words)]
    return "\n".join(["// not a word", *lines])


PRODUCT, CODING = ["vmatmul.s8.mxu0"] * 5, ["vrcp.f32", "vmul.f32", "vst"]


@pytest.mark.parametrize(
    ("bodies", "longest", "together"),
    [
        # As ours: coding alone, then what every step does.
        ([CODING, PRODUCT], (8, 8), (12, 8)),
        # One body with coding, one without: the later step takes the second.
        ([CODING + PRODUCT, PRODUCT], (11, 8), (17, 8)),
        # Both code tokens, so every step does.
        ([CODING + PRODUCT, CODING + PRODUCT], (11, 11), (20, 20)),
        ([PRODUCT, PRODUCT], (8, 8), (14, 14)),
    ],
    ids=["apart", "one of two", "both", "none"],
)
def test_coding_of_tokens_is_in_the_first_step_only(
    branches, bodies, longest, together
):
    text = schedule(*bodies)
    assert branches.longest(text) == longest
    assert branches.together(text) == together
