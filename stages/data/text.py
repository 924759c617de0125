"""Units of text and their n-gram hashes, for every script."""

from __future__ import annotations

import re
import unicodedata
from zlib import crc32

import numpy as np

# Scripts written without spaces: Thai and Lao, Myanmar, Khmer, kana, Han. There, a character is a unit.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNIT = re.compile(f"[{UNSPACED}]|[^\\s!-/:-@\\[-`{{-~\u2000-\u206f\u3000-\u303f\uff00-\uff0f{UNSPACED}]+")
MULTIPLIER = np.uint64(0x100000001B3)  # FNV's prime


def units(text: str) -> list[str]:
    """Words between spaces and punctuation, and single characters of scripts that put no spaces."""
    return UNIT.findall(text)


def normalised(text: str) -> str:
    """The text with case, compatibility forms and white space evened out: equal for equal documents."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def rolling(values: np.ndarray, n: int) -> np.ndarray:
    """Hashes uint64 [T-n+1] of all windows of n values (uint64 [T]); empty where T < n."""
    count = max(len(values) - n + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for i in range(n if count else 0):
        hashes *= MULTIPLIER
        hashes += values[i : i + count]
    # Finaliser of splitmix64: the low bits of a polynomial hash depend on low bits alone.
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(31))


def ngrams(text: str, n: int) -> np.ndarray:
    """Distinct hashes uint64 of the text's unit n-grams, in lower case, sorted."""
    values = np.array([crc32(unit.encode("utf-8", "replace")) for unit in units(text.lower())], np.uint64)
    return np.unique(rolling(values, n))


def shingles(text: str, n: int) -> np.ndarray:
    """Hashes uint32 of the text's character n-grams; of the whole text where it is shorter than one."""
    values = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
    return rolling(values, max(1, min(n, len(values)))).astype(np.uint32)
