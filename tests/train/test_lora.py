"""Adapters beside float and quantized weights, their starts, merging, PEFT's names."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax.core.formats import Codebook
from qjax.core.lowrank import best_rank

K, H, N, L, M, R = 64, 128, 64, 3, 6, 4
NF4 = qjax.RTN(weights=Codebook("nf4", double_quant=256))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[-2])


X = 3 * normal(9, M, K)


def scanned(p, x):
    @jax.checkpoint
    def layer(h, w):
        return h + jnp.tanh(h @ w["a"]) @ w["b"]

    return jax.lax.scan(lambda h, w: (layer(h, w), None), x, p["layers"])[0]


def unrolled(p, x):
    layer = jax.jit(lambda h, a, b: h + jnp.tanh(h @ a) @ b)
    for i in range(L):
        x = layer(x, p["layers"]["a"][i], p["layers"]["b"][i])
    return x


def experts(p, x):
    sizes = jnp.zeros(len(p["in"]), jnp.int32).at[0].set(2).at[2].set(4)
    h = jnp.tanh(jax.lax.ragged_dot(x, p["in"], sizes))
    return jax.lax.ragged_dot(h, p["out"], sizes)


def attention(p, x):
    """Weights with three axes, one of them transposed."""
    q = jnp.einsum("tD,Dhd->thd", x, p["q"])
    return jnp.einsum("thd,Dhd->tD", jnp.tanh(q), p["o"])


STACK = {"layers": {"a": normal(1, L, K, H), "b": normal(2, L, H, K)}}
CASES = {
    "scanned": (scanned, STACK),
    "unrolled": (unrolled, STACK),
    "experts": (experts, {"in": normal(1, 3, K, H), "out": normal(2, 3, H, N)}),
    "attention": (
        attention,
        {"q": normal(1, K, 4, 16), "o": normal(2, K, 4, 16)},
    ),
}


def quantized(f, params, recipe=NF4):
    return qjax.quantize(f, params, recipe, example=(X,), progress=False)


def started(f, params, seed=0, **options):
    """Adapters whose `B` is not zero, so that everything has a gradient."""
    f_lora, adapters = qjax.lora(
        f, params, R, example=(X,), key=jax.random.key(seed), **options
    )
    spread = lambda path, x: (
        x + 0.1 * jax.random.normal(jax.random.key(7), x.shape)
        if path[-1].key == "b"
        else x
    )
    return f_lora, jax.tree_util.tree_map_with_path(spread, adapters)


def loss_of(f_lora):
    return jax.jit(
        jax.value_and_grad(lambda a, p: jnp.mean((f_lora(a, p, X) - 1) ** 2))
    )


@pytest.mark.parametrize("case", [*CASES, "dora"])
def test_qlora_gradients_are_those_of_the_float_model(case):
    """Beside the same weights decoded: by LoRA on them, and by the merged weights."""
    f, params = CASES["scanned" if case == "dora" else case]
    options = {"dora": case == "dora"}
    q = quantized(f, params)
    floats = qjax.dequantize(q)
    f_lora, adapters = started(f, q, **options)
    value, grads = loss_of(f_lora)(adapters, q)
    same, want = loss_of(started(f, floats, **options)[0])(adapters, floats)
    chex.assert_trees_all_close(value, same, rtol=1e-5)
    for path, got in grads.leaves.items():
        chex.assert_trees_all_close(got, want.leaves[path], rtol=1e-3, atol=1e-6)
        assert all(jnp.any(g != 0) for g in jax.tree.leaves(got))
    if case == "scanned":

        def merged(factors):
            own = replace(adapters, leaves=factors)
            return jnp.mean((f(qjax.merge_lora(floats, own), X) - 1) ** 2)

        exact = jax.jit(jax.grad(merged))(adapters.leaves)
        chex.assert_trees_all_close(grads.leaves, exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case, dora", [("scanned", True), ("attention", False)])
def test_merged_is_what_was_trained(case, dora):
    f, params = CASES[case]
    q = quantized(f, params)
    f_lora, adapters = started(f, q, dora=dora)
    got = jax.jit(f_lora)(adapters, q, X)
    floats = qjax.merge_lora(q, adapters)
    beside = qjax.merge_lora(q, adapters, into="low_rank")
    assert all(qjax.is_quantized(x) for x in leaves_of(beside))
    assert not any(qjax.is_quantized(x) for x in leaves_of(floats))
    for merged in (floats, beside):
        want = jax.jit(qjax.apply(f))(merged, X)
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_correction_bias_stays_as_it_is(dora):
    """DoRA's magnitude is that of the weights; beside numpy in double precision."""
    f, params = (lambda p, x: x @ p["w"]), {"w": normal(1, K, N)}
    recipe = (qjax.RTN(weights=qjax.Int(3, qjax.group(32))), qjax.BiasCorrection())
    q = qjax.quantize(f, params, recipe, [(X + 1,)], progress=False)
    assert jnp.linalg.norm(q["w"].bias) > 0.1
    f_lora, adapters = started(f, q, dora=dora)
    own = adapters.leaves["w"]
    if dora:
        own["magnitude"] = own["magnitude"] * 1.3
    w = np.float64(q["w"].dequantize()) + 4 * np.float64(own["a"]) @ np.float64(
        own["b"]
    )
    if dora:
        w *= np.float64(own["magnitude"]) / np.linalg.norm(w, axis=0)
    want = np.float64(X) @ w + np.float64(q["w"].bias)
    got = jax.jit(f_lora)(adapters, q, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    beside = qjax.merge_lora(q, adapters, into="low_rank")
    got = jax.jit(qjax.apply(f))(beside, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="w has a correction bias"):
        qjax.merge_lora(q, adapters)


def leaves_of(tree):
    return jax.tree.leaves(tree, is_leaf=qjax.is_quantized)


def test_merged_experts():
    f, params = CASES["experts"]
    q = quantized(f, params)
    f_lora, adapters = started(f, q)
    want = jax.jit(f_lora)(adapters, q, X)
    got = jax.jit(f)(qjax.merge_lora(q, adapters), X)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="experts already"):
        qjax.merge_lora(q, adapters, into="low_rank")
    with pytest.raises(ValueError, match="experts, which have no magnitude"):
        started(f, params, dora=True)


