"""The parallel block's norm and residual sum on a GPU, in fewer passes over memory than Transformer Engine and torch take.

Forward: x + attention + mlp in one pass. Backward: the two branches' gradients, the norm's and the residual's in one pass.
All sums are FP32 and rounded to BF16 once.
"""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine_torch as tex
import triton
import triton.language as tl
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType

BLOCK = 4096
PROGRAMS = 4  # on each multiprocessor; each adds up the weight's gradient over its rows


class Fork(torch.autograd.Function):
    """x [..., hidden] -> x, norm(x) and norm(x) once more: what the residual, attention and MLP read. The norm is centred,
    with a weight [hidden] and no bias; `quantizer`: FP8's, or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, quantizer: Any) -> tuple[Tensor, Tensor, Tensor]:
        flat, bias = x.reshape(-1, x.shape[-1]), torch.zeros_like(weight)
        out, mean, rstd = tex.layernorm_fwd(flat, weight, bias, eps, None, quantizer, TE_DType[x.dtype], 0, False)
        ctx.save_for_backward(flat, weight, mean, rstd)
        return x.view_as(x), out.view(x.shape), out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, of_x: Tensor, *of_normed: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        rows, columns = x.shape
        out = torch.empty_like(x)
        programs = min(rows, PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count)
        of_weight = torch.empty(programs, columns, device=x.device)
        block = triton.next_power_of_2(columns)
        _fork_backward[(programs,)](
            x, weight, mean, rstd, of_x.contiguous(), *(grad.contiguous() for grad in of_normed), out, of_weight,
            rows, columns, BLOCK=block, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
        return out.view(of_x.shape), of_weight.sum(0).to(weight.dtype), None, None


class Join(torch.autograd.Function):
    """a + b + c, of one shape and type."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        out = torch.empty_like(a)
        _sum[(triton.cdiv(a.numel(), BLOCK),)](a, b.contiguous(), c.contiguous(), out, a.numel(), BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return grad, grad, grad


@triton.jit
def _sum(a, b, c, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x, y, z = tl.load(a + at, inside), tl.load(b + at, inside), tl.load(c + at, inside)
    tl.store(out + at, (x.to(tl.float32) + y.to(tl.float32) + z.to(tl.float32)).to(out.dtype.element_ty), inside)


@triton.jit
def _fork_backward(
    x, weight, mean, rstd, of_x, of_first, of_second, out, of_weight, rows, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """out = of_x + d norm / d x . (of_first + of_second); of_weight[program]: the weight's gradient over its rows."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row.to(tl.int64) * columns + column
        scale = tl.load(rstd + row)
        normed = tl.where(inside, (tl.load(x + at, inside, 0.0).to(tl.float32) - tl.load(mean + row)) * scale, 0.0)
        grad = tl.load(of_first + at, inside, 0.0).to(tl.float32) + tl.load(of_second + at, inside, 0.0).to(tl.float32)
        total += grad * normed
        grad *= w
        centre, slope = tl.sum(grad) / columns, tl.sum(grad * normed) / columns
        found = tl.load(of_x + at, inside, 0.0).to(tl.float32) + (grad - centre - normed * slope) * scale
        tl.store(out + at, found.to(out.dtype.element_ty), inside)
    tl.store(of_weight + tl.program_id(0).to(tl.int64) * columns + column, total, inside)
