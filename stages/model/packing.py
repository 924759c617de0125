"""Where the documents of one microbatch lie: Megatron's packed (thd) parameters plus the layout attention needs.

Documents are concatenated into one row of T tokens. Transformer Engine's kernels take that as it is. The torch attention
is slow one document at a time, so documents are gathered into a few padded [documents, length] buckets of similar length;
padding comes after each document's last token, where causal attention cannot see it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

# A document joins the bucket of a longer one while it fills at least this share of it.
FILL = 0.7


@dataclass(frozen=True)
class Bucket:
    """`count` documents padded to `length` tokens, at [start, start + count * length) of the padded layout."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Layout:
    """The padded layout of P positions.

    pad: int64 [P], row of the packed layout that each padded position reads (padding reads row 0).
    unpad: int64 [T], padded position of each packed row. positions: int64 [P], position within its document.
    """

    buckets: list[Bucket]
    pad: Tensor
    unpad: Tensor
    positions: Tensor


@dataclass
class Packing(PackedSeqParams):
    """PackedSeqParams for consecutive documents of `lengths` tokens. share: int64, the rows that this context-parallel rank
    has, where they are not all. cache: what layers share within a microbatch."""

    lengths: list[int] = field(default_factory=list)
    share: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def uniform(self) -> int | None:
        """The length of every document, where they are of one length."""
        return self.lengths[0] if min(self.lengths) == max(self.lengths) else None

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T], the position in its document of each token that this rank has."""
        lengths = np.asarray(self.lengths)
        found = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        found = to_device(found, self.cu_seqlens_q.device)
        return found if self.share is None else found[self.share]

    @cached_property
    def layout(self) -> Layout:
        return _layout(self.lengths, self.cu_seqlens_q.device)


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """The array on a device. From pinned memory, so that no GPU has to finish its work first."""
    tensor = torch.from_numpy(array)
    cuda = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if cuda else tensor.to(device)


def pack(lengths: list[int], device: torch.device | str = "cpu", share: np.ndarray | None = None) -> Packing:
    """The packing of consecutive documents of `lengths` tokens (each at least 1); share: see Packing."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    cu_seqlens = to_device(starts.astype(np.int32), device)
    longest = max(lengths)
    if cu_seqlens.is_cuda:
        # Attention compiles a kernel for every value: few values, each at most a quarter above the need.
        step = max(128, 1 << (longest.bit_length() - 3))
        longest = -(-longest // step) * step
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        # Context parallelism asks for the padded places too; ours are padded as documents of their own length.
        cu_seqlens_q_padded=None if share is None else cu_seqlens,
        cu_seqlens_kv_padded=None if share is None else cu_seqlens,
        lengths=list(lengths),
        share=None if share is None else to_device(share, device),
    )


def _layout(lengths: list[int], device: torch.device) -> Layout:
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
    pad, positions = np.concatenate(pad), np.concatenate(positions)
    return Layout(buckets, *(to_device(x, device) for x in (pad, unpad, positions)))
