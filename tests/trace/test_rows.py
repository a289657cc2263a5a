"""Inputs of sites as matrices, with a weight for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.statistics import AbsMaximum, Hessian, MovingRange
from qjax.placement import Placement
from qjax.trace.rows import Accumulator, finalized, mask_fits, merged, refusal, rows

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def first_input(kit, f, params, *inputs):
    """The site, its activation and its operands, at the first point."""
    stream = kit.open_stream(f, params, [inputs])
    point = next(iter(stream))
    _, op, x, _, rest = next(stream.inputs(point))
    return op, x, rest


def test_rows_times_matrix_is_the_operation(kit):
    """For every way in which a leaf meets an activation, kernels in leaf order too."""
    checked = 0
    for name, case in kit.CASES.items():
        params = kit.tree(case.shapes)
        stream = kit.open_stream(case.f, params, [case.inputs])
        leaves = jax.tree.leaves(params)
        for point in stream:
            for _, op, x, _, rest in stream.inputs(point):
                if refusal(op) or point.inside:
                    continue
                key = point.keys[0]
                w = op.call.layout.to_matrix(leaves[key[0]][key[1]])
                flat, weight = rows(op, x, rest, None)
                layer = op.weight.make(leaves[key[0]][key[1]])
                operands = [layer if r is None else r for r in rest]
                got = op.eqn.primitive.bind(*operands, **op.eqn.params)
                want = outputs(op, flat, weight, w)
                np.testing.assert_allclose(
                    got, want, rtol=1e-4, atol=1e-4, err_msg=name
                )
                checked += 1
    assert checked > 35


def outputs(op, x, weight, w):
    """`x @ w` in the shape of the operation's result."""
    if op.call.kind == "ragged_dot":
        return jnp.einsum("em,mk,ekn->mn", weight, x, w)
    y = x @ w
    if op.call.kind == "dot":
        return op.call.finish(y)
    spec = op.eqn.params["dimension_numbers"].out_spec
    shape = op.eqn.outvars[0].aval.shape
    places = [shape[d] for d in (spec[0], *spec[2:])]
    order = (spec[0], *spec[2:], spec[1])
    return jnp.transpose(y.reshape(*places, -1), np.argsort(order))


@pytest.mark.parametrize("spec", ["HWIO", "OIHW", "IWHO", "WOHI"])
def test_patches_of_every_convolution(kit, spec):
    """Strides, paddings, dilations of image and kernel, for any order of the kernel."""
    sizes = {"H": 3, "W": 2, "I": 4, "O": 5}
    w = normal(*(sizes[c] for c in spec))
    image = normal(2, 9, 8, 4)

    for options in (
        {"window_strides": (2, 1), "padding": "SAME"},
        {"window_strides": (1, 3), "padding": ((1, 2), (0, 1))},
        {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": ((1, 1), (0, 1)), "lhs_dilation": (2, 1)},
    ):

        def f(p, x, options=options):
            numbers = ("NHWC", spec, "NCHW")
            return jax.lax.conv_general_dilated(
                x, p["w"], dimension_numbers=numbers, **options
            )

        op, x, rest = first_input(kit, f, {"w": w}, image)
        flat, weight = rows(op, x, rest, None)
        assert flat.shape == (op.call.M, op.call.layout.K)
        got = outputs(op, flat, weight, op.call.layout.to_matrix(w))
        np.testing.assert_allclose(got, f({"w": w}, image), rtol=1e-4, atol=1e-4)


def seen_hessian(kit, f, params, batches, masks=None):
    stream = kit.open_stream(f, params, batches)
    return kit.hessians(stream, masks)


def test_experts_of_a_ragged_product(kit):
    """Each sees its own rows; one that sees none has zeros; padding counts nowhere."""
    sizes = jnp.array([3, 0, 4], jnp.int32)

    def f(p, x, sizes):
        return jax.lax.ragged_dot(x, p["w"], sizes)

    x = np.array(normal(8, 6))
    x[7] = np.nan  # no expert's row
    params = {"w": normal(3, 6, 5)}
    got = seen_hessian(kit, f, params, [(jnp.asarray(x), sizes)] * 2)["w"]
    want = [x[:3].T @ x[:3] / 3, np.zeros((6, 6)), x[3:7].T @ x[3:7] / 4]
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-6)


