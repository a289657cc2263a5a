"""The README's Python examples run as they stand, on the bundled model."""

import re
from pathlib import Path

import numpy as np
import pytest

import qjax
from qjax.commands.inputs import BUNDLED

# With torch at hand transformers imports it, and hqq, for any tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path: Path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code, calibrated, exported, trained = blocks
    named = re.compile(r'load_model\("Qwen[^"]+"\)')
    assert named.search(code)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(named.sub(f"load_model({str(BUNDLED)!r})", code), names)
    restored = qjax.restore(tmp_path / "out")
    again = qjax.apply(names["f"])(restored, names["tokens"])
    assert (again == names["logits"]).all()
    names["calibration"] = [names["tokens"]]
    exec(calibrated, names)
    assert {row.method for row in names["report"].sites} == {"GPTQ"}
    assert {row.method for row in names["report"].transforms} == {"SmoothQuant"}
    assert names["qparams"]["layers"]["0"]["attn"]["q_proj"]["kernel"].acts
    folder = re.compile(r'model="[^"]+"')
    exec(folder.sub(f"model={str(BUNDLED)!r}", exported), names)
    before = qjax.apply(names["f"])(names["qparams"], names["tokens"])
    after = qjax.apply(names["f"])(names["served"], names["tokens"])
    np.testing.assert_allclose(after, before, atol=1e-3)
    exec(trained, names)
    adapted = qjax.apply(names["f"])(names["base"], names["tokens"])
    np.testing.assert_allclose(names["logits"], adapted, atol=1e-4)
