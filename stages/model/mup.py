"""muP: the learning rate and initial weights tuned at one width serve another. Imports no torch.

Yang et al. 2022 (Tensor Programs V, arXiv 2203.03466), table 8, for Adam, with r = hidden_size / mup_base_width:

| parameter | initial std | learning rate | factor on the output |
| --- | --- | --- | --- |
| embedding, norms, biases | 1 | 1 | |
| hidden matrices | 1 / sqrt(r) | 1 / r | |
| output layer, tied to the embedding | 1 | 1 | 1 / r |
| output layer of its own, reward head | 1 / r | 1 / r | |

The last row is the same function in training as the one before it (lemma J.1: a factor moved into the weight and its
learning rate), so that untied models need no factor that Hugging Face's format could not hold. Widths are to differ in
hidden_size, heads and ffn_hidden_size alike at one head_dim: attention keeps its 1 / sqrt(head_dim), since the paper's
1 / d only matters where d grows. AdamW multiplies weight decay by the learning rate: that of hidden matrices falls
with 1 / r too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.model.config import ModelConfig

HIDDEN = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
READOUT = ("output_layer.weight", "score.weight")


def ratio(config: ModelConfig) -> float:
    """hidden_size / mup_base_width; 1 where muP is off."""
    return config.hidden_size / config.mup_base_width if config.mup_base_width else 1.0


def init_multiplier(config: ModelConfig) -> float:
    """On the initial standard deviation of hidden matrices."""
    return ratio(config) ** -0.5


def output_init_multiplier(config: ModelConfig) -> float:
    """On the initial standard deviation of an output layer of its own."""
    return 1 / ratio(config)


def output_multiplier(config: ModelConfig) -> float:
    """On the logits of tied embeddings."""
    return 1 / ratio(config) if config.tie_embeddings else 1.0


def lr_multiplier(config: ModelConfig, name: str) -> float:
    """On the learning rate of the parameter that Megatron-core calls `name`."""
    if name.endswith(HIDDEN) or (name.endswith(READOUT) and not (config.tie_embeddings and "output_layer" in name)):
        return 1 / ratio(config)
    return 1.0
