"""Every file of conf/model: it composes, and its modules have the parameters that the table counts (and was published)."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from flows.config import CONF
from stages.model import weights
from stages.model.config import ModelConfig
from stages.model.cpu import cuda_names
from stages.model.model import Model
from stages.stage import parse
from stages.trainer import parallel
from stages.trainer.config import TrainConfig

PUBLISHED = {
    "command_a": 111_057_580_032,
    "command_r7b": 8_028_033_024,
    "qwen_1b8": 1_836_828_672,
    "qwen_7b": 7_721_324_544,
    "qwen_14b": 14_167_290_880,
    "qwen2_0b5": 494_032_768,
    "llama3_8b": 8_030_261_248,
}
FILES = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_parameters_by_construction(name):
    values = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    config = parse(ModelConfig, values, "model")
    config.check()
    assert ModelConfig.from_hf(config.to_hf()).to_hf() == config.to_hf()
    with cuda_names(), torch.device("meta"):
        parallel.initialise(TrainConfig())
        model = Model(config, "lm")
    built = {parameter_name: tuple(p.shape) for parameter_name, p in model.named_parameters()}
    count = sum(torch.Size(shape).numel() for shape in built.values())
    assert count == config.parameters() == PUBLISHED.get(name, count)
    assert built.keys() == {row.name for row in weights.table(config)}


# What the files of these models say in transformers 4's keys, those that mean nothing to us included.
OLD = {
    "llama3_8b": {
        "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 8192}, "vocab_size": 128256, "eos_token_id": [128001, 128008],
    },
    "qwen2_0b5": {
        "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 131072, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "command_r7b": {
        "model_type": "cohere2", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "layer_norm_eps": 1e-05, "logit_scale": 0.25,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rope_scaling": None,
        "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096, "use_parallel_block": True, "vocab_size": 256000,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_config_files_of_transformers_4_give_these_sizes(name):
    values = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    assert ModelConfig.from_hf(OLD[name]) == parse(ModelConfig, values, "model")


def test_the_formula_of_command_a():
    """V h + L (2 h q d + 2 h kv d + 3 h ffn + h) + h (recipe, architecture)."""
    h, d, layers, ffn = 12288, 128, 64, 36864
    assert 256000 * h + layers * (2 * h * 96 * d + 2 * h * 8 * d + 3 * h * ffn + h) + h == PUBLISHED["command_a"]


def test_command_a_has_full_attention_without_positions_on_every_4th_layer():
    values = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "command_a.yaml"))
    config = ModelConfig(**values)
    full = [i for i in range(config.num_layers) if config.full_attention(i)]
    assert full == list(range(3, 64, 4)) and not any(map(config.rotary, full))
