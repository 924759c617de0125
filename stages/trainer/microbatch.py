"""Groups of sequences to microbatches: whole groups, balanced by tokens, every document a packed one."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stages.model.packing import Packing, pack, to_device
from stages.stage import CuveeError
from stages.trainer.batch import Group, Sequence


@dataclass
class Microbatch:
    """T tokens of S sequences, of which N tokens are targets.

    tokens: int64 [1, T]. rows: int64 [N], packed row that predicts each target. targets: int64 [N]. mask: float32 [N].
    sequence: int64 [N], 0..S-1. group: int64 [S]. last: int64 [S], row of each sequence's last token.
    fields: name -> float32 [S]. numbers: place of each sequence in the step's batch. reference: float32 [N].
    behaviour: float32 [N], teacher: float32 [M, k] with N = M * (k + 1): as in Packed, or None; so token_fields.
    places: int64 [N] in host memory, how many tokens precede each target in its sequence, less one.
    Under context parallelism tokens are this rank's share [1, T / ranks], rows are numbered in that share and given for
    its targets only, `here`: int64 [at most N], as `last_here` are the sequences whose `last` it has; `packing` and all
    else is of the whole sequences.
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
    places: np.ndarray
    reference: Tensor | None = None
    behaviour: Tensor | None = None
    teacher: Tensor | None = None
    here: Tensor | None = None
    last_here: Tensor | None = None
    token_fields: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sharing:
    """How a step's groups are shared: data-parallel rank and ranks, context-parallel rank and ranks; a rank's tokens of
    a microbatch are a multiple of `align`. turns: virtual pipeline stages take turns in as many microbatches, so that
    there must be a multiple of them, all of one length (0: no virtual pipeline)."""

    rank: int = 0
    ranks: int = 1
    context_rank: int = 0
    context_ranks: int = 1
    align: int = 1
    turns: int = 0
    device: torch.device | str = "cpu"

    @property
    def unit(self) -> int:
        """Under context parallelism the tokens of a document are a multiple of it: every rank takes two pieces."""
        return 2 * self.context_ranks if self.context_ranks > 1 else 1

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.unit) * self.unit


