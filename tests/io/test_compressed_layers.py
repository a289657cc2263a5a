"""Linears that code their inputs: for the same input, compressed-tensors' own output.

Between whole models, an input on the edge of two codes may fall to either side, because
sums differ in their last bit. The largest input of a token that is coded on a dynamic
scale always lies on an edge: `absmax / (absmax / 127.5)`. Layer by layer there is no
such slack.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import Float, Format, Int, group, tensor, token
from qjax.core.qtensor import Activation, SiteActs
from qjax.io.export import export
from qjax.ops import matmul

pytestmark = pytest.mark.optimized
FP8, INT8 = Float("e4m3", token()), Int(8, token())
ASYM8 = Int(8, tensor(), symmetric=False)
CASES: dict[str, tuple[Format, Activation]] = {
    "w8a8": (Int(8), Activation(INT8)),
    "w4a8": (Int(4, group(32)), Activation(INT8)),
    "w8a8_static": (Int(8), Activation(ASYM8, dynamic=False)),
    "fp8_dynamic": (Float("e4m3"), Activation(FP8)),
    "fp8_static": (
        Float("e4m3", tensor()),
        Activation(Float("e4m3", tensor()), dynamic=False),
    ),
}


def record(activation: Activation, w: Any) -> SiteActs:
    if activation.dynamic:
        return SiteActs(activation=activation)
    lead = (w.shape[0], 1, 1)
    zero = None
    if isinstance(activation.format, Int):
        zero = jnp.full(lead, 120, jnp.uint8)
    return SiteActs(jnp.full(lead, 0.02, jnp.float32), zero, activation=activation)


@pytest.mark.parametrize("name", CASES)
def test_every_linear_gives_their_output(small: Any, tmp_path: Path, name: str):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    format, activation = CASES[name]
    qparams = small.quantized(format, partial(record, activation))
    out = export(tmp_path / "out", qparams, model=small.folder)
    model, compared = AutoModelForCausalLM.from_pretrained(out), []
    run = jax.jit(matmul)

    def compare(names: list[str], layer: Any, inputs: Any, output: Any) -> None:
        kernel = qparams["layers"][names[-2].removeprefix("self_")][names[-1]]["kernel"]
        q = jax.tree.map(lambda a: a[int(names[2])], kernel)
        x = inputs[0].numpy().reshape(-1, inputs[0].shape[-1])
        y = np.asarray(run(jnp.asarray(x), replace(q, dtype=jnp.dtype("float32"))))
        y = y if layer.bias is None else y + layer.bias.detach().numpy()
        found = output.numpy().reshape(y.shape)
        np.testing.assert_allclose(found, y, atol=2e-6 * np.abs(y).max())
        compared.append(names[-1])

    for each, module in model.named_modules():
        if each.startswith("model.layers") and each.endswith("_proj"):
            module.register_forward_hook(partial(compare, each.split(".")))
    with torch.no_grad():
        model(torch.arange(48).reshape(2, 24))
    assert len(compared) == 14
