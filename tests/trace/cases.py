"""Functions in which a parameter meets an activation in every way that JAX offers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class Case:
    """`f(params, *inputs)`; `ops` are the low-bit operations that must appear."""

    f: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    inputs: tuple[Any, ...]
    ops: dict[str, int]
    roles: dict[str, str]


def normal(*shape: int) -> Any:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


@jax.custom_vjp
def _custom(x, w):
    return x @ w


_custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def _custom_jvp(x, w):
    return jnp.tanh(x @ w)


_custom_jvp.defjvp(
    lambda p, t: (_custom_jvp(*p), t[0] @ p[1] + p[0] @ t[1]),
)


def _scan(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["layers"]["w"])[0]


def _scan_remat(p, x):
    @jax.checkpoint
    def layer(c, w):
        return jnp.tanh(c @ w["a"]) @ w["b"]

    return jax.lax.scan(lambda c, w: (layer(c, w), None), x, p["layers"])[0]


def _scan_const(p, x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, length=3)[0]


def _while(p, x):
    def test(state):
        return state[0] < 3

    return jax.lax.while_loop(
        test, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x)
    )[1]


def _while_carry(p, x):
    """The parameter travels in the loop's state, unchanged."""
    state = (0, x, p["w"])

    def body(s):
        return s[0] + 1, jnp.tanh(s[1] @ s[2]), s[2]

    return jax.lax.while_loop(lambda s: s[0] < 3, body, state)[1]


def _nested_jit(p, x):
    layer = jax.jit(lambda w, h: jnp.tanh(h @ w))
    for name in ("a", "b", "c"):
        x = layer(p[name], x)
    return x


def _cond(p, x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: -2 * (x @ p["w"]))


def _indexed(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["layers"]["w"][i])
    return x


def _fori_indexed(p, x):
    def step(i, h):
        return jnp.tanh(h @ p["layers"]["w"][i])

    return jax.lax.fori_loop(0, 3, step, x)


def _attention(p, x):
    q = jnp.einsum("btD,Dhd->bthd", x, p["q"])
    k = jnp.einsum("btD,Dhd->bthd", x, p["k"])
    scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    mixed = jnp.einsum("bhts,bshd->bthd", scores, q)
    return jnp.einsum("bthd,hdD->btD", mixed, p["o"])


def _ragged(p, x):
    sizes = jnp.array([3, 0, 5], jnp.int32)
    return jax.lax.ragged_dot(x, p["w"], sizes)


def mesh() -> Any:
    return jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))


def _shard_map_n(p, x):
    return jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh(),
        in_specs=(P(), P(None, "m")),
        out_specs=P(None, "m"),
    )(x, p["w"])


def _shard_map_k(p, x):
    def local(x, w):
        return jax.lax.psum(x @ w, "m")

    return jax.shard_map(
        local, mesh=mesh(), in_specs=(P(None, "m"), P("m")), out_specs=P()
    )(x, p["w"])


def _conv(spec: tuple[str, str, str], groups: int = 1, stride: int = 1):
    dims = len(spec[0]) - 2

    def f(p, x):
        return jax.lax.conv_general_dilated(
            x,
            p["w"],
            (stride,) * dims,
            "SAME",
            dimension_numbers=spec,
            feature_group_count=groups,
        )

    return f


IMAGE = ("NHWC", "HWIO", "NHWC")
ids = jnp.array([[1, 5, 63], [0, 7, 7]])
x2, x3 = normal(5, 64), normal(2, 5, 64)
one = {"qmatmul": 1}

