"""Reductions whose result does not depend on the number of threads, because a merge's bytes may not."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of one shape, summed in FP64 on one thread: the order of sums is fixed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return float(torch.dot(a.flatten().double(), b.flatten().double()))
    finally:
        torch.set_num_threads(threads)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two flattened tensors; 0 where one of them is zero."""
    norms = (dot(a, a) * dot(b, b)) ** 0.5
    return dot(a, b) / norms if norms > 0 else 0.0
