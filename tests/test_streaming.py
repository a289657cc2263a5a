"""Calibrated quantization: sequential and exact, whatever the program looks like."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.coded import pack_codes
from qjax.core.formats import Int, channel
from qjax.core.scales import Grid
from qjax.core.statistics import Cross, Hessian
from qjax.methods.base import Solution
from qjax.quantize import quantize_with_report
from qjax.sitesolver import _solve

RNG = np.random.default_rng(0)
FORMAT = Int(3, channel())


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@jax.jit
def clipped(w, h):
    """`w` rounded on grids of ten sizes; of these the best on the inputs."""
    grid = FORMAT.fit(w)

    def error(size):
        small = Grid(grid.scale * size, grid.zero)
        delta = w - FORMAT.from_codes(FORMAT.to_codes(w, small), small)
        return jnp.sum(delta * (h @ delta), axis=0)

    sizes = jnp.linspace(0.55, 1.0, 10)
    best = sizes[jnp.argmin(jax.vmap(error)(sizes), axis=0)]
    grid = Grid(grid.scale * best, grid.zero)
    return pack_codes(FORMAT.to_codes(w, grid), grid, FORMAT, w.shape)


@dataclass(frozen=True)
class Clip:
    """A method that reads the Hessian: clipping by the error of the output."""

    targets: Any = "Linear"
    ignore: Any = ()
    full_precision: bool = False
    shared: bool = True
    random: bool = False
    activation: Any = None
    calibrator: Any = None
    format: Any = FORMAT
    statistics: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        asked = {"h": Hessian()} | ({"c": Cross()} if self.full_precision else {})
        object.__setattr__(self, "statistics", asked)

    def solve_site(self, w, stats, key=None):
        dead = jnp.sum(jnp.diagonal(stats["h"]) == 0)
        notes = {"dead": dead, "trace": jnp.trace(stats["h"])}
        if self.full_precision:
            notes["drift"] = jnp.abs(stats["c"]).max()
        return Solution((clipped(w, stats["h"]),), notes=notes)


def run(f, params, batches, method=None, **options):
    recipe = method or Clip()
    return quantize_with_report(f, params, recipe, batches, progress=False, **options)


unpacked = jax.jit(lambda part: part.unpack())
decoded = jax.jit(lambda part: part.decode(jnp.float32))
dequantized = jax.jit(qjax.dequantize)


def codes(leaf):
    return np.asarray(unpacked(leaf.parts[0]))


def by_name(report):
    return {row.name: row for row in report.sites}


def by_hand(w, rows):
    """The codes of one site from its input rows, in float32 as the pass has them."""
    rows = np.asarray(rows, np.float32).reshape(-1, rows.shape[-1])
    return clipped(w, rows.T @ rows / len(rows))


def same_codes(a, b, share=0.995):
    assert np.mean(a == b) >= share


def net(params, x, scan=False):
    def layer(x, w):
        q, k = jnp.tanh(x @ w["q"]), x @ w["k"]
        return x + (q * k) @ w["o"]

    if scan:
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])
    else:
        for w in params["layers"]:
            x = layer(x, w)
    return x @ params["head"]


def net_params(layers=3):
    every = [{n: normal(16, 16) / 4 for n in "qko"} for _ in range(layers)]
    return {"layers": every, "head": normal(16, 8)}


def stacked(params):
    layers = jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])
    return {**params, "layers": layers}


def scanned(params, x):
    return net(params, x, scan=True)


BATCHES = [(normal(2, 9, 16),), (normal(4, 3, 16),), (normal(2, 9, 16),)]


def test_every_site_sees_what_its_quantized_predecessors_make():
    """Each layer replayed by hand with the codes of the ones before."""
    params = net_params()
    q, report = run(net, params, BATCHES, Clip(ignore=("head",)))
    x = np.concatenate([np.asarray(b[0]).reshape(-1, 16) for b in BATCHES])
    for i, (w, new) in enumerate(zip(params["layers"], q["layers"], strict=True)):
        solved = {n: by_hand(w[n], x) for n in "qk"}
        qk = [x @ decoded(solved[n]) for n in "qk"]
        mixed = jnp.tanh(qk[0]) * qk[1]
        solved["o"] = by_hand(w["o"], mixed)
        for n in "qko":
            same_codes(codes(new[n]), np.asarray(unpacked(solved[n])))
            trace = by_name(report)[f"layers/{i}/{n}"].notes["trace"]
            seen = x if n in "qk" else np.asarray(mixed)
            assert trace == pytest.approx(np.square(seen).sum(-1).mean(), rel=1e-4)
        x = x + mixed @ decoded(solved["o"])


def test_scanned_layers_get_the_codes_of_unrolled_ones():
    params = net_params()
    q, one = run(net, params, BATCHES)
    s, two = run(scanned, stacked(params), BATCHES)
    for n in "qko":
        own = np.stack([codes(layer[n]) for layer in q["layers"]])
        np.testing.assert_array_equal(own, codes(s["layers"][n]))
    np.testing.assert_array_equal(codes(q["head"]), codes(s["head"]))
    assert list(by_name(one)) == list(by_name(two))
    for name, row in by_name(one).items():
        assert by_name(two)[name].error == pytest.approx(row.error, rel=1e-4)
        assert row.error < row.error_before
        assert row.samples == 48


def test_the_full_precision_stream():
    """Nothing drifts before something is quantized; `tanh` of it does."""
    _, report = run(net, net_params(), BATCHES, Clip(full_precision=True))
    drift = {name: row.notes["drift"] for name, row in by_name(report).items()}
    assert drift["layers/0/q"] == drift["layers/0/k"] == 0
    assert all(drift[f"layers/{i}/o"] > 0 for i in range(3))


@pytest.mark.parametrize("scan", [False, True])
def test_programs_do_not_grow_with_depth(scan):
    sizes = []
    for layers in (4, 16):
        params = net_params(layers)
        f = scanned if scan else net
        run(f, stacked(params) if scan else params, BATCHES)
        sizes.append(_solve._cache_size())
    assert sizes[0] == sizes[1]


def alone(w, rows):
    return np.asarray(unpacked(by_hand(w, rows)))


def test_kernels_of_every_shape():
    """Transposed, `[D, H, d]`, `[H, d, D]`, joined, convolved; in leaf order."""

    def f(p, x):
        q = jnp.einsum("tD,Dhd->thd", x, p["q"])
        o = jnp.einsum("thd,hdD->tD", jnp.sin(q), p["o"])
        a = jnp.tanh(o) @ jnp.concatenate([p["a"].T, p["b"]], axis=1)
        image = jnp.cos(a).reshape(1, 3, 4, 8)
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, p["conv"], (1, 1), "VALID", dimension_numbers=numbers
        )

    params = {
        "q": normal(16, 2, 4),
        "o": normal(2, 4, 16),
        "a": normal(5, 16),
        "b": normal(16, 3),
        "conv": normal(2, 2, 8, 6),
    }
    x = normal(12, 16)
    q, report = run(f, params, [(x,)], Clip(targets=("Linear", "Conv")))
    w = dequantized(q)
    mixed = jnp.sin(jnp.einsum("tD,Dhd->thd", x, w["q"])).reshape(12, 8)
    hidden = jnp.tanh(mixed @ w["o"].reshape(8, 16))
    image = jnp.cos(hidden @ jnp.concatenate([w["a"].T, w["b"]], axis=1))
    image = image.reshape(3, 4, 8)
    patches = np.stack(
        [image[i : i + 2, j : j + 2].reshape(-1) for i in range(2) for j in range(3)]
    )
    same_codes(codes(q["q"]), alone(params["q"].reshape(16, 8), x))
    same_codes(codes(q["o"]), alone(params["o"].reshape(8, 16), mixed))
    same_codes(codes(q["a"]), alone(params["a"].T, hidden))
    same_codes(codes(q["b"]), alone(params["b"], hidden))
    same_codes(codes(q["conv"]), alone(params["conv"].reshape(32, 6), patches))
    assert by_name(report)["conv"].samples == 6


def test_experts():
    """Batched and ragged; one that sees nothing is solved as if on white noise."""

    def f(p, x, sizes):
        each = jnp.stack([x, 2 * x, jnp.sin(x)], axis=1)
        y = jnp.einsum("tek,ekn->etn", each, p["dense"])
        return y, jax.lax.ragged_dot(x, p["ragged"], sizes)

    params = {"dense": normal(3, 16, 6), "ragged": normal(3, 16, 6)}
    x, sizes = normal(12, 16), jnp.array([7, 0, 5], jnp.int32)
    method = Clip(targets=("dense", "ragged"))
    q, report = run(f, params, [(x, sizes)], method)
    for e, rows in enumerate((x[:7], np.eye(16) * 4, x[7:])):
        same_codes(codes(q["ragged"])[e], alone(params["ragged"][e], rows))
        each = (x, 2 * x, jnp.sin(x))[e]
        same_codes(codes(q["dense"])[e], alone(params["dense"][e], each))
    row = by_name(report)["ragged"]
    assert row.samples == 0
    assert "1 of 3 experts: no samples reached it" in row.fallback
    assert by_name(report)["dense"].fallback == ""


def test_sites_inside_control_flow():
    """A cell over time has its statistics; a branch never taken says so."""

    def f(p, x):
        def step(h, row):
            return jnp.tanh(row @ p["w"] + h @ p["u"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((x.shape[1], 16)), x)
        return jax.lax.cond(h.sum() < 1e9, lambda: h @ p["a"], lambda: h @ p["b"])

    params = {n: normal(16, 16) / 4 for n in "wuab"}
    x = normal(7, 3, 16)
    q, report = run(f, params, [(x,)])
    rows = by_name(report)
    same_codes(codes(q["w"]), alone(params["w"], x))
    # Sites of one region are solved in order; the later see what the earlier became.
    assert next(iter(rows)) == "w"
    w, h, states = dequantized(q["w"]), jnp.zeros((3, 16)), []
    for row in x:
        states.append(h)
        h = jnp.tanh(row @ w + h @ params["u"])
    same_codes(codes(q["u"]), alone(params["u"], np.concatenate(states)))
    assert rows["w"].samples == rows["u"].samples == 21
    assert rows["w"].fallback == ""
    assert "no samples reached it" in rows["b"].fallback
    assert rows["a"].samples == 3


def test_what_stays_closed_is_reported():
    mesh = jax.make_mesh((8,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def f(p, x):
        inside = jax.shard_map(
            lambda x, w: x @ w,
            mesh=mesh,
            in_specs=(spec(), spec(None, "m")),
            out_specs=spec(None, "m"),
        )
        return inside(x, p["w"]) @ p["v"]

    params = {"w": normal(16, 16), "v": normal(16, 8)}
    _, report = run(f, params, [(normal(4, 16),)])
    row = by_name(report)["w"]
    assert "inside shard_map, which is not opened" in row.fallback
    assert row.measured == "weights"
    assert by_name(report)["v"].fallback == ""


def test_a_leaf_that_is_read_twice_is_solved_on_its_first_input():
    def f(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"]

    params, x = {"w": normal(16, 16)}, normal(9, 16)
    q, report = run(f, params, [(x,)])
    same_codes(codes(q["w"]), alone(params["w"], x))
    assert [row.name for row in report.sites] == ["w"]


def test_layers_taken_by_a_counter():
    def unrolled(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["layers"]["w"][i])
        return x

    def counted(p, x):
        step = lambda i, x: jnp.tanh(x @ p["layers"]["w"][i])
        return jax.lax.fori_loop(0, 3, step, x)

    params, x = {"layers": {"w": normal(3, 16, 16) / 4}}, normal(9, 16)
    a, one = run(unrolled, params, [(x,)])
    b, two = run(counted, params, [(x,)])
    same_codes(codes(a["layers"]["w"]), codes(b["layers"]["w"]), 1)
    assert [r.fallback for r in (*one.sites, *two.sites)] == [""] * 6


def test_padding_and_masks():
    """Padding never enters; where tokens are not in the mask's order, it is said."""

    def f(p, x):
        y = jnp.tanh(x @ p["w"])
        return jnp.einsum("btk,kn->tbn", y, p["u"]), (y[:, :, None] * 1.5) @ p["v"]

    params = {n: normal(16, 8) if n != "w" else normal(16, 16) for n in "wuv"}
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]], jnp.float32)
    x = normal(2, 4, 16)
    bad = jnp.where(mask[..., None] > 0, x, jnp.nan)
    q, report = run(f, params, [(bad,)], mask_fn=lambda x: mask)
    same_codes(codes(q["w"]), alone(params["w"], x[np.asarray(mask) > 0]))
    assert {r.samples for r in report.sites} == {4}
    with pytest.raises(ValueError, match=r"mask of batch 0 has shape \(3,\), but the"):
        run(f, params, [(x,)], mask_fn=lambda x: jnp.ones(3))


