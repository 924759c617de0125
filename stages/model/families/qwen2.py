"""Qwen2, and Qwen v1 written as Qwen2: sequential blocks, RMSNorm, biases on Q, K and V.

Qwen v1's inference options stand in config.json under its own names (`use_dynamic_ntk`, `use_logn_attn`,
`seq_length`); transformers' Qwen2ForCausalLM does not know them, and within the trained length they change nothing.
"""

from typing import Any

from stages.model.config import ModelConfig, Traits
from stages.model.families._common import layer_types, pattern_of, without_logit_scale
from stages.model.families._table import table  # noqa: F401
from stages.stage import ConfigError

TRAITS = Traits(parallel_block=False, norm="rmsnorm", rotary_everywhere=True, interleaved_rope=False, qkv_bias=True)


def check(config: ModelConfig, where: str) -> None:
    without_logit_scale(config, where)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    found = {
        "architectures": ["Qwen2ForCausalLM"],
        "layer_types": layer_types(config),
        "max_window_layers": 0 if window else config.num_layers,
        "rms_norm_eps": config.norm_epsilon,
        "sliding_window": window or None,
        "use_sliding_window": bool(window),
    }
    if config.dynamic_ntk or config.logn_attention:
        found |= {
            "seq_length": config.trained_length or config.max_position_embeddings,
            "use_dynamic_ntk": config.dynamic_ntk,
            "use_logn_attn": config.logn_attention,
        }
    return found


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    layers, kinds = hf["num_hidden_layers"], hf.get("layer_types")
    window = (hf.get("sliding_window") or 0) if hf.get("use_sliding_window") else 0
    if kinds is None and window:
        full = min(hf.get("max_window_layers", 28), layers)
        if 0 < full < layers:
            raise ConfigError(
                f"config.json: max_window_layers {full} of {layers}: windows on upper layers alone are not built; take a "
                "model with windows on every layer or none"
            )
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if kinds and "sliding_attention" not in kinds:
        window = 0
    found = {
        "sliding_window": window,
        "logit_scale": 1.0,
        "norm_epsilon": float(hf["rms_norm_eps"]),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "dynamic_ntk": hf.get("use_dynamic_ntk", False),
        "logn_attention": hf.get("use_logn_attn", False),
    }
    if window:
        found["sliding_window_pattern"] = pattern_of(kinds, layers + 1)
    if found["dynamic_ntk"] or found["logn_attention"]:
        found["trained_length"] = hf["seq_length"]
    return found
