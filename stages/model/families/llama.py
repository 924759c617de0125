"""Llama 2, 3 and 3.1 (the latter with `rope_scaling`): sequential blocks, RMSNorm, no biases."""

from typing import Any

from stages.model.config import ModelConfig, Traits
from stages.model.families._common import only, without_logit_scale
from stages.model.families._table import table  # noqa: F401

TRAITS = Traits(parallel_block=False, norm="rmsnorm", rotary_everywhere=True, interleaved_rope=False, qkv_bias=False)


def check(config: ModelConfig, where: str) -> None:
    only(config, where, sliding_window=0, dynamic_ntk=False, logn_attention=False)
    without_logit_scale(config, where)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": config.head_dim,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_epsilon,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": 0,
        "logit_scale": 1.0,
        "norm_epsilon": float(hf["rms_norm_eps"]),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }
