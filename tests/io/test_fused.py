"""Linears that vLLM runs as one are stored alike, or the export says so.

`golden/nvfp4.npz` says how llm-compressor rounds the weights of two models to NVFP4
(`scripts/parity/golden_nvfp4.py`).
"""

import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.formats import NVFP4, Int, group
from qjax.core.scales import Percentile
from qjax.io.export import export
from qjax.io.fused import FUSED
from qjax.io.huggingface import load_weights
from qjax.io.shards import open_shards
from qjax.models.mixtral import EXPERT
from qjax.trace.control import QuantizationWarning

FOUR = Int(4, group(32))
GOLDEN = Path(__file__).parents[1] / "golden" / "nvfp4.npz"
TINY = Path(qjax.__file__).parent / "models/tiny_llama"
TOKENS = np.random.default_rng(0).integers(2, 64, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    with np.load(GOLDEN) as golden:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(golden[f"base/{name}"].tobytes())
    return folder


def written(
    out: Path, model: Path, recipe: Any, calibrated: bool = False, scan: bool = True
) -> dict[str, np.ndarray]:
    """The tensors of the exported model; the export must not warn."""
    f, params, _ = load_weights(model, scan_layers=scan)
    batch = (jnp.asarray(TOKENS),)
    given: Any = {"calibration": [batch]} if calibrated else {"example": batch}
    given |= {"key": jax.random.key(0), "progress": False}
    return exported(out, qjax.quantize(f, params, recipe, **given), model)


def exported(out: Path, qparams: Any, model: Path) -> dict[str, np.ndarray]:
    """The tensors; the export must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        export(out, qparams, model=model)
    return {name: each.view() for name, each in open_shards(out).items()}


def scales(held: dict[str, np.ndarray], last: str) -> list[list[float]]:
    """The second scales of the members of every fused linear."""
    found = []
    for name in held:
        module, _, own = name.rpartition(".")
        parent, _, member = module.rpartition(".")
        for members in FUSED:
            if own == last and member == members[0]:
                each = (held[f"{parent}.{other}.{last}"] for other in members)
                found.append([float(x.item()) for x in each])
    return found


RTN, GPTQ = qjax.RTN, qjax.GPTQ
RECIPES: dict[str, tuple[Any, bool]] = {
    "rtn": (RTN("NVFP4A16"), False),
    "stochastic": (RTN("NVFP4A16", rounding="stochastic"), False),
    "rtn of inputs": (RTN("NVFP4"), True),
    "gptq": (GPTQ("NVFP4"), True),
    "imatrix": (qjax.IMatrix("NVFP4A16"), True),
    "awq": ((qjax.AWQ(n_grid=2), RTN("NVFP4A16")), True),
    "qep": (qjax.QEP(RTN("NVFP4A16")), True),
    "simple": (qjax.SimplePTQ("NVFP4"), True),
    "distilled": (qjax.ZeroQuantLKD("NVFP4A16", iters=2, lr=1e-2), True),
}
STATIC = ("rtn of inputs", "gptq", "simple")
IN_ONE = ["rtn", "rtn of inputs", "gptq"]
CASES = [
    *(("small", name, True) for name in RECIPES),
    *(("small", name, False) for name in (*IN_ONE, "distilled")),
    *(("mixtral", name, True) for name in IN_ONE),
]


@pytest.mark.parametrize(("model", "recipe", "scan"), CASES)
def test_members_share_second_scales(
    small: Any, mixtral: Path, tmp_path: Path, model: str, recipe: str, scan: bool
):
    folder = {"small": small.folder, "mixtral": mixtral}[model]
    held = written(tmp_path / "out", folder, *RECIPES[recipe], scan)
    weights, inputs = (
        scales(held, f"{kind}_global_scale") for kind in ("weight", "input")
    )
    layers, groups = {"small": (2, 2), "mixtral": (1, 4)}[model]
    assert len(weights) == layers * groups
    assert len(inputs) == (len(weights) if recipe in STATIC else 0)
    for each in (*weights, *inputs):
        assert len(set(each)) == 1
    # Every fused linear, and so every expert, has its own.
    assert len({members[0] for members in weights}) == len(weights)


def published(name: str) -> str:
    """The peer gives experts the names of linears; the checkpoint has Mixtral's."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{EXPERT[last]}" if ".experts." in name else name


@pytest.mark.parametrize("model", ["tiny_llama", "mixtral"])
def test_rounded_as_llm_compressor_does(mixtral: Path, tmp_path: Path, model: str):
    folder = {"tiny_llama": TINY, "mixtral": mixtral}[model]
    held = written(tmp_path / "out", folder, RTN("NVFP4A16"))
    with np.load(GOLDEN) as golden:
        names, second, packed, first = (
            golden[f"{model}/{key}"]
            for key in ("names", "global_scale", "packed", "scale")
        )
    own = [name.rpartition(".")[0] for name in held if name.endswith("_packed")]
    names = [published(name) for name in names.tolist()]
    assert sorted(own) == sorted(names)
    for i, name in enumerate(names):
        assert held[f"{name}.weight_global_scale"].item() == second[i]
        assert zlib.crc32(held[f"{name}.weight_scale"].tobytes()) == first[i]
        assert zlib.crc32(held[f"{name}.weight_packed"].tobytes()) == packed[i]


TRAINED = {
    "rtn": RTN("NVFP4A16"),
    "percentile": qjax.QAT(qjax.StraightThrough(NVFP4(), Percentile(99.0))),
}


@pytest.mark.parametrize(
    ("model", "recipe", "scan"),
    [("small", "rtn", True), ("small", "percentile", False), ("mixtral", "rtn", True)],
)
def test_what_is_trained_shares_second_scales_and_is_served(
    small: Any, mixtral: Path, tmp_path: Path, model: str, recipe: str, scan: bool
):
    """After a step in which every member has moved by an amount of its own."""
    folder = {"small": small.folder, "mixtral": mixtral}[model]
    f, params, _ = load_weights(folder, scan_layers=scan)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    batch = jnp.asarray(TOKENS)
    f_qat, qstate = qjax.fake_quantize(f, params, TRAINED[recipe], example=(batch,))
    loss = jax.jit(jax.grad(lambda p: jnp.square(f_qat(p, qstate, batch)[0]).mean()))
    params = jax.tree.map(lambda x, g: x - 0.1 * g, params, loss(params))
    qparams = qjax.finalize(params, qstate)
    got, want = jax.jit(f_qat)(params, qstate, batch)[0], qjax.apply(f)(qparams, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * jnp.abs(want).max())
    held = exported(tmp_path / "out", qparams, folder)
    weights = scales(held, "weight_global_scale")
    layers, groups = {"small": (2, 2), "mixtral": (1, 4)}[model]
    assert len(weights) == layers * groups
    assert all(len(set(each)) == 1 for each in weights)
    if recipe == "rtn":
        same = qjax.quantize(f, params, TRAINED[recipe], example=(batch,))
        for a, b in zip(*map(jax.tree.leaves, (qparams, same)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_two_formats(small: Any, tmp_path: Path):
    keep = lambda path: None if "k_proj" in path else FOUR
    with pytest.warns(QuantizationWarning) as caught:
        export(tmp_path / "out", small.quantized(keep), model=small.folder)
    (message,) = [str(each.message) for each in caught]
    layer = "model.layers.0.self_attn."
    assert message.startswith(f"{layer}q_proj and {layer}k_proj are stored in diff")


def test_two_second_scales(small: Any, tmp_path: Path):
    """Each matrix was rounded by itself."""
    qparams = small.quantized(NVFP4(), alone=True)
    said = r"_proj and .*_proj are in NVFP4 with different global scales, .* RTN\("
    with pytest.raises(ValueError, match=said):
        export(tmp_path / "out", qparams, model=small.folder)
    assert not (tmp_path / "out").exists()


def test_two_second_scales_of_inputs(small: Any, tmp_path: Path):
    f, params, _ = load_weights(small.folder, scan_layers=True)
    options: Any = {"progress": False}
    qparams = qjax.quantize(f, params, RTN("NVFP4"), [(TOKENS,)], **options)
    leaf = qparams["layers"]["attn"]["k_proj"]["kernel"]
    acts = replace(leaf.acts[0], global_scale=2 * leaf.acts[0].global_scale)
    qparams["layers"]["attn"]["k_proj"]["kernel"] = replace(leaf, acts=(acts,))
    with pytest.warns(QuantizationWarning, match="global scales of their inputs: vLLM"):
        export(tmp_path / "out", qparams, model=small.folder)


def test_two_second_scales_of_an_expert(mixtral: Path, tmp_path: Path):
    f, params, _ = load_weights(mixtral)
    steps = tuple(RTN("NVFP4A16", targets=f"*{n}_proj*") for n in ("gate", "up"))
    batch = (jnp.asarray(TOKENS),)
    qparams = qjax.quantize(f, params, steps, example=batch, progress=False)
    with pytest.raises(ValueError, match=r"\.w1 and .*\.w3 are .* global scales"):
        export(tmp_path / "out", qparams, model=mixtral)


def test_modules_that_stand_alone(small: Any, tmp_path: Path):
    def format(path: str) -> Any:
        return NVFP4() if "down_proj" in path or "o_proj" in path else FOUR

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(tmp_path / "out", small.quantized(format), model=small.folder)