@pytest.mark.parametrize("case", ["scanned", "unrolled", "experts"])
@pytest.mark.parametrize("recipe", [NF4, qjax.RTN("W8A8")])
def test_no_float_weight_is_kept_for_the_backward_pass(case, recipe):
    f, params = CASES[case]
    q = quantized(f, params, recipe)
    f_lora, adapters = started(f, q)
    if case == "scanned":  # remat would hide what the operation keeps
        f_lora, adapters = started(without_remat, q)
    _, back = jax.vjp(lambda a: f_lora(a, q, X), adapters)
    kept = [x for x in jax.tree.leaves(back) if hasattr(x, "dtype")]
    weights = [
        x for x in kept if jnp.issubdtype(x.dtype, jnp.floating) and x.size >= K * H
    ]
    assert not weights, [(x.shape, x.dtype) for x in weights]


WIDE = {"in": normal(1, 4, K, H), "out": normal(2, 4, H, N)}
UNEVEN = {"layers": {"a": normal(1, L, K, 113), "b": normal(2, L, 113, K)}}


@pytest.mark.parametrize(
    ("f", "params", "recipe", "dora"),
    [
        (scanned, STACK, NF4, False),
        (scanned, STACK, NF4, True),
        (scanned, STACK, qjax.RTN("W8A8"), False),
        (scanned, UNEVEN, qjax.RTN("W8A16"), False),
        (experts, WIDE, NF4, False),
    ],
)
def test_no_pass_makes_a_whole_float_weight(f, params, recipe, dora, largest_float):
    """Neither forward nor backward; `apply` decodes whole ones."""
    q = quantized(f, params, recipe)
    f_lora, adapters = started(f, q, dora=dora)
    mine = jax.grad(lambda a, q: f_lora(a, q, X).sum())
    # The largest are a leaf's adapters, and pieces of a weight or of all experts.
    sizes = [x.size for x in jax.tree.leaves(adapters)]
    piece = K * H if f is experts else K * H // 7
    assert largest_float(mine, adapters, q) <= max(piece, *sizes)
    decoding = jax.grad(lambda x, q: qjax.apply(f)(q, x).sum())
    assert largest_float(decoding, X, q) >= K * 113


