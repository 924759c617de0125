"""The output layer on a GPU: log-probabilities with FP32 softmax, holding no FP32 logits but those of one chunk."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

CHUNK_LOGITS = 1 << 27  # FP32 logits of a chunk of rows: 512 MiB
KEPT_BYTES = (
    4 << 30
)  # most memory to keep d logprob / d logits (BF16) for the backward pass; above, it is computed again
BLOCK = 4096


class LogprobsCuda(torch.autograd.Function):
    """log softmax(scale * hidden @ weight.T)[target] over a vocabulary split among tensor-parallel ranks.

    hidden: bfloat16 [N, h]. weight: bfloat16 [V / ranks, h], this rank's rows. target: int64 [N], ids in the whole
    vocabulary. Returns float32 [N]. Products accumulate and leave in FP32, softmax is FP32, the derivative by the logits
    is rounded to BF16. The backward pass returns this rank's share of hidden's gradient (to be summed over ranks).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, scale: float, group: Any) -> Tensor:
        ranks, n = dist.get_world_size(group), len(hidden)
        local = target - weight.shape[0] * dist.get_rank(group)
        norm, picked = (torch.empty(n, device=hidden.device) for _ in range(2))
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kept = wanted and n * len(weight) * hidden.element_size() <= KEPT_BYTES
        derivative = hidden.new_empty(n if kept else 0, len(weight))
        for part in _chunks(n, len(weight)):
            logits = torch.mm(hidden[part], weight.t(), out_dtype=torch.float32)
            statistics = torch.empty(3, len(logits), device=hidden.device)
            _statistics[(len(logits),)](logits, local[part], statistics, len(logits), scale, len(weight), BLOCK=BLOCK)
            peak, total, value = statistics
            if ranks > 1:
                highest = peak.clone()
                dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
                total *= torch.exp(peak - highest)
                peak = highest
                dist.all_reduce(statistics[1:], group=group)
            norm[part], picked[part] = peak + total.log(), value
            if kept:
                _differentiate(logits, local[part], norm[part], derivative[part], scale)
        ctx.save_for_backward(hidden, weight, local, norm, derivative)
        ctx.scale, ctx.kept = scale, kept
        return picked - norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, local, norm, derivative = ctx.saved_tensors
        grad = grad * ctx.scale
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, device=weight.device)
        for part in _chunks(len(hidden), len(weight)):
            if ctx.kept:
                d = derivative[part]
            else:
                logits = torch.mm(hidden[part], weight.t(), out_dtype=torch.float32)
                d = hidden.new_empty(logits.shape)
                _differentiate(logits, local[part], norm[part], d, ctx.scale)
            _scale_rows(torch.mm(d, weight), grad[part], grad_hidden[part])
            weighted = _scale_rows(hidden[part], grad[part], torch.empty_like(hidden[part]))
            torch.addmm(grad_weight, d.t(), weighted, out_dtype=torch.float32, out=grad_weight)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, CHUNK_LOGITS // columns)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _differentiate(logits: Tensor, target: Tensor, norm: Tensor, out: Tensor, scale: float) -> None:
    """out [N, V]: onehot(target) - softmax, the derivative of a log-probability by its (scaled) logits."""
    grid = (len(logits), triton.cdiv(logits.shape[1], BLOCK))
    _derivative[grid](logits, target, norm, out, scale, logits.shape[1], BLOCK=BLOCK)


def _scale_rows(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out = x [N, h] * scale [N] in FP32, rounded once: torch's product of two types is several times slower."""
    _scaled[(len(x), triton.cdiv(x.shape[1], BLOCK))](x, scale, out, x.shape[1], BLOCK=BLOCK)
    return out


@triton.jit
def _scaled(x, scale, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * columns + column, column < columns
    value = tl.load(x + at, inside).to(tl.float32) * tl.load(scale + row)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _statistics(logits, target, out, rows, scale, columns, BLOCK: tl.constexpr):
    """out[0..2, row]: largest scaled logit, sum of exp(logit - largest), the target's logit (0 where not on this rank)."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * columns
    peak, total = -float("inf"), 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(at + column, mask=column < columns, other=-float("inf")) * scale
        highest = tl.maximum(peak, tl.max(x))
        total = total * tl.exp(peak - highest) + tl.sum(tl.exp(x - highest))
        peak = highest
    wanted = tl.load(target + row)
    mine = (wanted >= 0) & (wanted < columns)
    tl.store(out + row, peak)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, tl.load(at + wanted, mask=mine, other=0.0) * scale)


@triton.jit
def _derivative(logits, target, norm, out, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(logits + row * columns + column, mask=inside, other=0.0) * scale
    value = tl.where(column == tl.load(target + row), 1.0, 0.0) - tl.exp(x - tl.load(norm + row))
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)
