"""Statistics of every site's input, against programs evaluated by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.lazy import LazyLeaf
from qjax.core.statistics import AbsMaximum, Hessian, Mean, MovingRange
from qjax.observe import namer
from qjax.trace.program import trace
from qjax.trace.sites import sites

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def observe(f, params, batches, statistics=None, **options):
    return qjax.observe(f, params, batches, statistics or Hessian(), **options)


def hessian(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5 * np.abs(want).max())


def layer_names(params):
    return [f"layers/{i}/{n}" for i in range(3) for n in ("q", "k", "o")]


def tiny(params, x, tap=lambda name, x: None, scan=False):
    """Three layers of q, k and o; what each reads goes to `tap`."""

    def layer(x, w, i=""):
        tap(f"layers/{i}/q", x)
        tap(f"layers/{i}/k", x)
        q, k = x @ w["q"].T, jnp.einsum("btk,khd->bthd", x, w["k"])
        mixed = jax.nn.silu(q)[..., None, :] * k
        tap(f"layers/{i}/o", mixed.reshape(*x.shape[:2], -1))
        return x + jnp.einsum("bthd,hdn->btn", mixed, w["o"])

    if scan:
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])[0]
    for i, w in enumerate(params["layers"]):
        x = layer(x, w, i)
    return x


def tiny_params():
    shapes = {"q": (4, 8), "k": (8, 2, 4), "o": (2, 4, 8)}
    return {
        "layers": [{n: normal(*s) / 3 for n, s in shapes.items()} for _ in range(3)]
    }


def stacked(params):
    return {"layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}


BATCHES = [(normal(2, 5, 8),), (normal(3, 2, 8),), (normal(2, 5, 8),)]


def taken(params, batches):
    seen = {}
    for (x,) in batches:
        tiny(
            params,
            x,
            lambda name, h: seen.setdefault(name, []).append(h.reshape(-1, 8)),
        )
    return {name: np.concatenate(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("scan", [False, True])
def test_the_hessian_of_every_site(scan):
    """Unrolled and scanned, transposed and three-dimensional kernels, two shapes."""
    params = tiny_params()
    given = stacked(params) if scan else params
    got = observe(lambda p, x: tiny(p, x, scan=scan), given, BATCHES)
    assert sorted(got) == sorted(layer_names(params))
    for name, rows in taken(params, BATCHES).items():
        close(got[name], hessian(rows))


def test_several_statistics_by_name():
    params = tiny_params()
    asked = {"h": Hessian(), "m": Mean(), "max": AbsMaximum(), "r": MovingRange()}
    got = observe(tiny, params, BATCHES, asked, targets="layers/1/*")
    assert sorted(got) == ["layers/1/k", "layers/1/o", "layers/1/q"]
    rows = taken(params, BATCHES)["layers/1/o"]
    found = got["layers/1/o"]
    close(found["h"], hessian(rows))
    close(found["m"], rows.mean(0))
    close(found["max"], np.abs(rows).max(0))
    assert float(found["r"].low[0]) < 0 < float(found["r"].high[0])


def test_padding_does_not_count():
    params = tiny_params()
    x = normal(2, 5, 8)
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], jnp.float32)
    got = observe(tiny, params, [(x.at[0, 4].set(jnp.nan),)], mask_fn=lambda x: mask)
    tiny_rows = taken(params, [(x,)])
    for name, rows in tiny_rows.items():
        close(got[name], hessian(rows[np.asarray(mask).reshape(-1) > 0]))


def test_a_mask_of_other_tokens_is_refused():
    with pytest.raises(
        ValueError, match=r"mask of batch 0 has shape \(3,\).*10 tokens"
    ):
        observe(tiny, tiny_params(), BATCHES, mask_fn=lambda x: jnp.ones(3))


def test_no_batch_no_site_no_match():
    params = tiny_params()
    with pytest.raises(ValueError, match="at least one batch"):
        observe(tiny, params, [])
    with pytest.raises(ValueError, match="'head' matches no site"):
        observe(tiny, params, BATCHES, targets="head")
    with pytest.raises(ValueError, match="no site whose weight is a parameter"):
        observe(lambda p, x: x * p["g"], {"g": jnp.ones(8)}, [(jnp.ones((2, 8)),)])


def test_what_is_not_finite_is_named():
    def f(params, x):
        return jnp.log(x @ params["a"]) @ params["b"]

    params = {"a": -jnp.eye(4), "b": jnp.eye(4)}
    with pytest.raises(ValueError, match=r"^the input of b holds 8 NaN or Inf"):
        observe(f, params, [(jnp.ones((2, 4)),)])


def test_a_leaf_that_is_read_twice():
    """Over all of its uses; a lookup has no input, a second layout does not count."""

    def twice(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    params, x = {"w": normal(6, 6)}, normal(5, 6)
    got = observe(twice, params, [(x,)])["w"]
    close(got, hessian(np.concatenate([x, np.tanh(x @ params["w"])])))

    def turned(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    params = {"w": normal(6, 3)}
    close(observe(turned, params, [(x,)])["w"], hessian(x))

    def tied(params, ids):
        return jnp.sin(params["e"][ids]) @ params["e"].T

    params, ids = {"e": normal(7, 4)}, jnp.array([[1, 5], [0, 6]])
    got = observe(tied, params, [(ids,)])["e"]
    close(got, hessian(np.sin(params["e"][ids])))


def test_convolutions_and_experts():
    def f(params, image, rows, sizes):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            image, params["conv"], (1, 1), "VALID", dimension_numbers=numbers
        )
        grouped = jax.lax.conv_general_dilated(
            image, params["deep"], (1, 1), "VALID", dimension_numbers=numbers,
            feature_group_count=2,
        )  # fmt: skip
        return y, grouped, jax.lax.ragged_dot(rows, params["experts"], sizes)

    params = {
        "conv": normal(2, 2, 3, 5)[:, :, :2],
        "deep": normal(2, 2, 1, 4),
        "experts": normal(3, 6, 4),
    }
    image, rows, sizes = normal(1, 4, 4, 2), normal(7, 6), jnp.array([5, 0, 2])
    got = observe(f, params, [(image, rows, sizes)])
    assert sorted(got) == ["conv", "experts"]
    patches = [
        np.asarray(image[0, i : i + 2, j : j + 2]).reshape(-1)
        for i in range(3)
        for j in range(3)
    ]
    close(got["conv"], hessian(np.stack(patches)))
    for expert, own in enumerate((rows[:5], rows[5:5], rows[5:])):
        want = hessian(own) if len(own) else np.zeros((6, 6))
        np.testing.assert_allclose(got["experts"][expert], want, rtol=1e-4, atol=1e-4)


def test_what_is_inside_control_flow():
    """A cell over time is seen at every step; a branch never taken is absent."""

    def f(params, x):
        def step(h, row):
            return jnp.tanh(row @ params["w"] + h @ params["u"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((x.shape[1], 4)), x)
        return jax.lax.cond(
            h.sum() < 1e9, lambda h: h @ params["a"], lambda h: h @ params["b"], h
        )

    params = {
        "w": normal(6, 4),
        "u": normal(4, 4),
        "a": normal(4, 2),
        "b": normal(4, 2),
    }
    x = normal(7, 3, 6)
    got = observe(f, params, [(x,)])
    assert sorted(got) == ["a", "u", "w"]
    h, states = np.zeros((3, 4)), []
    for row in np.asarray(x):
        states.append(h)
        h = np.tanh(row @ params["w"] + h @ params["u"])
    close(got["w"], hessian(x))
    close(got["u"], hessian(np.concatenate(states)))
    close(got["a"], hessian(h))


def test_quantized_and_lazy_leaves():
    params = tiny_params()
    want = observe(tiny, params, BATCHES)
    lazy = jax.tree.map(lambda x: LazyLeaf(x.shape, x.dtype, lambda: x), params)
    got = observe(tiny, lazy, BATCHES)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    method = qjax.RTN(weights=qjax.Int(4), targets="Linear")
    qparams = qjax.quantize(tiny, params, method, BATCHES, progress=False)
    rounded = observe(tiny, qparams, BATCHES)
    for name, rows in taken(qjax.dequantize(qparams), BATCHES).items():
        close(rounded[name], hessian(rows))
    assert np.abs(rounded["layers/2/q"] - want["layers/2/q"]).max() > 1e-4


def test_a_name_for_every_layer_of_every_leaf():
    """Gains and biases of a stack too, which are no sites."""

    def f(params, x):
        def layer(x, w):
            return jnp.tanh((x * w["norm"]["g"]) @ w["mlp"]["w"] + w["mlp"]["b"]), None

        x, _ = jax.lax.scan(layer, x, params["h"]["layers"])
        return x @ params["head"] * params["scale"]

    layers = {
        "mlp": {"w": normal(3, 4, 4), "b": normal(3, 4)},
        "norm": {"g": normal(3, 4)},
    }
    params = {"h": {"layers": layers}, "head": normal(4, 2), "scale": normal(2)}
    x = normal(5, 4)
    program = trace(f, params, (x,))
    name = namer(sites(f, params, x), program)
    numbers = {path: i for i, path in enumerate(program.paths)}
    assert name((numbers["h/layers/mlp/w"], (2,))) == "h/layers/2/mlp/w"
    assert name((numbers["h/layers/mlp/b"], (1,))) == "h/layers/1/mlp/b"
    assert name((numbers["h/layers/norm/g"], (0,))) == "h/layers/0/norm/g"
    assert name((numbers["head"], ())) == "head"
    assert name((numbers["scale"], ())) == "scale"
