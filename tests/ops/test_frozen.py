"""Weights that are not trained: values, gradients, and no float one of them made."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import encode
from qjax.core.formats import Codebook, Float, Granularity, Int, group, token
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs, Sparse
from qjax.core.transforms import Diagonal, Hadamard
from qjax.ops import pack, pieces
from qjax.ops.activations import code_input
from qjax.ops.frozen import frozen_matmul, frozen_ragged, takes
from qjax.ops.packed import Packed
from qjax.ops.pieces import Cut, cut_of
from qjax.ops.targets import Target

K, N, M, E, R = 64, 157, 6, 5, 2
INT4 = Int(4, group(16), symmetric=False, zero="int")
TOKENS = Activation(Int(8, token()))
HOPPER, OTHER = Target("gpu", "hopper"), Target("gpu", None)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


W, X, DY = normal(0, K, N), normal(1, M, K), normal(2, M, N)


def leaf(format, activation=None, w=W, **rest):
    roles = "kn" if w.ndim == 2 else "bkn"
    layout = Layout(roles, (0, K, N)[-w.ndim :])
    acts = SiteActs(activation=activation, **rest.pop("moves", {}))
    return QTensor.of(encode(w, format), layout, w.dtype, (acts,), **rest)


MOVES = {
    "t_in": Hadamard(jnp.sign(normal(5, K))),
    "t_out": Diagonal(1 + jnp.abs(normal(6, N))),
}
BESIDE = {
    "left": normal(3, K, R),
    "right": encode(normal(4, R, N), Int(8)),
    "bias": jnp.arange(float(N)),
}
# N = 157 has no divisor: the last piece is narrower than the others.
LEAVES = {
    "int4": lambda: leaf(INT4),
    "nf4": lambda: leaf(Codebook("nf4", double_quant=256)),
    "float8": lambda: leaf(Float()),
    "blocks": lambda: leaf(Int(4, Granularity(16, 4))),
    "one scale": lambda: leaf(Int(8, Granularity(16, None))),
    "coded input": lambda: leaf(INT4, TOKENS),
    "coded values": lambda: leaf(INT4, Activation(Float("e4m3", token()))),
    "outliers": lambda: leaf(Int(8), Activation(Int(8, token()), outliers=2.0)),
    "beside": lambda: leaf(INT4, TOKENS, moves=MOVES, **BESIDE),
    "tiles": lambda: pack(leaf(Int(4, symmetric=False, zero="int")), HOPPER),
    "narrow": lambda: pack(leaf(INT4), OTHER),
}


def both(f):
    """Value and gradient by the input."""
    return jax.jit(lambda x: (lambda y, back: (y, back(DY)[0]))(*jax.vjp(f, x)))


@pytest.mark.parametrize("name", LEAVES)
def test_values_and_gradients_are_those_of_the_decoded_weight(name, largest_float):
    """In numpy's double precision; a coded input differentiates straight through."""
    q = LEAVES[name]()
    run = lambda x: frozen_matmul(x, q)
    few = 2 if name == "tiles" else 4  # a tile has 64 columns
    assert takes(q) and largest_float(both(run), X) < K * N // few
    acts = q.site(0)
    inner = X if acts.t_in is None else acts.t_in(X)
    seen = np.float64(inner)
    if acts.activation is not None and acts.activation.outliers is None:
        seen = np.float64(code_input(inner, acts).decode(jnp.float32))
    codes = sum(np.float64(part.decode()) for part in q.parts)
    want, back = seen @ codes, np.float64(DY)
    if acts.t_out is not None:
        back = back * np.float64(acts.t_out.scale)
    grad = back @ codes.T
    if q.left is not None:
        branch = np.float64(q.left) @ np.float64(q.right.decode())
        want, grad = want + np.float64(inner) @ branch, grad + back @ branch.T
    if acts.t_out is not None:
        want = want * np.float64(acts.t_out.scale) + np.float64(q.bias)
        grad = grad @ np.float64(acts.t_in(jnp.eye(K))).T
    value, dx = both(run)(X)
    coarse = 0.02 if name == "outliers" else 1e-5
    assert np.linalg.norm(value - want) < coarse * np.linalg.norm(want)
    assert np.linalg.norm(dx - grad) < 1e-5 * np.linalg.norm(grad)


@pytest.mark.parametrize("activation", [None, TOKENS])
@pytest.mark.parametrize("format", [INT4, Int(8)])
def test_experts(format, activation, largest_float):
    q = leaf(format, activation, normal(7, E, K, N))
    sizes = jnp.array([2, 0, 1, 0, 3], jnp.int32)
    run = lambda x: frozen_ragged(x, q, sizes)
    assert largest_float(both(run), X) <= K * N
    value, dx = both(run)(X)
    owner = np.repeat(np.arange(E), sizes)
    experts = np.float64(q.matrix(jnp.float32))[owner]
    seen = X if activation is None else code_input(X, q.site(0)).decode(X.dtype)
    want = np.einsum("mk,mkn->mn", np.float64(seen), experts)
    chex.assert_trees_all_close(np.float64(value), want, rtol=1e-4, atol=1e-4)
    grad = np.einsum("mn,mkn->mk", np.float64(DY), experts)
    chex.assert_trees_all_close(np.float64(dx), grad, rtol=1e-4, atol=1e-4)


def test_packed_leaves_are_packed():
    for name, order in (("tiles", "tiles"), ("narrow", "narrow")):
        (part,) = LEAVES[name]().parts
        assert isinstance(part, Packed) and part.order == order


@pytest.mark.parametrize(
    ("N", "count", "unit", "want"),
    [
        (61, 8, 1, Cut(8, 7, 5)),
        (64, 8, 1, Cut(8, 8, 0)),
        (61, 8, 4, Cut(8, 7, 5)),
        (768, 8, 1, Cut(128, 6, 0)),
        (344, 8, 1, Cut(128, 2, 88)),
        (2048, 8, 1, Cut(256, 8, 0)),
        (3, 8, 128, Cut(3, 1, 0)),
    ],
)
def test_how_columns_are_cut(N, count, unit, want):
    cut = cut_of(N, count, unit)
    assert cut == want and cut.width * cut.count + cut.rest == N


def test_outliers_are_refused():
    sparse = Sparse(jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    assert not takes(leaf(INT4, sparse=sparse))
    assert pieces.PIECES == 8
