"""Log-probabilities of given tokens from hidden states, without holding the logits of the whole batch in FP32 twice."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def logprobs(hidden: Tensor, weight: Tensor, target: Tensor, scale: float, group: Any) -> Tensor:
    """log softmax(scale * hidden @ weight.T)[target], float32 [N], over a vocabulary split among the ranks of `group`.

    hidden: [N, h]. weight: [V / ranks, h], this rank's rows. target: int64 [N], ids in the whole vocabulary.
    """
    if hidden.dtype == torch.bfloat16:
        from stages.model.head_cuda import LogprobsCuda

        return LogprobsCuda.apply(hidden, weight, target, scale, group)
    return VocabParallelLogprobs.apply(hidden, weight, target, scale, group)


# Rows of a chunk: 128 rows of 4096 logits are 2 MiB, which stay in a core's cache from the product to its softmax.
CHUNK_LOGITS = 1 << 19


class VocabParallelLogprobs(torch.autograd.Function):
    """log softmax(scale * hidden @ weight.T)[target] over a vocabulary split among tensor-parallel ranks.

    hidden: [N, h]. weight: [V / ranks, h], this rank's rows. target: int64 [N], ids in the whole vocabulary.
    Returns float32 [N]. The backward pass returns this rank's share of hidden's gradient (to be summed over ranks).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, scale: float, group: Any) -> Tensor:
        rows, ranks = weight.shape[0], dist.get_world_size(group)
        local = target - rows * dist.get_rank(group)
        mine = (local >= 0) & (local < rows)
        local = local.masked_fill(~mine, 0)[:, None]
        keep = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        n, step = len(hidden), max(1, CHUNK_LOGITS // rows)
        probs = hidden.new_empty(n if keep else 0, rows)
        picked, norm = hidden.new_empty(n, 1), hidden.new_empty(n, 1)
        scaled = hidden * scale
        for i in range(0, n, step):
            part = slice(i, i + step)
            logits = torch.mm(scaled[part], weight.t())
            soft = torch.softmax(logits, 1, out=probs[part] if keep else None)
            torch.gather(logits, 1, local[part], out=picked[part])
            # logsumexp of the row, from its largest logit and that one's probability (at least 1 / V, never 0).
            torch.sub(logits.amax(1, keepdim=True), soft.amax(1, keepdim=True).log_(), out=norm[part])
        share = torch.ones_like(norm)  # of this rank's vocabulary in the whole softmax
        if ranks > 1:
            peak = norm.clone()
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
            share = (norm - peak).exp_()
            total = share.clone()
            dist.all_reduce(total, group=group)
            share /= total
            norm = peak + total.log_()
            picked.masked_fill_(~mine[:, None], 0)
            dist.all_reduce(picked, group=group)
        ctx.save_for_backward(hidden, weight, probs, share, local, mine)
        ctx.scale, ctx.step = scale, step
        return (picked - norm)[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, probs, share, local, mine = ctx.saved_tensors
        grad = grad[:, None] * ctx.scale
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        one, soft = grad * mine[:, None], -grad * share
        for i in range(0, len(hidden), ctx.step):
            part = slice(i, i + ctx.step)
            # d logprob / d logits = onehot - softmax; probs is ours to overwrite, nothing else reads it
            d = probs[part].mul_(soft[part]).scatter_add_(1, local[part], one[part])
            torch.mm(d, weight, out=grad_hidden[part])
            grad_weight.addmm_(d.t(), hidden[part])
        return grad_hidden, grad_weight, None, None, None
