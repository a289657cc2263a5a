"""Programs are shared by equal structure, and by nothing less."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.quantize import quantize_with_report
from qjax.scalesearch import linear_errors, module_errors
from qjax.sitesolver import _solve
from qjax.trace.rows import _run_update
from qjax.trace.segments import live, run_code

x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
SHAPES = {"w": (3, 8, 8)}


def at_top(array):
    return lambda p, x: jnp.tanh(x @ p["w"][0] + array)


def in_a_jit(array):
    layer = jax.jit(lambda h: h * array)
    return lambda p, x: layer(x) @ p["w"][0]


def in_an_opened_jit(array):
    layer = jax.jit(lambda h, w: (h * array) @ w)
    return lambda p, x: layer(x, p["w"][0])


def in_a_scan(array):
    def f(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w + array), None), x, p["w"])[0]

    return f


def in_a_scan_without_leaves(array):
    def f(p, x):
        scaled = jax.lax.scan(lambda h, _: (jnp.tanh(h + array), None), x, length=3)[0]
        return scaled @ p["w"][0]

    return f


def in_a_region(array):
    def f(p, x):
        step = lambda h, row: (jnp.tanh(row @ p["w"][0] + h + array), None)
        return jax.lax.scan(step, jnp.zeros(8), x)[0]

    return f


def in_a_custom_rule(array):
    @jax.custom_jvp
    def rule(h):
        return h + array

    rule.defjvp(lambda p, t: (rule(*p), t[0]))
    return lambda p, x: rule(x) @ p["w"][0]


def in_a_branch(array):
    def f(p, x):
        y = jax.lax.cond(x.sum() > 0, lambda h: h + array, lambda h: h - array, x)
        return y @ p["w"][0]

    return f


def as_a_literal(array):
    factor = float(np.max(array))
    return lambda p, x: (x * factor) @ p["w"][0]


def in_a_known_value(array):
    return lambda p, x: (x + jnp.cos(array) * 2) @ p["w"][0]


def in_a_random_stream(array):
    key = jax.random.key(int(jnp.sum(array)))
    draw = jax.jit(lambda shape: jax.random.normal(key, x.shape))
    return lambda p, x: (x + draw(x)) @ p["w"][0]


PLACES = (
    at_top,
    in_a_jit,
    in_an_opened_jit,
    in_a_scan,
    in_a_scan_without_leaves,
    in_a_region,
    in_a_custom_rule,
    in_a_branch,
    as_a_literal,
    in_a_known_value,
    in_a_random_stream,
)


@pytest.mark.parametrize("make", PLACES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [8, 5 * 8])
def test_a_captured_array_is_never_taken_for_another(kit, make, size):
    """Two functions of one text; both run through the same cache of programs."""
    params = kit.tree(SHAPES)
    for value in (1.0, 2.0):
        array = jnp.full(8 if size == 8 else (5, 8), value)
        if make is in_a_region and size != 8:
            array = array[0]
        f = make(array)
        (got,) = kit.through(f, params, [(x,)])
        assert kit.error(got, jax.jit(f)(params, x)) <= 1e-6


def test_large_literals_differ_by_content(kit):
    """The text of a jaxpr shows only the ends of a large array."""
    params = kit.tree(SHAPES)
    outs = []
    for value in (1.0, 2.0):
        array = np.zeros((5, 8000), np.float32)
        array[:, 4000] = value
        f = jax.jit(lambda p, x, a=array: (x @ p["w"][0]).sum() * jnp.asarray(a))
        (got,) = kit.through(f, params, [(x,)])
        outs.append(float(jnp.sum(got[0])))
    assert outs[1] == pytest.approx(2 * outs[0])


def sizes():
    return [f._cache_size() for f in (run_code, _run_update, _solve)]


@pytest.mark.parametrize("scan", [False, True])
def test_programs_do_not_grow_with_depth(kit, scan):
    """16 layers compile nothing that 4 have not."""
    counts, compiled = [], []
    for layers in (4, 16):
        f, params = kit.model("qwen3", layers=layers, scan_layers=scan)
        stream = kit.open_stream(f, params, [(kit.tokens(2, 12),)])
        kit.hessians(stream)
        stream.finish()
        counts.append(stream.programs.compiled)
        compiled.append(sizes())
    assert counts[0] == counts[1]
    assert compiled[0] == compiled[1]
    assert counts[0] < 20


def gained(params, x):
    for p in params:
        x = x + jnp.tanh((x * p["norm"]) @ p["up"]) @ p["down"]
    return x


def moved(layers, transform):
    """Sizes of the caches behind a transform's pass and the rounding after it."""
    rng = np.random.default_rng(0)
    shapes = {"up": (16, 32), "down": (32, 16)}
    one = {n: rng.normal(size=s).astype(np.float32) / 4 for n, s in shapes.items()}
    params = [{**one, "norm": np.ones(16, np.float32)} for _ in range(layers)]
    batches = [(rng.normal(size=(24, 16)).astype(np.float32),)]
    recipe = transform, qjax.RTN(weights=qjax.Int(4, qjax.channel()))
    _, report = quantize_with_report(gained, params, recipe, batches, progress=False)
    assert len(report.transforms) == 2 * layers
    assert any(row.into for row in report.transforms)
    return [*sizes(), *(f._cache_size() for f in (linear_errors, module_errors))]


@pytest.mark.parametrize("name", ["AWQ", "SmoothQuant"])
def test_programs_of_transforms_do_not_grow_with_depth(name):
    """16 layers compile nothing that 4 have not."""
    transform = getattr(qjax, name)()
    assert moved(4, transform) == moved(16, transform)


def test_layers_that_differ_do_not_share(kit):
    """A window in one layer only: its program is its own."""

    def f(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["w"][i])
            x = jnp.where(x > 0, x, 0) if i == 1 else x
        return x

    params = kit.tree(SHAPES)
    tape = kit.lanes(f, params, [(x,)])[0].tape
    places = [i for i, _ in tape.places] + [len(tape.ops)]
    keys = [live(tape, a, b).key for a, b in pairwise(places)]
    assert keys[0] == keys[2] != keys[1]