def split(sizes: list[int], budget: int, multiple: int) -> list[list[int]]:
    """Indices of groups of `sizes` tokens in the fewest bins, a multiple of `multiple`, that hold `budget` tokens each.

    The largest group first goes to the emptiest bin (longest processing time rule), so that bins are alike. A group
    larger than the budget is a bin alone. Raises CuveeError with fewer groups than `multiple`.
    """
    if len(sizes) < multiple:
        raise CuveeError(
            f"a step's batch of {len(sizes)} groups cannot be shared among {multiple} data-parallel ranks (times "
            "pipeline_parallel under virtual_pipeline); raise the batch or start fewer processes"
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


def build(
    groups: list[Group], numbers: list[int], vocab_size: int, longest: int, sharing: Sharing = Sharing(),
    least: int = 0,
) -> Microbatch:  # fmt: skip
    """One microbatch of `groups`, whose sequences have the given `numbers` in the step's batch.

    T is padded, to at least `least`, with a document that belongs to no sequence. Raises CuveeError for an empty sequence,
    one longer than `longest`, or a token outside the vocabulary.
    """
    sequences = [sequence for group in groups for sequence in group]
    lengths = np.array([len(sequence.tokens) for sequence in sequences])
    if lengths.min() < 1 or lengths.max() > longest:
        raise CuveeError(
            f"a sequence of {lengths.max()} tokens (shortest {lengths.min()}) does not fit the model's "
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
    at, targets = _targets(sequences, tokens, np.flatnonzero(mask), vocab_size)
    sequence = np.repeat(np.arange(len(sequences)), lengths)[at]
    more = {name: np.concatenate([s.token_fields[name] for s in sequences])[at] for name in sequences[0].token_fields}
    row, padded, documents, last = _padded(tokens, lengths, sharing, least)
    rows, arrays = row[at - 1], {**targets, "mask": mask[at], "sequence": sequence}
    share = None
    if sharing.context_ranks > 1:
        share = context_share(documents, sharing.context_rank, sharing.context_ranks)
        place = np.full(len(padded), -1)
        place[share] = np.arange(len(share))
        arrays["here"], arrays["last_here"] = (np.flatnonzero(place[r] >= 0) for r in (rows, last))
        padded, rows, last = padded[share], place[rows][arrays["here"]], place[last][arrays["last_here"]]
        arrays["targets"] = arrays["targets"][arrays["here"]]
    arrays |= {"tokens": padded[None], "rows": rows, "last": last,
               "group": np.repeat(np.arange(len(groups)), [len(group) for group in groups])}  # fmt: skip
    fields = {name: np.array([s.fields[name] for s in sequences], np.float32) for name in sequences[0].fields}
    put = partial(to_device, device=sharing.device)
    return Microbatch(
        **{name: put(array) for name, array in arrays.items()}, fields={name: put(a) for name, a in fields.items()},
        token_fields={name: put(a) for name, a in more.items()},
        packing=pack(documents, sharing.device, share), numbers=numbers, places=at - 1 - (ends - lengths)[sequence],
    )  # fmt: skip


def _targets(
    sequences: list[Sequence], tokens: np.ndarray, at: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(place of each target among `tokens`, arrays of the targets) where the tokens `at` have a mask. With a teacher each
    place is there k + 1 times, its own token last, so that of repeated places that one's value remains."""
    arrays = {"targets": tokens[at]}
    if sequences[0].behaviour is not None:
        arrays["behaviour"] = np.concatenate([s.behaviour for s in sequences]).astype(np.float32)[at]
    if sequences[0].teacher is not None:
        ids, nats = (np.concatenate(parts)[at] for parts in zip(*(s.teacher for s in sequences), strict=True))
        if ids.size and ids.max() >= vocab_size:
            raise CuveeError(f"the teacher's token {ids.max()} is outside the model's vocabulary of {vocab_size} rows")
        arrays["targets"] = np.concatenate([ids, tokens[at, None]], 1, dtype=np.int64).ravel()
        arrays["teacher"] = nats.astype(np.float32)
        at = at.repeat(ids.shape[1] + 1)
    return at, arrays


def _padded(
    tokens: np.ndarray, lengths: np.ndarray, sharing: Sharing, least: int
) -> tuple[np.ndarray, np.ndarray, list[int], np.ndarray]:
    """(padded row of each token, tokens in padded rows, lengths of padded documents, row of each sequence's last token).

    The padding after a document is never looked at: attention is causal.
    """
    sizes = sharing.padded(lengths)
    starts, first = np.cumsum(sizes) - sizes, np.cumsum(lengths) - lengths
    row = np.arange(len(tokens)) + np.repeat(starts - first, lengths)
    total = int(sizes.sum())
    multiple = math.lcm(sharing.unit, sharing.align * sharing.context_ranks)
    rest = -(-max(total, least) // multiple) * multiple - total
    padded = np.zeros(total + rest, np.int64)
    padded[row] = tokens
    return row, padded, [*map(int, sizes), *[rest] * bool(rest)], starts + lengths - 1


def context_share(lengths: list[int], rank: int, ranks: int) -> np.ndarray:
    """Rows, int64 [sum(lengths) / ranks], of one context-parallel rank in documents of `lengths` (multiples of 2 * ranks):
    pieces `rank` and 2 * ranks - 1 - rank of each document's 2 * ranks, so that causal attention costs every rank the
    same (Transformer Engine's thd_get_partitioned_indices)."""
    pieces = np.array(lengths) // (2 * ranks)
    starts = np.cumsum(lengths) - lengths
    both = [(s + i * p, p) for s, p in zip(starts, pieces, strict=True) for i in (rank, 2 * ranks - 1 - rank)]
    return np.concatenate([np.arange(s, s + p) for s, p in both])


def microbatches(
    groups: list[Group], budget: int, vocab_size: int, longest: int, sharing: Sharing = Sharing()
) -> list[Microbatch]:
    """This data-parallel rank's microbatches of at most `budget` tokens of a step's `groups`; every rank gets as many."""
    sizes = [sum(len(sequence.tokens) for sequence in group) for group in groups]
    first = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
    mine = split(sizes, budget, sharing.ranks * max(sharing.turns, 1))[sharing.rank :: sharing.ranks]
    least = 0
    if sharing.turns:
        tokens = [sharing.padded(np.array([len(s.tokens) for s in group])).sum() for group in groups]
        least = max(int(sum(tokens[i] for i in members)) for members in mine)
    found = []
    for members in mine:
        numbers = [int(n) for i in members for n in range(first[i], first[i + 1])]
        found.append(build([groups[i] for i in members], numbers, vocab_size, longest, sharing, least))
    return found
