"""What auto-round adds to a configuration, and its own format.

Whole checkpoints of its own are read in `test_peer_checkpoints.py`.
"""

from typing import Any

import pytest

from qjax.io import gptq
from qjax.io.quantized import reader_of

GPTQ = {
    **{"quant_method": "gptq", "autoround_version": "0.15.1", "bits": 4, "sym": True},
    **{"group_size": 32, "desc_act": False, "data_type": "int", "amp": False},
    **{"static_kv_granularity": "tensor", "to_quant_block_names": "model.layers"},
}


def test_its_settings_are_no_options_of_the_format():
    assert gptq.Reader.of(GPTQ).scheme == gptq.Scheme(4, 32, True)
    plain = {k: v for k, v in GPTQ.items() if k != "autoround_version"}
    with pytest.raises(ValueError, match="'data_type' is unknown"):
        gptq.Reader.of(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp', supported are"),
        ({"act_bits": 8}, "act_bits is 8, supported are"),
        ({"static_kv_dtype": "fp8"}, "static_kv_dtype is 'fp8'"),
        ({"turbo": 1}, "'turbo' is unknown"),
    ],
)
def test_what_changes_the_numbers_is_refused(changes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        reader_of({"quantization_config": GPTQ | changes})


def test_its_own_format_is_one_of_two_others():
    own = GPTQ | {"quant_method": "auto-round"}
    packed = own | {"packing_format": "auto_round:auto_gptq"}
    assert reader_of({"quantization_config": packed}) == gptq.Reader.of(GPTQ)
    for other in ("auto_round:fp8", [], {}, None):
        with pytest.raises(ValueError, match="packing_format is"):
            reader_of({"quantization_config": own | {"packing_format": other}})
