"""What auto-round (0.15) adds to a `quantization_config`, and its own format.

Beside the options of GPTQ's or AWQ's format it writes down its settings. Its own format
is one of those two under another name, without `g_idx`.
"""

from collections.abc import Mapping
from typing import Any

OWNER = "config.json: quantization_config"
METHOD = "auto-round"
PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
# What says how the codes were found, and nothing of how they are stored.
INFORMATIVE = frozenset(
    {
        *("autoround_version", "provider", "amp", "batch_size", "dataset", "iters"),
        *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input"),
        *("gradient_accumulate_steps", "lr", "minmax_lr", "low_gpu_mem_usage"),
        *("nsamples", "seqlen", "quant_block_list", "scale_dtype", "supported_types"),
        *("static_attention_granularity", "static_kv_granularity"),
        *("to_quant_block_names", "block_name_to_quantize"),
    }
)
# What changes the numbers: only these values are known to be read rightly.
PLAIN: dict[str, tuple[Any, ...]] = {
    "data_type": ("int", None),
    "act_bits": (16, 32, None),
    "act_data_type": ("int", "float", None),
    "static_attention_dtype": (None,),
    "static_kv_dtype": (None,),
    "super_bits": (None,),
    "super_group_size": (None,),
    "regex_config": ({}, None),
    "rotation_configs": ([], None),
    "extra_config": ({}, None),
}
UNUSED = frozenset({"act_group_size", "act_sym", "act_dynamic"})


def plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what auto-round adds.

    Raises:
      ValueError: a setting that changes the numbers and is not read.
    """
    if "autoround_version" not in raw:
        return dict(raw)
    for name, values in PLAIN.items():
        if raw.get(name, values[-1]) not in values:
            raise ValueError(
                f"{OWNER}.{name} is {raw[name]!r}, supported are {values} in what "
                "auto-round writes"
            )
    added = INFORMATIVE | UNUSED | PLAIN.keys()
    return {name: value for name, value in raw.items() if name not in added}


def as_its_packing(raw: Mapping[str, Any]) -> dict[str, Any]:
    """auto-round's own format as the configuration of the one that it is.

    Raises:
      ValueError: it is another.
    """
    packing = raw.get("packing_format")
    if not isinstance(packing, str) or packing not in PACKINGS:
        raise ValueError(
            f"{OWNER}.packing_format is {packing!r}, supported are "
            f"{', '.join(PACKINGS)}"
        )
    kept = {name: raw[name] for name in raw if name != "packing_format"}
    return kept | {"quant_method": PACKINGS[packing]}