CASES = {
    "matmul": Case(lambda p, x: x @ p["w"], {"w": (64, 48)}, (x2,), one, {"w": "kn"}),
    "vector": Case(
        lambda p, x: x @ p["w"], {"w": (64, 48)}, (normal(64),), one, {"w": "kn"}
    ),
    "weight_first": Case(
        lambda p, x: p["w"] @ x, {"w": (48, 64)}, (normal(64, 7),), one, {"w": "nk"}
    ),
    "transposed": Case(
        lambda p, x: x @ p["w"].T, {"w": (48, 64)}, (x3,), one, {"w": "nk"}
    ),
    "einsum": Case(
        lambda p, x: jnp.einsum("btk,kn->btn", x, p["w"]),
        {"w": (64, 48)},
        (x3,),
        one,
        {"w": "kn"},
    ),
    "einsum_output_order": Case(
        lambda p, x: jnp.einsum("btk,khd->hbdt", x, p["w"]),
        {"w": (64, 3, 16)},
        (x3,),
        one,
        {"w": "knn"},
    ),
    "two_contracted": Case(
        lambda p, x: jnp.einsum("bthd,hdD->btD", x, p["w"]),
        {"w": (4, 16, 48)},
        (normal(2, 5, 4, 16),),
        one,
        {"w": "kkn"},
    ),
    "contracted_apart": Case(
        lambda p, x: jnp.einsum("bdth,hDd->btD", x, p["w"]),
        {"w": (4, 48, 16)},
        (normal(2, 16, 5, 4),),
        one,
        {"w": "knk"},
    ),
    "reshaped": Case(
        lambda p, x: x @ p["w"].reshape(64, 48),
        {"w": (64, 3, 16)},
        (x2,),
        one,
        {"w": "knn"},
    ),
    "split_axis": Case(
        lambda p, x: jnp.einsum("tk,khd->thd", x, p["w"].reshape(64, 3, 16)),
        {"w": (64, 48)},
        (x2,),
        one,
        {"w": "kn"},
    ),
    "attention": Case(
        _attention,
        {"q": (64, 4, 16), "k": (64, 4, 16), "o": (4, 16, 64)},
        (x3,),
        {"qmatmul": 3},
        {"q": "knn", "k": "knn", "o": "kkn"},
    ),
    "scan": Case(_scan, {"layers/w": (3, 64, 64)}, (x2,), one, {"layers/w": "kn"}),
    "scan_constant": Case(_scan_const, {"w": (64, 64)}, (x2,), one, {"w": "kn"}),
    "checkpoint": Case(
        lambda p, x: jax.checkpoint(lambda x, w: jnp.sin(x @ w))(x, p["w"]),
        {"w": (64, 48)},
        (x2,),
        one,
        {"w": "kn"},
    ),
    "scan_of_checkpoint": Case(
        _scan_remat,
        {"layers/a": (3, 64, 96), "layers/b": (3, 96, 64)},
        (x2,),
        {"qmatmul": 2},
        {"layers/a": "kn", "layers/b": "kn"},
    ),
    "vmap": Case(
        lambda p, x: jax.vmap(lambda row: row @ p["w"])(x),
        {"w": (64, 48)},
        (x2,),
        one,
        {"w": "kn"},
    ),
    "vmap_weights": Case(
        lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x),
        {"w": (3, 64, 48)},
        (normal(3, 5, 64),),
        one,
        {"w": "bkn"},
    ),
    "custom_vjp": Case(
        lambda p, x: _custom(x, p["w"]), {"w": (64, 48)}, (x2,), one, {"w": "kn"}
    ),
    "custom_jvp": Case(
        lambda p, x: _custom_jvp(x, p["w"]), {"w": (64, 48)}, (x2,), one, {"w": "kn"}
    ),
    "cond": Case(_cond, {"w": (64, 48)}, (x2,), {"qmatmul": 2}, {"w": "kn"}),
    "while": Case(_while, {"w": (64, 64)}, (x2,), one, {"w": "kn"}),
    "while_carry": Case(_while_carry, {"w": (64, 64)}, (x2,), one, {"w": "kn"}),
    "nested_jit": Case(
        _nested_jit,
        {"a": (64, 64), "b": (64, 64), "c": (64, 64)},
        (x2,),
        {"qmatmul": 3},
        {"a": "kn", "b": "kn", "c": "kn"},
    ),
    "indexed_stack": Case(
        _indexed, {"layers/w": (3, 64, 64)}, (x2,), {"qmatmul": 3}, {"layers/w": "kn"}
    ),
    "fori_indexed_stack": Case(
        _fori_indexed, {"layers/w": (3, 64, 64)}, (x2,), one, {"layers/w": "kn"}
    ),
    "concatenated": Case(
        lambda p, x: x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1),
        {"q": (64, 48), "k": (64, 16), "v": (64, 16)},
        (x3,),
        {"qmatmul": 3},
        {"q": "kn", "k": "kn", "v": "kn"},
    ),
    "concatenated_transposed": Case(
        lambda p, x: jnp.concatenate([p["q"], p["k"]]) @ x,
        {"q": (48, 64), "k": (16, 64)},
        (normal(64, 7),),
        {"qmatmul": 2},
        {"q": "nk", "k": "nk"},
    ),
    "conv1d": Case(
        _conv(("NWC", "WIO", "NWC")),
        {"w": (3, 32, 16)},
        (normal(2, 9, 32),),
        {"qconv": 1},
        {"w": "kkn"},
    ),
    "conv2d": Case(
        _conv(IMAGE, stride=2),
        {"w": (3, 3, 32, 16)},
        (normal(2, 8, 8, 32),),
        {"qconv": 1},
        {"w": "kkkn"},
    ),
    "conv2d_channels_first": Case(
        _conv(("NCHW", "OIHW", "NCHW")),
        {"w": (16, 32, 3, 3)},
        (normal(2, 32, 8, 8),),
        {"qconv": 1},
        {"w": "nkkk"},
    ),
    "conv_grouped": Case(
        _conv(IMAGE, groups=4),
        {"w": (3, 3, 8, 16)},
        (normal(2, 8, 8, 32),),
        {"qconv": 1},
        {"w": "kkkn"},
    ),
    "conv_depthwise": Case(
        _conv(IMAGE, groups=32),
        {"w": (3, 3, 1, 32)},
        (normal(2, 8, 8, 32),),
        {"qconv": 1},
        {"w": "kkkn"},
    ),
    "moe_einsum": Case(
        lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]),
        {"w": (3, 64, 48)},
        (normal(3, 5, 64),),
        one,
        {"w": "bkn"},
    ),
    "ragged_dot": Case(
        _ragged,
        {"w": (3, 64, 48)},
        (normal(8, 64),),
        {"qragged_matmul": 1},
        {"w": "bkn"},
    ),
    "embedding_index": Case(
        lambda p, ids: p["w"][ids], {"w": (64, 32)}, (ids,), {"qembed": 1}, {"w": "nk"}
    ),
    "embedding_take": Case(
        lambda p, ids: jnp.take(p["w"], ids, axis=0),
        {"w": (64, 32)},
        (ids,),
        {"qembed": 1},
        {"w": "nk"},
    ),
    "tied": Case(
        lambda p, ids: p["w"][ids] @ p["w"].T,
        {"w": (64, 32)},
        (ids,),
        {"qembed": 1, "qmatmul": 1},
        {"w": "nk"},
    ),
    "shard_map_outputs": Case(_shard_map_n, {"w": (64, 64)}, (x2,), one, {"w": "kn"}),
    "shard_map_inputs": Case(
        _shard_map_k, {"w": (256, 48)}, (normal(5, 256),), one, {"w": "kn"}
    ),
}
