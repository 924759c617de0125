"""Model FLOPs of one optimizer step, counted exactly from the documents' lengths. Imports no torch.

A multiply-add is 2 FLOPs. Counted are the matrix products that the model needs, forward (1) and backward (2, for the
gradients of both factors): Chowdhery et al. 2022 (PaLM), appendix B, made exact in two places:

- the output layer for target rows only, because no other row is computed (a prompt, a document's last token);
- attention for the (query, key) pairs that the causal mask, the window and the document boundaries leave: the scores
  and the weighted values are 2 products of head_dim a pair and head, so 4 * heads * head_dim FLOPs forward.

Not counted: embedding lookups, norms, softmax, what activation recompute repeats, what a kernel computes on masked or
padded positions, a reference model's forward pass.
"""

from __future__ import annotations

import numpy as np

from stages.model.config import ModelConfig

TRAINING = 3  # a forward pass and twice as much backward


def layer_parameters(sizes: ModelConfig) -> int:
    """Weights that every token is multiplied with in the layers: attention's four matrices and the MLP's three."""
    attention = 2 * sizes.hidden_size * sizes.head_dim * (sizes.num_attention_heads + sizes.num_query_groups)
    return sizes.num_layers * (attention + 3 * sizes.hidden_size * sizes.ffn_hidden_size)


def pairs(lengths: np.ndarray, window: int = 0) -> int:
    """(query, key) pairs of causal attention within documents of `lengths` tokens, a query seeing `window` keys at
    most, itself included (0: all before it)."""
    lengths = np.asarray(lengths, np.int64)
    seen = np.minimum(lengths, window) if window else lengths
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())


def training_flops(sizes: ModelConfig, lengths: np.ndarray, targets: int, head: str = "lm") -> float:
    """Model FLOPs of a step on documents of `lengths` tokens, of which `targets` tokens are targets.

    head "reward" has one output a document instead of a vocabulary for each target.
    """
    lengths = np.asarray(lengths, np.int64)
    full = sum(sizes.full_attention(layer) for layer in range(sizes.num_layers))
    seen = full * pairs(lengths) + (sizes.num_layers - full) * pairs(lengths, sizes.sliding_window)
    outputs = len(lengths) if head == "reward" else targets * sizes.vocab_size
    dense = 2 * layer_parameters(sizes) * int(lengths.sum()) + 2 * sizes.hidden_size * outputs
    return float(TRAINING * (dense + 4 * sizes.num_attention_heads * sizes.head_dim * seen))
