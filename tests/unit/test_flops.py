"""Model FLOPs: against counting one by one, against torch's own counter, and the issue of windows and documents."""

from __future__ import annotations

import numpy as np
import pytest

from stages.model.config import ModelConfig
from stages.trainer.flops import layer_parameters, pairs, training_flops

SIZES = ModelConfig(
    num_layers=5, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=288, sliding_window=16, sliding_window_pattern=4, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("window", [0, 1, 7, 16, 100])
def test_pairs_are_those_of_the_mask(window):
    lengths = np.random.default_rng(window).integers(1, 60, 12)
    document = np.repeat(np.arange(len(lengths)), lengths)
    i = np.arange(len(document))
    seen = (document[:, None] == document) & (i[:, None] >= i)
    if window:
        seen &= i[:, None] - i < window
    assert pairs(lengths, window) == seen.sum()


def test_one_by_one():
    """Two matrices of attention with every head, two with the groups; three of the MLP; one full layer in four."""
    lengths, targets = np.array([3, 40]), 41
    matrices = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert layer_parameters(SIZES) == 5 * matrices
    forward = sum(2 * 5 * matrices for _ in range(43)) + sum(2 * 32 * 288 for _ in range(targets))
    for length in lengths:
        for query in range(length):
            for keys in [min(query + 1, 16)] * 4 + [query + 1]:
                forward += 4 * (2 * 8 * keys + 2 * 8 * keys)  # heads * (scores + weighted values)
    assert training_flops(SIZES, lengths, targets) == 3 * forward


def test_the_usual_estimate_is_near_for_long_models():
    """6 N a token plus causal attention (PaLM's appendix B, halved for the causal mask), at Command R7B's sizes."""
    sizes = ModelConfig(sliding_window=8192)
    tokens, length = 1 << 20, 8192
    usual = tokens * (6 * sizes.parameters() + 6 * sizes.num_layers * 4096 * length)
    found = training_flops(sizes, np.full(tokens // length, length), tokens)
    assert found == pytest.approx(usual, rel=1e-3)


def test_matrix_products_are_what_torch_counts():
    """torch counts what a forward and a backward pass multiply, without attention (its kernel is not a matmul)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from stages.model.cpu import cuda_names
    from stages.model.model import Model
    from stages.model.packing import pack
    from stages.trainer import parallel
    from stages.trainer.config import TrainConfig

    lengths, rows = [30, 9, 1, 50], torch.arange(0, 90, 3)
    with cuda_names():
        parallel.initialise(TrainConfig())
        model = Model(SIZES, "lm")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        tokens = torch.randint(0, 288, (1, 90))
        with FlopCounterMode(display=False) as counter:
            model(tokens, pack(lengths), rows).sum().backward()
    aten = torch.ops.aten
    products = counter.get_flop_counts()["Global"]
    dense = sum(products.get(op, 0) for op in (aten.mm, aten.addmm))
    without_attention = training_flops(SIZES, np.ones(90), len(rows)) - 3 * 4 * 32 * 5 * 90
    assert dense == without_attention
