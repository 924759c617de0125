"""The output layer's kernels against float64, and its memory at a vocabulary of 256,000."""

from __future__ import annotations

import pytest


@pytest.fixture
def case():
    import torch

    from stages.trainer import parallel
    from stages.trainer.config import TrainConfig

    parallel.initialise(TrainConfig())
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(700, 256, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(5003, 256, device="cuda", generator=generator).bfloat16().requires_grad_()
    target = torch.randint(5003, (700,), device="cuda", generator=generator)
    return hidden, weight, target, torch.randn(700, device="cuda", generator=generator)


@pytest.mark.parametrize("kept", [True, False])
def test_values_and_gradients(kept, case, monkeypatch):
    import torch
    import torch.distributed as dist

    from stages.model import head_cuda

    monkeypatch.setattr(head_cuda, "CHUNK_LOGITS", 5003 * 256)  # three chunks
    if not kept:
        monkeypatch.setattr(head_cuda, "KEPT_BYTES", 0)
    hidden, weight, target, upstream = case
    found = head_cuda.LogprobsCuda.apply(hidden, weight, target, 0.25, dist.group.WORLD)
    (found * upstream).sum().backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = torch.log_softmax(0.25 * h @ w.t(), 1).gather(1, target[:, None])[:, 0]
    (expected * upstream).sum().backward()
    assert float((found - expected).abs().max()) < 1e-4
    for ours, exact in ((hidden, h), (weight, w)):
        assert float((ours.grad - exact.grad).norm() / exact.grad.norm()) < 5e-3  # BF16's rounding


def test_memory_at_a_large_vocabulary(case):
    """32,768 rows of 256,000 logits are 31 GiB in FP32; here a chunk of 0.5 GiB and gradients of hidden and weight."""
    import torch
    import torch.distributed as dist

    from stages.model import head_cuda

    hidden = torch.randn(32768, 512, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(256000, 512, device="cuda").bfloat16().requires_grad_()
    target = torch.randint(256000, (32768,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head_cuda.LogprobsCuda.apply(hidden, weight, target, 1.0, dist.group.WORLD).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 3 * 2**30