def test_errors_name_the_site():
    def f(p, x):
        return jnp.log(x @ p["a"]) @ p["b"]

    good = {"a": jnp.eye(16), "b": jnp.eye(16)}
    with pytest.raises(ValueError, match=r"^the input of b holds 64 NaN or Inf in cal"):
        run(f, {**good, "a": -good["a"]}, [(jnp.ones((4, 16)),)])
    with pytest.raises(ValueError, match=r"^the input of a holds 1 NaN or Inf in cal"):
        run(f, good, [(jnp.ones((4, 16)).at[0, 0].set(jnp.inf),)])
    with pytest.raises(ValueError, match=r"^b holds 1 NaN or Inf of 256 values"):
        run(f, {**good, "b": good["b"].at[0, 0].set(jnp.nan)}, [(jnp.ones((4, 16)),)])


def test_dead_columns_are_noted():
    params = {"w": normal(16, 8)}
    x = normal(9, 16).at[:, jnp.array([3, 7])].set(0)
    q, report = run(lambda p, x: x @ p["w"], params, [(x,)])
    assert report.sites[0].notes["dead"] == 2
    assert np.isfinite(dequantized(q["w"])).all()


def test_activations_on_the_host_give_the_same_codes():
    params = net_params()
    a, _ = run(net, params, BATCHES)
    b, _ = run(net, params, BATCHES, offload=True)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_tied_embeddings_are_solved_without_data():
    """At the lookup, which comes first, there is no input."""

    def f(p, ids):
        return jnp.sin(p["e"][ids]) @ p["e"].T

    params, ids = {"e": normal(8, 16)}, jnp.array([[1, 5], [0, 6]])
    q, report = run(f, params, [(ids,)], Clip(targets="e"))
    assert "a lookup has no input to calibrate" in report.sites[0].fallback
    assert qjax.is_quantized(q["e"])
