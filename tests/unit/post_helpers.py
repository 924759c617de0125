"""Model folders for tests of post-training, as the stages publish them."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import artifact, context, tokenizer

from stages.chat.template import END_OF_TURN, SPECIAL_TOKENS

__all__ = ["artifact", "context", "save_checkpoint"]


def save_checkpoint(path: Path, hidden: int = 32, layers: int = 4, window: int = 8, seed: int = 0, std=0.02) -> Path:
    """A random Cohere2 CHECKPOINT folder (3 sliding-window layers and 1 full) with a tokenizer of 276 tokens and 320 rows
    of vocabulary; a larger `std` makes sharper predictions."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    tokenizer(path)
    torch.manual_seed(seed)
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(layers)]
    config = Cohere2Config(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        sliding_window=window,
        sliding_window_pattern=4,
        layer_types=kinds,
        logit_scale=0.25,
        initializer_range=std,
        rope_theta=50000.0,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=5,
        eos_token_id=SPECIAL_TOKENS.index(END_OF_TURN),
    )
    Cohere2ForCausalLM(config).save_pretrained(path)
    return path
