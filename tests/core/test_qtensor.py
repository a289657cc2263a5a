"""The algebra `W = T_in (sum Q + L R + S) T_out`, and QTensors as pytrees."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qjax.core.coded import Coded, encode
from qjax.core.formats import MX, NVFP4, Codebook, Float, Int, block, group, tensor
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, SiteActs, Sparse, Stacked, dequantize
from qjax.core.sharding import partition_specs, shard
from qjax.core.transforms import Dense, Diagonal, Hadamard, Kronecker, Permutation
from qjax.trace import apply

K, N = 64, 48
INT4 = Int(4, group(32), symmetric=False)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def orthogonal(seed, n):
    return jnp.linalg.qr(normal(seed, n, n))[0]


def f(p, x):
    return x @ p["w"]


TRANSFORMS = {
    "diagonal": lambda n: Diagonal(jnp.exp(normal(1, n))),
    "permutation": lambda n: Permutation(jax.random.permutation(jax.random.key(2), n)),
    "hadamard": lambda n: Hadamard(jnp.sign(normal(3, n))),
    "kronecker": lambda n: Kronecker(orthogonal(4, 4), orthogonal(5, n // 4)),
    "dense": lambda n: Dense(orthogonal(6, n)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_is_one_matrix_from_both_sides(name):
    t = TRANSFORMS[name](K)
    matrix = np.asarray(t(jnp.eye(K)))
    x, w = normal(7, 5, K), normal(8, K, N)
    chex.assert_trees_all_close(t(x), x @ matrix, atol=2e-5)
    chex.assert_trees_all_close(t.left(w), matrix @ w, atol=2e-5)
    chex.assert_trees_all_close(t.undone(w), np.linalg.solve(matrix, w), atol=2e-5)


def test_hadamard_is_scipys():
    from scipy.linalg import hadamard

    t = Hadamard(jnp.ones(K))
    chex.assert_trees_all_close(t(jnp.eye(K)), hadamard(K) / np.sqrt(K), atol=1e-6)


def test_hadamard_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"power of two, alone or .*, got 18"):
        Hadamard(jnp.ones(18))(jnp.ones((2, 18)))


def parts(name):
    """Hand-made parts, each with what it adds to the weight in numpy."""
    w = normal(0, K, N)
    coded = encode(w, INT4)
    left, right = normal(1, K, 4), normal(2, 4, N)
    values = jnp.array([3.0, -4.0, 0.0])
    rows, cols = jnp.array([1, 63, 0]), jnp.array([5, 47, 0])
    dense = np.zeros((K, N))
    dense[1, 5], dense[63, 47] = 3.0, -4.0
    low = np.asarray(left @ right)
    base = np.asarray(coded.decode(jnp.float32))
    second = encode(w - coded.decode(jnp.float32), Int(2, group(16)))
    fewer = encode(left, Int(8, tensor()))
    options = {
        "one": ((coded,), {}, base),
        "sum": ((coded, second), {}, base + np.asarray(second.decode(jnp.float32))),
        "low_rank": ((coded,), {"left": left, "right": right}, base + low),
        "coded_low_rank": (
            (coded,),
            {"left": fewer, "right": right},
            base + np.asarray(fewer.decode(jnp.float32) @ right),
        ),
        "only_low_rank": ((), {"left": left, "right": right}, low),
        "sparse": ((coded,), {"sparse": Sparse(values, rows, cols)}, base + dense),
    }
    return options[name]


@pytest.mark.parametrize(
    "name", ["one", "sum", "low_rank", "coded_low_rank", "only_low_rank", "sparse"]
)
def test_sums_of_parts(name):
    coded, rest, want = parts(name)
    q = QTensor.of(coded, Layout("kn", (K, N)), jnp.float32, **rest)
    x = normal(9, 5, K)
    chex.assert_trees_all_close(q.dequantize(), want, atol=1e-5)
    chex.assert_trees_all_close(apply(f)({"w": q}, x), x @ want, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_bias_and_low_rank_in_apply(name):
    coded, rest, core = parts("low_rank")
    t_in, t_out, bias = TRANSFORMS[name](K), TRANSFORMS[name](N), normal(3, N)
    if name == "hadamard":
        t_out = Diagonal(jnp.exp(normal(1, N)))
    acts = (SiteActs(t_in=t_in, t_out=t_out),)
    layout = Layout("kn", (K, N))
    q = QTensor.of(coded, layout, jnp.float32, acts, bias=bias, **rest)
    want = t_in(jnp.eye(K)) @ core @ t_out(jnp.eye(N))
    x = normal(9, 5, K)
    chex.assert_trees_all_close(q.dequantize(), want, atol=1e-3, rtol=1e-4)
    got = apply(f)({"w": q}, x)
    chex.assert_trees_all_close(got, x @ want + bias, atol=5e-3, rtol=1e-3)


LAYOUTS = [
    ("kn", (64, 48), ()),
    ("nk", (48, 64), ()),
    ("knn", (64, 3, 16), ()),
    ("kkn", (4, 16, 48), ()),
    ("knk", (4, 48, 16), ()),
    ("kbn", (64, 0, 48), (5,)),
]


@pytest.mark.parametrize("roles,sizes,batch", LAYOUTS)
@pytest.mark.parametrize("layers", [(), (2,), (2, 3)])
def test_layout_is_an_einsum(roles, sizes, batch, layers):
    layout = Layout(roles, sizes)
    leaf = normal(0, *layout.leaf_shape((*layers, *batch)))
    matrix = layout.to_matrix(leaf)
    assert matrix.shape == (*layers, *batch, 64, 48)
    chex.assert_trees_all_equal(layout.from_matrix(matrix), leaf)
    letters = iter("abcdefgh")
    names = {i: next(letters) for i in range(len(roles))}
    order = "".join(names[i] for r in "bkn" for i in layout.axes(r))
    own = "".join(names.values())
    want = np.einsum(f"...{own}->...{order}", np.asarray(leaf))
    chex.assert_trees_all_equal(matrix, want.reshape(matrix.shape))


def test_layout_refuses_unknown_roles():
    with pytest.raises(ValueError, match="'kx'"):
        Layout("kx", (1, 2))


def test_part_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(64, 48\)"):
        QTensor.of(encode(normal(0, K, N), INT4), Layout("nk", (K, N)), jnp.float32)


def test_bytes_are_exact():
    q = QTensor.of(encode(normal(0, K, N), INT4), Layout("kn", (K, N)), jnp.float32)
    codes, scales, zeros = K * N // 2, 2 * N * 4, 2 * N // 2
    assert q.nbytes == codes + scales + zeros
    assert q.bits_per_weight == 8 * q.nbytes / (K * N)


def test_scan_slices_a_stack():
    w = normal(0, 3, K, K)
    coded, layout = encode(w, INT4), Layout("kn", (K, K))
    q = QTensor.of(coded, layout, w.dtype, (SiteActs(t_in=Diagonal(jnp.ones((3, K)))),))
    assert q.shape == (3, K, K)
    total, _ = jax.lax.scan(lambda c, w: (c @ w.dequantize(), None), jnp.eye(K), q)
    want = jnp.linalg.multi_dot(list(q.dequantize()))
    chex.assert_trees_all_close(total, want, rtol=1e-4, atol=1e-2)
    chex.assert_trees_all_equal(q[1].dequantize(), q.dequantize()[1])


def test_stacked_formats_run_as_one_scan_each():
    w = normal(0, 5, K, K) / 8
    layout = Layout("kn", (K, K))
    first = QTensor.of(encode(w[:2], INT4), layout, w.dtype)
    second = QTensor.of(encode(w[2:], Int(8)), layout, w.dtype)
    q = {"layers": {"w": Stacked((first, second), ((0, 2), (2, 5))), "g": jnp.ones(5)}}

    def model(p, x):
        def layer(h, w):
            h = jnp.tanh(h @ w["w"]) * w["g"]
            return h, h.sum()

        return jax.lax.scan(layer, x, p["layers"])

    x = normal(9, 4, K)
    closed = jax.make_jaxpr(apply(model))(q, x)
    assert [e.primitive.name for e in closed.jaxpr.eqns].count("scan") == 2
    assert "qdequantize" not in str(closed)
    chex.assert_trees_all_close(
        apply(model)(q, x), model(dequantize(q), x), rtol=1e-5, atol=1e-5
    )
    assert q["layers"]["w"].shape == (5, K, K)
    with pytest.raises(ValueError, match="1:3"):
        q["layers"]["w"].layers(1, 3)


def test_pytree_survives_placeholders():
    q = QTensor.of(encode(normal(0, K, N), INT4), Layout("kn", (K, N)), jnp.float32)
    leaves, tree = jax.tree.flatten(q)
    assert jax.tree.unflatten(tree, [None] * len(leaves)).layout == q.layout
    assert isinstance(jax.tree.map(lambda _: True, q).parts[0], Coded)
    paths = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".parts[0].codes", ".parts[0].scale", ".parts[0].zero"]


def mesh():
    return jax.make_mesh((4, 2), ("k", "n"), axis_types=(AxisType.Auto,) * 2)


FORMATS = [
    INT4,
    Int(3, group(32)),
    Int(8),
    Float(),
    MX("fp4"),
    NVFP4(),
    Codebook("nf4", granularity=group(32)),
    Int(4, block(32, 16)),
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_sharded_equals_whole(format):
    w = normal(0, 256, 64)
    q = QTensor.of(encode(w, format), Layout("kn", w.shape), w.dtype)
    placed = shard(q, P("k", "n"), mesh())
    assert placed.parts[0].codes.sharding.spec == P("k", "n")
    assert max(s.data.size for s in placed.parts[0].codes.addressable_shards) == (
        q.parts[0].codes.size // 8
    )
    x = normal(1, 4, 256)
    got = jax.jit(apply(f))({"w": placed}, x)
    chex.assert_trees_all_close(got, apply(f)({"w": q}, x), rtol=1e-4, atol=1e-4)


def test_shards_that_cut_groups_or_words_are_refused():
    w = normal(0, 256, 64)
    layout = Layout("kn", w.shape)
    wide = QTensor.of(encode(w, Int(4, group(128))), layout, w.dtype)
    with pytest.raises(ValueError, match=r"groups of 128.*64 inputs"):
        partition_specs(wide, P("k"), mesh())
    narrow = QTensor.of(encode(w[:100], Int(3)), Layout("kn", (100, 64)), w.dtype)
    with pytest.raises(ValueError, match="whole words"):
        partition_specs(narrow, P("k"), mesh())
    heads = QTensor.of(encode(w, Int(4)), Layout("knn", (256, 4, 16)), w.dtype)
    with pytest.raises(ValueError, match="only the first may be sharded"):
        partition_specs(heads, P(None, None, "n"), mesh())


def test_stacked_formats_and_transforms_shard():
    w = normal(0, 4, 256, 64)
    layout = Layout("kn", (256, 64))
    acts = (SiteActs(t_in=Diagonal(jnp.ones((2, 256)))),)
    first = QTensor.of(encode(w[:2], INT4), layout, w.dtype, acts)
    second = QTensor.of(encode(w[2:], Int(8)), layout, w.dtype)
    placed = shard(
        Stacked((first, second), ((0, 2), (2, 4))), P(None, "k", "n"), mesh()
    )
    assert placed.parts[0].parts[0].codes.sharding.spec == P(None, "k", "n")
    want = jnp.concatenate([first.dequantize(), second.dequantize()])
    chex.assert_trees_all_close(placed.dequantize(), want)


def test_shard_map_decodes_what_it_cannot_split_and_says_so():
    from qjax.trace import QuantizationWarning

    w, x = normal(0, 64, 2, 8), normal(1, 4, 64)
    layout = Layout("knn", w.shape)
    q = QTensor.of(encode(layout.to_matrix(w), INT4), layout, w.dtype)

    def heads(p, x):
        return jax.shard_map(
            lambda p, x: jnp.einsum("mk,khd->mhd", x, p),
            mesh=mesh(),
            in_specs=(P(None, None, "n"), P()),
            out_specs=P(None, None, "n"),
        )(p, x)

    with pytest.warns(QuantizationWarning, match="inner axis"):
        got = apply(heads)(q, x)
    want = jnp.einsum("mk,khd->mhd", x, q.dequantize())
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