def test_bf16_gradients_are_those_of_the_decoded_model_to_its_rounding():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), STACK)
    q, x = quantized(scanned, narrow), X.astype(jnp.bfloat16)
    f_lora, adapters = started(scanned, q)

    @jax.jit
    @jax.grad
    def gradient(adapters, params):
        return jnp.mean((f_lora(adapters, params, x) - 1) ** 2)

    got, want = (gradient(adapters, p) for p in (q, qjax.dequantize(q)))
    for path, leaf in got.leaves.items():
        for name, g in leaf.items():
            exact = want.leaves[path][name]
            assert jnp.linalg.norm(g - exact) <= 2**-7 * jnp.linalg.norm(exact)


def without_remat(p, x):
    layer = lambda h, w: (h + jnp.tanh(h @ w["a"]) @ w["b"], None)
    return jax.lax.scan(layer, x, p["layers"])[0]


def test_scan_equals_unrolled():
    q = quantized(scanned, STACK)
    f_scan, adapters = started(scanned, q)
    f_flat, _ = started(unrolled, q)
    a, b = loss_of(f_scan)(adapters, q), loss_of(f_flat)(adapters, q)
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-6)


def test_at_the_start_nothing_changes():
    for dora in (False, True):
        q = quantized(scanned, STACK)
        f_lora, adapters = qjax.lora(
            scanned, q, example=(X,), key=jax.random.key(0), dora=dora
        )
        want = jax.jit(qjax.apply(scanned))(q, X)
        got = jax.jit(f_lora)(adapters, q, X)
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_scaling_dropout_and_targets():
    f = lambda p, x: x @ p["w"]["a"]
    params = {"w": {"a": jnp.zeros((K, N))}}
    f_lora, adapters = started(f, params, alpha=8)
    factors = adapters.leaves["w/a"]
    plain = jax.jit(f_lora)(adapters, params, X)
    chex.assert_trees_all_close(plain, X @ factors["a"] @ factors["b"] * 2, rtol=1e-4)
    stabilised = replace(adapters, config=replace(adapters.config, rslora=True))
    chex.assert_trees_all_close(
        jax.jit(f_lora)(stabilised, params, X), plain * 2, rtol=1e-4
    )
    dropping = replace(adapters, config=replace(adapters.config, dropout=0.25))
    chex.assert_trees_all_close(jax.jit(f_lora)(dropping, params, X), plain, rtol=1e-6)
    draw = jax.jit(jax.vmap(lambda k: f_lora(dropping, params, X, key=k)))
    mean = draw(jax.random.split(jax.random.key(3), 4096)).mean(0)
    spread = np.sqrt(1 / 3 / 4096) * jnp.linalg.norm(X, axis=1).max()
    rows = jnp.linalg.norm(factors["a"] @ factors["b"] * 2, axis=0).max()
    assert jnp.abs(mean - plain).max() < 4 * spread * rows


def test_bf16_and_a_step_of_an_optimiser():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), STACK)
    q, x = quantized(scanned, params), X.astype(jnp.bfloat16)
    f_lora, adapters = qjax.lora(scanned, q, R, example=(x,), key=jax.random.key(0))
    optimiser = optax.adamw(1e-2)

    @jax.jit
    def step(adapters, state):
        loss = lambda a: jnp.mean((f_lora(a, q, x).astype(jnp.float32) - 1) ** 2)
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimiser.update(grads, state, adapters)
        return value, optax.apply_updates(adapters, updates), state

    state, values = optimiser.init(adapters), []
    for _ in range(5):
        value, adapters, state = step(adapters, state)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}


def test_starts():
    """Each does what its paper says it minimises, better than the one before."""
    f, params = (lambda p, x: x @ p["w"]), {"w": normal(1, K, N)}
    skew = jnp.exp(jax.random.normal(jax.random.key(5), (K,)))
    x = normal(20, 128, K) * 8 * skew
    _, adapters = qjax.lora(f, params, R, example=(x,), key=jax.random.key(0))
    nf4 = Codebook("nf4")

    def error(start, weigh):
        own, base = qjax.initialise_lora(f, params, adapters, start, [(x,)])
        e = np.float64(qjax.merge_lora(base, own)["w"] - params["w"])
        return np.trace(e.T @ weigh @ e)

    even, seen = np.eye(K), np.float64(x.T @ x) / len(x)
    e = np.float64(quantized(f, params, qjax.RTN(weights=nf4))["w"].dequantize())
    nearest = ((e - params["w"]) ** 2).sum()
    once, often = (error(qjax.LoftQ(weights=nf4, iters=i), even) for i in (1, 5))
    assert often < once < nearest
    assert error(qjax.PiSSA(), even) < 1e-6 * nearest
    assert error(qjax.PiSSA(nf4), even) < nearest
    exact, diagonal, lqer, plain = (
        error(start, seen)
        for start in (
            qjax.QERA(weights=nf4),
            qjax.QERA(weights=nf4, exact=False),
            qjax.LQER(),
            qjax.LoftQ(iters=1),
        )
    )
    assert exact <= min(diagonal, lqer) and max(diagonal, lqer) < plain
    with pytest.raises(ValueError, match="QERA weighs the error by activations"):
        qjax.initialise_lora(f, params, adapters, qjax.QERA())


