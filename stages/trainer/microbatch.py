"""Groups of sequences to microbatches: whole groups, balanced by tokens, every document a packed one."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.model.packing import Packing, pack
from stages.stage import CuveeError
from stages.trainer.batch import Group


@dataclass
class Microbatch:
    """T tokens of S sequences, of which N tokens are targets.

    tokens: int64 [1, T]. rows: int64 [N], packed row that predicts each target. targets: int64 [N]. mask: float32 [N].
    sequence: int64 [N], 0..S-1. group: int64 [S]. last: int64 [S], row of each sequence's last token.
    fields: name -> float32 [S]. numbers: place of each sequence in the step's batch. reference: float32 [N].
    """

    tokens: Tensor
    packing: Packing
    rows: Tensor
    targets: Tensor
    mask: Tensor
    sequence: Tensor
    group: Tensor
    last: Tensor
    fields: dict[str, Tensor]
    numbers: list[int]
    reference: Tensor | None = None


def split(sizes: list[int], budget: int, multiple: int) -> list[list[int]]:
    """Indices of groups of `sizes` tokens in the fewest bins, a multiple of `multiple`, that hold `budget` tokens each.

    The largest group first goes to the emptiest bin (longest processing time rule), so that bins are alike. A group
    larger than the budget is a bin alone. Raises CuveeError with fewer groups than `multiple`.
    """
    if len(sizes) < multiple:
        raise CuveeError(
            f"a step's batch of {len(sizes)} groups cannot be shared among {multiple} data-parallel ranks; "
            "raise the batch or start fewer processes"
        )
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    count = -(-max(sum(sizes), 1) // (budget * multiple)) * multiple
    while True:
        count = min(count, len(sizes) // multiple * multiple)
        heap = [(0, bin_) for bin_ in range(count)]
        bins: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            load, bin_ = heap[0]
            bins[bin_].append(i)
            heapq.heapreplace(heap, (load + sizes[i], bin_))
        full = any(load > budget and len(bins[bin_]) > 1 for load, bin_ in heap)
        if not full or count + multiple > len(sizes):
            return [sorted(b) for b in bins]
        count += multiple


def build(groups: list[Group], numbers: list[int], vocab_size: int, longest: int, align: int = 1) -> Microbatch:
    """One microbatch of `groups`, whose sequences have the given `numbers` in the step's batch.

    align: T is padded to a multiple of it with a document that belongs to no sequence (sequence parallel).
    Raises CuveeError for an empty sequence, one longer than `longest`, or a token outside the vocabulary.
    """
    sequences = [sequence for group in groups for sequence in group]
    lengths = [len(sequence.tokens) for sequence in sequences]
    if min(lengths) < 1 or max(lengths) > longest:
        raise CuveeError(
            f"a sequence of {max(lengths)} tokens (shortest {min(lengths)}) does not fit the model's "
            f"max_position_embeddings {longest}; shorten sequence_length or raise the model's maximum"
        )
    tokens = np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int64)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise CuveeError(
            f"token id {tokens.max() if tokens.max() >= vocab_size else tokens.min()} is outside the model's vocabulary "
            f"of {vocab_size} rows; the data was tokenised with another tokenizer"
        )
    ends = np.cumsum(lengths)
    mask = np.concatenate([sequence.mask for sequence in sequences]).astype(np.float32)
    mask[ends - lengths] = 0.0  # nothing predicts a first token
    at = np.flatnonzero(mask)
    padding = -len(tokens) % align
    names = sequences[0].fields.keys()
    return Microbatch(
        tokens=torch.from_numpy(np.pad(tokens, (0, padding)))[None],
        packing=pack(lengths + [padding] * bool(padding)),
        rows=torch.from_numpy(at - 1),
        targets=torch.from_numpy(tokens[at]),
        mask=torch.from_numpy(mask[at]),
        sequence=torch.from_numpy(np.repeat(np.arange(len(sequences)), lengths)[at]),
        group=torch.from_numpy(np.repeat(np.arange(len(groups)), [len(group) for group in groups])),
        last=torch.from_numpy(ends - 1),
        fields={name: torch.tensor([s.fields[name] for s in sequences], dtype=torch.float32) for name in names},
        numbers=numbers,
    )


def microbatches(
    groups: list[Group], budget: int, vocab_size: int, longest: int, rank: int = 0, ranks: int = 1, align: int = 1
) -> list[Microbatch]:
    """This data-parallel rank's microbatches of a step's `groups`; every rank gets as many."""
    sizes = [sum(len(sequence.tokens) for sequence in group) for group in groups]
    first = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
    found = []
    for members in split(sizes, budget, ranks)[rank::ranks]:
        numbers = [int(n) for i in members for n in range(first[i], first[i + 1])]
        found.append(build([groups[i] for i in members], numbers, vocab_size, longest, align))
    return found
