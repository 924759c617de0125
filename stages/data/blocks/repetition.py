"""Repetition within a document: Gopher's rules (arXiv 2112.11446, table A1), with datatrove's definitions.

Shares of the text's characters: lines and paragraphs that occurred before; the most frequent 2-, 3-, 4-gram of words;
5- to 10-grams of words that occurred before, counted from left to right without overlap. A count over the whole
batch gives an upper bound that clears most documents; the rules themselves are worked out for the others. In scripts without spaces a word is a character, and n-grams are twice as long.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stages.data.document import Document
from stages.data.text import SPACELESS
from stages.data.thresholds import at_most
from stages.data.words import Words, cut, spans

TOP = {2: 0.20, 3: 0.18, 4: 0.16}
SLOTS = 18  # bits of the table that finds n-grams again: 1 MB, in the second-level cache
SHORT = 1000  # characters of a text in which an n-gram that occurs once may be over the limit
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass
class Config:
    scale: float = at_most(1.0, "prose: Gopher's limits are multiplied by this")


def filter(documents: list[Document], config: Config) -> list[str]:
    """A reason to remove each document, or "". Only prose is judged."""
    reasons = [_parts(document.text, config.scale) if document.domain == "prose" else "" for document in documents]
    chosen = [i for i, document in enumerate(documents) if document.domain == "prose" and not reasons[i]]
    for words, rows, places in cut([documents[i].text for i in chosen]):
        double = np.array([spaceless(documents[chosen[place]].text) for place in places])
        found = {**_ngrams(words, rows[~double], 1, config.scale), **_ngrams(words, rows[double], 2, config.scale)}
        for row, place in zip(rows.tolist(), places, strict=True):
            reasons[chosen[place]] = found.get(row, "")
    return reasons


def spaceless(text: str) -> bool:
    """Whether a fifth of the text is in scripts without spaces."""
    return not text.isascii() and len(SPACELESS.findall(text[:10_000])) > 0.2 * len(text[:10_000])


def _parts(text: str, scale: float) -> str:
    paragraphs = [part.lstrip("\n") for part in text.strip().split("\n\n") if part.strip("\n")]
    lines = [line for line in text.split("\n") if line]
    for name, parts in (("paragraphs", paragraphs), ("lines", lines)):
        if len(set(parts)) == len(parts):
            continue
        counts = Counter(parts)
        repeated = len(parts) - len(counts)
        characters = sum(len(part) * (n - 1) for part, n in counts.items() if n > 1)
        if repeated > scale * 0.30 * len(parts) or characters > scale * 0.20 * len(text):
            return f"repeated {name}: {repeated} of {len(parts)}"
    return ""


def _ngrams(words: Words, rows: np.ndarray, factor: int, scale: float) -> dict[int, str]:
    """Reasons for those of the texts `rows` that repeat too many n-grams."""
    text = np.repeat(np.arange(len(words.text_lengths)), np.diff(words.first))
    starts = np.flatnonzero(np.isin(np.arange(len(words.text_lengths)), rows)[text])
    reasons: dict[int, str] = {}
    for rules, measure in ((TOP, _top), (REPEATED, _repeated)):
        here = starts
        for n, limit in rules.items():
            here = here[here + n * factor <= words.first[1:][text[here]]]
            grams = Grams(words, here, text[here], n * factor)
            for i, characters in measure(grams, scale * limit * words.text_lengths):
                reasons.setdefault(i, f"repeated {n}-grams: {characters / words.text_lengths[i]:.0%}")
            if n == min(rules):  # a longer n-gram that occurs twice begins where a shorter one does
                here = here[grams.shared | (words.text_lengths[text[here]] < SHORT)]
    return reasons


class Grams:
    """The n-grams that begin with the words `starts`, of the texts `text`: hashes (uint64, different in each text).

    sizes: their characters. slots: leading bits of the hashes; equal n-grams have equal slots, few others do.
    """

    def __init__(self, words: Words, starts: np.ndarray, text: np.ndarray, n: int):
        self.words, self.starts, self.text, self.n = words, starts, text, n
        found = spans(words.sums, starts, starts + n)
        found ^= found >> np.uint64(29)
        found += text.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.hashes = found * np.uint64(0xBF58476D1CE4E5B9)
        self.sizes = words.length_sums[starts + n] - words.length_sums[starts]
        self.slots = (self.hashes >> np.uint64(64 - SLOTS)).astype(np.int64)

    @cached_property
    def again(self) -> np.ndarray:
        """bool: those whose slot was taken before, and so every n-gram that occurred before."""
        first, order = np.empty(1 << SLOTS, np.int32), np.arange(len(self.slots), dtype=np.int32)
        first[self.slots[::-1]] = order[::-1]
        return first[self.slots] != order

    @cached_property
    def shared(self) -> np.ndarray:
        """bool: all whose slot is taken twice."""
        twice = np.zeros(1 << SLOTS, bool)
        twice[self.slots[self.again]] = True
        return twice[self.slots]


def _top(grams: Grams, limits: np.ndarray) -> Iterator[tuple[int, int]]:
    """(text, characters) where the most frequent n-gram, with its spaces, holds more than the limit; of several, the first."""
    sizes = grams.sizes + grams.n - 1
    bound = np.bincount(grams.slots, minlength=1 << SLOTS)[grams.slots] * sizes
    for i in np.unique(grams.text[bound > limits[grams.text]]).tolist():
        a, b = np.searchsorted(grams.text, (i, i + 1))
        _, first, counts = np.unique(grams.hashes[a:b], return_index=True, return_counts=True)
        best = np.lexsort((first, -counts))[0]
        characters = int(counts[best] * sizes[a + first[best]])
        if characters > limits[i]:
            yield i, characters


def _repeated(grams: Grams, limits: np.ndarray) -> Iterator[tuple[int, int]]:
    """(text, characters) where n-grams that occurred before, from left to right, hold more than the limit.

    One that is counted is passed over whole. All that occurred before, laid over one another, hold at least as many.
    """
    again, ends = np.flatnonzero(grams.again), grams.words.length_sums
    begins, text = grams.starts[again], grams.text[again]
    stops = np.minimum(begins + grams.n, np.append(begins[1:], len(ends)))
    bound = np.bincount(text, ends[stops] - ends[begins], minlength=len(limits))
    at = np.flatnonzero(grams.shared & (bound > limits)[grams.text])
    found: dict[int, int] = {}
    seen, free = set(), 0
    rows = (values[at].tolist() for values in (grams.hashes, grams.starts, grams.sizes, grams.text))
    for gram, start, size, i in zip(*rows, strict=True):
        if start >= free and gram in seen:
            found[i] = found.get(i, 0) + size
            free = start + grams.n
        elif start >= free:
            seen.add(gram)
    yield from ((i, characters) for i, characters in found.items() if characters > limits[i])
