"""The driver: what it takes, what it leaves, what it refuses, what it costs."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.core.formats import Int, group
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import QTensor, Stacked, dequantize, is_quantized
from qjax.methods import HQQ, RTN
from qjax.models.functional import Function
from qjax.quantize import quantize, quantize_with_report
from qjax.solving import chunk_size, solve_chunk
from qjax.trace.apply import apply
from qjax.trace.control import QuantizationWarning
from qjax.trace.paths import flatten_with_paths

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 32)), jnp.float32)
BATCH = ((X,),)
G16 = Int(4, group(16))


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def chain(params, x):
    """Layers in a scan, then a foreign head."""
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["w"])
    return x @ params["out"]


def chain_params(layers=5):
    return {"layers": {"w": normal(layers, 32, 32)}, "out": normal(32, 10)}


def run(f, params, recipe, calibration=BATCH, **options):
    return quantize(f, params, recipe, calibration, progress=False, **options)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def test_report_says_what_happened():
    params = chain_params()
    recipe = (RTN("W8A16", targets="out"), HQQ(bits=3, group_size=16))
    q, report = quantize_with_report(chain, params, recipe, BATCH, progress=False)
    by_path = {row.path: row for row in report}
    assert set(by_path) == {"layers/w", "out"}
    row = by_path["layers/w"]
    assert len(row.names) == 5
    assert (row.method, row.format) == ("HQQ", HQQ(bits=3, group_size=16).format.name)
    w, back = params["layers"]["w"], q["layers"]["w"].dequantize()
    exact = float(jnp.linalg.norm(w - back) / jnp.linalg.norm(w))
    assert row.error == pytest.approx(exact, rel=1e-4)
    assert row.bits_per_weight == q["layers"]["w"].bits_per_weight
    assert row.seconds > 0 and row.fallback == ""
    assert "declares no head" in report.notes[0]
    assert report.table().row_count == len(report) == 2


def test_head_declared_by_the_function_stays_in_float():
    class Model:
        head = "out"

        def __call__(self, params, x):
            return chain(params, x)

    q, report = quantize_with_report(
        Model(), chain_params(), RTN(), BATCH, progress=False
    )
    assert not is_quantized(q["out"]) and report.notes == ()
    assert is_quantized(run(Model(), chain_params(), RTN(targets="out"))["out"])


def test_tied_embedding():
    def tied(params, tokens):
        return jnp.tanh(params["embed"][tokens] @ params["w"]) @ params["embed"].T

    params = {"embed": normal(20, 32), "w": normal(32, 32)}
    tokens = ((jnp.arange(6).reshape(2, 3),),)
    left = run(tied, params, RTN(), tokens)
    assert [p for p, x in flatten_with_paths(left) if is_quantized(x)] == ["w"]
    asked = run(tied, params, RTN(weights=G16, targets="embed"), tokens)
    assert asked["embed"].layout.K == 32
    y = apply(tied)(asked, tokens[0][0])
    np.testing.assert_allclose(y, tied(dequantize(asked), tokens[0][0]), atol=1e-5)


def test_layers_of_one_stack_may_differ():
    params = chain_params()
    _, report = quantize_with_report(
        chain, params, RTN(targets="layers/*"), BATCH, progress=False
    )
    recipe = (RTN("W8A16", targets=report[0].names[1:3]), RTN(weights=G16))
    q = run(chain, params, recipe)
    leaf = q["layers"]["w"]
    assert isinstance(leaf, Stacked)
    assert leaf.ranges == ((0, 1), (1, 3), (3, 5))
    assert [p.parts[0].format.bits for p in leaf.parts] == [4, 8, 4]
    alike = run(chain, params, RTN(weights=G16))["layers"]["w"].dequantize()
    np.testing.assert_array_equal(leaf.dequantize()[3:], alike[3:])
    np.testing.assert_allclose(apply(chain)(q, X), chain(dequantize(q), X), atol=1e-5)


def test_part_of_a_stack_cannot_stay_in_float():
    _, report = quantize_with_report(
        chain, chain_params(), RTN(), BATCH, progress=False
    )
    name = report[0].names[2]
    with pytest.raises(ValueError, match=f"{name} cannot stay in float"):
        run(chain, chain_params(), RTN(ignore=name))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_named_and_counted(bad):
    params = chain_params()
    w = params["layers"]["w"].at[3, 0, :2].set(bad)
    with pytest.raises(ValueError, match=r"3.* holds 2 NaN or Inf of 1024 values"):
        run(chain, {**params, "layers": {"w": w}}, RTN())
    with pytest.raises(ValueError, match=r"out holds 1 NaN or Inf of 320 values"):
        run(chain, {**params, "out": params["out"].at[0, 0].set(bad)}, HQQ())


def test_bad_calls_are_refused_in_a_sentence():
    params = chain_params()
    with pytest.raises(ValueError, match="give calibration"):
        run(chain, params, RTN(), None)
    with pytest.raises(ValueError, match="give calibration"):
        run(chain, params, RTN(), [])
    with pytest.raises(TypeError, match=r"write \(x,\)"):
        run(chain, params, RTN(), [X])
    with pytest.raises(ValueError, match=r"give key=jax.random.key"):
        run(chain, params, RTN(rounding="stochastic"))
    with pytest.raises(ValueError, match=r"'outt' matches no site.*out"):
        run(chain, params, RTN(targets="outt"))
    with pytest.warns(QuantizationWarning, match="'head' matches nothing"):
        run(chain, params, RTN(ignore="head"))


def test_traces_on_shapes_alone():
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    params = chain_params()
    by_shape = quantize(chain, params, RTN(), example=(shape,), progress=False)
    assert same(by_shape, run(chain, params, RTN()))


def test_quantized_leaves_are_left_alone():
    once = run(chain, chain_params(), RTN("W8A16", targets="out"))
    twice = run(chain, once, RTN())
    assert twice["out"] is once["out"] and is_quantized(twice["layers"]["w"])


def test_a_recipe_must_quantize_something():
    for step in (qjax.SmoothQuant(), qjax.AWQ(), qjax.BiasCorrection()):
        with pytest.raises(ValueError, match=r"\(\w+\) quantizes no weights: add"):
            run(chain, chain_params(), step)
    every = run(chain, chain_params(), RTN("W8A16"))
    with pytest.raises(ValueError, match="is quantized already"):
        run(chain, every, RTN("W4A16"))


def test_numpy_leaves():
    params = chain_params()
    arrays = jax.tree.map(np.asarray, params)
    assert same(run(chain, arrays, RTN()), run(chain, params, RTN()))


def test_experts_have_a_scale_each():
    def moe(params, x):
        return jnp.einsum("ecd,edf->ecf", x, params["up"])

    params, x = {"up": normal(3, 32, 16)}, normal(3, 4, 32)
    q = run(moe, params, RTN(weights=G16), ((x,),))
    assert isinstance(q["up"], QTensor) and q["up"].lead == (3,)
    alone = run(lambda p, x: x @ p["up"], {"up": params["up"][1]}, RTN(weights=G16))
    np.testing.assert_array_equal(q["up"].dequantize()[1], alone["up"].dequantize())


def test_convolutions_are_taken_too():
    def conv(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, params["k"], (1, 1), "SAME", dimension_numbers=dims
        )

    params, x = {"k": normal(3, 3, 8, 16)}, normal(2, 5, 5, 8)
    q = run(conv, params, RTN(weights=G16, targets="Conv"), ((x,),))
    assert (q["k"].layout.K, q["k"].layout.N) == (72, 16)
    np.testing.assert_allclose(apply(conv)(q, x), conv(dequantize(q), x), atol=1e-4)


def test_a_second_way_of_reading_a_leaf_is_reported():
    def both(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    params = {"w": normal(32, 16)}
    _, report = quantize_with_report(both, params, RTN(), BATCH, progress=False)
    assert "dequantized where dot reads it" in report[0].fallback
    columns = {str(c.header): list(c.cells) for c in report.table().columns}
    assert columns["fallback"] == [report[0].fallback]


def test_the_note_on_heads_is_about_steps_without_targets():
    def notes(recipe):
        return quantize_with_report(
            chain, chain_params(), recipe, BATCH, progress=False
        )[1].notes

    assert notes(RTN("W8A16", targets="layers")) == ()
    assert "step without targets" in notes((RTN("W8A16", targets="layers"), RTN()))[0]


def test_sharded_leaves_give_the_same_codes():
    def spread_over(axis_type):
        mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
        return jax.NamedSharding(mesh, jax.P(None, None, "model"))

    params = {"layers": {"w": normal(5, 32, 32)}, "out": normal(32, 16)}
    spread = spread_over(jax.sharding.AxisType.Auto)
    held = {**params, "layers": {"w": jax.device_put(params["layers"]["w"], spread)}}
    for method in (RTN(weights=G16), HQQ(group_size=16)):
        assert same(run(chain, held, method), run(chain, params, method))
    explicit = spread_over(jax.sharding.AxisType.Explicit)
    held["layers"] = {"w": jax.device_put(params["layers"]["w"], explicit)}
    with pytest.raises(
        ValueError, match=r"layers/w is sharded over a mesh.*AxisType.Auto"
    ):
        run(chain, held, RTN())


def test_layers_indexed_in_a_loop_are_layers_too():
    def loop(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["w"][i])
        return x

    params = {"w": normal(3, 32, 32)}
    q = run(loop, params, RTN(weights=G16))
    assert q["w"].shape == (3, 32, 32) and q["w"].lead == (3,)
    np.testing.assert_allclose(apply(loop)(q, X), loop(dequantize(q), X), atol=1e-5)


@pytest.mark.parametrize("method", [RTN(weights=G16), HQQ(group_size=16)])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_budget_changes_nothing(method, slices):
    params = chain_params()
    budget = slices * 32 * 32 * 4
    assert same(
        run(chain, params, method, batch_bytes=budget), run(chain, params, method)
    )


def test_one_compilation_per_shape():
    """Five layers in chunks of two: the last chunk is filled up, not compiled again."""
    method = RTN(weights=Int(5, group(8)))
    before = solve_chunk._cache_size()
    run(chain, chain_params(), method, batch_bytes=2 * 32 * 32 * 4)
    assert solve_chunk._cache_size() - before == 2  # [32, 32] and [32, 10]


@pytest.mark.parametrize(
    ("slices", "fit", "size"),
    [(10, 4, 4), (9, 4, 3), (5, 100, 5), (7, 0, 1), (8, 4, 4)],
)
def test_chunks_are_even(slices, fit, size):
    assert chunk_size(slices, 8, 8, fit * 8 * 8 * 4) == size


class Disk:
    """Lazy leaves which count their reads and see what is alive at each."""

    def __init__(self):
        self.reads, self.alive = [], []

    def leaf(self, name, array):
        def read():
            gc.collect()
            live = [x for x in jax.live_arrays() if x.shape == (32, 32)]
            self.alive.append(len(live) - self.base)
            self.reads.append(name)
            return jnp.asarray(array)

        return LazyLeaf(array.shape, array.dtype, read)

    def start(self):
        gc.collect()
        self.base = len([x for x in jax.live_arrays() if x.shape == (32, 32)])


def test_lazy_leaves_are_read_one_at_a_time():
    def deep(params, x):
        for w in params["w"]:
            x = jnp.tanh(x @ w)
        return x * params["gain"]

    arrays = [np.asarray(normal(32, 32)) for _ in range(6)]
    disk = Disk()
    lazy = {
        "gain": disk.leaf("gain", np.ones(32, np.float32)),
        "w": [disk.leaf(i, a) for i, a in enumerate(arrays)],
    }
    disk.start()
    q = run(deep, lazy, RTN(weights=G16), batch_bytes=1)
    assert disk.reads == [*range(6), "gain"]
    assert max(disk.alive) == 0  # the leaf before is gone when the next is read
    loaded = {"gain": jnp.ones(32), "w": [jnp.asarray(a) for a in arrays]}
    assert same(q, run(deep, loaded, RTN(weights=G16)))
    np.testing.assert_allclose(apply(deep)(q, X), deep(dequantize(q), X), atol=1e-5)


def test_donated_leaves_are_deleted_unless_shared():
    def twice(params, x):
        return x @ params["a"] + x @ params["b"] + x @ params["c"]

    shared = normal(32, 32)
    params = {"a": normal(32, 32), "b": shared, "c": shared}
    q = run(twice, params, RTN(weights=G16), donate=True)
    assert params["a"].is_deleted() and not shared.is_deleted()
    assert bool(jnp.isfinite(apply(twice)(q, X)).all())


def test_progress_bar_ends_full(capsys):
    quantize(chain, chain_params(), RTN(), BATCH)
    assert "100%" in capsys.readouterr().out


def test_head_and_routers_stay_in_float_unless_asked_for():
    def call(p, x):
        return (x @ p["router"]) @ p["up"] @ p["lm_head"]["kernel"]

    f = Function(call, head="lm_head/kernel", routers=("router",))
    params = {name: normal(32, 32) for name in ("router", "up")}
    params["lm_head"] = {"kernel": normal(32, 32)}

    def taken(recipe):
        q = run(f, params, recipe)
        return {path for path, x in flatten_with_paths(q) if is_quantized(x)}

    assert taken(RTN("W8A16")) == {"up"}
    assert taken(RTN("W8A16", targets=("router", "lm_head"))) == {
        "router",
        "lm_head/kernel",
    }
