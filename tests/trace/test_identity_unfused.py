"""Where XLA fuses nothing, a pass in which nothing is solved changes no bit at all."""

import jax
import pytest

from qjax.models import ARCHITECTURES

# Also where a norm ends a block, which the whole program rounds otherwise once it is
# fused (`test_identity.py`), and for models of other libraries.


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, "llama_tied", "opt_350m"}))
def test_models_keep_every_bit(kit, name):
    f, params = kit.model(name)
    batch = (kit.tokens(2, 12),)
    (got,) = kit.through(f, params, [batch])
    assert kit.error(got, jax.jit(f)(params, *batch)) == 0


def test_third_party_models_keep_every_bit(kit):
    for name, (build, inputs, _) in kit.load("test_third_party").MODELS.items():
        f, params = build()
        (got,) = kit.through(f, params, [inputs])
        assert kit.error(got, jax.jit(f)(params, *inputs)) == 0, name
