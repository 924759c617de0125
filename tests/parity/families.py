"""Small models of every family for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from stages.model import folder, weights
from stages.model.config import ModelConfig
from stages.model.cpu import cuda_names
from stages.model.model import Model
from stages.trainer import parallel
from stages.trainer.config import TrainConfig
from tests.unit.tiny import tokenizer

COHERE2 = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=320, sliding_window=16, logit_scale=1.0, init_std=0.3, max_position_embeddings=256,
)  # fmt: skip
QWEN2 = replace(
    COHERE2, family="qwen2", sliding_window=0, tie_embeddings=False, rope_theta=1e6, norm_epsilon=1e-6
)  # fmt: skip
LLAMA = replace(QWEN2, family="llama", rope_theta=10000.0, norm_epsilon=1e-5)
LLAMA31 = replace(
    LLAMA, rope_theta=500.0,
    rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64.0},
)  # fmt: skip
FAMILIES = {"cohere2": COHERE2, "qwen2": QWEN2, "llama": LLAMA31}


def build(config: ModelConfig, source, head: str = "lm") -> tuple[Model, list]:
    """A model on this machine with the weights of `source`, and its rows."""
    rows = weights.table(config, head)
    with cuda_names():
        parallel.initialise(TrainConfig())
        model = Model(config, head)
        weights.load(model, rows, source)
    return model, rows


def export(config: ModelConfig, seed: int, out: Path) -> Path:
    """A folder of `config` with random weights, norms and biases included."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [replace(row, std=row.std or 0.5) for row in weights.table(config)]
    model, rows = build(config, weights.Initial(rows, seed))
    weights.save(model, rows, out)
    folder.write(out, config, tokenizer(out.parent / "tokenizer"))
    return out


def again(path: Path, out: Path) -> Path:
    """`path` imported and exported to `out`."""
    out.mkdir()
    config = folder.read_config(path)
    model, rows = build(config, weights.Folder(path))
    weights.save(model, rows, out)
    folder.write(out, config, path)
    return out


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def theirs(config: ModelConfig, seed: int = 0) -> torch.nn.Module:
    """transformers' own random model of `config`, norms and biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = config.to_hf()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf.pop("model_type"), **hf))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model
