"""The stream of pretraining: documents of each domain, in an order that is a function of (seed, step) alone."""

from __future__ import annotations

import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.data.indexed import IndexedTokens
from stages.stage import CuveeError
from stages.trainer.batch import Group, Sequence

if TYPE_CHECKING:
    from stages.train.pretrain import Config

LONG = 0.5  # a long document fills more than this share of a sequence


class Source:
    """A domain's documents cut into pieces of at most `length` tokens, in an endless shuffled order.

    A document longer than that is cut evenly. Pieces without a target (one token) are left out. `longer_than`: only
    documents of more tokens.
    """

    def __init__(self, file: IndexedTokens, length: int, seed: list[int], longer_than: float = 0.0):
        lengths = file.lengths.astype(np.int64)
        kept = np.flatnonzero(lengths > longer_than)
        counts = -(-lengths[kept] // length)
        document = np.repeat(kept, counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces = np.repeat(counts, counts)
        starts = number * lengths[document] // pieces
        sizes = (number + 1) * lengths[document] // pieces - starts
        useful = sizes > 1
        self.file, self.seed = file, seed
        self.starts, self.sizes = file.offsets[document][useful] + starts[useful], sizes[useful]
        self.tokens = int(self.sizes.sum())
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of pieces in an epoch, and the place of each one's first token in it."""
        order = np.random.default_rng([*self.seed, epoch]).permutation(len(self.sizes))
        return order, np.cumsum(self.sizes[order]) - self.sizes[order]

    def take(self, begin: int, end: int) -> list[np.ndarray]:
        """The pieces whose first token lies in [begin, end) of the endless order."""
        found = []
        for epoch in range(begin // self.tokens, -(-end // self.tokens)):
            order, places = self._epoch(epoch)
            base = epoch * self.tokens
            low, high = np.searchsorted(places, [begin - base, end - base])
            found += [self._piece(i) for i in order[low:high]]
        return found

    def first(self, begin: int) -> np.ndarray:
        """The piece that holds token `begin` of the endless order."""
        order, places = self._epoch(begin // self.tokens)
        return self._piece(order[np.searchsorted(places, begin % self.tokens, side="right") - 1])

    def _piece(self, i: int) -> np.ndarray:
        return self.file.tokens[self.starts[i] : self.starts[i] + self.sizes[i]].astype(np.int32)


class Documents:
    """A Stream of about `batch_tokens` tokens a step, every domain by its share; a group is a document.

    A piece belongs to the step in which its first token falls, so that an epoch has each token once, none is cut off
    and any step can be found without the ones before it. drawn: domain -> tokens of the whole run; epochs: domain ->
    passes over it. Every rank reads the whole step from the memory map and trains on its share: reading costs a
    fraction of a second for millions of tokens, in a thread, and no rank depends on how many there are.
    Raises CuveeError where a domain would be passed more than max_epochs times.
    """

    prefetchable = True

    def __init__(self, config: Config, tokens: Path, fingerprint: str = ""):
        from stages.train.pretrain import shares

        self.config, self.fingerprint = config, fingerprint
        table = json.loads((tokens / "tokens.json").read_text())["splits"]["train"]
        share = shares(config.blend, {domain: counts["tokens"] for domain, counts in table.items()})
        files = {domain: IndexedTokens(tokens / f"train-{domain}") for domain in share}
        self.phases = [self._phase(i, length, share, files) for i, (length, _) in enumerate(config.plan())]
        self._count_epochs()

    def _phase(self, index: int, length: int, share: dict[str, float], files: dict[str, IndexedTokens]) -> list[Any]:
        """[(sources, shares) of ordinary steps, the same of steps with long documents]."""
        seed = lambda kind, domain: [self.config.seed, index, kind, zlib.crc32(domain.encode())]  # noqa: E731
        whole = {d: Source(file, length, seed(0, d)) for d, file in files.items()}
        for domain, source in whole.items():
            if not source.tokens:
                raise CuveeError(f"blend: no document of domain {domain} has two tokens, so that none has a target; leave it out")
        kinds = [(whole, share)]
        if self.config.long_every:
            long = {d: Source(file, length, seed(1, d), LONG * length) for d, file in files.items()}
            long = {d: source for d, source in long.items() if source.tokens}
            if not long:
                raise CuveeError(
                    f"long_every: no document is longer than {LONG * length:.0f} tokens, half the sequence_length "
                    f"{length} of phase {index + 1}; set it to 0 or shorten the sequences"
                )
            kinds.append((long, dict.fromkeys(long, 1 / len(long))))
        return kinds

    def _place(self, step: int) -> tuple[int, int, int]:
        """(phase, kind, how many steps of this kind the phase had before) of a step; kind 1 takes long documents."""
        phase, step = self.config.phase(step)
        every = self.config.long_every
        long = step // every if every else 0
        return (phase, 1, long) if every and step % every == every - 1 else (phase, 0, step - long)

    def _count_epochs(self) -> None:
        config = self.config
        self.drawn: dict[str, float] = {}
        passes: dict[str, float] = {}
        for sources, (_, steps) in zip(self.phases, config.plan(), strict=True):
            long = steps // config.long_every if config.long_every else 0
            for (by_domain, share), count in zip(sources, (steps - long, long), strict=False):
                for domain, source in by_domain.items():
                    drawn = share[domain] * config.batch_tokens * count
                    self.drawn[domain] = self.drawn.get(domain, 0.0) + drawn
                    passes[domain] = passes.get(domain, 0.0) + drawn / source.tokens
        self.epochs = {d: self.drawn[d] / self.phases[0][0][0][d].tokens for d in self.drawn}
        for domain, count in passes.items():
            if count > config.max_epochs:
                raise CuveeError(
                    f"max_epochs: {config.steps} steps pass {count:.1f} times over domain {domain} (or its long documents), "
                    f"more than {config.max_epochs:g}; lower steps, batch_tokens or its share in blend, or add data"
                )

    def batch(self, step: int, trainer: Any) -> list[Group]:
        phase, kind, number = self._place(step)
        sources, share = self.phases[phase][kind]
        found: list[np.ndarray] = []
        for domain, source in sources.items():
            amount = share[domain] * self.config.batch_tokens
            found += source.take(int(amount * number), int(amount * (number + 1)))
        if not found:  # every domain's share of the step lies inside a piece of the step before: go on with the largest
            domain = max(sources, key=lambda d: share[d])
            found = [sources[domain].first(int(share[domain] * self.config.batch_tokens * number))]
        return [[Sequence(tokens, np.ones(len(tokens), np.float32))] for tokens in found]
