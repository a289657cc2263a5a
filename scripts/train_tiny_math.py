"""Contractions of the training step: bfloat16 in, float32 out, in both directions."""

from typing import Any

import jax
import jax.numpy as jnp


def narrow(x: jax.Array) -> jax.Array:
    """To bfloat16."""
    return x.astype(jnp.bfloat16)


def contract(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of bfloat16 operands, accumulated in float32."""
    return jnp.einsum(spec, narrow(a), narrow(b), preferred_element_type=jnp.float32)


def mixed(forward: str, left: str, right: str) -> Any:
    """An einsum whose gradients are mixed-precision einsums too.

    `left` and `right` contract the output's cotangent with the other operand.
    """

    @jax.custom_vjp
    def product(a, b):
        return contract(forward, a, b)

    def keep(a, b):
        return contract(forward, a, b), (narrow(a), narrow(b))

    def gradients(kept, cotangent):
        a, b = kept
        return contract(left, cotangent, b), contract(right, cotangent, a)

    product.defvjp(keep, gradients)
    return product


_linear = mixed("mk,kn->mn", "mn,kn->mk", "mn,mk->kn")
_scores = mixed("hqtd,hsd->hqts", "hqts,hsd->hqtd", "hqts,hqtd->hsd")
_values = mixed("hqts,hsd->hqtd", "hqtd,hsd->hqts", "hqtd,hqts->hsd")


def mixed_linear(x: jax.Array, kernel: jax.Array, dimensions: Any, **_: Any) -> Any:
    """What `flax.nnx.Linear` calls instead of `lax.dot_general`."""
    out = _linear(x.reshape(-1, x.shape[-1]), kernel)
    return out.reshape(*x.shape[:-1], kernel.shape[1])


def mixed_attention(q, k, v, mask, scale, cap=None):
    """Causal attention without padding, arguments as in `qjax.models.layers`."""
    assert cap is None, "scores of the tiny Llama have no bound"
    b, t, h, d = q.shape
    g = k.shape[2]
    q = (q * scale).reshape(b, t, g, h // g, d).transpose(0, 2, 3, 1, 4)
    q = q.reshape(b * g, h // g, t, d)
    k, v = (x.transpose(0, 2, 1, 3).reshape(b * g, t, d) for x in (k, v))
    causal = jnp.tril(jnp.ones((t, t), bool))
    weights = jax.nn.softmax(jnp.where(causal, _scores(q, k), -1e30), axis=-1)
    out = _values(weights, v).reshape(b, g, h // g, t, d)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h * d)


def _chunk_loss(hidden, table, targets):
    logits = contract("md,vd->mv", hidden, table)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    powers = jnp.exp(logits - top)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    loss = jnp.sum(jnp.log(total) + top - picked)
    slope = powers / total
    slope = slope - (jnp.arange(table.shape[0]) == targets[:, None])
    return (
        loss,
        contract("mv,vd->md", slope, table),
        contract("mv,md->vd", slope, hidden),
    )


@jax.custom_vjp
def cross_entropy(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean loss in nats of `targets[B, T]`, logits being `hidden @ table.T`.

    The gradient is computed with the loss, sequence by sequence, so that the logits
    of one sequence at a time exist.
    """
    return _loss_and_gradient(hidden, table, targets)[0]


def _loss_and_gradient(hidden, table, targets):
    rows = max(1, 512 // hidden.shape[1])
    chunk = rows if hidden.shape[0] % rows == 0 else 1
    shape = (hidden.shape[0] // chunk, chunk * hidden.shape[1])

    def body(carry, xs):
        loss, d_hidden, d_table = _chunk_loss(xs[0], table, xs[1])
        return (carry[0] + loss, carry[1] + d_table), d_hidden

    start = (jnp.zeros(()), jnp.zeros_like(table))
    xs = (hidden.reshape(*shape, -1), targets.reshape(shape))
    (loss, d_table), d_hidden = jax.lax.scan(body, start, xs)
    scale = 1.0 / targets.size
    return loss * scale, (d_hidden.reshape(hidden.shape) * scale, d_table * scale)


def _gradient(kept, cotangent):
    return kept[0] * cotangent, kept[1] * cotangent, None


cross_entropy.defvjp(_loss_and_gradient, _gradient)
