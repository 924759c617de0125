"""Near-duplicates: MinHash signatures, LSH bands, connected components; the first document of a component stays.

Zyda-2's parameters (arXiv 2411.06068): character 25-grams, 128 hashes in 8 bands of 16 rows. Two documents of
Jaccard similarity s meet with probability 1-(1-s^16)^8: 0.2 at s=0.8, 0.46 at 0.85, 0.81 at 0.9. Like there, a
meeting is not checked for a false positive. FineWeb's are 14 bands of 8 rows: 0.75 is as likely as not. Case,
punctuation and white space make no difference; numbers do, unless `fold_digits`. A text of fewer characters than an
n-gram is not compared.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from stages.data.document import Document
from stages.data.join import ROWS, Keys, State, connect, equal, roots
from stages.data.text import MULTIPLIER, mixed
from stages.data.words import groups, normal_codes, windows
from stages.stage import ConfigError, option

ROW = [("document", np.int64), ("hash", np.uint64), ("source", np.uint32)]
EMPTY = 2**32 - 1


@dataclass
class Config:
    characters: int = option(25, "length of the n-grams compared, in characters")
    bands: int = option(8, "bands; one equal band makes two documents neighbours")
    rows: int = option(16, "hashes a band")
    seed: int = option(10, "seed of the hash functions")
    fold_digits: bool = option(False, "numbers make no difference, as in FineWeb: tables that differ in them alone are equal")
    cross_source: bool = option(False, "compare documents of different sources only, as Zyda-2 does")


def check(config: Config) -> None:
    """Raises ConfigError for anything below 1."""
    for name in ("characters", "bands", "rows"):
        if getattr(config, name) < 1:
            raise ConfigError(f"options.minhash.{name}: {getattr(config, name)} is below 1; Zyda-2 has "
                              "characters 25, bands 8, rows 16")


def keys(documents: list[Document], config: Config) -> np.ndarray:
    """A row a document and band: 64 bits of the band's hashes, and a hash of the source. None without an n-gram."""
    bands = signatures([document.text for document in documents], config).reshape(len(documents), config.bands, config.rows)
    rows = np.empty((len(documents), config.bands), ROW)
    rows["document"] = np.arange(len(documents))[:, None]
    rows["source"] = np.array([crc32(document.source.encode()) for document in documents], np.uint32)[:, None]
    rows["hash"] = _band_hashes(bands)
    return rows[(bands != EMPTY).any((1, 2))].reshape(-1)


def _band_hashes(bands: np.ndarray) -> np.ndarray:
    """uint64 [documents, bands] of uint32 [documents, bands, rows]; equal bands at different places differ."""
    found = np.tile(np.arange(bands.shape[1], dtype=np.uint64), (len(bands), 1))
    for row in range(bands.shape[2]):
        found = mixed(found * MULTIPLIER + bands[:, :, row])
    return found


def join(keys: Keys, config: Config, state: State) -> None:
    """`first`: the place of the first document of the component, which stays. The order of the sources is their priority."""
    first = state.array("first", np.int64, keys.count)
    first[:] = np.arange(keys.count)
    for later, earliest in equal(keys, state.folder):
        connect(first, later, earliest)
    for start in range(0, keys.count, ROWS):
        roots(first, np.arange(start, min(start + ROWS, keys.count)))
    removed = state.array("removed", bool, keys.count)
    removed[:] = first != np.arange(keys.count)
    if config.cross_source:
        source = np.zeros(keys.count, np.uint32)
        for rows in keys.parts():
            source[rows["document"]] = rows["source"]
        removed &= source[first] != source
    _shield(keys, first, removed)


def _shield(keys: Keys, first: np.ndarray, removed: np.ndarray) -> None:
    """What is in a component with a benchmark's document goes, and names it."""
    benchmark = np.flatnonzero(keys.protected)
    owners, at = np.unique(first[benchmark], return_index=True)
    for start in range(0, keys.count if len(owners) else 0, ROWS):
        part = slice(start, min(start + ROWS, keys.count))
        found = np.minimum(np.searchsorted(owners, first[part]), len(owners) - 1)
        near = owners[found] == first[part]
        removed[part] |= near
        first[part] = np.where(near, benchmark[at][found], first[part])


def apply(documents: list[Document], places: np.ndarray, config: Config, state: State) -> list[str]:
    """The reason names the document that stays."""
    found = zip(state["removed"][places].tolist(), state["first"][places].tolist(), strict=True)
    return [f"near-duplicate: {state.id(first)}" if gone else "" for gone, first in found]


def signatures(texts: list[str], config: Config) -> np.ndarray:
    """MinHash signatures uint32 [texts, bands * rows] by one permutation hashing (arXiv 1208.1259).

    Each n-gram is hashed once; the hash picks one of the bins and the bin keeps its smallest. Equal bins are as likely as
    the similarity, as with a hash function a bin, at a hundredth of the work. An empty bin takes the value of another,
    the first full one that its number draws (optimal densification, arXiv 1703.04664).
    """
    bins = config.bands * config.rows
    found = np.full((len(texts), bins), EMPTY, np.uint32)
    full = np.zeros((len(texts), bins), bool)
    salt = mixed(np.array([config.seed], np.uint64))
    for group in groups(texts):
        values, lengths = normal_codes([texts[i] for i in group], config.fold_digits)
        for hashes, text in windows(values, lengths, config.characters):
            hashes = mixed(hashes ^ salt)
            column = (hashes >> np.uint64(32)) * np.uint64(bins) >> np.uint64(32)
            place = np.array(group)[text] * bins + column.astype(np.int64)
            np.minimum.at(found.reshape(-1), place, hashes.astype(np.uint32))
            full.reshape(-1)[place] = True
    rows, columns = np.nonzero(~full & full.any(1)[:, None])
    attempt = 0
    while len(rows):
        draw = mixed(columns.astype(np.uint64) + np.uint64(attempt * 0x10001 + 1)) % np.uint64(bins)
        lucky = full[rows, draw]
        found[rows[lucky], columns[lucky]] = found[rows[lucky], draw[lucky]]
        rows, columns = rows[~lucky], columns[~lucky]
        attempt += 1
    return found
