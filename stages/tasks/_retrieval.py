"""Hybrid retrieval over chunks of documents: BM25 and character trigrams, fused by reciprocal ranks.

BM25 (Robertson and Zaragoza, 2009) finds words, the trigrams' cosine finds other forms of them; fused as in "Contextual
Retrieval" (Anthropic, 2024), whose contexts of chunks are here what each chunk's document begins with: no model writes them.
The trigram vectors are sparse counts and know nothing of meaning: they stand where a trained embedding would.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

K1, B, FUSE = 1.5, 0.75, 60


@dataclass(frozen=True)
class Chunk:
    """A piece of a document. context: what the document begins with, "" for its first chunk; searched, not shown."""

    text: str
    context: str = ""


def chunks(text: str, length: int) -> list[Chunk]:
    """The text in pieces of whole sentences or lines, of up to `length` characters (a longer sentence is a piece of its own)."""
    pieces: list[str] = []
    for part in re.split(r"(?<=[.!?])\s+|\n+", text):
        part = " ".join(part.split())
        if pieces and len(pieces[-1]) + 1 + len(part) <= length:
            pieces[-1] += f" {part}"
        elif part:
            pieces.append(part)
    return [Chunk(piece, pieces[0][:100] if number else "") for number, piece in enumerate(pieces)]


class Index:
    """Chunks that can be searched."""

    def __init__(self, chunks: list[Chunk]):
        self.words = [_words(f"{chunk.context} {chunk.text}") for chunk in chunks]
        self.grams = [_trigrams(f"{chunk.context} {chunk.text}") for chunk in chunks]
        self.length = sum(w.total() for w in self.words) / max(1, len(chunks))
        self.holders = Counter(word for words in self.words for word in words)

    def search(self, query: str, top: int) -> list[int]:
        """The numbers of the `top` chunks, best first: the sum of 1 / (60 + rank) over both rankings; the lower number wins ties."""
        asked, (grams, norm), n = _words(query), _trigrams(query), len(self.words)
        bm25 = [0.0] * n
        for i, words in enumerate(self.words):
            for word in asked.keys() & words.keys():
                idf = math.log(1 + (n - self.holders[word] + 0.5) / (self.holders[word] + 0.5))
                bm25[i] += idf * words[word] * (K1 + 1) / (words[word] + K1 * (1 - B + B * words.total() / self.length))
        cosine = [sum(v * own[g] for g, v in grams.items() if g in own) / (norm * size) for own, size in self.grams]
        fused = [0.0] * n
        for scores in (bm25, cosine):
            for rank, i in enumerate(sorted(range(n), key=lambda i: (-scores[i], i))):
                fused[i] += 1 / (FUSE + rank + 1) if scores[i] > 0 else 0.0
        return [i for i in sorted(range(n), key=lambda i: (-fused[i], i))[:top] if fused[i] > 0]


@lru_cache(1 << 16)
def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.casefold()))


@lru_cache(1 << 16)
def _trigrams(text: str) -> tuple[dict[str, float], float]:
    text = " ".join(["", *re.findall(r"[^\W_]+", text.casefold()), ""])
    counts = {gram: 1 + math.log(n) for gram, n in Counter(text[i : i + 3] for i in range(len(text) - 2)).items()}
    return counts, math.sqrt(sum(v * v for v in counts.values())) or 1.0