def test_experts_of_a_batched_product(kit):
    def f(p, x):
        return jnp.einsum("cek,nek->ecn", x, p["w"])

    x, params = normal(5, 3, 6), {"w": normal(4, 3, 6)}
    got = seen_hessian(kit, f, params, [(x,)])["w"]
    want = np.einsum("cek,cel->ekl", x, x) / 5
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flat", [False, True])
def test_padding_never_enters(kit, flat):
    mask = jnp.array([[1, 1, 0], [1, 0, 0]], jnp.float32)
    x = np.array(normal(2, 3, 6))
    x[0, 2] = np.nan
    x[1, 1:] = np.inf

    def f(p, x):
        return (x.reshape(6, 6) if flat else x) @ p["w"]

    stream = kit.open_stream(f, {"w": normal(6, 4)}, [(jnp.asarray(x),)])
    got = kit.hessians(stream, [mask])["w"]
    kept = np.stack([x[0, 0], x[0, 1], x[1, 0]])
    np.testing.assert_allclose(got, kept.T @ kept / 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("einsum", "shape", "fits"),
    [
        ("btk,kn->btn", (2, 3, 6), True),
        ("tbk,kn->tbn", (3, 2, 6), False),
        ("bthk,kn->bthn", (2, 3, 4, 6), False),
        ("btk,kn->btn", (2, 4, 6), False),
    ],
)
def test_a_mask_that_does_not_fit_is_not_taken_for_one(kit, einsum, shape, fits):
    def f(p, x):
        return jnp.einsum(einsum, x, p["w"])

    op, x, _ = first_input(kit, f, {"w": normal(6, 4)}, normal(*shape))
    assert mask_fits(op, x, jnp.ones((2, 3))) is fits


def test_what_is_not_finite_is_counted(kit):
    x = np.ones((4, 6), np.float32)
    x[1, 2], x[3, 0], x[3, 5] = np.nan, np.inf, -np.inf
    op, _, rest = first_input(kit, lambda p, x: x @ p["w"], {"w": normal(6, 3)}, x)
    accumulator, asked = Accumulator(), {"h": Hessian()}
    seen = accumulator.init(asked, op)
    seen = accumulator.update(asked, op, seen, jnp.asarray(x), None, rest, None)
    assert (float(seen.bad), float(seen.tokens)) == (3, 4)


def test_states_that_share_an_array_are_updated(kit):
    """A moving range starts with one array in four places; the state is donated."""
    op, x, rest = first_input(
        kit, lambda p, x: x @ p["w"], {"w": normal(6, 3)}, normal(4, 6)
    )
    asked = {"range": MovingRange()}
    accumulator = Accumulator()
    seen = accumulator.update(
        asked, op, accumulator.init(asked, op), x, None, rest, None
    )
    # 0.01 x + 0.99 x, three roundings of at most half a step each.
    high = finalized(asked, seen)["range"].high[0]
    np.testing.assert_allclose(high, x.max(), rtol=1.5 * 2**-23)


@pytest.mark.parametrize("kind", ["dot", "ragged"])
def test_a_mesh_sees_what_one_device_sees(kit, kind):
    """Bit for bit: every device its own batch, merged in their order."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
    batches = [normal(8, 6) for _ in range(4)]
    sizes = jnp.array([10, 0, 20], jnp.int32)

    def dot(p, x, sizes):
        return x @ p["w"][0]

    def ragged(p, x, sizes):
        return jax.lax.ragged_dot(x, p["w"], sizes)

    f = {"dot": dot, "ragged": ragged}[kind]
    whole = jnp.concatenate(batches)
    op, _, rest = first_input(kit, f, {"w": normal(3, 6, 5)}, whole, sizes)
    asked = {"h": Hessian(), "max": AbsMaximum()}

    def taken(placement, parts):
        accumulator = Accumulator(placement)
        seen = accumulator.init(asked, op)
        for x in parts:
            seen = accumulator.update(asked, op, seen, x, None, rest, None)
        return jax.tree.map(np.asarray, finalized(asked, seen))

    got = taken(Placement(mesh), [whole])
    if kind == "dot":
        small, _, _ = first_input(kit, f, {"w": normal(3, 6, 5)}, batches[0], sizes)
        accumulator = Accumulator()
        seen = accumulator.init(asked, small)
        for x in batches:
            seen = accumulator.update(asked, small, seen, x, None, rest, None)
        want = finalized(asked, seen)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    else:
        want = taken(Placement(), [whole])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want
        )


def test_merging_is_seeing_both(kit):
    op, x, rest = first_input(
        kit,
        lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]),
        {"w": normal(2, 6, 3)},
        normal(2, 4, 6),
    )
    asked, accumulator = {"h": Hessian()}, Accumulator()

    def after(*xs):
        seen = accumulator.init(asked, op)
        for each in xs:
            seen = accumulator.update(asked, op, seen, each, None, rest, None)
        return seen

    both = merged(asked, after(x), after(2 * x))
    want = finalized(asked, after(x, 2 * x))["h"]
    np.testing.assert_array_equal(finalized(asked, both)["h"], want)
    assert both.tokens.tolist() == [8, 8]