def test_starts_code_inputs_as_their_scheme_says():
    """As quantize does: the codes' input is coded, the factors take it as it is."""
    f, params = (lambda p, x: x @ p["w"]), {"w": normal(1, K, N)}
    f_lora, adapters = qjax.lora(f, params, R, example=(X,), key=jax.random.key(0))
    for start in (qjax.QERA("W8A8"), qjax.LoftQ("W8A8")):
        own, base = qjax.initialise_lora(f, params, adapters, start, [(X,)])
        by_rank = replace(start, rank=R)
        want = qjax.quantize(f, params, by_rank, [(X,)], progress=False)
        assert base["w"].acts == want["w"].acts != ()
        got = jax.jit(f_lora)(own, base, X)
        chex.assert_trees_all_close(
            got, jax.jit(qjax.apply(f))(want, X), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"LoftQ codes inputs in fp8 .* static range"):
        qjax.initialise_lora(f, params, adapters, qjax.LoftQ("FP8"))


def test_a_start_names_the_site_that_no_batch_reaches():
    def f(p, x):
        return jax.lax.cond(x.sum() < 1e9, lambda: x @ p["a"], lambda: x @ p["b"])

    params = {"a": normal(1, K, N), "b": normal(2, K, N)}
    _, adapters = qjax.lora(f, params, R, example=(X,), key=jax.random.key(0))
    with pytest.raises(ValueError, match="no batch of calibration reaches b, whose"):
        qjax.initialise_lora(f, params, adapters, qjax.QERA(), [(X,)])


def test_qera_is_the_optimum_in_closed_form():
    """Against numpy's double precision: no factors of that rank leave less."""
    w, x = np.float64(normal(1, 32, 24)), np.float64(normal(2, 200, 32)) * 5
    x[:, :4] *= 6
    C = x.T @ x / 200
    split = jax.jit(lambda w, C: qjax.QERA().split(w, 3, C))
    coded, left, right = split(jnp.float32(w), jnp.float32(C))
    e = w - np.float64(coded.decode())
    values, vectors = np.linalg.eigh(C)
    tail = np.linalg.svd((vectors * np.sqrt(values)).T @ e)[1][3:]
    rest = e - np.float64(left) @ np.float64(right)
    np.testing.assert_allclose(np.trace(rest.T @ C @ rest), (tail**2).sum(), rtol=1e-3)
    plain = e - np.asarray(jnp.matmul(*best_rank(jnp.float32(e), 3)))
    assert np.trace(rest.T @ C @ rest) < np.trace(plain.T @ C @ plain)


BAD = {
    "LoRA.rank": {"rank": 0},
    "LoRA.alpha": {"alpha": -1},
    "LoRA.dropout": {"dropout": 1.0},
    "LoRA: targets 'nowhere'": {"targets": "nowhere"},
    "layers/a is one stacked leaf": {"targets": "layers/1/a"},
}


@pytest.mark.parametrize("text", BAD)
def test_bad_fields_are_named(text):
    with pytest.raises((ValueError, TypeError), match=f"^{text}"):
        qjax.lora(scanned, STACK, example=(X,), key=jax.random.key(0), **BAD[text])


def test_a_number_is_no_key():
    with pytest.raises(TypeError, match=r"must be a key such as .* got 0"):
        qjax.lora(scanned, STACK, example=(X,), key=0)
    legacy = jax.random.PRNGKey(0)
    assert qjax.lora(scanned, STACK, example=(X,), key=legacy)[1].leaves
