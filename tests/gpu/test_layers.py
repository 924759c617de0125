"""Transformer Engine's spec against the torch spec in FP32, the same weights: log-probabilities and gradients."""

from __future__ import annotations

import pytest

from tests.gpu.models import FAMILIES, build

# Largest difference of a log-probability, and least cosine of the whole gradient. Measured: BF16 0.013 and 0.99995,
# FP8 up to 0.24 and down to 0.987 (random weights, logits of unit scale).
BOUNDS = {
    "bf16": (0.03, 0.9998),
    "fp8_delayed": (0.4, 0.98),
    "fp8_tensorwise": (0.3, 0.98),
    "fp8_blockwise": (0.3, 0.98),
}
# Packed documents, one longer than two windows, and a dense batch (which takes another kernel).
BATCHES = {"packed": [300, 1, 129, 512, 82], "dense": [512, 512]}


def run(model, lengths):
    import torch

    from stages.model.packing import pack

    total = sum(lengths)
    tokens = torch.randint(2048, (1, total), generator=torch.Generator().manual_seed(1)).cuda()
    rows = torch.arange(0, total - 1, 2, device="cuda")
    found = model(tokens, pack(lengths, "cuda"), rows, tokens[0, rows + 1])
    found.sum().backward()
    return found.detach().float()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_torch_spec(family, precision, batch):
    import torch

    reference, of_reference = build(FAMILIES[family], "fp32")
    model, of_model = build(FAMILIES[family], precision)
    expected, found = run(reference, BATCHES[batch]), run(model, BATCHES[batch])
    largest, cosine = BOUNDS[precision]
    assert float((found - expected).abs().max()) < largest
    a, b = of_reference(), of_model()
    assert a.keys() == b.keys()
    flat = [torch.cat([x[name].flatten() for name in a]) for x in (a, b)]
    assert float(torch.nn.functional.cosine_similarity(*flat, dim=0)) > cosine


def test_a_wrong_window_would_show():
    from dataclasses import replace

    sizes = FAMILIES["cohere2"]
    reference, _ = build(sizes, "fp32")
    model, _ = build(replace(sizes, sliding_window=sizes.sliding_window // 2), "bf16")
    difference = run(model, BATCHES["packed"]) - run(reference, BATCHES["packed"])
    assert float(difference.abs().max()) > BOUNDS["bf16"][0]
