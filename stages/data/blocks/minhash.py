"""Near-duplicates: MinHash signatures, LSH bands, connected components; the first document of a component stays.

Zyda-2's parameters (arXiv 2411.06068): character 25-grams, 128 hashes in 8 bands of 16 rows. Two documents of
Jaccard similarity s meet with probability 1-(1-s^16)^8: 0.2 at s=0.8, 0.46 at 0.85, 0.81 at 0.9. Like there, a
meeting is not checked for a false positive.
"""

from dataclasses import dataclass

import numpy as np

from stages.data.document import Document
from stages.data.text import shingles
from stages.stage import ConfigError, option

CHUNK = 1024  # shingles hashed at once: 128 rows of them stay in the second-level cache


@dataclass
class Config:
    characters: int = option(25, "length of the n-grams compared, in characters")
    bands: int = option(8, "bands; one equal band makes two documents neighbours")
    rows: int = option(16, "hashes a band")
    seed: int = option(10, "seed of the hash functions")
    cross_source: bool = option(False, "compare documents of different sources only, as Zyda-2 does")


def check(config: Config) -> None:
    """Raises ConfigError for anything below 1."""
    for name in ("characters", "bands", "rows"):
        if getattr(config, name) < 1:
            raise ConfigError(f"options.minhash.{name}: {getattr(config, name)} is below 1; Zyda-2 has "
                              "characters 25, bands 8, rows 16")


def select(documents: list[Document], config: Config) -> list[str]:
    """A reason to remove each document, or "". The order of the sources is their priority."""
    if not documents:
        return []
    bands = signatures([document.text for document in documents], config).reshape(-1, config.bands, config.rows)
    parent = list(range(len(documents)))
    for band in range(config.bands):
        buckets: dict[bytes, int] = {}
        for i in range(len(documents)):
            first = buckets.setdefault(bands[i, band].tobytes(), i)
            a, b = _root(parent, first), _root(parent, i)
            parent[max(a, b)] = min(a, b)
    return [_reason(documents, i, _root(parent, i), config) for i in range(len(documents))]


def _reason(documents: list[Document], i: int, first: int, config: Config) -> str:
    if i == first or config.cross_source and documents[i].source == documents[first].source:
        return ""
    return f"near-duplicate: {documents[first].id}"


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = i = parent[parent[i]]
    return i


def signatures(texts: list[str], config: Config) -> np.ndarray:
    """MinHash signatures uint32 [texts, bands * rows]: minima of a*x+b mod 2^32 (a odd) over each text's shingles."""
    generator = np.random.default_rng(config.seed)
    a, b = generator.integers(0, 2**32, (2, config.bands * config.rows, 1), dtype=np.uint32)
    a |= np.uint32(1)
    found = np.full((len(texts), len(a)), 2**32 - 1, np.uint32)
    for row, text in zip(found, texts, strict=True):
        values = shingles(text, config.characters)
        for start in range(0, len(values), CHUNK):
            hashes = a * values[start : start + CHUNK]
            hashes += b
            np.minimum(row, hashes.min(axis=1), out=row)
    return found
