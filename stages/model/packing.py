"""Where the documents of one microbatch lie: Megatron's packed (thd) parameters plus the layout attention needs.

Documents are concatenated into one row of T tokens. Attention over many short documents is slow one document at a
time, so on a CPU they are gathered into a few padded [documents, length] buckets of similar length; padding comes
after each document's last token, where causal attention cannot see it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

# A document joins the bucket of a longer one while it fills at least this share of it.
FILL = 0.7


@dataclass
class Bucket:
    """`count` documents padded to `length` tokens, at [start, start + count * length) of the padded layout."""

    start: int
    count: int
    length: int


@dataclass
class Packing(PackedSeqParams):
    """PackedSeqParams for documents of the given lengths, with the padded layout of the CPU attention.

    pad: int64 [P], row of the packed layout that each padded position reads (padding reads row 0).
    unpad: int64 [T], padded position of each packed row. positions: int64 [P], position within its document.
    """

    buckets: list[Bucket] = field(default_factory=list)
    pad: Tensor | None = None
    unpad: Tensor | None = None
    positions: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict)


def pack(lengths: list[int], device: torch.device | str = "cpu") -> Packing:
    """The packing of consecutive documents of `lengths` tokens (each at least 1)."""
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = np.argsort(-sizes, kind="stable")
    buckets, first, offset = [], 0, 0
    pad, positions, unpad = [], [], np.empty(starts[-1], dtype=np.int64)
    while first < len(order):
        length = int(sizes[order[first]])
        last = first + int(np.searchsorted(-sizes[order[first:]], -FILL * length, side="right"))
        members = order[first:last]
        column = np.arange(length)
        rows = starts[members][:, None] + column
        real = column < sizes[members][:, None]
        pad.append(np.where(real, rows, 0).ravel())
        positions.append(np.broadcast_to(column, rows.shape).ravel())
        unpad[rows[real]] = offset + np.flatnonzero(real.ravel())
        buckets.append(Bucket(offset, len(members), length))
        first, offset = last, offset + rows.size
    cu_seqlens = torch.from_numpy(starts.astype(np.int32)).to(device)
    longest = int(sizes.max())
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        buckets=buckets,
        pad=torch.from_numpy(np.concatenate(pad)).to(device),
        unpad=torch.from_numpy(unpad).to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
    )
