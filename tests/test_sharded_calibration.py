"""Calibration on a mesh: the codes of one device, on devices and on processes."""

import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import qjax
from qjax.placement import Placement

WORKER = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
sys.path.insert(0, sys.argv[1])
from qjax.commands.calibration import MeshOptions
mesh = MeshOptions(2, 2, sys.argv[2], 2, int(sys.argv[3])).start()
import qjax
from sharded_model import f, params, batches, recipe
quantized = qjax.quantize(f, params(), recipe, batches(), progress=False, mesh=mesh)
if jax.process_index() == 0:
    qjax.save(sys.argv[1] + "/out", quantized)
"""

MODEL = """
import jax.numpy as jnp, numpy as np
import qjax

recipe = qjax.GPTQ(weights=qjax.Int(4, qjax.group(16)))

def params():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32)
    return [{"up": draw(32, 64), "down": draw(64, 32)} for _ in range(3)]

def f(p, x):
    for layer in p:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x

def batches():
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(2, 40, 32)).astype(np.float32),) for _ in range(8)]
"""


@pytest.fixture(scope="module")
def known():
    names: dict = {}
    exec(MODEL, names)
    names["one"] = qjax.quantize_with_report(
        names["f"], names["params"](), names["recipe"], names["batches"](),
        progress=False,
    )  # fmt: skip
    return names


def on_mesh(known, data: int, model: int, batches=None):
    mesh = jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    return qjax.quantize_with_report(
        known["f"], known["params"](), known["recipe"], batches or known["batches"](),
        progress=False, mesh=mesh,
    )  # fmt: skip


def codes(quantized) -> np.ndarray:
    leaves = jax.tree.leaves(quantized, is_leaf=qjax.is_quantized)
    return np.concatenate([np.asarray(q.parts[0].unpack()).ravel() for q in leaves])


def same_codes(a, b) -> float:
    return float((codes(a) == codes(b)).mean())


@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2), (1, 8)])
def test_eight_devices_give_the_codes_of_one(known, data, model):
    quantized, report = on_mesh(known, data, model)
    assert same_codes(quantized, known["one"][0]) >= 0.995
    for one, many in zip(known["one"][1].sites, report.sites, strict=True):
        assert many.samples == one.samples == 640
        assert many.error == pytest.approx(one.error, rel=1e-3)


def test_a_mesh_repeats_itself_bit_for_bit(known):
    first, second = (on_mesh(known, 4, 2)[0] for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_batches_that_do_not_fill_the_devices(known):
    """Six batches on four devices: four together, two that every device runs."""
    batches = known["batches"]()[:6]
    quantized, report = on_mesh(known, 4, 2, batches)
    one = qjax.quantize(
        known["f"], known["params"](), known["recipe"], batches, progress=False
    )
    assert same_codes(quantized, one) >= 0.995
    assert {site.samples for site in report.sites} == {480}


def test_two_processes_give_the_codes_of_one(known, tmp_path):
    (tmp_path / "sharded_model.py").write_text(MODEL)
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "worker.py", str(tmp_path), address, str(process)],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
        )
        for process in range(2)
    ]
    try:
        results = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [w.returncode for w in workers] == [0, 0], results[0].decode()[-2000:]
    assert same_codes(qjax.restore(tmp_path / "out"), known["one"][0]) >= 0.995


def test_a_mesh_with_other_axes_is_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="the mesh has an axis 'x'"):
        Placement(mesh)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="explicit axes"):
        Placement(explicit)
    assert Placement(None).batch(jnp.ones(3), joined=True).shape == (3,)
