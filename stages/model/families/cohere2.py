"""Cohere2: Command A, Command R7B (Command A report, section 2). Sliding-window layers rotate, full ones do not."""

from typing import Any

from stages.model.config import ModelConfig, Traits
from stages.model.families._common import layer_types, only, pattern_of
from stages.model.families._table import table  # noqa: F401
from stages.stage import ConfigError

TRAITS = Traits(parallel_block=True, norm="layernorm", rotary_everywhere=False, interleaved_rope=True, qkv_bias=False)


def check(config: ModelConfig, where: str) -> None:
    only(config, where, tie_embeddings=True, dynamic_ntk=False, logn_attention=False)
    if not config.sliding_window:
        raise ConfigError(f"{where}.sliding_window: 0, but cohere2's positions are in its windows; give at least 1")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Cohere2ForCausalLM"],
        "attention_bias": False,
        "head_dim": config.head_dim,
        "layer_norm_eps": config.norm_epsilon,
        "layer_types": layer_types(config),
        "logit_scale": config.output_scale,
        "rotary_pct": 1.0,  # llama.cpp's converter reads it, as Cohere's own files have it
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": config.sliding_window_pattern,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": hf["sliding_window"],
        "sliding_window_pattern": hf.get("sliding_window_pattern") or pattern_of(hf.get("layer_types"), 4),
        "logit_scale": float(hf["logit_scale"]),
        "norm_epsilon": float(hf["layer_norm_eps"]),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }
