"""Reductions whose result does not depend on the number of threads, because a merge's bytes may not."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 24  # elements

def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of one shape, summed in FP64 on one thread: the order of sums is fixed. In pieces, as the
    embedding of a large model in FP64 would take more memory than all models in FP32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pieces = zip(a.flatten().split(PIECE), b.flatten().split(PIECE), strict=True)
        return sum(float(torch.dot(x.double(), y.double())) for x, y in pieces)
    finally:
        torch.set_num_threads(threads)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two flattened tensors; 0 where one of them is zero."""
    norms = (dot(a, a) * dot(b, b)) ** 0.5
    return dot(a, b) / norms if norms > 0 else 0.0
