"""Calibration on a mesh: the codes of one device, on devices and on processes."""

import json
import os
import socket
import subprocess
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import qjax
from qjax.placement import Placement

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
    parts = [q.parts[0] for q in leaves if qjax.is_quantized(q)]
    return np.concatenate([np.asarray(part.unpack()).ravel() for part in parts])


def same_codes(a, b) -> float:
    return float((codes(a) == codes(b)).mean())


@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2), (1, 8)])
def test_eight_devices_give_the_codes_of_one(known, data, model):
    quantized, report = on_mesh(known, data, model)
    assert same_codes(quantized, known["one"][0]) >= 0.995
    for one, many in zip(known["one"][1].sites, report.sites, strict=True):
        assert many.samples == one.samples == 640
        assert many.error == pytest.approx(one.error, rel=1e-3)


def gained(p, x):
    for layer in p:
        x = x + jnp.tanh((x * layer["norm"]) @ layer["up"]) @ layer["down"]
    return x


W4 = qjax.Int(4, qjax.group(16))
RECIPES = {
    "awq": (qjax.AWQ(), qjax.RTN(weights=W4)),
    "smoothquant": (qjax.SmoothQuant(), qjax.RTN(weights=W4)),
    "autoround": qjax.AutoRound(weights=W4, iters=50),
}


@pytest.fixture(scope="module")
def both(known):
    """A recipe on one device and on eight."""

    @cache
    def run(name):
        layers = [{**layer, "norm": jnp.ones(32)} for layer in known["params"]()[:2]]
        given = gained, layers, RECIPES[name], known["batches"]()
        options = {"progress": False, "key": jax.random.key(0)}
        axes = {"axis_types": (AxisType.Auto,) * 2}
        mesh = jax.make_mesh((4, 2), ("data", "model"), **axes)
        one = qjax.quantize_with_report(*given, **options)
        return one, qjax.quantize_with_report(*given, **options, mesh=mesh)

    return run


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_transforms_give_the_codes_of_one(both, name):
    (one, _), (many, _) = both(name)
    assert same_codes(many, one) >= 0.995


def test_blocks_are_solved_as_well_as_on_one(both):
    """Batches that run together are drawn together, so that other steps are made."""
    (_, one), (_, many) = both("autoround")
    for a, b in zip(one.sites, many.sites, strict=True):
        assert b.error < b.error_before
        assert b.error == pytest.approx(a.error, rel=0.1)


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


def command(folder, text, out) -> list[str]:
    """`qjax quantize`; two linears, so that little is compiled."""
    words = f"quantize {folder} {out} --recipe gptq --scheme W4A16 "
    words += f"--targets */mlp/up_proj */mlp/down_proj --calibration.text {text} "
    words += f"--calibration.length 32 --calibration.report {out}.jsonl"
    program = "import sys, qjax.cli; sys.exit(qjax.cli.main())"
    return [sys.executable, "-c", program, *words.split()]


def run(*commands: list[str]) -> None:
    """All at once, each with two devices."""
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(c, env=environment, stderr=subprocess.PIPE) for c in commands
    ]
    try:
        said = [process.communicate(timeout=400)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(p.returncode for p in started), said[0].decode()[-2000:]


def on_two_processes(words: list[str]) -> None:
    """The same command, with the address of the first process and a number each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    more = "--calibration.mesh.data 2 --calibration.mesh.model 2 "
    more += f"--calibration.mesh.coordinator {address} --calibration.mesh.processes 2"
    more += " --calibration.mesh.process"
    run(*([*words, *more.split(), str(process)] for process in range(2)))


def errors(report) -> dict[str, float]:
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    return {x["name"]: x["error"] for x in lines if x["kind"] == "site"}


def test_two_processes_give_the_codes_of_one(folder, text, tmp_path):
    """From one command line; errors within 0.1 %, and the same bits a second time."""
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    run(command(folder, text, one))
    on_two_processes(command(folder, text, two))
    on_two_processes(command(folder, text, again))
    a, b, c = (qjax.restore(path) for path in (one, two, again))
    assert same_codes(b, a) >= 0.995
    for x, y in zip(jax.tree.leaves(b), jax.tree.leaves(c), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    expected = errors(one.with_suffix(".jsonl"))
    assert len(expected) == 4
    assert errors(two.with_suffix(".jsonl")) == pytest.approx(expected, rel=1e-3)


def test_a_mesh_with_other_axes_is_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="the mesh has an axis 'x'"):
        Placement(mesh)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="explicit axes"):
        Placement(explicit)
    assert Placement(None).batch(jnp.ones(3), joined=True).shape == (3,)
